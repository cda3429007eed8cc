"""What is written is what the manifest says."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from data_prep.conversion import Output, Source, convert_items
from data_prep.shard_writer import Item, Sample
from slrnet.data.manifest import DataError, load_dataset


def _bytes(size: tuple[int, int], kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("L", size).save(file, kind)
    return file.getvalue()


@dataclass(frozen=True, kw_only=True)
class _Drawn(Source[Item]):
    image: tuple[int, int]
    mask: tuple[int, int]

    def scan(self, item: Item) -> Sample:
        return Sample.of(item, (4, 3), (1,))

    def encode(self, sample: Sample) -> tuple[bytes, bytes | None]:
        return _bytes(self.image, "JPEG"), _bytes(self.mask, "PNG")


@pytest.mark.parametrize(
    ("image", "mask", "wrong"),
    [((4, 3), (4, 3), None), ((3, 4), (4, 3), "image"), ((4, 3), (3, 4), "mask"), ((4, 3), (4, 4), "mask")],
)
def test_sizes_are_compared_with_the_manifest(
    tmp_path: Path, image: tuple[int, int], mask: tuple[int, int], wrong: str | None
) -> None:
    source = _Drawn(place="drawn", class_names=("background", "cat"), image=image, mask=mask)
    output = Output(tmp_path / "out", name="drawn", made_by="draw")
    items = [Item(key="a", split="train")]
    if wrong is None:
        convert_items(source, items, output)
        row = load_dataset(tmp_path / "out").split("train").row(0)
        assert (row.width, row.height) == image
    else:
        with pytest.raises(DataError, match=rf"the {wrong} written for 'a' has \d x 4 pixels, .* 4 x 3"):
            convert_items(source, items, output)
        assert not (tmp_path / "out").exists()
