"""Fonts for the texts in pictures. Pillow's own font has Latin letters alone; an installed one serves other scripts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TypeAlias

from PIL import ImageFont

from slrnet.data.catalog import class_keys
from slrnet.storage.shown import logger_of

__all__ = ["Font", "drawable_names", "font_families", "font_for"]

Font: TypeAlias = ImageFont.ImageFont | ImageFont.FreeTypeFont
"""What Pillow draws texts with."""
_LISTED = 10
_log = logger_of(__name__)


def font_for(text: str, size: int) -> Font:
    """A font of `size` pixels with all letters of a text; if no installed one has them, the one that has the most."""
    file = _best_file(frozenset(text))
    return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)


@cache
def drawable_names(classes: Sequence[str]) -> tuple[str, ...]:
    """Names of classes for pictures: a name for which no font is installed gives way to its key.

    A warning says which, once. `classes` is a tuple, all K names, because keys depend on all of them.
    """
    shown = tuple(name if _is_drawable(name) else key for name, key in zip(classes, class_keys(classes), strict=True))
    replaced = [f"{key} is {name}" for key, name in zip(shown, classes, strict=True) if key != name]
    if replaced:
        more = f" and {len(replaced) - _LISTED} more" if len(replaced) > _LISTED else ""
        _log.warning(
            "no installed font has the letters of %d classes; pictures show keys instead: %s%s. Install a font for the "
            "script, such as the package fonts-noto-cjk",
            len(replaced),
            ", ".join(replaced[:_LISTED]),
            more,
        )
    return shown


def font_families(texts: Sequence[str]) -> list[str]:
    """Families for matplotlib's `font.family` that together have the letters of all texts, as far as any has them."""
    from matplotlib.font_manager import FontProperties

    files = dict.fromkeys(_best_file(frozenset(text)) for text in texts)
    return ["DejaVu Sans", *(FontProperties(fname=file).get_name() for file in files if file)]


def _is_drawable(text: str) -> bool:
    letters = frozenset(text)
    return _needed(letters) <= _letters_of(_best_file(letters))


@cache
def _best_file(letters: frozenset[str]) -> str | None:
    """The font file for some letters; None for Pillow's own font, if that has them or no other has more of them."""
    needed, best, most = _needed(letters), None, -1
    if all(code < 128 for code in needed):
        return None
    for file in (None, *_installed()):
        count = len(needed & _letters_of(file))
        if count > most:
            best, most = file, count
        if count == len(needed):
            break
    return best


def _needed(letters: frozenset[str]) -> frozenset[int]:
    return frozenset(ord(letter) for letter in letters if not letter.isspace())


@cache
def _installed() -> tuple[str, ...]:
    """Font files, upright sans serif of normal weight first; the same order on each call."""
    from matplotlib.font_manager import fontManager  # takes a second, and most pictures need no other font

    # matplotlib's font of last resort has a box with the script's name for every letter.
    fonts = [font for font in fontManager.ttflist if not font.name.startswith("Last Resort")]
    order = {
        font.fname: ("sans" not in font.name.casefold(), font.style != "normal", str(font.weight) != "400", font.fname)
        for font in fonts
    }
    return tuple(sorted(order, key=order.__getitem__))


@cache
def _letters_of(file: str | None) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    if file is not None:
        return frozenset(FT2Font(file).get_charmap())
    own = ImageFont.load_default(10)
    if not isinstance(own, ImageFont.FreeTypeFont):
        return frozenset(range(128))  # Pillow without FreeType
    own.path.seek(0)  # type: ignore[union-attr]
    return frozenset(FT2Font(own.path).get_charmap())
