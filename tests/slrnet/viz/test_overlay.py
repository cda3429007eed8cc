from __future__ import annotations

import numpy as np

from slrnet.data.catalog import voc_palette
from slrnet.viz.overlay import draw_overlay

PALETTE = voc_palette()


def grey_image(height: int, width: int, level: int = 100) -> np.ndarray:
    return np.full((height, width, 3), level, dtype=np.uint8)


class TestDrawOverlay:
    def test_values_by_hand(self) -> None:
        # A 7x7 block of class 1 (128, 0, 0) in a 9x9 picture: its core is colour over grey, its rim nearly white.
        mask = np.zeros((9, 9), dtype=np.int64)
        mask[1:8, 1:8] = 1
        out = np.asarray(draw_overlay(grey_image(9, 9), mask, PALETTE))
        assert out[0, 0].tolist() == [55, 55, 55]  # 0.55 * 100
        core = [round(0.62 * 128 + 0.38 * 100), 38, 38]
        assert (out[2:7, 2:7] == core).all()
        assert core == [117, 38, 38]
        rim = [round(0.35 * 117.36 + 0.65 * 255), round(0.35 * 38 + 0.65 * 255), round(0.35 * 38 + 0.65 * 255)]
        assert out[1, 1].tolist() == rim
        assert out[1, 4].tolist() == rim

    def test_void_is_striped_light_and_dark(self) -> None:
        mask = np.full((8, 8), 255)
        out = np.asarray(draw_overlay(grey_image(8, 8), mask, PALETTE))
        light, dark = [round(0.5 * 250 + 0.5 * 55)] * 3, [round(0.5 * 150 + 0.5 * 55)] * 3
        assert {tuple(pixel) for pixel in out.reshape(-1, 3).tolist()} == {tuple(light), tuple(dark)}
        assert out[0, 0].tolist() == light
        assert out[0, 4].tolist() == dark
        assert out[4, 0].tolist() == dark

    def test_classes_that_touch_are_parted_by_an_outline(self) -> None:
        mask = np.ones((5, 10), dtype=np.uint8)
        mask[:, 5:] = 2
        out = np.asarray(draw_overlay(grey_image(5, 10), mask, PALETTE)).astype(int)
        assert (out[:, 4:6].sum(-1) > out[:, 2:3].sum(-1) + 150).all()
        assert (out[:, :4] == out[0, 0]).all()

    def test_hue_comes_from_the_class_alone(self) -> None:
        colourful = np.zeros((6, 6, 3), dtype=np.uint8)
        colourful[..., 1] = 200
        out = np.asarray(draw_overlay(colourful, np.zeros((6, 6), int), PALETTE))
        assert (out[..., 0] == out[..., 1]).all()
        assert (out[..., 1] == out[..., 2]).all()

    def test_inputs_stay_as_they_are(self) -> None:
        image, mask = grey_image(6, 6), np.full((6, 6), 255)
        draw_overlay(image, mask, PALETTE)
        assert (image == 100).all()
        assert (mask == 255).all()
