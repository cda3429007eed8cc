"""Ablations as data: variants of a configuration, the paper's with its numbers for them, and one of our own.

The numbers are mIoU in percent on VOC's validation set, single-scale, without CRF (Sec. 4.6); plots have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slrnet.config import ConfigError

__all__ = ["ABLATIONS", "Ablation", "Variant", "choose_variants"]


@dataclass(frozen=True)
class Variant:
    """One row of a table or one point of a plot."""

    label: str
    """The paper's name, where it has one."""
    changes: tuple[str, ...]
    """Changes of the recipe, each `section.field=value`."""
    paper: float | None = None
    """The paper's mIoU, percent."""
    x: float | None = None
    """Position on the axis of a plot; None in tables."""


@dataclass(frozen=True)
class Ablation:
    """A figure or table of the paper, or another comparison; the first variant is what the others differ from."""

    title: str
    """What it shows, and where in the paper, if there."""
    axis: str
    """What the variants differ in."""
    variants: tuple[Variant, ...]
    """In the paper's order."""
    logarithmic: bool = False
    """Whether the axis is logarithmic."""
    chosen: float | None = None
    """Position on the axis of the paper's choice (Sec. 4.1)."""


def _series(key: str, values: tuple[int, ...]) -> tuple[Variant, ...]:
    return tuple(Variant(str(value), (f"{key}={value}",), x=value) for value in values)


def _views(scales: str, *, color: bool, flip: bool, paper: float) -> Variant:
    """A check mark in the paper means that the views differ in this; without one, they share it."""
    differ = " + ".join(name for name, on in (("color", color), ("flip", flip)) if on)
    changes = (f"views.scales=[{scales}]", f"views.own_color={str(color).lower()}", f"views.flip={str(flip).lower()}")
    return Variant(f"({scales}) {differ}".strip(), changes, paper)


_NO_WEIGHTS = ("calibration.view_weights=[]",)
"""A recipe may weigh its views; a single one has nothing to weigh."""

ABLATIONS: dict[str, Ablation] = {
    "fig4": Ablation(
        "Strength of the cross-view supervision (paper Fig. 4, left)",
        "lambda_reg",
        _series("weights.consistency", (0, 1, 2, 4, 8)),
        chosen=4,
    ),
    "fig4-right": Ablation(
        "Cross-view supervision (paper Fig. 4, right)",
        "supervision",
        tuple(
            Variant(label, (f"calibration.supervision={name}",))
            for label, name in (("MVMC", "mvmc"), ("KL Div.", "kl"), ("CPS", "cps"))
        ),
    ),
    "fig6-left": Ablation(
        "Iterations of CVLR (paper Fig. 6, left)", "T", _series("cvlr.num_iters", (1, 2, 3, 4, 5, 6)), chosen=1
    ),
    "fig6-right": Ablation(
        "Dimension of the dictionary (paper Fig. 6, right)",
        "d",
        _series("cvlr.dim", (64, 128, 256, 512, 1024)),
        logarithmic=True,
        chosen=256,
    ),
    "table7": Ablation(
        "Augmentations of the views (paper Table 7)",
        "views",
        (
            _views("1.0", color=True, flip=True, paper=60.88),
            _views("0.5, 1.0", color=True, flip=True, paper=64.07),
            _views("1.0, 1.0", color=True, flip=True, paper=61.53),
            _views("0.5, 1.0", color=True, flip=False, paper=63.89),
            _views("0.5, 1.0", color=False, flip=True, paper=63.99),
            _views("0.5, 1.0, 1.5", color=False, flip=False, paper=63.90),
        ),
    ),
    "table8": Ablation(
        "Low-rank modules (paper Table 8)",
        "module",
        (
            Variant("CVLR", ("cvlr.method=cvlr", "cvlr.num_iters=1"), 63.99),
            Variant("- Separate dictionary", ("cvlr.method=separate", "cvlr.num_iters=1"), 61.24),
            Variant("- w/o latent space reg.", ("cvlr.method=free", "cvlr.num_iters=3"), 62.83),
            Variant("- w/o CVLR", ("cvlr.enabled=false",), 61.11),
            Variant("EMAU", ("cvlr.method=emau", "cvlr.num_iters=3"), 61.76),
            Variant("Ham.", ("cvlr.method=nmf", "cvlr.num_iters=6"), 59.75),
        ),
    ),
    "views_by_cvlr": Ablation(
        "The second view and CVLR, each alone and together",
        "network",
        tuple(
            Variant(f"{views}, {module}", (f"views.scales={scales}", f"cvlr.enabled={enabled}", *more))
            for views, scales, more in (("1 view", "[1.0]", _NO_WEIGHTS), ("2 views", "[1.0,0.5]", ()))
            for module, enabled in (("no CVLR", "false"), ("CVLR", "true"))
        ),
    ),
}
"""By name, as in `slrnet tune --ablation NAME`. The columns of Table 7 are read from the text of the paper."""


def choose_variants(name: str, labels: Sequence[str] = ()) -> tuple[int, ...]:
    """Indices of variants in the ablation `name`, in the paper's order.

    `labels` are the paper's names, in any case, with or without a leading dash; none: all variants.

    Raises:
        ConfigError: there is no such ablation or variant.
    """
    if name not in ABLATIONS:
        raise ConfigError(f"unknown ablation {name!r}; known are {', '.join(ABLATIONS)}")
    known = [variant.label for variant in ABLATIONS[name].variants]
    plain = [_plain_label(label) for label in known]
    for label in labels:
        if _plain_label(label) not in plain:
            raise ConfigError(f"ablation {name!r} has no variant {label!r}; it has {', '.join(map(repr, known))}")
    wanted = {_plain_label(label) for label in labels or known}
    return tuple(index for index, label in enumerate(plain) if label in wanted)


def _plain_label(label: str) -> str:
    return label.removeprefix("- ").casefold().strip()
