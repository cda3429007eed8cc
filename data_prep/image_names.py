"""Images as tables and lists name them: by path, key or what other machines made of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from data_prep.found_files import key_of
from data_prep.shard_writer import listed
from data_prep.text_files import read_lines
from slrnet.data.manifest import DataError
from slrnet.storage.shown import say

__all__ = ["ImageNames"]


class ImageNames:
    """Finds images by the names in tables and lists.

    A name is a path below the folder of images, with or without suffix, or a key. Where no image has it, folders before
    it are left out one by one (`photos/a.jpg`, `C:\\photos\\a.jpg`), then case is ignored, then the folder of the
    image, if that leaves one image.

    Args:
        paths: Paths of the images below their folder, by key.
        skip_unmatched: Whether names of no image are left out, with a line that names them.
    """

    def __init__(self, paths: Mapping[str, str], *, skip_unmatched: bool = False) -> None:
        self.paths = paths
        self._skip_unmatched = skip_unmatched
        self._by_case: Mapping[str, str | None] | None = None
        self._by_name: Mapping[str, str | None] | None = None

    def find(self, name: str) -> tuple[str, str] | None:
        """Key of the image that a name means, and how it was found, an empty text for the name as it is."""
        name = name.strip().strip("\"'")
        if (key := key_of(name)) in self.paths:
            return key, ""
        parts = [
            part for part in re.sub(r"^[A-Za-z]:", "", name.replace("\\", "/")).split("/") if part not in ("", ".")
        ]
        tails = [key_of("/".join(parts[start:])) for start in range(len(parts))]
        for place, tail in enumerate(tails):
            if tail in self.paths:
                return tail, "without the folders before it" if place else ""
        if self._by_case is None or self._by_name is None:
            self._by_case = _unique((key.casefold(), key) for key in self.paths)
            self._by_name = _unique(
                (key_of(path.rpartition("/")[2]).casefold(), key) for key, path in self.paths.items()
            )
        for tail in tails:
            if same := self._by_case.get(tail.casefold()):
                return same, "in another case"
        alone = self._by_name.get(tails[-1].casefold()) if tails else None
        return (alone, "in another folder") if alone else None

    def find_all(self, names: Mapping[str, int], what: str) -> dict[str, str]:
        """Keys by name; says which names are not those of the files.

        Args:
            names: Line of each name, the first where it has several.
            what: What lists them, for messages.

        Raises:
            DataError: there are names of no image, and those are not to be left out; or different ones may mean one.
        """
        found = {name: self.find(name) for name in names}
        ways: dict[str, list[str]] = {}
        for name, key in found.items():
            if key is not None and key[1]:
                ways.setdefault(key[1], []).append(f"{name} as {self.paths[key[0]]}")
        _refuse_same(found, what)
        for way, texts in ways.items():
            say(f"{what}: {len(texts)} name(s) are those of images {way}: {listed(texts)}")
        if unknown := [f"{name!r} (line {names[name]})" for name, key in found.items() if key is None]:
            if not self._skip_unmatched:
                raise DataError(
                    f"{what} lists {len(unknown)} image(s) that are not there: {listed(unknown)}; correct or remove "
                    "them, or leave them out with --skip-unmatched"
                )
            say(f"{what}: left out {len(unknown)} name(s) of no image: {listed(unknown)}")
        return {name: key[0] for name, key in found.items() if key is not None}

    def read_keys(self, path: Path) -> list[str]:
        """Keys of the images in a list file, one a line.

        Raises:
            DataError: it cannot be read, is empty, or lists images that are not there.
        """
        lines = {line.strip(): number for number, line in reversed(list(enumerate(read_lines(path, "list file"), 1)))}
        lines.pop("", None)
        if not lines:
            raise DataError(f"the list file {path} is empty; it holds one image a line")
        return list(dict.fromkeys(self.find_all(dict(reversed(lines.items())), str(path)).values()))

    def read_splits(self, lists: Mapping[str, Path]) -> dict[str, str]:
        """Splits by key, from the list file of each split; raises `DataError` if an image is in two of them."""
        split_of: dict[str, str] = {}
        for split, path in lists.items():
            for key in self.read_keys(path):
                if key in split_of:
                    raise DataError(f"image {key!r} is in the splits {split_of[key]!r} and {split!r}; keep one")
                split_of[key] = split
        return split_of


def _refuse_same(found: Mapping[str, tuple[str, str] | None], what: str) -> None:
    """Raises `DataError` if a name means the image of another one, and not as it is: two files may be meant."""
    names: dict[str, list[str]] = {}
    for name, key in found.items():
        if key is not None:
            names.setdefault(key[0], []).append(name)
    loose = {name for name, key in found.items() if key is not None and key[1]}
    same = [" and ".join(several) for several in names.values() if len(several) > 1 and not loose.isdisjoint(several)]
    if same:
        raise DataError(
            f"{what} has different names that could mean one image: {listed(same)}; write each as its path below "
            "--images"
        )


def _unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str | None]:
    """Values by name; None where a name has several."""
    found: dict[str, str | None] = {}
    for name, value in pairs:
        found[name] = None if name in found else value
    return found
