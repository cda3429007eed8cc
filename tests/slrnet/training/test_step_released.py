"""The recipes of the released training, step for step, against slow oracles written from its description.

The oracles take a network's outputs and loop over images, classes and pixels. They know no function of the losses and
the calibration. The network in between is ours; other tests compare its parts. Everything is in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from slrnet.config import Config, apply_overrides
from slrnet.data.batch import Batch
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.models.cvlr import CrossViewLowRank
from slrnet.models.network import Outputs
from slrnet.models.slrnet import SLRNet
from slrnet.recipes import get_recipe
from slrnet.training.optim import build_optimizer, rate_factor, set_rate
from slrnet.training.step import find_pseudo_rows, losses_of, make_views, step_generator
from tests.fixtures.tiny_encoder import tiny_encoder

K, SIDE, NUM = 4, 13, 3
VOC = ("voc_wsss_released", "voc_sss_image_labels_released", "voc_sss_released")


@pytest.fixture(autouse=True)
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rounding flips no ReLU and no maximum then, which would change gradients at once."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setenv("SLRNET_KERNELS", "off")
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def config_of(recipe: str) -> Config:
    """The recipe at a tiny size; colors stay, and so do the features that dropout and gates would change."""
    colors = [f"views.{name}=0.0" for name in ("brightness", "contrast", "saturation", "hue")]
    sizes = [
        f"train.batch_size={NUM}",
        "model.decoder_dim=8",
        "model.skip_dim=3",
        "model.aspp_dilations=1,2,3",
        "cvlr.dim=8",
    ]
    small = ["calibration.refine_stride=2", "calibration.refine_iters=2", "calibration.refine_dilations=1,2"]
    off = ["model.dropout=0.0", "model.gate_rate=0.0", f"optim.reference_batch_size={NUM}"]
    low = ["calibration.floor=0.1"] if recipe == VOC[2] else []  # else cubed, the background decides nothing here
    return apply_overrides(get_recipe(recipe), [*colors, *sizes, *small, *off, *low])


def network_of(config: Config) -> SLRNet:
    torch.manual_seed(3)
    cvlr = CrossViewLowRank(8, dim=8, form=config.cvlr.form, start=config.cvlr.start)
    background = config.predicts_background
    network = SLRNet(tiny_encoder(), config.model, num_classes=K, cvlr=cvlr, predict_background=background)
    with torch.no_grad():
        network.mask_head.classify.weight *= 3  # so that pseudo labels decide something
    return network.train()


def batch_of(config: Config, step: int) -> Batch:
    """Image 0 has a true mask where the setting uses masks; it shows all classes of its image labels."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (NUM, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    masks = torch.full((NUM, SIDE, SIDE), IGNORE_INDEX, dtype=torch.uint8)
    masks[0, :5], masks[0, 5:, :4], masks[0, 8:, 4:] = 0, 1, 3
    has = torch.tensor([config.setting != "wsss", False, False])
    known = torch.full((NUM,), config.setting != "sss")
    return Batch(images, labels * known[:, None], known, ("a", "b", "c"), has, masks if has.any() else None)


# --- The oracles -----------------------------------------------------------------------------------------------------


def resized(maps: Tensor, height: int, width: int) -> Tensor:
    """Bilinear with aligned corners, (K, h, w) to (K, height, width): a product with weights of rows and columns."""

    def weights(old: int, new: int) -> Tensor:
        matrix = torch.zeros(new, old)
        for i in range(new):
            place = i * (old - 1) / (new - 1) if new > 1 else 0.0
            low = min(int(place), old - 1)
            matrix[i, low] += 1 - (place - low)
            if low + 1 < old:
                matrix[i, low + 1] += place - low
        return matrix

    rows, columns = weights(maps.shape[1], height), weights(maps.shape[2], width)
    return torch.einsum("yh,khw,xw->kyx", rows, maps, columns)


def refined(image: Tensor, maps: Tensor, config: Config) -> Tensor:
    """Weighted means over 3x3 neighborhoods at the dilations, borders repeated; similar colors weigh more."""
    _, height, width = maps.shape
    steps = [(dy * d, dx * d) for d in config.calibration.refine_dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1)]

    def at(y: int, x: int, dy: int, dx: int) -> tuple[int, int]:
        return min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)

    kernels: dict[tuple[int, int], list[tuple[tuple[int, int], float]]] = {}
    for y, x in product(range(height), range(width)):
        samples = torch.stack([image[:, *at(y, x, *step)] for step in steps])
        spread = samples.std(dim=0)
        around = [at(y, x, *step) for step in steps if step != (0, 0)]
        values = [float((-(image[:, *n] - image[:, y, x]).abs() / (1e-8 + 0.1 * spread)).mean()) for n in around]
        total = sum(math.exp(value) for value in values)
        kernels[y, x] = [(n, math.exp(value) / total) for n, value in zip(around, values, strict=True)]
    for _ in range(config.calibration.refine_iters):
        new = torch.zeros_like(maps)
        for (y, x), kernel in kernels.items():
            for n, weight in kernel:
                new[:, y, x] += weight * maps[:, *n]
        maps = new
    return maps


