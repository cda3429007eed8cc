"""Which mask belongs to which image: by the same path, else by what people and tools make of it.

A way of naming counts only where it leaves one mask for one image, among all of them. Whatever is not of the same path
is said.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence

from data_prep.shard_writer import listed
from slrnet.storage.shown import say

__all__ = ["masks_among", "pair_masks"]

_MASK_WORDS = (
    "masks?|segmentations?|segmented|seg|labels?|lbl|gt|ground[_-]?truth|annotations?|ann|gtfine_labelids|labelids"
)
_IMAGE_WORDS = "images?|img|leftimg8bit|rgb|sat|photo"
_MASK_FOLDERS = re.compile(
    r"(?i)masks?|labels?|annotations?|gt|gtfine|ground_?truth|seg|segmentations?|segmentationclass"
)
_IMAGE_FOLDERS = re.compile(r"(?i)images?|imgs?|jpegimages|photos?|leftimg8bit|rgb")
_Form = Callable[[str], str]

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".heic", ".heif", ".hif", ".webp", ".avif")


def pair_masks(images: Mapping[str, str], masks: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Finds the mask of each image.

    Args:
        images: Paths of the images below their folder, by key.
        masks: Paths of the masks below theirs.

    Returns:
        Masks by key of the image; and the masks that belong to no image, or to several.
    """
    pairs: dict[str, str] = {}
    free = set(masks)
    for what, of_image, of_mask in _WAYS:
        if not free or len(pairs) == len(images):
            break
        keys, files = _single(list(images), list(images.values()), of_image), _single(masks, masks, of_mask)
        found = {
            keys[name]: files[name]
            for name in keys
            if name in files and keys[name] not in pairs and files[name] in free
        }
        if found and what:
            texts = [f"{mask} for {images[key]}" for key, mask in found.items()]
            say(f"--masks: {len(found)} mask(s) {what} belong to images: {listed(texts)}")
        pairs |= found
        free -= set(found.values())
    return pairs, sorted(free)


def masks_among(paths: Sequence[str]) -> set[str]:
    """Of images and masks in one folder, the masks: named as an image with a word such as `_mask`, beside a photo of
    the same name, or in a folder `masks` beside a folder `images`."""
    stems: dict[str, list[str]] = {}
    for path in paths:
        stems.setdefault(_stem(path), []).append(path)
    apart = {path for path in paths if any(map(_MASK_FOLDERS.fullmatch, path.split("/")[:-1]))}
    images = {_image_place(path) for path in paths if path not in apart}
    masks = {path for path in apart if _mask_place(path) in images}
    for stem, same in stems.items():
        photos = [path for path in same if path.lower().endswith(PHOTO_SUFFIXES)]
        if (plain := _without(stem, _MASK_WORDS)) != stem and _names_image(plain, stems):
            masks |= set(same)
        elif len(photos) == 1:
            masks |= set(same) - set(photos)
    return masks


def _names_image(plain: str, stems: Mapping[str, object]) -> bool:
    return plain in stems or any(f"{plain}{word}" in stems for word in ("_image", "_img", "_sat", "_rgb"))


def _single(keys: Sequence[str], paths: Sequence[str], form: _Form) -> dict[str, str]:
    """Keys by the form of their paths, where one alone has that form."""
    found: dict[str, str | None] = {}
    for key, path in zip(keys, paths, strict=True):
        name = form(path)
        if name:
            found[name] = None if name in found else key
    return {name: key for name, key in found.items() if key is not None}


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _png_stem(path: str) -> str:
    return _stem(path) if path.endswith(".png") else ""


def _nfc(path: str) -> str:
    return unicodedata.normalize("NFC", _stem(path))


def _nfc_path(path: str) -> str:
    return unicodedata.normalize("NFC", path)


def _without(stem: str, words: str) -> str:
    """A path without suffix, less a word such as `_mask` at the beginning or end of its name."""
    folder, name = os.path.split(stem)
    plain = re.sub(rf"(?i)(?:[_\-. ](?:{words})|(?<=[a-z0-9])(?:Mask|Seg|Label))$", "", name)
    plain = re.sub(rf"(?i)^(?:{words})[_\-. ]", "", plain)
    return os.path.join(folder, plain or name)


def _plain_mask(path: str) -> str:
    """Of a mask also without the suffix of its image: `a.jpg_mask.png` as `a`."""
    plain = _without(_nfc(path), _MASK_WORDS)
    return re.sub(r"(?i)\.(jpe?g|png|tiff?|bmp|webp)$", "", plain)


def _plain_image(path: str) -> str:
    return _without(_nfc(path), _IMAGE_WORDS)


def _image_place(path: str) -> str:
    """`train/images/a.jpg` as `train/a`."""
    *folders, name = _plain_image(path).split("/")
    return "/".join([*(folder for folder in folders if not _IMAGE_FOLDERS.fullmatch(folder)), name])


def _mask_place(path: str) -> str:
    """`train/masks/a.png` as `train/a`."""
    *folders, name = _plain_mask(path).split("/")
    return "/".join([*(folder for folder in folders if not _MASK_FOLDERS.fullmatch(folder)), name])


def _loose(path: str) -> str:
    return re.sub(r"[\s_.\-]+", "_", path.casefold())


def _then(change: _Form, form: _Form) -> _Form:
    return lambda path: change(form(path))


_FORMS: tuple[tuple[_Form, _Form], ...] = ((_nfc, _nfc), (_nfc, _plain_mask), (_plain_image, _plain_mask))
_WAYS: tuple[tuple[str, _Form, _Form], ...] = (
    ("", _stem, _png_stem),
    ("of another suffix or normalization", _nfc, _nfc),
    ("that are named for the image's file", _nfc_path, _nfc),
    *(("with a word such as `_mask` in their names", *forms) for forms in _FORMS[1:]),
    *(("in another case", _then(str.casefold, image), _then(str.casefold, mask)) for image, mask in _FORMS),
    *(("with other separators", _then(_loose, image), _then(_loose, mask)) for image, mask in _FORMS),
    ("in a folder of masks beside that of images", _image_place, _mask_place),
    *(("in another folder", _then(os.path.basename, image), _then(os.path.basename, mask)) for image, mask in _FORMS),
)
"""Ways of naming, the strictest first: what is said of such masks, the form of an image's path, that of a mask's."""
