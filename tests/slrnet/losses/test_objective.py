"""The objective: its parts from losses worked out apart, its weights, pretraining, one view, kinds of labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slrnet.config import LossConfig, WeightsConfig
from slrnet.losses.consistency import code_consistency, mask_consistency, mask_divergence
from slrnet.losses.objective import Labels, Objective, classification_loss, objective
from slrnet.losses.segmentation import balanced_cross_entropy, weigh
from slrnet.models.network import Outputs
from slrnet.ops.cross_entropy import resized_cross_entropy

IMAGE_LABELS = torch.tensor([[1, 0, 0], [1, 0, 1]])


def outputs(views: int, *, cvlr: bool = True) -> Outputs:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, exists: bool = True) -> list[Tensor]:
        tensors = [torch.randn(2, *shape, generator=generator).requires_grad_() for _ in range(views)]
        return tensors if exists else []

    return Outputs(
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


def labels_of(pseudo: Tensor | None, **changes: Any) -> Labels:
    """Image labels alone, unless `changes` say otherwise."""
    given: dict[str, Any] = {
        "image_labels": IMAGE_LABELS,
        "has_image_labels": torch.tensor([True, True]),
        "pixel_labels": None,
        "has_pixel_labels": torch.tensor([False, False]),
        "pseudo_labels": pseudo,
    }
    return Labels(**(given | changes))


def run(aligned: Outputs, labels: Tensor | Labels | None, **weights: float) -> Objective:
    labels = labels if isinstance(labels, Labels) else labels_of(labels)
    return objective(aligned, labels, weights=WeightsConfig(**weights), losses=LossConfig())


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
        "mask_consistency": mask_consistency(out.logits, IMAGE_LABELS, divisor="voc").mean().item(),
    }
    if cvlr:
        for view in range(views):
            scores, masks = out.auxiliary_class_scores[view], out.auxiliary_logits[view]
            expected["classification"] += 0.2 / views * classification_loss(scores, IMAGE_LABELS).mean().item()
            entropy = balanced_cross_entropy(masks, labels, image_labels=IMAGE_LABELS)
            expected["segmentation"] += 0.2 / views * entropy.mean().item()
        expected["code_consistency"] = code_consistency(out.codes, divisor="voc").mean().item()
    assert {name: value.item() for name, value in result.parts.items()} == pytest.approx(expected, abs=1e-5)
    assert expected["segmentation"] > 0
    total = 1.3 * expected["classification"] + 0.7 * expected["segmentation"]
    total += 4.5 * (expected["mask_consistency"] + expected.get("code_consistency", 0.0))
    assert result.total.item() == pytest.approx(total, abs=1e-4)


def test_the_two_consistency_terms_may_have_their_own_weights() -> None:
    out = outputs(2)
    parts = run(out, None).parts
    rest = parts["classification"]
    masks, codes = parts["mask_consistency"], parts["code_consistency"]
    for own, expected in (
        ({"mask_consistency": 0.5}, 0.5 * masks + 3 * codes),
        ({"code_consistency": 0.0}, 3 * masks),
        ({"mask_consistency": 0.5, "code_consistency": 2.0}, 0.5 * masks + 2 * codes),
    ):
        assert torch.isclose(run(out, None, consistency=3.0, **own).total, rest + expected)


def test_pretraining_has_no_segmentation_part() -> None:
    out = outputs(2)
    result = run(out, None)
    assert set(result.parts) == {"classification", "mask_consistency", "code_consistency"}
    expected = result.parts["classification"] + 4 * (
        result.parts["mask_consistency"] + result.parts["code_consistency"]
    )
    assert result.total.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_probe_learns_by_plain_cross_entropy_over_labeled_pixels_and_by_its_mean_activations() -> None:
    """The means over an image's labeled pixels, in loops, and over the activations; the mean over the views."""
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(2, 4, 6, 6, generator=generator) for _ in range(2)]
    activations = [torch.randn(2, 3, 6, 6, generator=generator) for _ in range(2)]
    out = replace(outputs(2), probe_logits=logits, probe_activations=activations)
    pseudo = pseudo_labels()
    masks = torch.full_like(pseudo, 255)
    masks[1, 2:5] = 2

    def expected(targets: Tensor) -> float:
        total = 0.0
        for maps in logits:
            for n in range(2):
                spots = [(y, x) for y in range(6) for x in range(6) if targets[n, y, x] != 255]
                entropies = [-maps[n, :, y, x].log_softmax(0)[targets[n, y, x]].item() for y, x in spots]
                total += sum(entropies) / len(spots) / 2
        return total / 2

    for labels, targets in (
        (labels_of(pseudo), pseudo),
        (labels_of(None, seeds=pseudo), pseudo),
        (
            labels_of(pseudo, pixel_labels=masks, has_pixel_labels=torch.tensor([False, True])),
            torch.stack([pseudo[0], masks[1]]),
        ),
        (
            labels_of(
                None, seeds=pseudo[:, ::2, ::2], pixel_labels=masks, has_pixel_labels=torch.tensor([False, True])
            ),
            torch.stack([pseudo[0, ::2, ::2].repeat_interleave(2, 0).repeat_interleave(2, 1), masks[1]]),
        ),
    ):
        result = run(out, labels)
        assert result.parts["probe"].item() == pytest.approx(expected(targets), abs=1e-5)
        scores = [view.mean(dim=(2, 3)) for view in activations]
        losses = [classification_loss(view, IMAGE_LABELS).mean().item() for view in scores]
        assert result.parts["probe_classification"].item() == pytest.approx(sum(losses) / 2, abs=1e-5)
        without = run(replace(out, probe_logits=[], probe_activations=[]), labels).total
        assert result.total.item() - without.item() == pytest.approx(
            0.1 * expected(targets) + sum(losses) / 2, abs=1e-4
        )
    known = labels_of(pseudo, has_image_labels=torch.tensor([True, False]))
    first = sum(classification_loss(view.mean(dim=(2, 3)), IMAGE_LABELS)[0].item() for view in activations)
    assert run(out, known).parts["probe_classification"].item() == pytest.approx(first / 4, abs=1e-5)
    own = run(out, labels_of(torch.stack([pseudo, pseudo.flip(1)]))).parts["probe"]
    logits[1] = logits[1].flip(2)
    assert torch.isclose(own, run(out, labels_of(pseudo)).parts["probe"])


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


