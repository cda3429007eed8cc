"""Trains the same on 1, 2 and 4 workers: `python benchmarks/same_training.py`.

Each setting trains for 20 steps with pseudo labels, from the same weights: training mode, two views with random flips
and colors, dropout and gates 0, a global batch of 6 (4 workers have 1 or 2 images each), gloo. "2, then 4" resumes with
4 workers after half of the steps; "1, other rounding" is one worker whose first weights differ in their last bit.
Shown are the largest differences from one worker: of a step's loss, relative; of a tensor of weights or statistics,
over its norm; of the validation mIoU, in points. Claims, in float64: losses and weights differ by at most 1e-9, and the
mIoU is equal. In the last row, without a claim, each worker's batch norms measure its own images
(`model.sync_batch_norm=false`). With `--precision fp32` nothing is claimed: it shows how far rounding goes in 20 steps.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CLAIMED = 1e-9
EPOCHS, STEPS, BATCH = 4, 5, 6
SETTINGS = (
    "data.crop_size=64", "data.workers=0", "model.encoder=timm:test_efficientnet", "model.encoder_weights=none",
    "model.decoder_dim=16", "model.skip_dim=8", "model.dropout=0", "model.gate_rate=0", "cvlr.dim=16",
    f"train.batch_size={BATCH}", f"train.epochs={EPOCHS}", "train.pretrain_epochs=0",
    f"evaluation.every={EPOCHS}", "evaluation.pseudo_mask_images=0",
)  # fmt: skip
MASKS = ("data.pixel_labeled_subset=masks", "data.pixel_oversampling=1")
LABELS: dict[str, tuple[str, ...]] = {
    "wsss": (),
    "sss_image_labels": ("setting=sss_image_labels", *MASKS),
    "sss": ("setting=sss", *MASKS),
}
ROUNDED, OWN = "1, other rounding", "4, own batch norms"
ROWS = {"1": (1,), ROUNDED: (1,), "2": (2,), "4": (4,), "2, then 4": (2, 4), OWN: (4,)}
"""Numbers of workers, one after the other; the first row is what the others are compared with."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp64", "fp32"), default="fp64", help="arithmetic of the trainings")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a setting; repeatable")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options)
        return 0
    with tempfile.TemporaryDirectory(prefix="same-training-") as temporary:
        return _compare(Path(temporary), claimed=options.precision == "fp64" and not options.set)


def _compare(root: Path, *, claimed: bool) -> int:
    import torch

    _write_data(root)
    for world in (1, 2, 4):
        _run_workers(root, world)
    print("| setting | workers | losses | weights | mIoU |\n| --- | --- | --- | --- | --- |")
    worst = 0.0
    for setting in LABELS:
        one, *others = (torch.load(root / setting / f"{row}.pt", weights_only=True) for row in ROWS)
        for row, other in zip(list(ROWS)[1:], others, strict=True):
            losses, weights, miou = _differences(one, other)
            print(f"| {setting} | {row} | {losses:.1e} | {weights:.1e} | {100 * miou:.2f} |")
            worst = worst if row == OWN else max(worst, losses, weights, miou)
    if not claimed:
        return 0
    print(f"largest difference: {worst:.1e} (claimed: at most {CLAIMED})")
    return 0 if worst <= CLAIMED else 1


def _write_data(root: Path) -> None:
    """Pictures for `STEPS` steps an epoch; a third of them are the subset `masks`."""
    from data_prep import voc
    from data_prep.conversion import Output
    from data_prep.demo import write_voc_folder

    write_voc_folder(root / "voc", seed=0, num_train=STEPS * BATCH, num_val=8, image_size=96)
    masks = root / "masks.txt"
    masks.write_text("\n".join(f"train_{index:05d}" for index in range(0, STEPS * BATCH, 3)), encoding="utf-8")
    voc.convert(root / "voc", Output(root / "data", name="demo", shards=4, subsets={"masks": masks}))


def _run_workers(root: Path, world: int) -> None:
    """Runs what is to be trained by so many workers, in one go: starting them takes the time."""
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--folder", str(root), "--worker"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([*command, str(rank), str(world)], env=environment) for rank in range(world)]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"error: the exit codes of {world} workers are {codes}")


def _differences(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float, float]:
    losses = max(abs(b - a) / abs(a) for a, b in zip(one["losses"], other["losses"], strict=True))
    weights = max(
        float((other["weights"][name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-12))
        for name, value in one["weights"].items()
    )
    return losses, weights, abs(one["miou"] - other["miou"])


def _work(options: argparse.Namespace) -> None:
    """One of the workers."""
    import torch.distributed as dist

    from slrnet.distributed.process import configure_process

    configure_process(1)
    root, (rank, world) = options.folder, options.worker
    texts = [f"train.precision={options.precision}", *options.set]
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{root}/group-{world}", rank=rank, world_size=world)
    for setting in LABELS:
        for row, workers in ROWS.items():
            for place, count in enumerate(workers, 1):
                if count == world:
                    _train(root, setting, row, texts, until=EPOCHS * place // len(workers))
    if world > 1:
        dist.destroy_process_group()


def _train(root: Path, setting: str, row: str, texts: list[str], *, until: int) -> None:
    """Trains, or continues, one row; rank 0 writes the loss of each step, the weights and the score."""
    import torch

    from slrnet.config import apply_overrides
    from slrnet.data.manifest import load_dataset
    from slrnet.distributed.process import current_process, gather_over_ranks
    from slrnet.recipes import demo
    from slrnet.training.listener import Listener
    from slrnet.training.trainer import Trainer

    class Losses(Listener):
        def step(self, done: int, parts: Any, **_: Any) -> None:
            losses.append(parts["loss"])

    process, losses, scores = current_process(torch.device("cpu")), list[float](), list[float]()
    texts = [*SETTINGS, *LABELS[setting], *texts, f"model.sync_batch_norm={str(row != OWN).lower()}"]
    config = apply_overrides(demo(), texts)
    folder, result = root / setting / row, root / setting / f"{row}.pt"
    trainer = Trainer(config, load_dataset(root / "data"), process=process, folder=folder, listener=Losses())
    trainer.resume()
    if row == ROUNDED:
        with torch.no_grad():
            for weight in trainer.model.parameters():
                weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))
    trainer.fit(report=lambda metrics: scores.append(metrics.get("val/miou_ss", 0.0)), until=until)
    if process.is_main:
        before = torch.load(result, weights_only=True)["losses"] if result.exists() else []
        torch.save({"losses": before + losses, "weights": trainer.model.state_dict(), "miou": scores[-1]}, result)
    gather_over_ranks(None, process)  # the checkpoint is written


if __name__ == "__main__":
    sys.exit(main())
