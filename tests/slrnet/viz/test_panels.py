from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slrnet.data.catalog import VOC_CLASSES, voc_palette
from slrnet.data.manifest import DatasetInfo
from slrnet.viz import panels
from slrnet.viz.overlay import draw_overlay
from slrnet.viz.panels import class_legend, draw_class_scores, draw_panel

PALETTE = voc_palette()
NAMES = ("background", "cat", "dog", "horse")


def info_of(classes: tuple[str, ...]) -> DatasetInfo:
    colors = tuple((int(red), int(green), int(blue)) for red, green, blue in PALETTE[: len(classes)])
    return DatasetInfo(name="d", classes=classes, palette=colors, counts={}, fingerprint="", made_by="")


INFO, VOC = info_of(NAMES), info_of(VOC_CLASSES)


def grey_image(height: int, width: int, level: int = 100) -> np.ndarray:
    return np.full((height, width, 3), level, dtype=np.uint8)


def panel_of(image: np.ndarray, *masks: np.ndarray | None, info: DatasetInfo, title: str = "") -> Image.Image:
    captions = ("raw mask", "refined mask", "pseudo label", "ground truth")
    named = {caption: mask for caption, mask in zip(captions, masks, strict=True) if mask is not None}
    return draw_panel(image, named, info, title=title)


class TestDrawPanel:
    def test_one_tile_for_each_stage(self) -> None:
        image = grey_image(200, 300)
        mask = np.zeros((200, 300), dtype=np.int64)
        with_truth = panel_of(image, mask, mask, mask, mask, info=INFO)
        without = panel_of(image, mask, mask, mask, None, info=INFO)
        assert with_truth.width == 10 + 3 * 310
        assert without.width == 10 + 2 * 310
        assert with_truth.height == without.height

    def test_order_and_place_of_the_tiles(self) -> None:
        image = grey_image(240, 240)
        masks = [np.full((240, 240), index) for index in (1, 2, 3, 0)]
        page = np.asarray(panel_of(image, *masks, info=INFO))
        corners = [(34 + row * (24 + 240 + 10), 10 + column * 250) for row in range(2) for column in range(3)]
        tiles = [page[top : top + 240, left : left + 240] for top, left in corners[:5]]
        assert (tiles[0] == image).all()
        for tile, mask in zip(tiles[1:], masks, strict=True):
            assert (tile == np.asarray(draw_overlay(image, mask, PALETTE))).all()

    def test_small_images_are_enlarged_by_a_whole_factor(self) -> None:
        mask = np.zeros((48, 64), dtype=np.int64)
        mask[:, 32:] = 1
        page = panel_of(grey_image(48, 64), mask, mask, mask, None, info=INFO)
        assert page.width == 10 + 2 * (4 * 64 + 10)
        tile = np.asarray(page)[34 : 34 + 4 * 48, 10 + 266 : 10 + 266 + 256]
        assert (tile[:, :128] == 55).all()
        assert (tile[:, 128 + 1 :] == [117, 38, 38]).all()

    def test_title_adds_a_line(self) -> None:
        image, mask = grey_image(240, 240), np.zeros((240, 240), int)
        plain = panel_of(image, mask, mask, mask, None, info=INFO)
        titled = panel_of(image, mask, mask, mask, None, info=INFO, title="2007_000032")
        assert titled.height == plain.height + 24
        assert (np.asarray(titled)[:30, :150] < 100).any()

    def test_legend_names_what_occurs_in_any_mask(self) -> None:
        entries = class_legend([np.array([[2, 0]]), np.array([[255]])], PALETTE, NAMES)
        assert entries == [("background", (70, 70, 70)), ("dog", tuple(PALETTE[2].tolist())), ("void", None)]
        assert class_legend([np.array([[2, 0, 255]])], PALETTE, NAMES, foreground_only=True) == entries[1:2]
        image, mask = grey_image(240, 240), np.zeros((240, 240), int)
        refined = mask.copy()
        refined[100:200, 100:200] = 3
        page = np.asarray(panel_of(image, mask, refined, mask, None, info=INFO))
        legend = page[10 + 2 * (24 + 240 + 10) :].reshape(-1, 3).tolist()
        assert PALETTE[3].tolist() in legend
        assert PALETTE[1].tolist() not in legend

    def test_long_legends_wrap_inside_the_page(self) -> None:
        widths = [100.0, 100.0, 100.0, 700.0, 100.0]
        # 20 for swatch and space, 20 behind: entries of 140; the fourth does not fit into 500 and stands alone.
        assert panels._legend_positions(widths, 500) == [(10, 0), (150, 0), (290, 0), (10, 1), (10, 2)]
        ids = np.arange(21).repeat(100).reshape(-1, 60)
        image = grey_image(*ids.shape)
        page = np.asarray(panel_of(image, ids, ids, ids, None, info=VOC))
        assert (page[:, -5:] == 255).all()
        assert (page[-3:] == 255).all()

    def test_what_does_not_fit_is_refused(self) -> None:
        image, mask = grey_image(8, 8), np.zeros((8, 8), int)
        with pytest.raises(ValueError, match=r"refined mask has shape \(4, 8\), its image \(8, 8\); resize the mask"):
            panel_of(image, mask, mask[:4], mask, None, info=INFO)
        with pytest.raises(ValueError, match=r"pseudo label holds the ids \[4\]; known are 0 to 3, and 255"):
            panel_of(image, mask, mask, mask + 4, None, info=INFO)
        with pytest.raises(ValueError, match=r"mask holds the ids \[-1\]"):
            draw_overlay(image, mask - 1, PALETTE)
        with pytest.raises(ValueError, match=r"must be \(H, W, 3\) uint8"):
            draw_overlay(image.astype(np.float32), mask, PALETTE)

    def test_a_photograph_with_its_mask(self, voc6: Path) -> None:
        key = (voc6 / "ImageSets" / "Segmentation" / "val.txt").read_text().split()[0]
        image = np.asarray(Image.open(voc6 / "JPEGImages" / f"{key}.jpg").convert("RGB"))
        truth = np.asarray(Image.open(voc6 / "SegmentationClass" / f"{key}.png"))
        page = panel_of(image, truth, truth, truth, truth, info=VOC, title=key)
        found = {tuple(c) for c in np.asarray(page)[-40:].reshape(-1, 3).tolist()}
        for index in set(np.unique(truth).tolist()) - {0, 255}:
            assert tuple(PALETTE[index].tolist()) in found


