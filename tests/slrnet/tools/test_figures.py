"""The paper's figures: the right images in the right places; tables: the paper's figures as its, ours in their rows."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from slrnet.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from slrnet.cli.main import main
from slrnet.data.catalog import VOC_CLASSES
from slrnet.data.manifest import ShardSet
from slrnet.evaluation.examine import EvaluationTarget, Examination, choose_by_iou, examine, read_examples
from slrnet.models.cvlr import CrossViewLowRank
from slrnet.models.slrnet import SLRNet
from slrnet.tools.codes import code_maps, heat
from slrnet.tools.figures.pictures import (
    _checkpoints,
    best_of_each_class,
    code_figure,
    feature_figure,
    feature_rgb,
    features_around,
    iteration_figure,
    mask_figure,
)
from slrnet.tools.figures.progress import draw_history, draw_validation, write_pictures
from slrnet.tools.figures.tables import PAPER_TABLES, read_results, write_tables
from slrnet.viz.overlay import draw_overlay


@pytest.fixture(scope="module")
def target(tiny_run: Path, tiny_data: ShardSet) -> EvaluationTarget:
    return EvaluationTarget.of(load_checkpoint(tiny_run), tiny_data, "cpu")


@pytest.fixture(scope="module")
def examination(target: EvaluationTarget) -> Examination:
    return examine(target, "val")


@pytest.fixture
def two_epochs(tiny_run: Path, tmp_path: Path) -> Path:
    """A run's folder with checkpoints of epochs 1 and 2, whose scores leave the first the best."""
    checkpoint = load_checkpoint(tiny_run)
    for epoch in (1, 2):
        state = replace(checkpoint.state, epoch=epoch)
        place = tmp_path / "two" / "checkpoints"
        save_checkpoint(place, config=checkpoint.config, state=state, model=checkpoint.model, optimizer={})
    return tmp_path / "two"


def plain(table: str) -> str:
    """A Markdown table without the spaces that align its columns."""
    return re.sub(r" +\|", " |", re.sub(r"\| +", "| ", table))


def titles(figure: Any) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def row_names(figure: Any) -> list[str]:
    return [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]


class TestPictures:
    def test_masks_are_those_of_the_best_and_the_worst_images(
        self, target: EvaluationTarget, examination: Examination
    ) -> None:
        figure = mask_figure(target, examination, number=2)
        best = choose_by_iou(examination.scores, 2, hardest=False)
        worst = choose_by_iou(examination.scores, 2, hardest=True)
        expected = []
        for pair in zip(best, worst, strict=True):
            for one in pair:
                expected += [one.key, "truth", f"prediction, foreground IoU {100 * one.foreground_iou:.0f}"]
        assert titles(figure) == expected
        assert best[0].foreground_iou == max(score.foreground_iou for score in examination.scores)
        assert worst[0].foreground_iou == min(score.foreground_iou for score in examination.scores)
        example = read_examples(target, "val", best[:1])[0]
        np.testing.assert_array_equal(figure.axes[0].get_images()[0].get_array(), example.image)
        (legend,) = figure.legends
        assert {text.get_text() for text in legend.get_texts()} <= {"ant", "bee", "cat"}
        ant = legend.get_patches()[[text.get_text() for text in legend.get_texts()].index("ant")]
        assert ant.get_facecolor()[:3] == pytest.approx((128 / 255, 0, 0))  # VOC's colour of class 1

    def test_codes_are_those_of_the_class_on_its_best_image(
        self, target: EvaluationTarget, examination: Examination
    ) -> None:
        figure = code_figure(target, examination, number=2)
        best = best_of_each_class(examination.scores)
        for index, score in best.items():
            assert score.iou[index] == max(one.iou[index] for one in examination.scores if one.true_pixels[index])
        first, second = list(best)[:2]
        names = target.checkpoint.state.classes
        wanted = [f"{names[first]}, truth", names[first], f"{names[second]}, truth", names[second]]
        assert titles(figure)[:4] == wanted
        (example,) = read_examples(target, "val", [best[first]])
        assert isinstance(target.inference.model, SLRNet)
        codes = code_maps(target.inference, example.image, [1]).codes[1]
        np.testing.assert_array_equal(figure.axes[1].get_images()[0].get_array(), heat(codes[first]))

    def test_iterations_at_both_epochs(self, target: EvaluationTarget, examination: Examination) -> None:
        scores = choose_by_iou(examination.scores, 1, hardest=False)
        late = replace(target, checkpoint=replace(target.checkpoint, state=replace(target.checkpoint.state, epoch=9)))
        figure = iteration_figure([target, late], read_examples(target, "val", scores), scores, [1, 4])
        name = target.checkpoint.state.classes[scores[0].main_class]
        assert titles(figure)[:6] == 2 * [f"{scores[0].key}: {name}", "T = 1", "T = 4"]
        early = target.checkpoint.state.epoch
        assert row_names(figure) == [f"epoch {early}", "epoch 9"]

    def test_features_before_and_after_of_every_view(self, target: EvaluationTarget, examination: Examination) -> None:
        examples = read_examples(target, "val", examination.scores[:1])
        figure = feature_figure(target, examples)
        kinds = ["features before", "features after", "activation before", "activation after"]
        assert titles(figure) == [examples[0].key, *kinds, "", *kinds]
        assert row_names(figure) == ["scale 1", "scale 0.5"]

    def test_features_are_those_around_the_module(self, target: EvaluationTarget) -> None:
        assert isinstance(target.inference.model, SLRNet)
        assert target.inference.model.cvlr is not None
        views = [torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(side)) for side in (32, 64)]
        pairs = features_around(target.inference.model, views)
        auxiliary = target.inference.model.auxiliary_head
        assert auxiliary is not None
        with torch.no_grad():
            before = [pair[0][None] for pair in pairs]
            again = target.inference.model.cvlr(before, [auxiliary(view) for view in before]).features
        for (_, after), expected in zip(pairs, again, strict=True):
            torch.testing.assert_close(after[None], expected)
        assert pairs[0][0].shape[1:] != pairs[1][0].shape[1:]

    def test_equal_features_have_equal_colours(self) -> None:
        one = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
        first, second, third = feature_rgb([one, one.flip(2), one[:, :2]])
        assert first.shape == (4, 5, 3)
        np.testing.assert_allclose(first[:, ::-1].astype(int), second, atol=1)
        np.testing.assert_allclose(first[:2].astype(int), third, atol=1)
        assert np.ptp(first) > 200
        assert feature_rgb([one[:2]])[0].shape == (4, 5, 3)


