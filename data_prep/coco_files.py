"""Annotation files of COCO's form, read piece by piece: a file of any size never lies in memory whole.

Such a file is a JSON object with the lists `images` (id, file_name, width, height), `categories` (id, name) and
`annotations` (image_id, category_id and more). Ids are whole numbers or texts; "12" and 12.0 are the id 12. The file is
UTF-8 or UTF-16, with a byte order mark or without, or Windows-1252, which is said as it is a guess.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.text_files import GUESS, check_regular, say_guess, text_encoding
from slrnet.data.manifest import DataError

__all__ = ["Annotations", "Category", "CocoImage", "Id", "read_annotations"]

Id = int | str
LISTS = ("images", "categories", "annotations")
LONGEST_NAME = 1000
LONGEST_SIDE = 1_000_000
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class CocoImage(NamedTuple):
    """An image that an annotation file lists."""

    id: Id
    file_name: str
    width: int
    height: int


class Category(NamedTuple):
    """A category that an annotation file lists."""

    id: Id
    name: str
    supercategory: str
    """Empty where it has none."""


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """What an annotation file says, and where in it each annotation stands."""

    path: Path
    """The file."""
    encoding: str
    """Its encoding, without a byte order mark."""
    images: tuple[CocoImage, ...]
    """In the order of their ids, numbers before texts."""
    categories: tuple[Category, ...]
    """In the order of their ids."""
    image_places: npt.NDArray[np.int64]
    """(A,) the place among `images` of each annotation's image, ascending."""
    category_places: npt.NDArray[np.int64]
    """(A,) the place among `categories` of its category."""
    spans: npt.NDArray[np.int64]
    """(A, 2) its first byte in the file and how many bytes it takes."""

    def of_image(self, place: int) -> slice:
        """Rows of the annotations of `images[place]`."""
        first, last = np.searchsorted(self.image_places, [place, place + 1])
        return slice(int(first), int(last))


def read_annotations(path: Path) -> Annotations:
    """Reads an annotation file (instances_*.json) and notes where its annotations stand, without keeping them.

    Raises:
        DataError: the file is missing or not of that form; the message names the entry.
    """
    try:
        check_regular(path, "annotation file")
        with path.open("rb") as file:
            encoding, start = _encoding(file.read(1 << 16))
        try:
            return _Content(path, encoding).read(start)
        except UnicodeDecodeError:
            if encoding != "utf-8":
                raise
            return _Content(path, GUESS).read(start)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; fetch COCO's annotations and unpack them") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is no file of COCO's instance annotations: {error}; correct it, or export or fetch it again"
        ) from None


def read_spans(path: Path, encoding: str, spans: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    """The annotations that stand in a file at `spans` (n, 2), their category's id as in `Annotations.categories`."""
    annotations = []
    with path.open("rb") as file:
        for start, length in spans.tolist():
            file.seek(start)
            annotation = json.loads(file.read(length).decode(encoding))
            annotations.append(annotation | {"category_id": identity(annotation, "category_id")})
    return annotations


def identity(entry: Mapping[str, Any], field: str) -> Id:
    """An id as a number or a text; digits are a number.

    Raises:
        ValueError: it is missing or something else.
    """
    value = entry.get(field)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value:
        return int(value) if re.fullmatch(r"0|-?[1-9][0-9]{0,17}", value) else value
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"has the {field} {value!r:.40}; a whole number or a text is allowed")
    return value