def test_each_view_may_have_its_own_pseudo_labels() -> None:
    out, first = outputs(2), pseudo_labels()
    second = first.flip(-1)
    joined = run(out, torch.stack([first, second]), auxiliary=0.4).parts["segmentation"]
    both = sum(
        balanced_cross_entropy(out.logits[v], labels, image_labels=IMAGE_LABELS).mean()
        + 0.2 * balanced_cross_entropy(out.auxiliary_logits[v], labels, image_labels=IMAGE_LABELS).mean()
        for v, labels in enumerate((first, second))
    )
    assert torch.isclose(joined, torch.as_tensor(both))


def test_the_divergence_is_a_part_where_it_is_asked_for() -> None:
    out, weights = outputs(2), WeightsConfig(consistency=3.0)
    plain, more = (
        objective(out, labels_of(pseudo_labels()), weights=weights, losses=LossConfig(), divergence=flag)
        for flag in (False, True)
    )
    assert set(more.parts) - set(plain.parts) == {"mask_divergence"}
    assert torch.isclose(more.parts["mask_divergence"], mask_divergence(out.logits).mean())
    assert torch.isclose(more.total, plain.total + 3 * more.parts["mask_divergence"])


@pytest.mark.parametrize(
    ("choice", "part"),
    [({"mask_consistency": "probs"}, "mask_consistency"), ({"code_consistency": "maximum"}, "code_consistency")],
)
def test_what_the_distances_compare_is_a_setting(choice: dict[str, Any], part: str) -> None:
    out = outputs(2)
    changed = objective(out, labels_of(None), weights=WeightsConfig(), losses=LossConfig(**choice))
    compare = next(iter(choice.values()))
    if part == "mask_consistency":
        expected = mask_consistency([view.softmax(dim=1) for view in out.logits], IMAGE_LABELS, divisor="voc").mean()
    else:
        expected = code_consistency(out.codes, compare=compare, divisor="voc").mean()
    assert changed.parts[part].item() == pytest.approx(expected.item())
    assert changed.parts[part].item() != pytest.approx(run(out, None).parts[part].item(), rel=1e-4)


def true_masks() -> Tensor:
    """Of image 1 alone: class 2, which its image labels do not have, and void."""
    labels = torch.full((2, 6, 6), 255)
    labels[1, :3], labels[1, 3:, :3] = 0, 2
    return labels


