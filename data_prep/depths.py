"""The depth of a set of images: which values of its images with more than 8 bits become black and white.

`--depth` is a text of `slrnet.data.depth`, or one of two words that ask for ranges from all images, never from one:

- `auto`: the smallest of 8, 10, 12, 14 and 16 bits that holds all values; for floats the smallest of 0..1, 0..255 and
  0..65535. Refused where that may be wrong: negative or larger values, images that it would leave nearly black or
  white, sets that use less than an eighth of the range, and sets with several types of such samples.
- `percentiles` or `percentiles:LOW..HIGH`: the percentiles of all values, by type of sample; 0.5..99.5 by default.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.shard_writer import listed
from data_prep.workers import ConversionPool
from slrnet.data.depth import Depth, Range, check_finite
from slrnet.data.images import deep_samples, left_out, open_image, sample_type
from slrnet.data.manifest import DataError
from slrnet.storage.shown import say

__all__ = ["AUTO", "check_depth", "choose_depth"]

AUTO, PERCENTILES = "auto", "percentiles"
BITS = (8, 10, 12, 14, 16)
FLOAT_ENDS = (1, 255, 65535)
DEFAULT_PERCENTILES = (0.5, 99.5)
DARK, BRIGHT, FLAT = 1 / 8, 3 / 4, 1 / 8
"""Shares of the range: an image all below the first or above the second, or a set that spans less than the third."""
REMEDY = (
    "say which values become black and white: --depth BITS or --depth=LOW..HIGH, such as 12 or -160..240, or --depth "
    "percentiles for the 0.5th and 99.5th percentile of all images"
)
CODES = 2**16
_PARTS = 64


@dataclass
class _Values:
    """The values of all images of one type of sample."""

    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(CODES, dtype=np.int64))
    """(65536,) by code, see `_codes`."""
    least: float = np.inf
    most: float = -np.inf
    images: list[tuple[str, float, float]] = field(default_factory=list)
    """Path, 1st and 99th percentile of each image."""

    def add(self, other: _Values) -> None:
        self.counts += other.counts
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)
        self.images += other.images


def check_depth(option: str) -> None:
    """Raises `DataError` if `--depth` is no text that `choose_depth` takes."""
    if option != AUTO and _percentiles(option) is None:
        Depth.parse(option)


def choose_depth(option: str, paths: Sequence[str], workers: ConversionPool) -> Depth:
    """The depth of a set of images, as `--depth` asks for it, and a line about it.

    Also names the images of which something is left out (further bands, animations). Files that cannot be read are
    passed over; whoever reads them next names them.

    Raises:
        DataError: the option has another form, or the values of the images do not say which depth they have.
    """
    headers = workers.map(_header, paths, label="looking")
    _tell_what_is_left_out({path: clause for path, (_, clause) in zip(paths, headers, strict=True) if clause})
    deep = [path for path, (kind, _) in zip(paths, headers, strict=True) if kind]
    percentiles = _percentiles(option)
    if not deep or (option != AUTO and percentiles is None):
        depth = Depth() if option == AUTO or percentiles else Depth.parse(option)
        for kind, one in depth.ranges.items() if deep else ():
            about = f"{len(deep)} image(s) of more than 8 bits; {one.low:g} is black, {one.high:g} white"
            say(f"depth {kind}{'=' * bool(kind)}{one}: {about}")
        return depth
    step = -(-len(deep) // _PARTS)
    parts = [deep[start : start + step] for start in range(0, len(deep), step)]
    found: dict[str, _Values] = defaultdict(_Values)
    for part in workers.map(_survey, parts, weights=[len(part) for part in parts], label="measuring depth"):
        for kind, values in part.items():
            found[kind].add(values)
    choose = _automatic if percentiles is None else partial(_between, percentiles)
    ranges = {kind: choose(kind, values) for kind, values in sorted(found.items())}
    if option == AUTO and len(ranges) > 1:
        about = "; ".join(_about(kind, found[kind]) for kind in ranges)
        raise DataError(f"{about}; if each type has a range of its own, say so: --depth {Depth(ranges)}")
    for kind, chosen in ranges.items():
        say(f"depth {kind}={chosen}: {_about(kind, found[kind])}; {chosen.low:g} is black, {chosen.high:g} white")
    return Depth(ranges)


def _percentiles(option: str) -> tuple[float, float] | None:
    """The two percentiles, in percent, that an option asks for; None for other options."""
    word, _, values = option.partition(":")
    if word != PERCENTILES:
        return None
    try:
        low, high = map(float, values.split("..")) if values else DEFAULT_PERCENTILES
    except ValueError:
        low, high = 1, 0
    if not 0 <= low < high <= 100:
        raise DataError(f"--depth {option!r} is not percentiles:LOW..HIGH with 0 to 100, such as percentiles:1..99")
    return low, high


def _tell_what_is_left_out(clauses: Mapping[str, str]) -> None:
    for clause in sorted(set(clauses.values())):
        names = [path for path, own in clauses.items() if own == clause]
        say(f"{len(names)} image(s), each {clause}: {listed(names, ', ')}", error=True)


# In the worker processes.


def _header(path: str) -> tuple[str | None, str | None]:
    """Type of the samples, if deep, and what is left out of an image; from its header."""
    try:
        with open_image(Path(path)) as image:
            return sample_type(image), left_out(image)
    except DataError:
        return None, None


def _survey(paths: Sequence[str]) -> dict[str, _Values]:
    found: dict[str, _Values] = defaultdict(_Values)
    for path in paths:
        try:
            with open_image(Path(path)) as image:
                kind = sample_type(image)
                assert kind is not None
                samples, _ = deep_samples(image)
                check_finite(samples)
        except DataError:
            continue
        counts = np.bincount(_codes(samples).ravel(), minlength=CODES)
        ends = (_percentile(counts, kind, 1), _percentile(counts, kind, 99))
        found[kind].add(_Values(counts, float(samples.min()), float(samples.max()), [(path, *ends)]))
    return dict(found)


def _codes(samples: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """One of 65,536 codes a sample, in the order of values: 16 bits as they are, others to about three digits."""
    if samples.dtype.itemsize <= 2:
        return samples.astype(np.int32) + (CODES // 2 if samples.dtype.kind == "i" else 0)
    bits = samples.astype(np.float32).view(np.int32) >> 16
    return np.where(bits < 0, bits ^ 0x7FFF, bits) + CODES // 2


def _percentile(counts: npt.NDArray[np.int64], kind: str, percent: float) -> float:
    """A percentile of the values whose codes were counted."""
    total = np.cumsum(counts)
    code = int(np.searchsorted(total, max(1, percent / 100 * total[-1])))
    if kind in ("uint16", "int16", "int8"):
        return float(code - (0 if kind == "uint16" else CODES // 2))
    bits = code - CODES // 2
    return float(np.array([(bits ^ 0x7FFF if bits < 0 else bits) << 16], dtype=np.int32).view(np.float32)[0])


# Choosing.


def _automatic(kind: str, values: _Values) -> Range:
    ends = FLOAT_ENDS if kind.startswith("float") else [2**bits - 1 for bits in BITS]
    white = next((end for end in ends if values.most <= end), None)
    if values.least < 0 or white is None:
        raise DataError(f"{_about(kind, values)}, which no common depth has: {REMEDY}")
    span = _percentile(values.counts, kind, 99) - _percentile(values.counts, kind, 1)
    if span < FLAT * white:
        raise DataError(
            f"{_about(kind, values)}, nearly all within {span:g} of each other, too flat for 0..{white}: {REMEDY}"
        )
    unfit = [
        f"{path} ({low:g} to {high:g})"
        for path, low, high in values.images
        if 0 < high < DARK * white or low > BRIGHT * white
    ]
    if unfit:
        raise DataError(
            f"{_about(kind, values)}, so {white} would be white, and {len(unfit)} of them nearly black or white: "
            f"{listed(unfit, ', ')}; {REMEDY}"
        )
    return Range(0, white, clip=True) if kind.startswith("float") else Range.of_bits(white.bit_length())


def _between(percentiles: tuple[float, float], kind: str, values: _Values) -> Range:
    low, high = (_percentile(values.counts, kind, percent) for percent in percentiles)
    if not low < high:
        low, high = values.least, values.most
    if not low < high:
        raise DataError(f"{_about(kind, values)}, all the same: {REMEDY}")
    return Range(low, high, clip=True)


def _about(kind: str, values: _Values) -> str:
    return f"{len(values.images)} image(s) have {kind} samples from {values.least:g} to {values.most:g}"