class TestCommand:
    @pytest.mark.parametrize("what", ["fig2", "fig3", "fig5"])
    @pytest.mark.slow
    def test_a_figure_of_one_checkpoint(self, what: str, tiny_run: Path, tmp_path: Path) -> None:
        assert main(["figures", what, str(tiny_run), "--out", str(tmp_path), "--images", "1", "--device", "cpu"]) == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"{what}.pdf", f"{what}.png"]
        with Image.open(tmp_path / f"{what}.png") as picture:
            assert picture.width == 1584  # 7.2 inches at 220 dots each
        assert (tmp_path / f"{what}.pdf").read_bytes().startswith(b"%PDF")

    @pytest.mark.slow
    def test_the_first_and_last_checkpoint_of_a_run(self, two_epochs: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        assert (
            main(["figures", "fig7", str(two_epochs), "--out", str(out), "--images", "1", "--num-iters", "1", "2"]) == 0
        )
        assert (out / "fig7.png").is_file()

    def test_of_three_checkpoints_the_first_and_the_last_are_taken(self, two_epochs: Path) -> None:
        first = load_checkpoint(two_epochs / "checkpoints" / "checkpoint-0001")
        state = replace(first.state, epoch=2, step=9, unfinished={"loss": 1.0})
        for epoch, step in ((1, 2), (2, 4)):
            own = replace(first.state, epoch=epoch, step=step)
            save_checkpoint(first.path.parent, config=first.config, state=own, model=first.model, optimizer={})
        save_checkpoint(first.path.parent, config=first.config, state=state, model=first.model, optimizer={})
        assert [found.state.step for found in _checkpoints("fig7", [two_epochs])] == [2, 9]

    def test_mistakes_are_named(
        self, tiny_run: Path, two_epochs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        one = str(two_epochs / "checkpoints" / "checkpoint-0001")
        cases = {
            "2 checkpoints are given; fig3 is of one": ["fig3", one, one],
            "name two checkpoints of different epochs": ["fig7", one, one],
            "gives 0": ["fig7", str(tmp_path)],
            "holds no checkpoint": ["fig5", str(tmp_path / "none")],
            "is no folder": ["tables", str(tmp_path / "none")],
            "there is no result below": ["tables", str(tmp_path)],
        }
        for expected, arguments in cases.items():
            assert main(["figures", *arguments, "--out", str(tmp_path / "out")]) == 2
            assert expected in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_network_without_codes(
        self, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make_plain: Callable[[Path], Path]
    ) -> None:
        plain = str(make_plain(tmp_path / "plain"))
        for what in ("fig2", "fig5"):
            assert main(["figures", what, plain, "--out", str(tmp_path / "out"), "--images", "1"]) == 2
            assert "without a low-rank module" in capsys.readouterr().err

    def test_codes_of_atoms_that_are_no_classes(self, target: EvaluationTarget, examination: Examination) -> None:
        model = copy.deepcopy(target.inference.model)
        assert isinstance(model, SLRNet)
        model.cvlr = CrossViewLowRank(8, method="free", dim=6, num_bases=5)
        with pytest.raises(ValueError, match="no low-rank module whose atoms are classes.*codes draws"):
            code_figure(replace(target, inference=replace(target.inference, model=model)), examination, number=1)


@pytest.fixture
def make_plain(tiny_run: Path) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        checkpoint = load_checkpoint(tiny_run)
        config = checkpoint.config.model_copy(
            update={"cvlr": checkpoint.config.cvlr.model_copy(update={"enabled": False})}
        )
        model = {k: v for k, v in checkpoint.model.items() if not k.startswith(("cvlr.", "auxiliary_head."))}
        save_checkpoint(folder / "checkpoints", config=config, state=checkpoint.state, model=model, optimizer={})
        return folder

    return make


class TestTables:
    @staticmethod
    def run_of(folder: Path, source: Path, *, classes: tuple[str, ...], setting: str = "wsss") -> Path:
        checkpoint = load_checkpoint(source)
        subset = "" if setting == "wsss" else "pixels"
        data = checkpoint.config.data.model_copy(update={"pixel_labeled_subset": subset})
        config = checkpoint.config.model_copy(update={"setting": setting, "data": data})
        state = replace(checkpoint.state, classes=classes)
        save_checkpoint(folder / "checkpoints", config=config, state=state, model=checkpoint.model, optimizer={})
        return folder

    @staticmethod
    def record(run: Path, name: str, protocol: str, miou: float, **more: Any) -> None:
        checkpoint = next((run / "checkpoints").iterdir())
        content = {
            "protocol": protocol,
            "split": "val",
            "images": 7,
            "metrics": {"val/miou": miou},
            "checkpoint": str(checkpoint),
            "epoch": 2,
        }
        place = run / "evaluations" / name
        place.mkdir(parents=True)
        (place / "evaluation.json").write_text(json.dumps(content | more))

    def test_ours_are_in_the_table_of_their_setting(self, tiny_run: Path, tmp_path: Path) -> None:
        weak = self.run_of(tmp_path / "we|ak", tiny_run, classes=VOC_CLASSES)
        self.record(weak, "a", "ms_crf", 0.5, before_crf={"ms": {"val/miou": 0.4}})
        self.record(weak, "b", "ss+gated_by_image_labels", 0.6)
        few = self.run_of(tmp_path / "few", tiny_run, classes=VOC_CLASSES[:4], setting="sss")
        self.record(few, "a", "ss", 0.3)
        other = self.run_of(tmp_path / "other", tiny_run, classes=("background", "ant"))
        self.record(other, "a", "ss", 0.2)
        checkpoint = str(next((weak / "checkpoints").iterdir()))
        job = {"checkpoint": checkpoint, "epoch": 2}
        quality = {"train": {"ms_crf+gated_by_image_labels": {"images": 9, "metrics": {"miou": 0.7}}}}
        (tmp_path / "pseudo").mkdir()
        (tmp_path / "pseudo" / "pseudo_labels.json").write_text(json.dumps({"job": job, "quality": quality}))
        out = tmp_path / "out"
        assert main(["figures", "tables", str(tmp_path), "--out", str(out)]) == 0
        parts = plain((out / "tables.md").read_text()).split("\n## ")[1:]
        ours = [[line for line in part.splitlines() if "ours: " in line] for part in parts]
        name, encoder = "| slrnet, we&#124;ak, epoch 2 |", "timm:test_efficientnet"
        assert ours[0] == [
            f"{name} | | 60.0 | ours: ss+gated_by_image_labels, 7 images |",
            f"{name} yes | 70.0 | | ours: ms_crf+gated_by_image_labels, 9 images |",
        ]
        assert ours[1] == [
            f"{name} {encoder} | I | 50.0 | | ours: ms_crf, 7 images |",
            f"{name} {encoder} | I | 40.0 | | ours: ms, 7 images |",
        ]
        assert ours[2] == ours[3] == ours[4] == []
        assert all("| not run |" in part for part in parts[2:5])
        assert len(ours[5]) == 1
        assert "**3 of VOC's 20 classes, not comparable**" in ours[5][0]
        assert "| slrnet, other, epoch 2 | val | 20.0 |" in parts[6]

    def test_a_record_whose_checkpoint_is_gone_is_named(self, tiny_run: Path, tmp_path: Path) -> None:
        run = self.run_of(tmp_path / "run", tiny_run, classes=VOC_CLASSES)
        (kept,) = (run / "checkpoints").iterdir()
        self.record(run, "moved", "ss", 0.5, checkpoint=f"/elsewhere/checkpoints/{kept.name}")
        self.record(run, "gone", "ss", 0.5, checkpoint="/elsewhere/checkpoints/checkpoint-0007")
        results, unused = read_results([run])
        assert [result.run for result in results] == ["run"]
        assert len(unused) == 1
        assert "checkpoint-0007 is gone" in unused[0]

    def test_the_papers_rows_are_marked_as_its_own(self) -> None:
        text = plain(write_tables([]))
        assert [len(table.rows) for table in PAPER_TABLES] == [9, 19, 8, 9, 8, 6]
        assert text.count("| paper |") == 59
        assert text.count("| not run |") == 6
        for table in PAPER_TABLES:
            assert all(len(row) == len(table.head) for row in table.rows)
        for line in (
            "| SLRNet | yes | 70.3 | 69.3 | paper |",
            "| SLRNet | ResNet38 | I | 67.2 | 67.6 | paper |",
            "| SLRNet | ResNet38 | I, P | 75.1 | 75.5 | paper |",
            "| SLRNet | ResNet101 | 72.9 | paper |",
        ):
            assert line in text


class TestProgress:
    def test_validation_images_are_the_first_by_the_best_checkpoint(
        self, target: EvaluationTarget, two_epochs: Path, tiny_data: ShardSet
    ) -> None:
        number = min(2, tiny_data.split("val").num_samples)
        picture = np.asarray(draw_validation(two_epochs, number=number))
        scores = sorted(examine(target, "val").scores, key=lambda score: score.index)[:number]
        for example in read_examples(target, "val", scores):
            for shown in (example.image, *(overlay(m, example, tiny_data) for m in (example.mask, example.truth))):
                assert holds(picture, shown)

    def test_history_has_a_row_for_each_image_and_a_column_for_each_epoch(self, tmp_path: Path) -> None:
        shades = {("a", 1): 40, ("a", 2): 80, ("b", 1): 120, ("b", 2): 160}
        (tmp_path / "history").mkdir()
        for (key, epoch), shade in shades.items():
            Image.new("RGB", (30, 20), (shade, 0, 0)).save(tmp_path / "history" / f"{key}-epoch-{epoch:03d}.png")
        picture = draw_history(tmp_path)
        assert picture is not None
        red = np.asarray(picture)[..., 0] * (np.asarray(picture)[..., 1] == 0)
        places = {of: np.argwhere(red == shade).min(axis=0) for of, shade in shades.items()}
        assert places["a", 1][0] == places["a", 2][0] < places["b", 1][0] == places["b", 2][0]
        assert places["a", 1][1] == places["b", 1][1] < places["a", 2][1] == places["b", 2][1]

    def test_a_run_without_pseudo_labels_has_one_picture(self, two_epochs: Path) -> None:
        assert write_pictures(two_epochs) == [two_epochs / "validation.png"]
        assert Image.open(two_epochs / "validation.png").size[0] > 0


def overlay(mask: np.ndarray, example: Any, data: ShardSet) -> np.ndarray:
    return np.asarray(draw_overlay(example.image, mask, data.info.palette_array()))


def holds(picture: np.ndarray, part: np.ndarray) -> bool:
    """Whether a picture shows another one somewhere, pixel for pixel."""
    height, width = part.shape[:2]
    corners = np.argwhere((picture[: -height + 1 or None, : -width + 1 or None] == part[0, 0]).all(axis=2))
    return any(np.array_equal(picture[y : y + height, x : x + width], part) for y, x in corners)
