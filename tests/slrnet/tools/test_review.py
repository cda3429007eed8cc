"""The review: what is doubtful without looking at masks, what a person decides, and the data set that comes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slrnet.checkpoints.checkpoint import load_checkpoint
from slrnet.cli.main import main
from slrnet.config import apply_overrides
from slrnet.data.catalog import IGNORE_INDEX
from slrnet.data.manifest import DataError, ShardSet, load_dataset
from slrnet.data.samples import SampleIndex, ShardFiles
from slrnet.data.supervision import supervision_of
from slrnet.evaluation.examine import EvaluationTarget
from slrnet.tools.review.desk import ReviewDesk, open_desk
from slrnet.tools.review.doubt import Doubt, measure_doubts
from slrnet.tools.review.reviewed_shards import SUBSET, write_reviewed


@pytest.fixture
def desk(tiny_run: Path, tmp_path: Path) -> ReviewDesk:
    return open_desk(tmp_path / "review", load_checkpoint(tiny_run), data=None, number=4, device="cpu")[0]


def doubts(run: Path, shards: ShardSet) -> list[tuple[int, Doubt]]:
    return measure_doubts(EvaluationTarget.of(load_checkpoint(run), shards, "cpu"))


def test_the_least_sure_come_first_and_no_mask_is_read(
    tiny_run: Path, tiny_data: ShardSet, write_tiny: Callable[..., ShardSet], tmp_path: Path
) -> None:
    ranked = doubts(tiny_run, tiny_data)
    assert sorted(index for index, _ in ranked) == list(range(9))
    figures = np.array([(-one.confidence, one.disagreement, one.loss) for _, one in ranked], dtype=float)
    view = tiny_data.split("train")
    classes = np.array([len(view.row(index).classes) for index, _ in ranked])
    assert len(set(classes.tolist())) > 1
    expected = []
    for own, shown in zip(figures, classes, strict=True):
        alike = figures[classes == shown]
        below = ((alike < own).sum(axis=0) + (alike == own).sum(axis=0) / 2).mean()
        expected.append(float(below / len(alike)))
    assert [one.doubt for _, one in ranked] == pytest.approx(expected, abs=1e-6)
    assert expected == sorted(expected, reverse=True)
    # The same images with bytes for masks that no decoder takes.
    broken = write_tiny(tmp_path / "broken", mask_bytes=lambda sample, png: b"no mask")
    assert doubts(tiny_run, broken) == ranked


def test_only_masks_that_training_may_not_see_are_reviewed(tiny_run: Path, tiny_data: ShardSet) -> None:
    checkpoint = load_checkpoint(tiny_run)
    seen = apply_overrides(checkpoint.config, ["setting=sss_image_labels", "data.pixel_labeled_subset=pixels"])
    target = EvaluationTarget.of(checkpoint, tiny_data, "cpu")
    target = EvaluationTarget(type(checkpoint)(**vars(checkpoint) | {"config": seen}), tiny_data, target.inference)
    members = np.flatnonzero(tiny_data.split("train").in_subset("pixels"))
    assert {index for index, _ in measure_doubts(target)} == set(range(9)) - set(members.tolist())


def test_decisions_become_a_subset_with_its_masks(
    desk: ReviewDesk, tiny_run: Path, tiny_data: ShardSet, tmp_path: Path
) -> None:
    accepted, redrawn, discarded, undecided = desk.keys
    mask = np.zeros_like(desk.mask(redrawn))
    mask[:4], mask[4:8] = 3, IGNORE_INDEX
    desk.decide(accepted, "accepted", desk.mask(accepted))
    desk.decide(redrawn, "redrawn", mask)
    desk.decide(discarded, "accepted", desk.mask(discarded))
    desk.decide(discarded, "discarded")
    again = ReviewDesk(desk.folder, desk.record)  # as after a restart
    assert again.decisions == {accepted: "accepted", redrawn: "redrawn", discarded: "discarded"}
    config = load_checkpoint(tiny_run).config
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        assert write_reviewed(tiny_data, config, again.masks(), folder, made_by="slrnet review") == 2
    assert all((folders[1] / file.name).read_bytes() == file.read_bytes() for file in folders[0].iterdir())
    written = load_dataset(folders[0], check=True)
    next_config = apply_overrides(config, ["setting=sss_image_labels", f"data.pixel_labeled_subset={SUBSET}"])
    view, before = written.split("train"), tiny_data.split("train")
    seen = supervision_of(next_config, written).pixel_labels.array.tolist()
    assert {view.key(place) for place in seen} == {accepted, redrawn}
    index = SampleIndex(shard_set=written, split=view)
    with ShardFiles(index) as files, ShardFiles(SampleIndex(shard_set=tiny_data, split=before)) as old_files:
        for place in range(view.num_samples):
            row, contents, old = view.row(place), files.read(place), old_files.read(place)
            assert (row.key, contents["jpg"]) == (before.key(place), old["jpg"])
            if row.key == redrawn:
                decoded = index.decode_mask(row, contents)
                assert decoded is not None
                assert (decoded.numpy() == mask).all()
                assert row.classes == tuple(sorted({*before.row(place).classes, 3}))
            elif row.key in (discarded, undecided):
                assert contents["png"] == old["png"]  # to measure with; the subset does not name it


def test_a_second_review_keeps_the_first_ones_masks(
    desk: ReviewDesk, tiny_run: Path, tiny_data: ShardSet, tmp_path: Path
) -> None:
    config = load_checkpoint(tiny_run).config
    one, two = desk.keys[:2]
    write_reviewed(tiny_data, config, {one: desk.mask(one)}, tmp_path / "one", made_by="slrnet review")
    after = apply_overrides(config, ["setting=sss_image_labels", f"data.pixel_labeled_subset={SUBSET}"])
    first = load_dataset(tmp_path / "one")
    assert write_reviewed(first, after, {two: desk.mask(two)}, tmp_path / "two", made_by="slrnet review") == 2
    view = load_dataset(tmp_path / "two").split("train")
    assert {view.key(place) for place in np.flatnonzero(view.in_subset(SUBSET)).tolist()} == {one, two}


def test_refusals(desk: ReviewDesk, tiny_run: Path, tiny_data: ShardSet, tmp_path: Path) -> None:
    checkpoint, key = load_checkpoint(tiny_run), desk.keys[0]
    with pytest.raises(DataError, match="no mask was accepted or redrawn yet"):
        write_reviewed(tiny_data, checkpoint.config, desk.masks(), tmp_path / "none", made_by="slrnet review")
    with pytest.raises(DataError, match=r"its image \(.*; correct the mask of this image"):
        desk.decide(key, "redrawn", np.zeros((2, 2), dtype=np.uint8))
    with pytest.raises(DataError, match=r"has the ids \[9\]; the classes are background, ant"):
        desk.decide(key, "redrawn", np.full_like(desk.mask(key), 9))
    record = desk.folder / "review.json"
    record.write_text(json.dumps({**desk.record, "checkpoint": "other"}))
    with pytest.raises(DataError, match="holds another review .checkpoint other, now .*; choose another --out"):
        open_desk(desk.folder, checkpoint, data=None, number=4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(DataError, match="is not empty and holds no review"):
        open_desk(tmp_path / "full", checkpoint, data=None, number=4)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("form", ["labelme", "coco"])
def test_a_tool_gets_the_images_and_gives_masks_back(
    form: str, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pycocotools")
    given = ["review", str(tiny_run), "--out", str(tmp_path / "review"), "--images", "9"]
    assert main([*given, "--hand-out", f"{form}={tmp_path / 'tool'}"]) == 0
    export = tmp_path / "tool" / ("images" if form == "labelme" else "coco.json")
    assert main([*given, "--corrected", str(export)]) == 0
    assert main([*given, "--write", str(tmp_path / "next")]) == 0
    said = capsys.readouterr().out
    told = re.search(r"([1-9]) corrected masks of 9", said)  # the others showed a person nothing to correct
    assert told
    assert f"training may see the masks of {told[1]} images (subset reviewed)" in said
    assert f"slrnet train --init {tiny_run} --data {tmp_path / 'next'} --set setting=sss_image_labels" in said
    desk = ReviewDesk(tmp_path / "review", json.loads((tmp_path / "review" / "review.json").read_text()))
    assert len(desk.decisions) == int(told[1])
    for key in desk.decisions:
        proposed = desk.folder / "proposed" / f"{key}.png"
        same = (desk.mask(key) == np.asarray(Image.open(proposed))).mean()
        assert same == 1 if form == "coco" else same > 0.9


def test_a_stroke_paints_its_class() -> None:
    pytest.importorskip("nicegui")
    from slrnet.tools.review.page import paint

    mask = paint(np.zeros((20, 30), dtype=np.uint8), [(5.0, 10.0), (25.0, 10.0)], label=2, width=6.0)
    assert set(np.unique(mask)) == {0, 2}
    assert (mask[10, 5:26] == 2).all()
    assert mask[3].sum() == mask[17].sum() == 0
    assert (paint(mask, [(15.0, 10.0)], label=0, width=6.0)[10, 13:18] == 0).all()


@pytest.mark.slow
def test_a_mask_is_redrawn_on_the_page(
    tiny_run: Path,
    tmp_path: Path,
    browser: Any,
    serve: Callable[..., AbstractContextManager[str]],
    keep_screenshot: Callable[[str], None],
) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def text(selector: str) -> str:
        return str(browser.execute_script("return document.querySelector(arguments[0])?.innerText || ''", selector))

    def wait(condition: Any) -> None:
        WebDriverWait(browser, 120, poll_frequency=0.2).until(lambda _: condition(), "what was waited for")

    review = tmp_path / "review"
    with serve("slrnet", "review", str(tiny_run), "--out", str(review), "--images", "2") as address:
        browser.get(address)
        wait(lambda: "1 of 2" in text(".status"))
        picture = browser.find_element(By.CSS_SELECTOR, ".picture img")
        wait(lambda: picture.size["height"] > 50)
        ActionChains(browser).move_to_element(picture).click_and_hold().move_by_offset(60, 20).release().perform()
        browser.find_element(By.CSS_SELECTOR, ".accept").click()
        wait(lambda: "2 of 2" in text(".status"))
        keep_screenshot("review")
        browser.find_element(By.CSS_SELECTOR, ".discard").click()
        wait(lambda: "all are decided" in text(".status"))
    desk = ReviewDesk(review, json.loads((review / "review.json").read_text()))
    assert desk.decisions == {desk.keys[0]: "redrawn", desk.keys[1]: "discarded"}
    name = f"{desk.keys[0]}.png"
    assert (review / "masks" / name).read_bytes() != (review / "proposed" / name).read_bytes()
