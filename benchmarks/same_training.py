"""Trains the same on 1, 2 and 4 workers: `python benchmarks/same_training.py`.

Each setting trains for 20 steps with pseudo labels, from the same weights: training mode, two views with random flips
and colors, dropout and gates 0, a global batch of 6 (4 workers have 1 or 2 images each), gloo, float32. "2, then 4"
resumes with 4 workers after half of the steps. Shown are the largest differences from one worker: of a step's loss,
relative; of a tensor of weights or statistics, over its norm; of the validation mIoU, in points. Claims: losses and
weights differ by at most 1e-5, and the mIoU is equal. In the last row, without a claim, each worker's batch norms
measure its own images (`model.sync_batch_norm=false`).
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

CLAIMED = 1e-5
EPOCHS, STEPS, BATCH = 4, 5, 6
SETTINGS = (
    "data.crop_size=64", "data.workers=0", "model.encoder=timm:test_efficientnet", "model.encoder_weights=none",
    "model.decoder_dim=16", "model.skip_dim=8", "model.dropout=0", "model.gate_rate=0", "cvlr.dim=16",
    f"train.batch_size={BATCH}", f"train.epochs={EPOCHS}", "train.pretrain_epochs=0", "train.precision=fp32",
    "train.checkpoint_every=0", f"evaluation.every={EPOCHS}", "evaluation.pseudo_mask_images=0",
)  # fmt: skip
MASKS = ("data.pixel_labeled_subset=masks", "data.pixel_oversampling=1")
LABELS: dict[str, tuple[str, ...]] = {
    "wsss": (),
    "sss_image_labels": ("setting=sss_image_labels", *MASKS),
    "sss": ("setting=sss", *MASKS),
}
ROWS = {"2": (2,), "4": (4,), "2, then 4": (2, 4), "4, own batch norms": (4,)}
"""Numbers of workers, one after the other."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=LABELS, nargs="+", default=[*LABELS], help="default: all")
    parser.add_argument("--worker", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--set", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options.folder, options.set, *options.worker)
        return 0
    with tempfile.TemporaryDirectory(prefix="same-training-") as temporary:
        return _compare(Path(temporary), options.setting)


def _compare(root: Path, settings: list[str]) -> int:
    _write_data(root)
    print("| setting | workers | losses | weights | mIoU |\n| --- | --- | --- | --- | --- |")
    worst = 0.0
    for setting in settings:
        one = _train(root / setting, (1,), LABELS[setting])
        for row, workers in ROWS.items():
            own = ["model.sync_batch_norm=false"] * ("own" in row)
            other = _train(root / f"{setting}-{row}", workers, [*LABELS[setting], *own])
            losses, weights, miou = _differences(one, other)
            print(f"| {setting} | {row} | {losses:.1e} | {weights:.1e} | {100 * miou:.2f} |", flush=True)
            worst = worst if own else max(worst, losses, weights, miou)
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


def _train(folder: Path, workers: tuple[int, ...], settings: Any) -> dict[str, Any]:
    """Trains with some workers to the end, or to the half and then with others; returns what rank 0 saw."""
    import torch

    seen: dict[str, Any] = {"losses": []}
    for place, world in enumerate(workers):
        until = EPOCHS * (place + 1) // len(workers)
        (folder / "rendezvous").unlink(missing_ok=True)
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--folder",
            str(folder),
            "--set",
            *SETTINGS,
            *settings,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        running = [
            subprocess.Popen([*command, "--worker", *map(str, (rank, world, until))], env=environment)
            for rank in range(world)
        ]
        codes = [process.wait() for process in running]
        if any(codes):
            raise SystemExit(f"error: a worker of {folder.name} failed")
        part = torch.load(folder / "seen.pt", weights_only=True)
        seen = part | {"losses": seen["losses"] + part["losses"]}
    return seen


def _differences(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float, float]:
    losses = max(abs(b - a) / abs(a) for a, b in zip(one["losses"], other["losses"], strict=True))
    weights = max(
        float((other["weights"][name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-12))
        for name, value in one["weights"].items()
    )
    return losses, weights, abs(one["miou"] - other["miou"])


def _work(folder: Path, settings: list[str], rank: int, world: int, until: int) -> None:
    """One worker; rank 0 writes the loss of each step, the weights and the score."""
    import torch
    import torch.distributed as dist

    from slrnet.config import apply_overrides
    from slrnet.data.manifest import load_dataset
    from slrnet.distributed.process import configure_process, current_process
    from slrnet.recipes import demo
    from slrnet.training.listener import Listener
    from slrnet.training.trainer import Trainer

    class Losses(Listener):
        def step(self, done: int, parts: Any, **_: Any) -> None:
            losses.append(parts["loss"])

    configure_process(1)
    folder.mkdir(exist_ok=True)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    process, losses, scores = current_process(torch.device("cpu")), list[float](), list[float]()
    data = load_dataset(folder.parent / "data")
    trainer = Trainer(apply_overrides(demo(), settings), data, process=process, folder=folder, listener=Losses())
    trainer.resume()
    trainer.fit(report=lambda metrics: scores.append(metrics.get("val/miou_ss", 0.0)), until=until)
    if process.is_main:
        seen = {"losses": losses, "weights": trainer.model.state_dict(), "miou": scores[-1]}
        torch.save(seen, folder / "seen.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
