"""Trains the released code and this one side by side, step for step, from the same weights on the same batches.

    python benchmarks/released_training.py --peer-dir FOLDER [--only wsss ...] [--encoders lite wide]

FOLDER is a checkout of the authors' code (GitHub DesertsP/SLRNet). Ours runs with the recipe of the released training
(`voc_wsss_released` and so on). Both get the same crops, image labels and true masks, and the same random numbers for
dropout and gates; colors are not distorted. An epoch is one step, so the steps go through pretraining, the first pseudo
labels and the cosine. Each row is the largest difference over all tensors: of the first step, whose weights are equal,
and of all steps. Gradients and weights are compared tensor by tensor, by the norm of the difference over the norm.

Both train in float64, where rounding is too small to flip a ReLU, a maximum or the sign of a distance. In float32 such
a flip changes some gradients by a thousandth within three steps, and then the two trainings drift apart, as any two do.
WideResNet-38 takes few steps, from the last one of pretraining on.

Claims: loss parts and gradients of all steps differ by at most 1e-5; weights after the last step by at most 1e-4; no
pseudo label differs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._claims import at_most
from benchmarks._ours import random_batch
from benchmarks._released import released_network, released_network_lite
from slrnet.config import Config
from slrnet.data.batch import Batch
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.models.slrnet import build_network
from slrnet.recipes import get_recipe
from slrnet.sweeps.space import apply_values
from slrnet.tools.convert_weights import rename_released
from slrnet.training.optim import build_optimizer, rate_factor, set_rate
from slrnet.training.step import _pseudo_labels, align, find_pseudo_rows, losses_of, make_views, step_generator

PARTS, WEIGHTS = 1e-5, 1e-4
"""Claimed largest differences."""


@dataclass(frozen=True)
class Released:
    """How the released code trains a setting, from its experiments' files and training scripts."""

    model: str
    weights: tuple[float, float, float, float]
    """Of classification, mask consistency, code consistency and segmentation."""
    pretrain_epochs: int
    epochs: int
    masks: bool = False
    """Whether some images have true masks."""
    options: Mapping[str, Any] | None = None


SETTINGS = {
    "voc_wsss": Released("models.slrnet", (1.0, 4.0, 4.0, 1.0), 5, 30),
    "voc_sss_image_labels": Released("models.slrnet_semi", (0.5, 2.0, 2.0, 0.5), 5, 30, masks=True),
    "voc_sss": Released(
        "models.slrnet_semi_wo_cls",
        (1.0, 4.0, 4.0, 1.0),
        10,
        40,
        masks=True,
        options={"cutoff_top": 0.8, "cutoff_low": 0.6},
    ),
}
SIZES: dict[str, dict[str, Any]] = {
    "lite": {"crop": 65, "batch": 2, "steps": 20, "pretraining": 40},
    "wide": {"crop": 65, "batch": 1, "steps": 2, "pretraining": 1},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "lite": {
        "model.encoder": "efficientnet_lite0",
        "model.output_stride": 16,
        "model.aspp_dilations": (6, 12, 18),
        "model.frozen_stages": 2,
        "calibration.refine_stride": 8,  # the released code refines at the masks' resolution, here the skip's
    },
    "wide": {},
}
NUM_CLASSES = 5


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    with float64():
        held = [compare(args, name, encoder) for encoder in args.encoders for name in args.only or SETTINGS]
    return 0 if all(held) else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-dir", type=Path, required=True, help="checkout of the authors' code to compare with")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, help="compare only these (default: all)")
    parser.add_argument("--encoders", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, help="optimizer steps (default: lite 20, wide 2)")
    parser.add_argument("--pretraining", type=int, help="most steps before pseudo labels (default: lite all, wide 1)")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


@contextmanager
def float64() -> Iterator[None]:
    """All numbers are float64, also where the code asks for float32."""
    torch.set_default_dtype(torch.float64)
    with mock.patch.object(Tensor, "float", Tensor.double), mock.patch.dict(os.environ, {"SLRNET_KERNELS": "off"}):
        yield


