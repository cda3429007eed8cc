"""The depth of a set of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from data_prep.depths import check_depth, choose_depth
from data_prep.workers import ConversionPool
from slrnet.data.manifest import DataError

RAMP = np.linspace(0, 1, 4096).reshape(64, 64)
WIDE = (RAMP * 60_000).astype(np.uint16)


def chosen(folder: Path, option: str, images: Sequence[npt.NDArray[Any]], processes: int = 1) -> str:
    paths = []
    for place, image in enumerate(images):
        paths.append(str(folder / f"{place}.tif"))
        Image.fromarray(image).save(paths[-1])
    with ConversionPool(processes) as workers:
        return str(choose_depth(option, paths, workers))


@pytest.mark.parametrize(
    ("most", "kind", "depth"),
    [
        (255, "uint16", "uint16=8"),
        (256, "uint16", "uint16=10"),
        (4095, "uint16", "uint16=12"),
        (4096, "uint16", "uint16=14"),
        (65535, "uint16", "uint16=16"),
        (200, "int32", "int32=8"),
        (3000, "int32", "int32=12"),
        (1, "float32", "float32=0..1"),
        (255, "float32", "float32=0..255"),
        (60_000, "float32", "float32=0..65535"),
    ],
)
def test_the_smallest_depth_that_holds_all_values(tmp_path: Path, most: float, kind: str, depth: str) -> None:
    brightest = (RAMP * most).astype(kind)
    assert chosen(tmp_path, "auto", [brightest // 4 * 3, brightest, np.zeros_like(brightest)]) == depth


@pytest.mark.slow
def test_the_whole_set_decides_with_any_number_of_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [(RAMP * most).astype(np.uint16) for most in (900, 800, 1024)]
    assert chosen(tmp_path, "auto", images) == chosen(tmp_path, "auto", images, processes=2) == "uint16=12"
    said = "depth uint16=12: 3 image(s) have uint16 samples from 0 to 1024; 0 is black, 4095 white"
    assert capsys.readouterr().out.splitlines() == [said, said]


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ([(RAMP * 4095).astype(np.uint16), WIDE], r"65535 would be white, and 1 of them nearly black or white.*0\.tif"),
        ([(RAMP * 4095).astype(np.uint16) + 61_000, WIDE], r"1 of them nearly black or white.*0\.tif"),
        ([(RAMP * 3000).astype(np.uint16) + 28_000], r"too flat for 0\.\.65535"),
        ([np.full((9, 9), 3000, dtype=np.uint16)], "all within 0 of each other"),
        ([(RAMP * 4000 - 1000).astype(np.int32)], "from -1000 to 3000, which no common depth has"),
        ([(RAMP * 1e6).astype(np.int32)], r"from 0 to 1e\+06, which no common depth has"),
        ([(RAMP - 0.5).astype(np.float32)], r"from -0\.5 to 0\.5, which no common depth has"),
        ([(RAMP * 4095).astype(np.uint16), RAMP.astype(np.float32)], r"say so: --depth float32=0\.\.1,uint16=12"),
    ],
)
def test_what_may_be_wrong_is_refused(tmp_path: Path, images: list[npt.NDArray[Any]], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        chosen(tmp_path, "auto", images)


@pytest.mark.parametrize(
    ("option", "kind", "depth"),
    [
        ("percentiles", "uint16", "uint16=20..4075"),
        ("percentiles:0..100", "uint16", "uint16=0..4095"),
        ("percentiles:10..50", "uint16", "uint16=409..2048"),
        ("percentiles:0..50", "int32", "int32=0..2048"),
    ],
)
def test_percentiles_are_of_all_images(tmp_path: Path, option: str, kind: str, depth: str) -> None:
    values = np.arange(4096).astype(kind).reshape(64, 64)
    got = chosen(tmp_path, option, [values[::2], values[1::2]])
    low, high = (float(text) for text in got.partition("=")[2].split(".."))
    wanted = [float(text) for text in depth.partition("=")[2].split("..")]
    assert got.startswith(kind)
    assert low == pytest.approx(wanted[0], abs=1)
    assert high == pytest.approx(wanted[1], abs=1 if kind == "uint16" else 2048 / 128)


def test_percentiles_of_negative_floats(tmp_path: Path) -> None:
    got = chosen(tmp_path, "percentiles:25..75", [(RAMP * 4 - 2).astype(np.float32)])
    low, high = (float(text) for text in got.removeprefix("float32=").split(".."))
    assert (low, high) == pytest.approx((-1, 1), rel=1 / 64)


def test_what_the_user_names_is_taken(tmp_path: Path) -> None:
    assert chosen(tmp_path, "-160..240", [(RAMP * 4000 - 1000).astype(np.int32)]) == "-160..240"
    assert chosen(tmp_path, "auto", [(RAMP * 255).astype(np.uint8)]) == ""


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bands = np.zeros((4, 4, 4), dtype=np.uint8)
    assert chosen(tmp_path, "auto", [bands] * 11 + [bands[..., :3]]) == ""
    said = capsys.readouterr().err
    assert said.startswith("11 image(s), each has 4 bands; the first three are taken: ")
    assert "9.tif, ... and 1 more" in said


@pytest.mark.parametrize("option", ["percentiles:9", "percentiles:50..10", "percentiles:-1..9", "automatic", "7"])
def test_other_words_are_refused(option: str) -> None:
    with pytest.raises(DataError, match=r"depth|--depth"):
        check_depth(option)


@pytest.mark.parametrize("option", ["auto", "12", "0..1", "percentiles", "percentiles:1..99", "uint16=12,float32=0..1"])
def test_words_that_are_allowed(option: str) -> None:
    assert check_depth(option) is None
