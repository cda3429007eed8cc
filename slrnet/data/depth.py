"""How images with more than 8 bits a sample become 8-bit ones: by a stated range of values, never one of their own.

A file of 16 bits may hold 10, 12 or 16; a float may end at 1 or at 255. So a data set has one range for each type of
sample (`uint16`, `float32`, ...), chosen when it is prepared and stored in `dataset.json` and in checkpoints. Its text,
as `--depth` takes it:

- `12`: unsigned values of 12 bits; 0 becomes black, 4095 white, and larger values are refused;
- `-160..240`: values from black to white; others are clipped;
- `uint16=12,float32=0..1`: the same by type of sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from slrnet.data.manifest_rows import DataError

__all__ = ["SAMPLE_TYPES", "Depth", "ImageError", "Range", "check_finite"]

SAMPLE_TYPES = ("int8", "uint16", "int16", "uint32", "int32", "float32")
"""Types of samples that are no 8-bit ones, as texts name them."""
_ROWS = 2**22
"""Values that are scaled at a time."""
_REMEDY = (
    "say which values become black and white with --depth of `slrnet prepare folder` or `slrnet predict`: BITS or "
    "LOW..HIGH, such as 12 or 0..1"
)


class ImageError(DataError):
    """Something is wrong with an image; whoever knows its file adds the name (`slrnet.data.images.open_image`)."""


@dataclass(frozen=True)
class Range:
    """Values that become black (`low`) and white (`high`)."""

    low: float
    high: float
    clip: bool
    """Whether values beyond are clipped; refused otherwise."""

    @classmethod
    def of_bits(cls, bits: int) -> Range:
        """The range of unsigned values of 8 to 32 bits."""
        return cls(0, 2**bits - 1, clip=False)

    def __str__(self) -> str:
        """Text of the range, as `Depth.parse` reads it."""
        return f"{self.low:.9g}..{self.high:.9g}" if self.clip else str(int(self.high).bit_length())


@dataclass(frozen=True)
class Depth:
    """Ranges by type of sample; see the module's docstring."""

    ranges: Mapping[str, Range] = field(default_factory=dict)
    """By type of sample; that of `""` is for all types that are not named."""

    @classmethod
    def parse(cls, text: str) -> Depth:
        """Reads a text; an empty one gives no range.

        Raises:
            DataError: the text has another form.
        """
        ranges = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            kind, equals, values = part.rpartition("=")
            if (equals and kind not in SAMPLE_TYPES) or kind in ranges:
                raise DataError(f"the depth {text!r} names {kind!r}; allowed are {', '.join(SAMPLE_TYPES)}, each once")
            ranges[kind] = _range(values, text)
        return cls(ranges)

    def __str__(self) -> str:
        """The text that gives this depth; "" for none."""
        return ",".join(f"{kind}={one}" if kind else str(one) for kind, one in sorted(self.ranges.items()))

    def to_8_bit(self, values: npt.NDArray[Any], kind: str) -> npt.NDArray[np.uint8]:
        """Scales values of a type of sample to uint8, rounded to the nearest, in their shape.

        Raises:
            DataError: there is no range for this type, or a value is not finite or beyond the range.
        """
        check_finite(values)
        chosen = self.ranges.get(kind) or self.ranges.get("")
        if chosen is None:
            known = f"; known is the depth {self}" if self.ranges else ""
            ends = f"{values.min():g} to {values.max():g}"
            raise ImageError(f"it has {kind} samples, here from {ends}{known}: {_REMEDY}")
        if not chosen.clip and (values.max() > chosen.high or values.min() < chosen.low):
            raise ImageError(
                f"its {kind} samples go from {values.min():g} to {values.max():g}, beyond the depth {chosen} "
                f"({chosen.low:g} to {chosen.high:g}): {_REMEDY}"
            )
        scaled = np.empty(values.shape, dtype=np.uint8)
        step = max(1, _ROWS // max(1, values[:1].size))
        for start in range(0, len(values), step):
            part = (values[start : start + step].astype(np.float64) - chosen.low) * (255 / (chosen.high - chosen.low))
            scaled[start : start + step] = part.clip(0, 255).round()
        return scaled


def check_finite(values: npt.NDArray[Any]) -> None:
    """Raises `ImageError` if there is a NaN or an infinity among the values."""
    if values.dtype.kind == "f" and (bad := values.size - int(np.isfinite(values).sum())):
        raise ImageError(f"{bad} of its {values.size} values are NaN or infinite; replace them by numbers")


def _range(values: str, text: str) -> Range:
    low, dots, high = values.partition("..")
    try:
        if not dots and 8 <= (bits := int(values)) <= 32:
            return Range.of_bits(bits)
        if dots and np.isfinite(float(low)) and float(low) < float(high) < np.inf:
            return Range(float(low), float(high), clip=True)
    except ValueError:
        pass
    raise DataError(f"the depth {text!r} is neither bits from 8 to 32 nor LOW..HIGH, such as 12, 0..1 or -160..240")
