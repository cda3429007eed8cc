"""The table that a training and an evaluation end with."""

from __future__ import annotations

from collections.abc import Mapping

from slrnet.training.tracking import metric_key

__all__ = ["quality_table"]


def quality_table(metrics: Mapping[str, float], classes: tuple[str, ...]) -> str:
    """Formats IoU, FDR and FNR of pseudo masks and validation masks per class, in percent.

    Args:
        metrics: figures by their MLflow names, as shares in [0, 1]. What was not measured is left out.
        classes: names of the K classes, background first.
    """
    groups = [name for name in ("pseudo_mask", "val") if any(key.startswith(name + "/") for key in metrics)]
    width = max(len("mean"), *(len(name) for name in classes))
    head = " " * width + "".join(f"  {group:^22}" for group in groups)
    units = f"{'%':<{width}}" + "  {:>6}  {:>6}  {:>6}".format("IoU", "FDR", "FNR") * len(groups)
    rows = [_row(name, [_class_values(metrics, group, name) for group in groups], width) for name in classes]
    means = _row("mean", [_mean_values(metrics, group) for group in groups], width)
    rule = "-" * len(units)
    note = "means of FDR and FNR are over the foreground classes (paper Eq. 10, 11)"
    return "\n".join([head.rstrip(), units, rule, *rows, rule, means, note])


def _row(name: str, values: list[list[float | None]], width: int) -> str:
    cells = [value for group in values for value in group]
    return f"{name:<{width}}" + "".join(f"  {'-' if cell is None else f'{100 * cell:.1f}':>6}" for cell in cells)


def _class_values(metrics: Mapping[str, float], group: str, name: str) -> list[float | None]:
    return [metrics.get(metric_key(group, kind, name)) for kind in ("iou", "fdr", "fnr")]


def _mean_values(metrics: Mapping[str, float], group: str) -> list[float | None]:
    miou = next((value for key, value in metrics.items() if key.startswith(f"{group}/miou")), None)
    return [miou, metrics.get(f"{group}/mfdr"), metrics.get(f"{group}/mfnr")]