def compare(args: argparse.Namespace, name: str, encoder: str) -> bool:
    """Trains both and prints the table of a setting and an encoder; returns whether the claims hold."""
    given = {"steps": args.steps, "pretraining": args.pretraining}
    released, size = SETTINGS[name], SIZES[encoder] | {key: value for key, value in given.items() if value is not None}
    build = released_network if encoder == "wide" else released_network_lite
    options = dict(released.options or {})
    peer = build(args.peer_dir, num_classes=NUM_CLASSES, model=released.model, **options)
    spread(peer)
    config = our_config(name, encoder, size)
    ours = build_network(config, num_classes=NUM_CLASSES, weights=False).train()
    peer.to(torch.get_default_dtype()), ours.to(torch.get_default_dtype())
    ours.load_state_dict(our_tensors(peer.state_dict()))
    ours_steps = our_training(ours, config, size)
    peer_steps = released_training(peer, released, config, ours.encoder.normalize)
    seen: defaultdict[str, list[float]] = defaultdict(list)
    decided, begun = [], time.perf_counter()
    first = max(0, config.train.pretrain_epochs - size["pretraining"])
    for step in range(first, first + size["steps"]):
        batch = batch_of(step, size, masks=released.masks)
        if config.setting == "sss":  # as the loader hands them over
            none = torch.zeros_like(batch.image_labels)
            batch = replace(batch, image_labels=none, has_image_labels=torch.zeros_like(batch.has_image_labels))
        their = peer_steps(batch, step)
        own = ours_steps(batch, step)
        for key, value in differences(own, their).items():
            seen[key].append(value)
        decided.append(float((own.labels != IGNORE_INDEX).float().mean()) if own.labels is not None else 0.0)
    seconds = (time.perf_counter() - begun) / size["steps"]
    tensors = our_tensors(peer.state_dict())
    last = max(distance(value, tensors[key]) for key, value in ours.state_dict().items() if value.is_floating_point())
    print(f"\n{name}, {encoder}: crop {size['crop']}, batch {size['batch']}, {size['steps']} steps of {seconds:.1f} s")
    print(f"pseudo labels decide {100 * sum(decided) / max(1, sum(map(bool, decided))):.0f} % of the pixels")
    print(f"{'largest difference':>22}  first step  all steps")
    for key, values in seen.items():
        print(f"{key:>22}  {values[0]:10.1e}  {max(values):9.1e}")
    print(f"{'weights and statistics':>22}  {'':10}  {last:9.1e}")
    largest = max(max(values) for key, values in seen.items() if key != "pseudo labels")
    held = at_most("parts and gradients of all steps", largest, PARTS)
    held &= at_most("weights after the last step", last, WEIGHTS)
    return held & at_most("share of pseudo labels that differ", max(seen["pseudo labels"]), 0.0)


def our_config(name: str, encoder: str, size: Mapping[str, Any]) -> Config:
    """Returns the recipe with another encoder and size, and undistorted colors."""
    off = {f"views.{kind}": 0.0 for kind in ("brightness", "contrast", "saturation", "hue")}
    sizes = {"data.crop_size": size["crop"], "train.batch_size": size["batch"]}
    rate = {"optim.reference_batch_size": size["batch"]}
    return apply_values(get_recipe(f"{name}_released"), ENCODERS[encoder] | off | sizes | rate)


def our_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns released tensors by our names; timm's encoder has its own names there as here."""
    first = {
        name.replace("backbone.features.", "backbone."): tensor
        for name, tensor in tensors.items()
        if not name.startswith(("newly_added.", "backbone.fixed_layers."))
    }
    return rename_released(first, source="the released network")


def spread(peer: Any) -> None:
    """Spreads the released network's logits, so that pseudo labels of random weights decide some pixels."""
    with torch.no_grad():
        peer.last_conv[-1].weight.mul_(3)