def test_classes_that_an_image_shows_may_weigh_more() -> None:
    """PyTorch's pos_weight; and the auxiliary head's classification loss may have a weight of its own."""
    scores = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.0, -0.5]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        scores, IMAGE_LABELS.float(), pos_weight=torch.tensor(10.0)
    )
    assert classification_loss(scores, IMAGE_LABELS, 10.0).mean().item() == pytest.approx(expected.item())
    out = outputs(2)
    parts = [run(out, None, auxiliary_classification=weight).parts["classification"].item() for weight in (0.0, 1.0)]
    auxiliary = sum(classification_loss(s, IMAGE_LABELS).mean().item() for s in out.auxiliary_class_scores) / 2
    assert parts[1] - parts[0] == pytest.approx(auxiliary)


FIRST, SECOND, BOTH, NONE = ([True, False], [False, True], [True, True], [False, False])


class TestKindsOfLabels:
    def entropy(self, out: Outputs, labels: Tensor, image: int, **options: Any) -> float:
        """Eq. 1 of one image, by the losses' own functions: views 1 and 2, the auxiliary head at 0.4."""
        weighed = weigh(labels, 4, **options)
        main = sum(resized_cross_entropy(view, weighed.labels, weighed.weights)[image].item() for view in out.logits)
        side = sum(
            resized_cross_entropy(view, weighed.labels, weighed.weights)[image].item() for view in out.auxiliary_logits
        )
        return main + 0.4 * side / 2

    @pytest.mark.parametrize("balance", [True, False])
    def test_images_with_masks_use_them_and_the_others_their_pseudo_labels(self, balance: bool) -> None:
        out, pseudo, masks = outputs(2), pseudo_labels(), true_masks()
        labels = labels_of(pseudo, pixel_labels=masks, has_pixel_labels=torch.tensor(SECOND))
        losses = LossConfig(pixel_balance=balance)
        result = objective(out, labels, weights=WeightsConfig(pixel_labels=3.0), losses=losses)
        plain = None if balance else torch.tensor([True, True])
        of_pseudo = self.entropy(out, pseudo, 0, image_labels=IMAGE_LABELS) / 2
        of_masks = self.entropy(out, masks, 1, plain=plain) / 2
        assert result.parts["segmentation"].item() == pytest.approx(of_pseudo, abs=1e-5)
        assert result.parts["pixel_segmentation"].item() == pytest.approx(of_masks, abs=1e-5)
        assert min(of_pseudo, of_masks) > 0
        rest = result.parts["classification"] + 4 * (
            result.parts["mask_consistency"] + result.parts["code_consistency"]
        )
        assert result.total.item() == pytest.approx(rest.item() + of_pseudo + 3 * of_masks, abs=1e-4)

    def test_classification_is_of_images_with_image_labels_and_no_mask(self) -> None:
        out = outputs(2)
        for masks, names, counted in ((SECOND, BOTH, [1, 0]), (NONE, FIRST, [1, 0]), (NONE, BOTH, [1, 1])):
            labels = labels_of(
                pseudo_labels(), has_pixel_labels=torch.tensor(masks), has_image_labels=torch.tensor(names)
            )
            views = [(scores, 1.0) for scores in out.class_scores]
            views += [(scores, 0.2) for scores in out.auxiliary_class_scores]
            expected = sum(
                factor * (classification_loss(scores, IMAGE_LABELS) * torch.tensor(counted)).mean().item()
                for scores, factor in views
            )
            assert run(out, labels).parts["classification"].item() == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("pretraining", [True, False])
    def test_the_released_training_counts_true_masks_three_times(self, pretraining: bool) -> None:
        """Of c = .5 and images 1 (a mask) and 2 (none): in the classification's place c L / 2, as the mean over masks
        c L, and after pretraining c L / 2 again."""
        out, masks = outputs(2), true_masks()
        pseudo = None if pretraining else pseudo_labels()
        labels = labels_of(pseudo, pixel_labels=masks, has_pixel_labels=torch.tensor(SECOND))
        weights = WeightsConfig(segmentation=0.5, pixel_labels=2.0, pixel_pretraining=1.0, pixel_mean=1.0)
        entropy = self.entropy(out, masks, 1, plain=torch.tensor(BOTH))
        expected = 0.5 * entropy / 2 + 0.5 * entropy + (0 if pretraining else 0.5 * entropy / 2)
        result = objective(out, labels, weights=weights, losses=LossConfig())
        parts = dict(result.parts)
        rest = parts["classification"] + 4 * (parts["mask_consistency"] + parts["code_consistency"])
        rest = rest + 0.5 * parts.get("segmentation", 0)
        assert (result.total - rest).item() == pytest.approx(expected, abs=1e-5)

    def test_the_mean_over_masks_is_that_of_the_global_batch(self) -> None:
        """A quarter of its images have masks, half of these do: their mean counts twice as much."""
        labels = labels_of(None, pixel_labels=true_masks(), has_pixel_labels=torch.tensor(SECOND))
        part_of_more = replace(labels, pixel_labeled_share=torch.tensor(0.25))
        without, alone, whole = (
            run(outputs(2), of, pixel_mean=mean).total.item()
            for of, mean in ((labels, 0.0), (labels, 1.0), (part_of_more, 1.0))
        )
        assert whole - without == pytest.approx(2 * (alone - without))
        assert alone > without

    def test_the_mean_over_no_mask_is_zero(self) -> None:
        labels = labels_of(None, pixel_labels=torch.full((2, 6, 6), 255))
        with_mean, without = (run(outputs(2), labels, pixel_mean=mean).total.item() for mean in (1.0, 0.0))
        assert with_mean == without

    def test_true_masks_may_have_to_show_all_classes_too(self) -> None:
        """Image 1 has classes 1 and 3; its mask shows class 2 and the background, so it does not count."""
        out = outputs(2)
        labels = labels_of(None, pixel_labels=true_masks(), has_pixel_labels=torch.tensor(SECOND))
        complete = labels_of(None, pixel_labels=pseudo_labels(), has_pixel_labels=torch.tensor(SECOND))
        for given, counts in ((labels, False), (complete, True)):
            losses = LossConfig(pixel_validity=True)
            part = objective(out, given, weights=WeightsConfig(), losses=losses).parts["pixel_segmentation"].item()
            assert (part > 0) == counts
            assert run(out, given).parts["pixel_segmentation"].item() > 0

    def test_without_image_labels_there_is_no_classification_and_all_classes_are_compared(self) -> None:
        out = replace(outputs(2), class_scores=[], auxiliary_class_scores=[])
        labels = labels_of(pseudo_labels(), has_image_labels=None, pixel_labels=true_masks())
        parts = run(out, labels).parts
        assert set(parts) == {"segmentation", "pixel_segmentation", "mask_consistency", "code_consistency"}
        nobody = torch.tensor(NONE)
        expected = mask_consistency(out.logits, IMAGE_LABELS, has_image_labels=nobody, divisor="voc").mean().item()
        assert parts["mask_consistency"].item() == pytest.approx(expected)
        incomplete = torch.zeros(2, 6, 6, dtype=torch.int64)
        incomplete[:, :2] = 2  # one class of two, or another one: nothing is known, so nothing is missing
        found = run(out, labels_of(incomplete, has_image_labels=None)).parts["segmentation"].item()
        assert found == pytest.approx(sum(self.entropy(out, incomplete, i) for i in (0, 1)) / 2, abs=1e-5)

    @pytest.mark.parametrize("pretraining", [True, False])
    @pytest.mark.parametrize("masks", [FIRST, BOTH, NONE])
    def test_a_kind_that_a_batch_lacks_is_an_exact_zero_with_a_graph(self, masks: Any, pretraining: bool) -> None:
        out = outputs(2)
        has = torch.tensor(masks)
        given = torch.where(has[:, None, None], pseudo_labels(), 255)
        labels = labels_of(None if pretraining else pseudo_labels(), pixel_labels=given, has_pixel_labels=has)
        parts = run(out, labels).parts
        assert ("segmentation" in parts) != pretraining
        assert (parts["pixel_segmentation"].item() == 0) == (masks == NONE)
        if not pretraining:
            assert (parts["segmentation"].item() == 0) == (masks == BOTH)
        assert (parts["classification"].item() == 0) == (masks == BOTH)
        sum(parts.values()).backward()  # type: ignore[union-attr]
        for tensor in (*out.logits, *out.auxiliary_logits, *out.class_scores, *out.auxiliary_class_scores):
            assert tensor.grad is not None
            assert bool(tensor.grad.isfinite().all())

    def test_true_masks_train_while_pretraining(self) -> None:
        labels = labels_of(None, pixel_labels=true_masks(), has_pixel_labels=torch.tensor(SECOND))
        parts = run(outputs(2), labels).parts
        assert "segmentation" not in parts
        assert parts["pixel_segmentation"].item() > 0
