"""The objective: its parts from losses worked out apart, its weights, pretraining, one view."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slrnet.config import LossConfig, WeightsConfig
from slrnet.losses.classification import classification_loss
from slrnet.losses.consistency import code_consistency, mask_consistency
from slrnet.losses.objective import AlignedOutputs, Objective, objective
from slrnet.losses.segmentation import balanced_cross_entropy

IMAGE_LABELS = torch.tensor([[1, 0, 0], [1, 0, 1]])


def outputs(views: int, *, cvlr: bool = True) -> AlignedOutputs:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, exists: bool = True) -> list[Tensor]:
        tensors = [torch.randn(2, *shape, generator=generator).requires_grad_() for _ in range(views)]
        return tensors if exists else []

    return AlignedOutputs(
        logits=draw(4, 3, 3),
        auxiliary_logits=draw(4, 3, 3, exists=cvlr),
        codes=[view.softmax(dim=1) for view in draw(4, 3, 3, exists=cvlr)],
        class_scores=draw(3),
        auxiliary_class_scores=draw(3, exists=cvlr),
    )


def pseudo_labels() -> Tensor:
    """Image 0 shows background and class 1, image 1 background, classes 1 and 3: both complete."""
    labels = torch.zeros(2, 6, 6, dtype=torch.int64)
    labels[:, :3, :3], labels[1, 4:], labels[:, 5, 5] = 1, 3, 255
    return labels


def run(aligned: AlignedOutputs, labels: Tensor | None, **weights: float) -> Objective:
    return objective(aligned, labels, IMAGE_LABELS, weights=WeightsConfig(**weights), losses=LossConfig())


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("cvlr", [True, False])
def test_parts_and_total(views: int, cvlr: bool) -> None:
    out, labels = outputs(views, cvlr=cvlr), pseudo_labels()
    weights = {"segmentation": 0.7, "classification": 1.3, "consistency": 4.5, "auxiliary": 0.2}
    result = run(out, labels, **weights)
    expected = {
        "classification": sum(classification_loss(s, IMAGE_LABELS).mean().item() for s in out.class_scores),
        "segmentation": sum(
            balanced_cross_entropy(m, labels, image_labels=IMAGE_LABELS).mean().item() for m in out.logits
        ),
        "mask_consistency": mask_consistency(out.logits, IMAGE_LABELS).mean().item(),
    }
    if cvlr:
        for view in range(views):
            scores, masks = out.auxiliary_class_scores[view], out.auxiliary_logits[view]
            expected["classification"] += 0.2 / views * classification_loss(scores, IMAGE_LABELS).mean().item()
            entropy = balanced_cross_entropy(masks, labels, image_labels=IMAGE_LABELS)
            expected["segmentation"] += 0.2 / views * entropy.mean().item()
        expected["code_consistency"] = code_consistency(out.codes).mean().item()
    assert {name: value.item() for name, value in result.parts.items()} == pytest.approx(expected, abs=1e-5)
    assert expected["segmentation"] > 0
    total = 1.3 * expected["classification"] + 0.7 * expected["segmentation"]
    total += 4.5 * (expected["mask_consistency"] + expected.get("code_consistency", 0.0))
    assert result.total.item() == pytest.approx(total, abs=1e-4)


def test_pretraining_has_no_segmentation_part() -> None:
    out = outputs(2)
    result = run(out, None)
    assert set(result.parts) == {"classification", "mask_consistency", "code_consistency"}
    expected = result.parts["classification"] + 4 * (
        result.parts["mask_consistency"] + result.parts["code_consistency"]
    )
    assert result.total.item() == pytest.approx(expected.item(), abs=1e-5)


def test_one_view_has_no_distance_and_keeps_the_graph() -> None:
    out = outputs(1)
    result = run(out, None)
    assert result.parts["mask_consistency"].item() == 0
    assert result.parts["code_consistency"].item() == 0
    result.total.backward()  # type: ignore[no-untyped-call]
    for tensor in (*out.logits, *out.class_scores):
        assert tensor.grad is not None


@pytest.mark.parametrize(
    "weights",
    [
        {"segmentation": 0.0},
        {"classification": 0.0},
        {"consistency": 0.0},
        {"auxiliary": 0.0},
        {"segmentation": 0.0, "classification": 0.0, "consistency": 0.0},
    ],
)
def test_a_weight_of_zero_leaves_the_graph_whole(weights: dict[str, float]) -> None:
    """Distributed training waits for a gradient of every parameter, be it zero."""
    out = outputs(2)
    run(out, pseudo_labels(), **weights).total.backward()  # type: ignore[no-untyped-call]
    for tensor in (*out.logits, *out.auxiliary_logits, *out.class_scores, *out.auxiliary_class_scores):
        assert tensor.grad is not None


@pytest.mark.parametrize(
    ("choice", "part"),
    [({"mask_consistency": "probs"}, "mask_consistency"), ({"code_consistency": "maximum"}, "code_consistency")],
)
def test_what_the_distances_compare_is_a_setting(choice: dict[str, Any], part: str) -> None:
    out = outputs(2)
    changed = objective(out, None, IMAGE_LABELS, weights=WeightsConfig(), losses=LossConfig(**choice))
    compare = next(iter(choice.values()))
    if part == "mask_consistency":
        expected = mask_consistency(out.logits, IMAGE_LABELS, compare=compare).mean()
    else:
        expected = code_consistency(out.codes, compare=compare).mean()
    assert changed.parts[part].item() == pytest.approx(expected.item())
    assert changed.parts[part].item() != pytest.approx(run(out, None).parts[part].item(), rel=1e-4)
