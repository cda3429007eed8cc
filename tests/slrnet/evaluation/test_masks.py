"""Measured masks against counts made by hand, on a network that reads the class off the colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from slrnet.config import CalibrationConfig, Config, EvaluationConfig, apply_overrides
from slrnet.data.batch import EvalSample
from slrnet.data.eval_loader import EvalLoader
from slrnet.data.manifest import DataError, ShardSet
from slrnet.distributed.process import Process
from slrnet.evaluation.masks import (
    WAITING,
    PseudoMask,
    Quality,
    _of_one_size,
    evaluate_masks,
    measure_pseudo_masks,
    protocol_name,
    quality_metrics,
)
from slrnet.evaluation.metrics import ConfusionMatrix
from slrnet.inference.forward import Inference
from slrnet.models.encoders import Encoder
from slrnet.models.slrnet import Outputs

BLACK, GREEN, BLUE, WHITE = (0, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
PLAIN = Encoder(nn.Identity(), stages=(), channels=(3, 3), strides=(8, 16), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
CONFIG = apply_overrides(
    Config(
        calibration=CalibrationConfig(
            refine_iters=0, refine_stride=1, confidence_threshold=0.6, background_threshold=0.7, floor=0.2
        )
    ),
    ["model.output_stride=16", "data.crop_size=64", "views.scales=1"],
)


class ColourNetwork(nn.Module):
    """Background where it is dark, class 1 where green, class 2 where blue; sure of itself, at full resolution."""

    num_classes = 3
    encoder = PLAIN

    def __init__(self, scores: Sequence[float] = (1.0, 1.0)) -> None:
        super().__init__()
        self.scores = scores
        self.unused = nn.Parameter(torch.zeros(1))  # says where the network is
        self.sizes: list[tuple[int, int]] = []

    def forward(self, views: Sequence[Tensor]) -> Outputs:
        self.sizes += [(view.shape[-2], view.shape[-1]) for view in views]
        logits = [torch.cat([torch.full_like(view[:, :1], 0.5), view[:, 1:]], dim=1) * 20 for view in views]
        return Outputs(logits, [torch.tensor([self.scores]) for _ in views], [], [], [])


def sample(
    rows: Sequence[tuple[int, int, int]],
    mask_rows: Sequence[int] | None,
    *,
    size: tuple[int, int] = (64, 48),
    labels: tuple[float, float] = (1.0, 1.0),
    key: str = "a",
) -> EvalSample:
    """An image of equally high stripes, and a mask of equally high stripes."""
    height, width = size
    index = torch.arange(height) * len(rows) // height
    image = torch.tensor(rows, dtype=torch.uint8)[index].T.unsqueeze(2).expand(3, height, width).contiguous()
    mask = None
    if mask_rows is not None:
        index = torch.arange(height) * len(mask_rows) // height
        mask = torch.tensor(mask_rows, dtype=torch.uint8)[index].unsqueeze(1).expand(height, width).contiguous()
    return EvalSample(key, image, mask, torch.tensor(labels))


def evaluate(samples: Sequence[EvalSample], *, config: Config = CONFIG, model: nn.Module | None = None) -> Quality:
    inference = Inference(model or ColourNetwork(), config)  # type: ignore[arg-type]
    return evaluate_masks(inference, samples, process=Process())


class TestEvaluateMasks:
    def test_counts_by_hand(self) -> None:
        # 64 rows of 48 pixels: seen are 32 of background and 32 of class 1; true are 16 rows each of 0, 1, 1, void.
        quality = evaluate([sample([BLACK, GREEN], [0, 1, 1, 255])])
        assert quality.matrix.counts.tolist() == [[768, 0, 0, 0], [768, 768, 0, 0], [0, 0, 0, 0]]
        assert (quality.protocol, quality.images) == ("ss", 1)

    def test_images_add_up_and_those_without_mask_are_passed_over(self) -> None:
        quality = evaluate([sample([BLUE], [2]), sample([GREEN], None), sample([GREEN], [0])])
        assert quality.matrix.counts.tolist() == [[0, 3072, 0, 0], [0, 0, 0, 0], [0, 0, 3072, 0]]
        assert quality.images == 2

    @pytest.mark.parametrize("size", [(37, 53), (5, 7), (1, 1), (16, 300), (65, 64)])
    def test_every_pixel_counts_at_any_size(self, size: tuple[int, int]) -> None:
        quality = evaluate([sample([GREEN], [1], size=size)])
        assert quality.matrix.counts[1].tolist() == [0, size[0] * size[1], 0, 0]
        assert int(quality.matrix.counts.sum()) == size[0] * size[1]

    def test_images_of_one_size_go_together_and_give_the_same_counts(self) -> None:
        samples = [
            sample([BLUE, GREEN], [2, 1], labels=(1.0, 0.0)),
            sample([GREEN], [1], size=(32, 48)),
            sample([BLUE], [2], labels=(0.0, 1.0)),
            sample([BLACK], [0]),
        ]
        config, found = apply_overrides(CONFIG, ["evaluation.gating=image_labels"]), []
        for together, sizes in ((1, [(64, 48), (32, 48), (64, 48), (64, 48)]), (2, [(64, 48), (32, 48), (64, 48)])):
            model = ColourNetwork()
            inference = Inference(model, config)  # type: ignore[arg-type]
            found.append(evaluate_masks(inference, samples, process=Process(), together=together))
            assert model.sizes == sizes
        assert found[0].images == found[1].images == 4
        assert found[0].matrix.counts.equal(found[1].matrix.counts)

    def test_no_image_waits_for_ever_for_others_of_its_size(self) -> None:
        samples = [sample([BLACK], [0], size=(16, width)) for width in range(16, 16 + WAITING + 8)]
        assert len(next(_of_one_size(iter(samples), 2))) == 1

    def test_nothing_to_measure(self) -> None:
        quality = evaluate([])
        assert quality.images == 0
        assert math.isnan(quality.matrix.miou())
        assert quality_metrics("val", quality, ("background", "a", "b")) == {}

    def test_each_image_exactly_once_over_two_ranks(self, tiny_data: ShardSet) -> None:
        class Network(ColourNetwork):
            num_classes = 4

            def forward(self, views: Sequence[Tensor]) -> Outputs:
                logits = torch.cat([torch.full_like(views[0][:, :1], 0.45), views[0]], dim=1) * 20
                return Outputs([logits], [torch.ones(1, 3)], [], [], [])

        def measure(rank: int, world_size: int) -> Quality:
            loader = EvalLoader(tiny_data, split="val", rank=rank, world_size=world_size)
            return evaluate(loader, model=Network())  # type: ignore[arg-type]

        whole, halves = measure(0, 1), [measure(0, 2), measure(1, 2)]
        assert (whole.images, [half.images for half in halves]) == (5, [2, 3])
        halves[0].matrix.merge(halves[1].matrix)
        assert halves[0].matrix.counts.equal(whole.matrix.counts)
        assert whole.matrix.miou() > 0.8


class TestGating:
    def test_image_labels_that_are_not_known_are_refused(self) -> None:
        by_labels = apply_overrides(CONFIG, ["evaluation.gating=image_labels"])
        with pytest.raises(DataError, match="image 'a' has none; use none or scores, or prepare the data with"):
            evaluate([replace(sample([BLUE], [2]), has_image_labels=False)], config=by_labels)

    def test_a_network_without_class_scores_is_measured(self) -> None:
        class Scoreless(ColourNetwork):
            def forward(self, views: Sequence[Tensor]) -> Outputs:
                return replace(super().forward(views), class_scores=[])

        assert evaluate([sample([BLUE], [2])], model=Scoreless()).matrix.counts[2].tolist() == [0, 0, 3072, 0]

    def test_gating_changes_what_is_counted(self) -> None:
        striped = sample([GREEN, BLUE], [1, 2], labels=(1.0, 0.0))
        config = apply_overrides(CONFIG, ["evaluation.gating=image_labels"])
        quality = evaluate([striped], config=config)
        # The image is said to have no class 2, so its stripe becomes background.
        assert quality.matrix.counts[2].tolist() == [1536, 0, 0, 0]
        assert quality.protocol == "ss+gated_by_image_labels"
        scored = evaluate(
            [striped], config=apply_overrides(CONFIG, ["evaluation.gating=scores"]), model=ColourNetwork((-5.0, 5.0))
        )
        assert scored.matrix.counts[1].tolist() == [1536, 0, 0, 0]
        assert scored.matrix.counts[2].tolist() == [0, 0, 1536, 0]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "ss"),
        ({"gating": "scores"}, "ss+gated_by_scores"),
        ({"gating": "image_labels"}, "ss+gated_by_image_labels"),
        ({"background_power": 3.0}, "ss+background_power_3"),
        ({"gating": "scores", "background_power": 1.5}, "ss+gated_by_scores+background_power_1.5"),
        ({"scale": 0.75}, "ss+scale_0.75"),
        ({"resizing": "released"}, "ss+resizing_released"),
        ({"scales": (1.0, 2.0)}, "ss"),
    ],
)
def test_a_protocol_has_what_it_does_in_its_name(settings: dict[str, object], name: str) -> None:
    assert protocol_name(EvaluationConfig(**settings)) == name  # type: ignore[arg-type]


def test_protocols_of_several_scales_name_them_unless_they_are_the_usual_ones() -> None:
    assert protocol_name(EvaluationConfig(), "ms_crf") == "ms_crf"
    config = EvaluationConfig(scales=(1.0, 0.5), gating="scores")
    assert protocol_name(config, "ms") == "ms+scales_1,0.5+gated_by_scores"


class TestMeasurePseudoMasks:
    @staticmethod
    def measure(samples: Sequence[EvalSample], config: Config = CONFIG) -> tuple[Quality, Quality, list[PseudoMask]]:
        shown: list[PseudoMask] = []
        inference = Inference(ColourNetwork(), config)  # type: ignore[arg-type]
        dense, kept = measure_pseudo_masks(inference, samples, process=Process(), show=shown.append)
        return dense, kept, shown

    def test_right_masks_are_counted_as_right(self) -> None:
        dense, kept, (shown,) = self.measure([sample([BLACK, GREEN], [0, 1], labels=(1.0, 0.0))])
        assert dense.matrix.counts.tolist() == [[1536, 0, 0, 0], [0, 1536, 0, 0], [0, 0, 0, 0]]
        assert kept.matrix.counts.equal(dense.matrix.counts)
        for mask in (shown.raw, shown.refined, shown.pseudo_labels):
            assert mask.shape == (64, 48)
            assert mask.equal(sample([BLACK, GREEN], [0, 1]).pixel_labels.long())  # type: ignore[union-attr]
        assert (dense.images, kept.images) == (1, 1)
        assert dense.protocol == "fused 1 views, refined, gated by image labels"
        assert kept.protocol.endswith(", thresholded")

    def test_classes_that_the_labels_rule_out_never_appear(self) -> None:
        dense, _, (shown,) = self.measure([sample([BLUE, GREEN], [2, 1], labels=(1.0, 0.0))])
        assert set(shown.raw.unique().tolist()) == {0, 1}
        assert dense.matrix.counts[:, 2].tolist() == [0, 0, 0]

    def test_nothing_is_ruled_out_where_the_training_has_no_image_labels(self) -> None:
        striped = sample([BLUE, GREEN], [2, 1], labels=(1.0, 0.0))
        alone = apply_overrides(CONFIG, ["setting=sss", "data.pixel_labeled_subset=some"])
        dense, _, (shown,) = self.measure([striped], alone)
        assert set(shown.raw.unique().tolist()) == {1, 2}
        assert dense.protocol == "fused 1 views, refined, not gated"
        _, _, (unlabeled,) = self.measure([replace(striped, has_image_labels=False)])
        assert unlabeled.raw.equal(shown.raw)

    def test_undecided_pixels_are_no_coverage(self) -> None:
        # Dim green: probability of class 1 near a half, under 0.6 of the maximum that the bright stripe sets.
        dim = (0, 128, 0)
        _, kept, (shown,) = self.measure([sample([GREEN, dim, BLACK, BLACK], [1, 1, 0, 0], labels=(1.0, 0.0))])
        undecided = int((shown.pseudo_labels == 255).sum())
        assert undecided >= 15 * 48
        assert kept.matrix.coverage() == 1 - undecided / (64 * 48)

    def test_images_without_mask_are_shown_but_not_counted(self) -> None:
        dense, _, shown = self.measure([sample([GREEN], None), sample([GREEN], [1], key="b")])
        assert [masks.sample.key for masks in shown] == ["a", "b"]
        assert dense.images == 1

    @pytest.mark.parametrize("size", [(37, 53), (5, 7)])
    def test_any_size_any_number_of_views_and_no_class_at_all(self, size: tuple[int, int]) -> None:
        config = apply_overrides(CONFIG, ["views.scales=1.0,0.5,1.5"])
        dense, kept, (shown,) = self.measure([sample([GREEN], [0], size=size, labels=(0.0, 0.0))], config)
        assert shown.pseudo_labels.shape == size
        assert dense.matrix.counts.tolist() == [[size[0] * size[1], 0, 0, 0], [0] * 4, [0] * 4]
        assert kept.matrix.coverage() <= 1
        assert dense.protocol.startswith("fused 3 views")


def test_figures_of_a_matrix_by_hand() -> None:
    matrix = ConfusionMatrix(3)
    matrix.counts = torch.tensor([[6, 2, 0, 0], [1, 2, 0, 1], [0, 0, 0, 0]])
    figures = quality_metrics("val", Quality(matrix, "ss", 1), ("background", "tv/monitor", "absent"))
    assert figures == pytest.approx(
        {
            "val/miou": (6 / 9 + 2 / 6) / 2,
            "val/mfdr": 2 / 4,
            "val/mfnr": 2 / 4,
            "val/iou/background": 6 / 9,
            "val/iou/tv-monitor": 2 / 6,
            "val/fdr/background": 1 / 7,
            "val/fdr/tv-monitor": 2 / 4,
            "val/fnr/background": 2 / 8,
            "val/fnr/tv-monitor": 2 / 4,
        }
    )