def pseudo_label(image: Tensor, probs: Tensor, allowed: set[int], config: Config) -> Tensor:
    """(SIDE, SIDE) from the mean of the un-warped probabilities (K, h, w) of one image."""
    settings, small = config.calibration, -(-SIDE // config.calibration.refine_stride)
    probs = probs.clone()
    if config.setting == "sss":
        probs[0] = probs[0] ** 3
    maps = resized(refined(resized(image, small, small), resized(probs, small, small), config), SIDE, SIDE)
    labels = torch.full((SIDE, SIDE), IGNORE_INDEX)
    limits = [
        max(float(maps[k].max()) * (settings.confidence_threshold if k else settings.background_threshold),
            settings.floor) for k in range(K)
    ]  # fmt: skip
    for y, x in product(range(SIDE), range(SIDE)):
        claims = [k for k in allowed if float(maps[k, y, x]) > limits[k]]
        if len(claims) == 1:
            labels[y, x] = claims[0]
    return labels


def balanced(logits: Tensor, labels: Tensor, must_show: int | None) -> Tensor:
    """Cross-entropy of one image, a class weighing (total - its pixels) / (1 + total); the mean is over all pixels."""
    maps = resized(logits, SIDE, SIDE)
    counts = {k: int((labels == k).sum()) for k in range(K)}
    total = sum(counts.values())
    if must_show is not None and sum(count > 0 for count in counts.values()) != must_show:
        return maps.sum() * 0
    loss = maps.sum() * 0
    for y, x in product(range(SIDE), range(SIDE)):
        k = int(labels[y, x])
        if k != IGNORE_INDEX:
            weight = (total - counts[k]) / (1 + total)
            loss = loss + weight * (torch.logsumexp(maps[:, y, x], dim=0) - maps[k, y, x])
    return loss / (SIDE * SIDE)


def soft_margin(scores: Tensor, labels: Tensor) -> Tensor:
    terms = [torch.log1p(torch.exp(-s if y else s)) for s, y in zip(scores, labels.tolist(), strict=True)]
    return torch.stack(terms).mean()


def one_hot_maximum(codes: Tensor) -> Tensor:
    return torch.where(codes == codes.amax(dim=0, keepdim=True), codes, torch.zeros(()))


def oracle(out: Outputs, batch: Batch, config: Config, *, pretraining: bool) -> tuple[Tensor, dict[str, Tensor], Any]:
    """The released loss: its total, the parts before weighting and the labels of each image."""
    c_cls, c_reg, c_seg = {"wsss": (1, 4, 1), "sss_image_labels": (0.5, 2, 0.5), "sss": (1, 4, 1)}[config.setting]
    height, width = out.logits[0].shape[-2:]
    images = batch.images.double() / 255
    cls, seg, masks, codes, labels = [], [], [], [], []
    for n in range(NUM):
        strong, named = bool(batch.has_pixel_labels[n]), batch.image_labels[n]
        probs = [resized(view[n].softmax(dim=0), height, width) for view in out.logits]
        distance = (probs[0][1:] - probs[1][1:]).abs()
        masks.append((distance if config.setting == "sss" else distance * named[:, None, None]).mean())
        views = [one_hot_maximum(resized(view[n], height, width)) for view in out.codes]
        codes.append((views[0] - views[1]).abs().mean())
        allowed = set(range(K)) if config.setting == "sss" else {0, *(k + 1 for k in range(K - 1) if named[k])}
        label = torch.full((SIDE, SIDE), IGNORE_INDEX)
        if strong:
            assert batch.pixel_labels is not None
            label = batch.pixel_labels[n].long()
        elif not pretraining:
            with torch.no_grad():
                label = pseudo_label(images[n], (probs[0] + probs[1]) / 2, allowed, config)
        labels.append(label)
        must_show = None if config.setting == "sss" else int(named.sum()) + 1
        unwarped = [resized(view[n], height, width) for view in out.logits]
        entropy = [balanced(view, label, must_show) for view in (*unwarped, out.auxiliary_logits[0][n])]
        seg.append(entropy[0] + entropy[1] + 0.4 * entropy[2])
        if config.setting == "sss":
            cls.append(seg[-1] if strong else seg[-1] * 0)
        else:
            heads = (*out.class_scores, out.auxiliary_class_scores[0])
            margins = [soft_margin(scores[n], named) for scores in heads]
            cls.append(seg[-1] if strong else margins[0] + margins[1] + 0.4 * margins[2])
    parts = {"slot": torch.stack(cls).mean(), "segmentation": torch.stack(seg).mean()}
    parts |= {"mask_consistency": torch.stack(masks).mean(), "code_consistency": torch.stack(codes).mean()}
    total = c_cls * parts["slot"] + c_reg * (parts["mask_consistency"] + parts["code_consistency"])
    if config.setting != "wsss":
        total = total + c_seg * torch.stack([seg[n] for n in range(NUM) if batch.has_pixel_labels[n]]).mean()
    if not pretraining:
        total = total + c_seg * parts["segmentation"]
    return total, parts, torch.stack(labels)


# --- The comparison --------------------------------------------------------------------------------------------------


def our_step(network: SLRNet, batch: Batch, config: Config, *, pretraining: bool) -> Any:
    inputs, views, crops = make_views(batch.images.double() / 255, config.views, network.encoder, step_generator(0))
    assert [view.shape[-1] for view in inputs] == [SIDE, SIDE // 2]
    out = network(inputs)
    rows = None if pretraining else find_pseudo_rows(batch)
    return out, losses_of(out, views, crops, batch, config=config, pseudo_rows=rows)


@pytest.mark.parametrize("pretraining", [True, False])
@pytest.mark.parametrize("recipe", VOC)
def test_parts_and_gradients(recipe: str, pretraining: bool) -> None:
    config = config_of(recipe)
    network, batch = network_of(config), batch_of(config, 1)
    out, losses = our_step(network, batch, config, pretraining=pretraining)
    total, parts, labels = oracle(out, batch, config, pretraining=pretraining)
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-10)
    own = dict(losses.parts)
    masks = own.pop("pixel_segmentation", torch.zeros(()))
    assert (own.pop("classification", torch.zeros(())) + masks).item() == pytest.approx(parts["slot"].item(), rel=1e-10)
    for name in ("mask_consistency", "code_consistency"):
        assert own[name].item() == pytest.approx(parts[name].item(), rel=1e-10)
    if not pretraining:
        assert (own["segmentation"] + masks).item() == pytest.approx(parts["segmentation"].item(), rel=1e-10)
        decided = (labels != IGNORE_INDEX).flatten(1).any(dim=1)
        assert bool(decided.all())
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    theirs = torch.autograd.grad(total, parameters, retain_graph=True)
    ours = torch.autograd.grad(losses.total, parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("recipe", "texts"),
    [
        (VOC[0], ["views.unwarp=logits"]),
        (VOC[0], ["views.sizes=fitted"]),
        (VOC[0], ["model.auxiliary_views=all"]),
        (VOC[0], ["calibration.fusion=logits"]),
        (VOC[0], ["losses.mask_consistency=logits"]),
        (VOC[0], ["losses.code_consistency=all"]),
        (VOC[0], ["cvlr.form=paper", "model.auxiliary_views=all"]),
        (VOC[1], ["losses.pixel_balance=false"]),
        (VOC[1], ["weights.pixel_mean=0.0"]),
        (VOC[1], ["weights.pixel_labels=1.0"]),
        (VOC[2], ["calibration.background_power=1.0"]),
        (VOC[2], ["losses.mask_background=true"]),
    ],
)
def test_each_setting_of_the_recipes_counts(recipe: str, texts: list[str]) -> None:
    """So the comparisons above would notice each of them."""
    totals = []
    for config in (config_of(recipe), apply_overrides(config_of(recipe), texts)):
        network, batch = network_of(config), batch_of(config, 1)
        inputs, views, crops = make_views(batch.images.double() / 255, config.views, network.encoder, step_generator(0))
        out = network(inputs)
        rows = find_pseudo_rows(batch)
        totals.append(losses_of(out, views, crops, batch, config=config, pseudo_rows=rows).total.item())
    assert totals[0] != pytest.approx(totals[1], rel=1e-6)


def test_weights_after_steps_through_pretraining_and_cosine() -> None:
    """An epoch is one step here: two before the cosine, two in it; the rates are those of the released optimizer."""
    config = apply_overrides(config_of(VOC[1]), ["train.pretrain_epochs=2", "train.cosine_epochs=28"])
    ours = network_of(config)
    theirs = copy.deepcopy(ours)
    optimizer = build_optimizer(ours, config.optim, batch_size=NUM)
    moments: dict[str, Tensor] = {}
    for step in range(4):
        batch, pretraining = batch_of(config, step), step < 2
        set_rate(optimizer, rate_factor(step, pretrain_steps=2, total_steps=30))
        optimizer.zero_grad()
        our_step(ours, batch, config, pretraining=pretraining)[1].total.backward()
        optimizer.step()
        out, _ = our_step(theirs, batch, config, pretraining=True)
        total, _, _ = oracle(out, batch, config, pretraining=pretraining)
        share = 1.0 if pretraining else 0.5 * (1 + math.cos(math.pi * (step - 2) / 28))
        names = [name for name, parameter in theirs.named_parameters() if parameter.requires_grad]
        parameters = dict(theirs.named_parameters())
        gradients = torch.autograd.grad(total, [parameters[name] for name in names])
        with torch.no_grad():
            for name, gradient in zip(names, gradients, strict=True):
                bias, new = name.endswith("bias"), not name.startswith("encoder.")
                gradient = gradient + (0.0 if bias else 5e-4) * parameters[name]
                moments[name] = 0.9 * moments.get(name, torch.zeros(())) + gradient
                rate = 5e-4 * share * (2 if bias else 1) * (10 if new else 1)
                parameters[name] -= rate * (gradient + 0.9 * moments[name])
    for (name, one), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12, msg=name)