class TestDrawClassScores:
    def drawn(self, iou: list[float], names: tuple[str, ...] = NAMES) -> np.ndarray:
        scores = {"iou": iou, "fdr": [0.5] * len(iou), "fnr": [0.25] * len(iou)}
        return np.asarray(draw_class_scores(scores, info_of(names), title="val"))

    def test_bars_are_as_long_as_the_shares(self) -> None:
        page = self.drawn([0.0, 0.5, 1.0, math.nan])
        for place, length in ((1, 75), (2, 150), (3, 0)):
            row = page[10 + 2 * 24 + 20 * place + 8, 160:311]
            assert abs((row == PALETTE[place]).all(axis=1).sum() - length) <= 2

    @pytest.mark.parametrize(("classes", "columns"), [(21, 1), (51, 1), (81, 2), (201, 4)])
    def test_many_classes_stand_in_columns(self, classes: int, columns: int) -> None:
        names = tuple(f"a class with a name too long for its column {i}" for i in range(classes))
        page = self.drawn([0.5] * classes, names)
        assert page.shape[1] == columns * (150 + 150 + 3 * 52 + 30) + 10
        assert page.shape[0] <= 2 * 24 + 51 * 20 + 20
        for column in range(columns):  # a name ends before its bar
            left = 10 + column * 486
            assert (page[60:, left + 142 : left + 149] == 255).all()
