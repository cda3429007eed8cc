"""Texts in pictures: a font that has their letters, or the class's key where none is installed."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from PIL import ImageFont

from slrnet.viz.lettering import Font, drawable_names, font_families, font_for

NOWHERE = "\U000f0000"
"""A character of a private area, for which no font of a distribution has a picture."""


def _pixels(font: Font, text: str) -> bytes:
    mask = font.getmask(text)
    return np.asarray(mask).tobytes() + bytes(mask.size)


def test_latin_letters_keep_pillows_own_font() -> None:
    assert _pixels(font_for("traffic light", 15), "traffic light") == _pixels(
        ImageFont.load_default(15), "traffic light"
    )


@pytest.mark.parametrize("text", ["собака", "σκύλος", "dig, собака"])
def test_letters_of_other_scripts_come_from_an_installed_font(text: str) -> None:
    font = font_for(text, 15)
    missing = _pixels(font, NOWHERE)
    pictures = [_pixels(font, letter) for letter in set(text) - {" "}]
    assert missing not in pictures
    assert len(set(pictures)) == len(pictures)
    assert drawable_names(("background", text)) == ("background", text)
    assert "DejaVu Sans" in font_families([text])


def test_a_class_without_a_font_shows_its_key_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    classes = ("background", NOWHERE, "dog", *(f"{NOWHERE}{i}" for i in range(10)))
    with caplog.at_level(logging.WARNING):
        shown = drawable_names(classes)
    assert shown[:3] == ("background", "class_1", "dog")
    (message,) = caplog.messages
    assert "no installed font has the letters of 11 classes" in message
    assert f"class_1 is {NOWHERE}" in message
    assert "and 1 more" in message
    assert "fonts-noto-cjk" in message
    caplog.clear()
    assert drawable_names(classes) == shown
    assert not caplog.messages
