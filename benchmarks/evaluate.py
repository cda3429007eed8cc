"""Compares the evaluation protocols in speed with the released inference code, with the same network and weights.

    python benchmarks/evaluate.py --peer-dir FOLDER

FOLDER is a checkout of the authors' code (GitHub DesertsP/SLRNet). Its network (WideResNet-38, random weights) and the
loop of its tools/infer_voc.py run here on the CPU; slrnet.tools.convert_weights loads its weights into our network. The
script times `ss` (one scale, not mirrored) and `ms` (five scales, each also mirrored) from the decoded image to the
mask. Both codes alternate, each in its own process, set up as by its own commands. Without --peer-dir, it times only
this project. Ours runs in float32, which is the default, and with `evaluation.precision=auto`, which chooses bfloat16
if the processor has bfloat16 matrix instructions. Claims: `ms` takes at most 0.6 of the released time, and in float32
the networks' probabilities are equal within 1e-4.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from slrnet.tools.predict import load_predictor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from benchmarks._released import released_network
from benchmarks._sides import run_in_turn, serve_side
from slrnet.checkpoints.checkpoint import Checkpoint, restore_model
from slrnet.config import Protocol
from slrnet.cpu.allocator import keep_memory
from slrnet.sweeps.space import apply_values
from slrnet.tools.convert_weights import released_checkpoint

CLAIMED_TIME = 0.6
CLAIMED_DIFFERENCE = 1e-4
OURS = {"slrnet": "fp32", "slrnet, auto": "auto"}
SCALES = (1.0, 1.5, 2.0, 0.5, 0.75)
Picture = np.ndarray[Any, np.dtype[np.uint8]]
Infer = Callable[[Picture], Picture]


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.side:
        serve_side(side(args))
        return 0
    print(f"one image of {args.width} x {args.height}, {args.threads} thread(s), {args.repeats} alternating runs")
    held = args.peer_dir is None or compare(args.peer_dir)
    for protocol in args.protocols:
        seen = run_in_turn({name: command(args, name, protocol) for name in sides(args)}, repeats=args.repeats)
        for name, found in seen.items():
            print(f"{protocol} {name:>12}: {found}")
        for name in OURS if args.peer_dir is not None else ():
            ratio, memory = (seen[name].median / seen["released"].median, seen[name].peak / seen["released"].peak)
            claim = f" (claimed: at most {CLAIMED_TIME})" if protocol == "ms" else ""
            print(f"{protocol}, {name}: time over released {ratio:.2f}{claim}, memory {memory:.2f}")
            held = held and (protocol != "ms" or ratio <= CLAIMED_TIME)
    return 0 if held else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-dir", type=Path, help="checkout of the authors' code to compare with")
    parser.add_argument("--protocols", nargs="+", choices=["ss", "ms"], default=["ss", "ms"])
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=(*OURS, "released"), help=argparse.SUPPRESS)
    return parser.parse_args()


def sides(args: argparse.Namespace) -> tuple[str, ...]:
    return tuple(OURS) if args.peer_dir is None else (*OURS, "released")


def command(args: argparse.Namespace, name: str, protocol: str) -> list[str]:
    """Returns the command that runs one side in its own process."""
    arguments = ["--side", name, "--protocols", protocol, "--threads", str(args.threads)]
    size = ["--height", str(args.height), "--width", str(args.width)]
    peer = [] if args.peer_dir is None else ["--peer-dir", str(args.peer_dir)]
    return [sys.executable, __file__, *arguments, *size, *peer]


def side(args: argparse.Namespace) -> Callable[[], object]:
    """Returns the action of one side: predicting the image."""
    image = np.random.default_rng(0).integers(0, 256, (args.height, args.width, 3), dtype=np.uint8)
    (protocol,) = args.protocols
    if args.side == "released":
        infer = released(released_network(args.peer_dir, training=False), protocol)
    else:
        keep_memory()  # as the prediction commands do
        infer = ours(our_checkpoint(None), protocol, OURS[args.side])
    return lambda: infer(image)


def compare(peer_dir: Path) -> bool:
    """Returns True if both networks' probabilities agree on one view, of a size that neither has to resize."""
    peer = released_network(peer_dir, training=False)
    images = torch.randn(1, 3, 97, 97, generator=torch.Generator().manual_seed(0))
    model = restore_model(our_checkpoint(peer)).eval()
    with torch.no_grad():
        _, theirs = peer(images, single_scale=True)
        probs = model([images]).logits[0].softmax(dim=1)
        full = F.interpolate(probs, size=images.shape[-2:], mode="bilinear", align_corners=True)
    difference = float((theirs - full).abs().max())
    print(f"largest difference of probabilities {difference:.1e} (claimed: at most {CLAIMED_DIFFERENCE:.0e})")
    return difference <= CLAIMED_DIFFERENCE


def our_checkpoint(peer: nn.Module | None) -> Checkpoint:
    """Returns a checkpoint with the released network's weights; without `peer`, with random weights."""
    from slrnet.checkpoints.checkpoint import TrainState
    from slrnet.models.slrnet import build_network
    from slrnet.tools.convert_weights import _released_config

    if peer is not None:
        with tempfile.TemporaryDirectory() as folder:
            torch.save({"state_dict": peer.state_dict()}, f"{folder}/released.pth")
            return released_checkpoint(f"{folder}/released.pth")
    config = _released_config("wsss")
    torch.manual_seed(0)
    weights = build_network(config, num_classes=21).state_dict()
    classes = tuple(str(index) for index in range(21))
    state = TrainState(epoch=0, step=0, classes=classes, data_fingerprint="", world_size=1)
    return Checkpoint(Path(), config, state, weights, {})


def ours(checkpoint: Checkpoint, protocol: Protocol, precision: str) -> Infer:
    config = apply_values(checkpoint.config, {"evaluation.precision": precision})
    predictor = load_predictor(replace(checkpoint, config=config), protocol=protocol, device="cpu")
    return lambda image: predictor(image).mask


def released(peer: nn.Module, protocol: Protocol) -> Infer:
    """Returns the released inference for one image: bicubic scales, mirroring, gating by scores, background^3."""
    mean, std = (np.array(values, dtype=np.float32) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))

    def view(image: Picture, scale: float) -> Tensor:
        size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
        scaled = image if scale == 1 else np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        return torch.from_numpy(((scaled / np.float32(255) - mean) / std).astype(np.float32).transpose(2, 0, 1))

    def infer(image: Picture) -> Picture:
        maps, scores = [], []
        for scale in SCALES if protocol == "ms" else (1.0,):
            upright = view(image, scale)
            batch = torch.stack([upright, upright.flip(-1)]) if protocol == "ms" else upright[None]
            with torch.no_grad():
                score, probs = peer(batch, single_scale=True)
            mean_probs = (probs[0] + probs[1].flip(-1)) / 2 if protocol == "ms" else probs[0]
            maps.append(F.interpolate(mean_probs[None], image.shape[:2], mode="bilinear", align_corners=True)[0])
            scores.append(score.mean(dim=0))
        merged, pooled = torch.stack(maps).mean(dim=0), torch.stack(scores).mean(dim=0).sigmoid()
        merged[1:] *= ((pooled > 0.3) & (pooled >= pooled.topk(6).values[-1]))[:, None, None]
        merged[0] = merged[0] ** 3
        return merged.numpy().argmax(axis=0).astype(np.uint8)

    return infer


if __name__ == "__main__":
    sys.exit(main())