def batch_of(step: int, size: Mapping[str, Any], *, masks: bool) -> Batch:
    """Returns crops of two classes and the background; with `masks`, half of them have true masks, some pixels void."""
    whole = random_batch(batch=size["batch"], crop=size["crop"], num_classes=NUM_CLASSES, present=2, seed=step)
    whole = replace(whole, image_labels=whole.image_labels.to(torch.get_default_dtype()))
    if not masks:
        return whole
    has = torch.arange(size["batch"]) < max(1, size["batch"] // 2)
    ids = whole.image_labels.topk(2, dim=1).indices + 1
    bands = torch.full((size["batch"], size["crop"], size["crop"]), IGNORE_INDEX, dtype=torch.uint8)
    third = size["crop"] // 3
    bands[:, :third] = 0
    for n, row in enumerate(ids.tolist()):
        bands[n, third : 2 * third, : 2 * third], bands[n, 2 * third :] = row
    bands[~has] = IGNORE_INDEX
    return replace(whole, has_pixel_labels=has, pixel_labels=bands)


def images_of(batch: Batch) -> Tensor:
    """Returns (N, 3, H, W) images in [0, 1]."""
    return batch.images.to(torch.get_default_dtype(), memory_format=torch.contiguous_format) / 255


@dataclass(frozen=True)
class Step:
    """Result of a training step."""

    parts: dict[str, float]
    labels: Tensor | None
    """(M, H, W) pseudo labels of the images without a true mask, 255 where undecided; None in pretraining."""
    gradients: dict[str, Tensor]


def differences(own: Step, their: Step) -> dict[str, float]:
    """Returns relative differences by quantity; of pseudo labels, the share of pixels."""
    found = {name: abs(own.parts[name] - value) / max(abs(value), 1e-12) for name, value in their.parts.items()}
    whole = sum(float(gradient.norm()) ** 2 for gradient in their.gradients.values()) ** 0.5
    assert own.gradients.keys() == their.gradients.keys(), own.gradients.keys() ^ their.gradients.keys()
    found["gradients"] = max(
        distance(own.gradients[name], gradient, least=1e-6 * whole) for name, gradient in their.gradients.items()
    )
    assert (own.labels is None) == (their.labels is None)
    found["pseudo labels"] = (
        float((own.labels != their.labels).float().mean()) if own.labels is not None and own.labels.numel() else 0.0
    )
    return found


def distance(one: Tensor, other: Tensor, *, least: float = 1e-12) -> float:
    """Returns the norm of the difference over the norm, or over `least` if that is larger."""
    return float((one - other).norm()) / max(float(other.norm()), least)


@contextmanager
def same_draws(step: int) -> Iterator[None]:
    """Dropout draws by the number of the step and of the call, so two networks of the same order draw the same."""
    generator = step_generator(step)

    def draw(x: Tensor, p: float, training: bool, shape: tuple[int, ...]) -> Tensor:
        if not training or p == 0:
            return x
        keep = torch.rand(shape, generator=generator) >= p
        return x * (keep / (1 - p))

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return draw(x, p, training, tuple(x.shape))

    def dropout2d(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return draw(x, p, training, (*x.shape[:2], 1, 1))

    with mock.patch.object(F, "dropout", dropout), mock.patch.object(F, "dropout2d", dropout2d):
        yield


def our_training(model: nn.Module, config: Config, size: Mapping[str, Any]) -> Callable[[Batch, int], Step]:
    """Returns a function that takes our training's step number `step` on a batch."""
    network: Any = model
    optimizer = build_optimizer(model, config.optim, batch_size=size["batch"])
    first = config.train.pretrain_epochs
    last = first + (config.train.cosine_epochs or config.train.epochs - first)

    def take(batch: Batch, step: int) -> Step:
        set_rate(optimizer, rate_factor(step, pretrain_steps=first, total_steps=last))
        optimizer.zero_grad(set_to_none=True)
        rows = None if step < first else find_pseudo_rows(batch)
        inputs, views, crops = make_views(images_of(batch), config.views, network.encoder, step_generator(step))
        with same_draws(step):
            outputs = network(inputs)
        losses = losses_of(outputs, views, crops, batch, config=config, pseudo_rows=rows)
        losses.total.backward()
        labels = None
        if rows is not None:
            aligned = align(outputs, views, unwarp=config.views.unwarp)
            labels = _pseudo_labels(aligned, crops, batch, config, rows)[~batch.has_pixel_labels]
        parts = {name: float(part.detach()) for name, part in losses.parts.items()}
        masks = parts.pop("pixel_segmentation", 0.0)
        pseudo = {} if rows is None else {"segmentation": parts.pop("segmentation") + masks}
        slot = parts.pop("classification", 0.0) + masks  # where the released code puts true masks
        gradients = {
            name: tensor.grad.clone() for name, tensor in network.named_parameters() if tensor.grad is not None
        }
        optimizer.step()
        total = float(losses.total.detach())
        return Step({"total": total, "classification": slot, **parts, **pseudo}, labels, gradients)

    return take


def released_training(
    peer: nn.Module, released: Released, config: Config, normalize: Callable[[Tensor], Tensor]
) -> Callable[[Batch, int], Step]:
    """Returns a function that takes the released training's step on a batch; an epoch is one step."""
    network: Any = peer
    factors = (1, 2, 10, 20)
    decay, rate = config.optim.weight_decay, config.optim.lr
    optimizer = torch.optim.SGD(
        [
            {"params": group, "lr": rate * factor, "weight_decay": decay * (place % 2 == 0)}
            for place, (group, factor) in enumerate(zip(network.parameter_groups(), factors, strict=True))
        ],
        lr=rate,
        momentum=0.9,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, released.epochs - released.pretrain_epochs)

    def take(batch: Batch, step: int) -> Step:
        images, has = images_of(batch), batch.has_pixel_labels
        given: tuple[Tensor, ...] = (batch.image_labels,)
        if released.masks:
            assert batch.pixel_labels is not None
            ids = torch.arange(NUM_CLASSES).view(1, -1, 1, 1)
            given = (*given, (batch.pixel_labels[:, None] == ids).float(), has)
        with same_draws(step):
            *losses, maps, _ = network(normalize(images).contiguous(), images.clone(), *given)
        classification, segmentation, masks, codes = (loss.mean() for loss in losses)
        after = step > released.pretrain_epochs
        weights = released.weights
        total = weights[0] * classification + weights[1] * masks + weights[2] * codes
        if released.masks:
            total = total + weights[3] * losses[1][has].mean()
        if after:
            total = total + weights[3] * segmentation
        optimizer.zero_grad()
        total.backward()
        named = network.named_parameters(remove_duplicate=False)
        tensors = {name: tensor.grad for name, tensor in named if tensor.grad is not None}
        gradients = {name: tensor.clone() for name, tensor in our_tensors(tensors).items()}
        optimizer.step()
        if after:
            schedule.step()
        parts = {"total": total, "classification": classification, "mask_consistency": masks, "code_consistency": codes}
        parts |= {"segmentation": segmentation} if after else {}
        pseudo = maps["pseudo"]
        labels = torch.where(pseudo.sum(dim=1) < 1, IGNORE_INDEX, pseudo.argmax(dim=1))[~has] if after else None
        return Step({name: float(part.detach()) for name, part in parts.items()}, labels, gradients)

    return take


if __name__ == "__main__":
    sys.exit(main())
