"""Measures how fast folders of images and masks are converted to shards.

    python benchmarks/conversion_speed.py [--images 10000] [--processes 2] [--folder DIR]

Generates pairs of a 320-pixel JPEG and an indexed PNG mask and converts them with `data_prep/folder.py`: once with
indexed masks, which are copied, and once with color masks, which are decoded and re-encoded. For comparison, the same
number of processes only decodes all pixels of each pair and hashes its bytes. The conversion must do this to find
damaged files, so this is its upper bound. The two alternate.
Claim, with indexed masks: at least 400 images/s on 2 cores, and 80 % of the bound (ratio of the medians).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.conversion import Output
from data_prep.folder import FolderInput, convert
from data_prep.workers import ConversionPool
from slrnet.data.catalog import voc_palette

CLAIMED_RATE, CLAIMED_SHARE = 400.0, 0.8
CLASSES = ("cat", "dog", "horse")
DISTINCT = 200
"""Number of distinct pairs; the rest are copies under other names."""
PER_FOLDER = 1000


def main() -> int:
    args = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="conversion-", dir=args.folder) as temporary:
        root = Path(temporary)
        write_pairs(root, args.images, size=(args.size, args.size * 3 // 4))
        (root / "palette.txt").write_text(palette_text())
        pairs = [
            (path, root / "masks" / path.relative_to(root / "images").with_suffix(".png"))
            for path in (root / "images").rglob("*.jpg")
        ]
        megabytes = sum(path.stat().st_size for pair in pairs for path in pair) / 1e6
        print(f"{len(pairs)} pairs of {args.size} pixels, {megabytes:.0f} MB, {args.processes} process(es)")
        output = partial(Output, processes=args.processes)
        names = ("reading and hashing", "one eighth per side", "indexed masks")
        rates: dict[str, list[float]] = {name: [] for name in names}
        for number in range(args.repeats):
            runs = [partial(read_pairs, pairs, args.processes, whole=whole) for whole in (True, False)]
            target = output(root / f"a{number}")
            runs.append(
                partial(convert, FolderInput(images=root / "images", masks=root / "masks", classes=CLASSES), target)
            )
            for name, run in zip(names, runs, strict=True):
                rates[name].append(rate(len(pairs), run))
            shutil.rmtree(root / f"a{number}")
        whole, eighth, copied = (statistics.median(rates[name]) for name in names)
        print(f"{'reading and hashing':>24}: {whole:7.0f} images/s; at one eighth per side {eighth:.0f}")
        print(f"{'indexed masks':>24}: {copied:7.0f} images/s (claimed: at least {CLAIMED_RATE:.0f} on 2 cores)")
        color_masks(root / "masks")
        given = FolderInput(images=root / "images", masks=root / "masks", palette=root / "palette.txt")
        colored = rate(len(pairs), partial(convert, given, output(root / "b")))
        print(f"{'color masks':>24}: {colored:7.0f} images/s")
    share = copied / whole
    print(f"conversion over reading and hashing {share:.2f} (claimed: at least {CLAIMED_SHARE})")
    print(f"conversion over reading at one eighth per side and hashing {copied / eighth:.2f}")
    return int(copied < CLAIMED_RATE or share < CLAIMED_SHARE)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10000, help="number of pairs (default: 10000)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of alternating runs (default: 3)")
    parser.add_argument("--size", type=int, default=320, help="longer side of the images in pixels")
    parser.add_argument("--processes", type=int, default=2, help="worker processes (default: 2)")
    parser.add_argument("--folder", type=Path, help="where to write the images (default: the system's temporary one)")
    return parser.parse_args()


def write_pairs(root: Path, number: int, *, size: tuple[int, int]) -> None:
    """Writes images/ and masks/ in `root`, `PER_FOLDER` pairs per subfolder."""
    random = np.random.default_rng(0)
    drawn = [draw_pair(random, size) for _ in range(min(number, DISTINCT))]
    for index in range(number):
        name = f"{index // PER_FOLDER:03}/{index:06}"
        for folder, suffix, data in zip(("images", "masks"), (".jpg", ".png"), drawn[index % len(drawn)], strict=True):
            path = root / folder / f"{name}{suffix}"
            if index % PER_FOLDER == 0:
                path.parent.mkdir(parents=True)
            path.write_bytes(data)


def draw_pair(random: np.random.Generator, size: tuple[int, int]) -> tuple[bytes, bytes]:
    """Returns a JPEG with large shapes and fine noise, about as many bytes as a photo, and a PNG mask of ellipses."""
    width, height = size
    coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = random.normal(0, 10, (height, width, 1))
    picture = Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))
    rows, columns = np.mgrid[:height, :width]
    ids = np.zeros((height, width), dtype=np.uint8)
    for _ in range(3):
        y, x = random.uniform(0, height), random.uniform(0, width)
        distance = np.hypot((rows - y) / random.uniform(0.1, 0.4), (columns - x) / random.uniform(0.1, 0.4))
        ids[distance < width] = random.integers(1, len(CLASSES) + 1)
        ids[(distance >= width) & (distance < width * 1.04)] = 255
    mask = Image.fromarray(ids)
    mask.putpalette(voc_palette().tobytes())
    return encoded(picture, "JPEG", quality=90), encoded(mask, "PNG")


def encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def palette_text() -> str:
    colors = voc_palette()
    names = {"background": 0, **{name: label for label, name in enumerate(CLASSES, start=1)}, "void": 255}
    return "".join(f"{name} {' '.join(map(str, colors[label].tolist()))}\n" for name, label in names.items())


def color_masks(folder: Path) -> None:
    """Replaces the indexed masks in a folder with RGB masks."""
    made: dict[bytes, bytes] = {}
    for path in folder.rglob("*.png"):
        data = path.read_bytes()
        if data not in made:
            with Image.open(path) as image:
                made[data] = encoded(image.convert("RGB"), "PNG")
        path.write_bytes(made[data])


def read_pairs(pairs: list[tuple[Path, Path]], processes: int, *, whole: bool) -> None:
    with ConversionPool(processes) as workers:
        workers.map(partial(read_pair, whole=whole), pairs, label="reading")


def read_pair(pair: tuple[Path, Path], *, whole: bool) -> str:
    """Decodes both files and hashes their bytes; without `whole`, decodes the JPEG at one eighth of its size."""
    digest = hashlib.sha256()
    for path in pair:
        data = path.read_bytes()
        digest.update(data)
        with Image.open(io.BytesIO(data)) as image:
            if not whole:
                image.draft("L", (1, 1))
            image.load()
    return digest.hexdigest()


def rate(number: int, run: partial[object]) -> float:
    start = time.perf_counter()
    run()
    return number / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