class _Content:
    """Collects the entries of an annotation file."""

    def __init__(self, path: Path, encoding: str) -> None:
        self.path, self.encoding = path, encoding
        self._images: dict[Id, CocoImage] = {}
        self._categories: dict[Id, Category] = {}
        self._file_names: dict[str, Id] = {}
        # Annotations may come before what they point to, so their ids get numbers as they come.
        self._numbers: dict[str, dict[Id, int]] = {"image_id": {}, "category_id": {}}
        self._columns = {name: array("q") for name in ("image_id", "category_id", "start", "length")}

    def read(self, start: int) -> Annotations:
        """Reads the file from a byte on."""
        counts: dict[str, int] = {}
        with self.path.open("rb") as file:
            for name, first, length, value in _elements(file, self.encoding, start):
                counts[name] = counts.get(name, 0) + 1
                try:
                    self._take(name, first, length, value)
                except ValueError as error:
                    raise ValueError(f"{name}[{counts[name] - 1}] {error}") from None
        return self._annotations()

    def _take(self, name: str, start: int, length: int, value: Any) -> None:
        if name not in LISTS:
            return
        if not isinstance(value, dict):
            raise ValueError(f"is {value!r:.40}; an object is allowed")
        if name == "annotations":
            for field, numbers in self._numbers.items():
                self._columns[field].append(numbers.setdefault(identity(value, field), len(numbers)))
            self._columns["start"].append(start)
            self._columns["length"].append(length)
        elif name == "images":
            image = CocoImage(
                identity(value, "id"), _word(value, "file_name"), _side(value, "width"), _side(value, "height")
            )
            if image.id in self._images:
                raise ValueError(f"has the id {image.id!r:.40} of another image, {self._images[image.id].file_name!r}")
            if self._file_names.setdefault(image.file_name, image.id) != image.id:
                raise ValueError(f"has the file_name {image.file_name!r} of image {self._file_names[image.file_name]}")
            self._images[image.id] = image
        else:
            supercategory = value.get("supercategory")
            category = Category(
                identity(value, "id"),
                _word(value, "name").strip(),
                supercategory if isinstance(supercategory, str) else "",
            )
            if category.id in self._categories:
                raise ValueError(f"has the id {category.id!r:.40} of another category")
            self._categories[category.id] = category

    def _annotations(self) -> Annotations:
        images = sorted(self._images.values(), key=_order)
        categories = sorted(self._categories.values(), key=_order)
        image_places = self._places("image_id", images)
        order = np.argsort(image_places, kind="stable")
        spans = np.stack([np.array(self._columns[name], dtype=np.int64) for name in ("start", "length")], axis=1)
        texts = [image.file_name for image in images] + [category.name for category in categories]
        if self.encoding == GUESS:
            say_guess(f"the annotation file {self.path}", repr(next((t for t in texts if not t.isascii()), "")))
        return Annotations(
            path=self.path,
            encoding=self.encoding,
            images=tuple(images),
            categories=tuple(categories),
            image_places=image_places[order],
            category_places=self._places("category_id", categories)[order],
            spans=spans[order],
        )

    def _places(self, field: str, entries: Sequence[CocoImage | Category]) -> npt.NDArray[np.int64]:
        """(A,) the place among sorted entries that each annotation points to."""
        place_of = {entry.id: place for place, entry in enumerate(entries)}
        if strangers := [value for value in self._numbers[field] if value not in place_of]:
            what = "images" if field == "image_id" else "categories"
            shown = ", ".join(f"{value!r:.40}" for value in strangers[:5])
            raise ValueError(f"it has annotations of the {what} [{shown}], which it does not list")
        places = np.array([place_of[value] for value in self._numbers[field]], dtype=np.int64)
        return places[np.array(self._columns[field], dtype=np.int64)]


def _order(entry: CocoImage | Category) -> tuple[bool, Id]:
    return isinstance(entry.id, str), entry.id


def _word(entry: Mapping[str, Any], field: str) -> str:
    text = entry.get(field)
    if not isinstance(text, str) or not text.strip() or len(text) > LONGEST_NAME or CONTROL.search(text):
        raise ValueError(
            f"has the {field} {text!r:.40}; 1 to {LONGEST_NAME} characters, no control characters, are allowed"
        )
    return text


def _side(entry: Mapping[str, Any], field: str) -> int:
    value = entry.get(field)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 1 <= value <= LONGEST_SIDE or value % 1:
        raise ValueError(f"has the {field} {value!r:.40}; whole pixels from 1 to {LONGEST_SIDE} are allowed")
    return int(value)


# Reading of JSON piece by piece.


def _encoding(head: bytes) -> tuple[str, int]:
    """Encoding of a file that begins with `head`, and how many bytes its byte order mark takes."""
    encoding = text_encoding(head) or "utf-8"
    if encoding == "utf-32":
        raise ValueError("it is UTF-32 text; save it as UTF-8")
    if encoding == "utf-16":
        return ("utf-16-le" if head[0] == 0xFF else "utf-16-be"), 2
    return encoding.removesuffix("-sig"), 3 if encoding.endswith("-sig") else 0


def _elements(file: BinaryIO, encoding: str = "utf-8", start: int = 0) -> Iterator[tuple[str, int, int, Any]]:
    """Elements of the arrays in a JSON object: name of the array, first byte, number of bytes, value.

    Members that are no arrays are passed over, except those of the names that are needed.

    Raises:
        ValueError: it is no such object.
    """
    reader, names = _JsonReader(file, encoding, start), set()
    reader.take("{")
    while True:
        name = str(reader.value())
        names.add(name)
        reader.take(":")
        if reader.peek() == "[":
            yield from _array(reader, name)
        elif name in LISTS:
            raise ValueError(f"its {name!r} is no list")
        else:
            reader.value()
        if reader.peek() == "}":
            break
        reader.take(",")
    reader.take("}")
    if reader.peek():
        raise ValueError(f"byte {reader.position}: something follows the end of the object")
    if missing := [name for name in LISTS if name not in names]:
        raise ValueError(f"it has no list {missing[0]!r}")


def _array(reader: _JsonReader, name: str) -> Iterator[tuple[str, int, int, Any]]:
    reader.take("[")
    while reader.peek() != "]":
        start = reader.position
        value = reader.value()
        yield name, start, reader.position - start, value
        if reader.peek() != "]":
            reader.take(",")
    reader.take("]")


class _JsonReader:
    """Values of a JSON file, one after the other; holds a chunk of the file and the current value.

    A character stands for a unit of the encoding, one byte or two, so that its place tells the place in the file.

    ijson does not say where in the file a value stands. Annotations would have to be written to a second file, to be
    read again when their image is drawn, and images, categories and annotations take a pass over the file each.
    """

    CHUNK = 1 << 22
    LONGEST = 1 << 26
    """Units of a value; COCO's longest annotations have some 100,000."""

    def __init__(self, file: BinaryIO, encoding: str, start: int) -> None:
        file.seek(start)
        self._file = file
        self._encoding = encoding
        self._unit = {"utf-16-le": "<u2", "utf-16-be": ">u2"}.get(encoding, "u1")
        self._width = np.dtype(self._unit).itemsize
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._before = start

    @property
    def position(self) -> int:
        """Byte of the file that comes next."""
        return self._before + self._at * self._width

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if not self._fill():
                return ""

    def take(self, wanted: str) -> None:
        """Goes past a character."""
        if self.peek() != wanted:
            raise ValueError(self._there(self._at, repr(wanted)))
        self._at += 1

    def value(self) -> Any:
        """Parses what comes next and goes past it."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                wrong = f"byte {self._before + error.pos * self._width}: {error.msg}"
            except RecursionError:
                raise ValueError(f"byte {self.position}: a value is nested too deeply") from None
            else:
                # A number may go on in the next chunk; whole values have one of these behind them.
                if self._text[end : end + 1] in (*",:]}", *" \t\r\n") and end < len(self._text):
                    text, self._at = self._text[self._at : end], end
                    return value if text.isascii() else json.loads(self._decoded(text))
                wrong = self._there(end, "a comma or bracket")
            if len(self._text) - self._at > self.LONGEST:
                raise ValueError(f"byte {self.position}: a value is longer than {self.LONGEST >> 20} MB")
            if not self._fill():
                raise ValueError(wrong)

    def _there(self, at: int, wanted: str) -> str:
        there = repr(self._text[at : at + 1]) if at < len(self._text) else "the end of the file"
        return f"byte {self._before + at * self._width} is {there}, not {wanted}"

    def _decoded(self, units: str) -> str:
        """The text that units stand for, a unit in each character."""
        codes = np.frombuffer(units.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        return codes.astype(self._unit).tobytes().decode(self._encoding)

    def _fill(self) -> bool:
        more = self._file.read(self.CHUNK * self._width)
        if len(more) % self._width:
            raise ValueError(f"it ends within a character at byte {self._before + len(more)}")
        codes = np.frombuffer(more, dtype=self._unit).astype("<u4")
        self._before += self._at * self._width
        self._text = self._text[self._at :] + codes.tobytes().decode("utf-32-le", "surrogatepass")
        self._at = 0
        return bool(more)
