"""Measures the speed of the loader, from shards to batches of crops, on one core.

    python benchmarks/loader.py --peer-dir FOLDER

FOLDER is a checkout of the authors' code (GitHub DesertsP/SLRNet); its dataset class and transforms read the same
images from files. Images are 500x375 JPEGs with as many bytes as photos, crops are 321x321, and each shard's samples
come in random order. All sides use one thread and alternate. Also shown: the loader with color augmentation, which the
training step applies per batch on its device and the released class applies per image. Claims: at least 4 times the
images/s of the released class, and 80 % of the speed of decoding the same bytes alone. The loader decodes photos of a
million pixels or more at reduced size; the script prints the time of this relative to decoding them whole.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._turns import times_in_turn
from benchmarks.conversion_speed import draw_pair
from data_prep.shard_writer import Sample, write_dataset
from slrnet.config import DataConfig, ViewsConfig
from slrnet.data import transforms
from slrnet.data.batch import Batch
from slrnet.data.catalog import voc_palette
from slrnet.data.manifest import load_dataset
from slrnet.data.supervision import plan_supervision
from slrnet.data.train_loader import TrainLoader
from slrnet.data.transforms import decode_image
from slrnet.views.color import apply_color, draw_color

CLAIMED_RATIO, CLAIMED_SHARE = 4.0, 0.8
SIZE, CROP, BATCH, SCALE = (500, 375), 321, 16, (0.9, 1.0)
LARGE_SIZES = (1280, 960), (1920, 1440), (4000, 3000)


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(1)
    gc.freeze()  # as reader processes do in training
    with tempfile.TemporaryDirectory(prefix="loader-") as temporary:
        folder = Path(temporary)
        images = write_shards(folder, args.images, SIZE)
        size = statistics.mean(len(data) for data in images) / 1e3
        print(f"{len(images)} images of {SIZE[0]} x {SIZE[1]}, {size:.0f} kB each, one thread")
        loader = open_loader(folder)
        views = [memoryview(bytearray(data)) for data in images]  # decodable without a copy
        fast: dict[str, Callable[[], object]] = {
            "decoding alone": lambda: exhaust(decode_image(view) for view in views),
            "loader": lambda: exhaust(loader.epoch(0)),
        }
        slow: dict[str, Callable[[], object]] = {
            "loader": fast["loader"],
            "loader and colors": lambda: exhaust(colors(batch) for batch in loader.epoch(0)),
        }
        if args.peer_dir is not None:
            released = released_dataset(args.peer_dir, folder, images)
            slow["released class"] = lambda: exhaust(released[index] for index in range(len(images)))
        rates = rates_in_turn(fast, 5 * args.repeats, len(images))  # more turns, because they are short
        share = rates["loader"] / rates["decoding alone"]
        rates = rates_in_turn(slow, args.repeats, len(images))
        for side in LARGE_SIZES:
            large_photographs(folder / str(side[0]), side, args.repeats)
    print(f"loader over decoding alone {share:.2f} (claimed: at least {CLAIMED_SHARE})")
    held = share >= CLAIMED_SHARE
    if args.peer_dir is not None:
        ratio = rates["loader"] / rates["released class"]
        print(f"loader over the released class {ratio:.1f} (claimed: at least {CLAIMED_RATIO:.0f})")
        print(f"loader and colors over the released class {rates['loader and colors'] / rates['released class']:.1f}")
        held = held and ratio >= CLAIMED_RATIO
    return 0 if held else 1


def large_photographs(folder: Path, size: tuple[int, int], repeats: int) -> None:
    """Prints the loader's time for a batch of large photos, relative to decoding them whole."""
    folder.mkdir()
    write_shards(folder, BATCH, size)
    loader = open_loader(folder)

    def whole() -> None:
        with mock.patch.object(transforms, "_REDUCED_FROM", 2**40):
            exhaust(loader.epoch(0))

    forms = {"reduced": lambda: exhaust(loader.epoch(0)), "whole": whole}
    for form in forms.values():
        form()
    times = times_in_turn(forms, repeats=repeats)
    reduced, full = (1e3 * statistics.median(times[name]) / BATCH for name in forms)
    print(f"{size[0]} x {size[1]}: {reduced:.1f} ms per image, {full:.1f} decoded whole, ratio {reduced / full:.2f}")


def open_loader(folder: Path) -> TrainLoader:
    shards, config = load_dataset(folder / "shards"), DataConfig(crop_size=CROP, crop_scale=SCALE, workers=0)
    supervision = plan_supervision(shards.split("train"), config, "wsss")
    return TrainLoader(shards, config, supervision, batch_size=BATCH, seed=0)


def rates_in_turn(forms: dict[str, Callable[[], object]], repeats: int, count: int) -> dict[str, float]:
    """Prints and returns the median images/s of each implementation."""
    for form in forms.values():
        form()
    times = times_in_turn(forms, repeats=repeats)
    for name, values in times.items():
        median, slowest, fastest = (count / value for value in (statistics.median(values), max(values), min(values)))
        print(f"{name:>18}: {median:6.0f} images/s ({slowest:.0f} to {fastest:.0f})")
    return {name: count / statistics.median(values) for name, values in times.items()}


def exhaust(made: Iterable[object]) -> None:
    """Consumes all items and keeps none, so memory is reused as in training."""
    for _ in made:
        pass


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-dir", type=Path, help="checkout of the authors' code to compare with")
    parser.add_argument(
        "--images", type=int, default=960, help=f"number of images, a multiple of {BATCH} (default: 960)"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="turns of the comparison with the released class; the one with decoding alone has 5 times as many",
    )
    return parser.parse_args()


def write_shards(folder: Path, count: int, size: tuple[int, int]) -> list[bytes]:
    """Writes generated images and masks, as shards and as files; returns the images' bytes."""
    random = np.random.default_rng(0)
    pairs = [draw_pair(random, size) for _ in range(count)]
    samples = [
        Sample(key=f"{index:06}", split="train", width=size[0], height=size[1], classes=(1,), subsets=(), source=index)
        for index in range(count)
    ]
    write_dataset(
        folder / "shards",
        samples,
        lambda sample: pairs[sample.source],
        name="random",
        classes=("background", "cat", "dog", "horse"),
        palette=voc_palette()[:4],
        made_by="benchmarks/loader.py",
        samples_per_shard=64,
    )
    for index, (image, mask) in enumerate(pairs):
        (folder / f"{index}.jpg").write_bytes(image)
        (folder / f"{index}.png").write_bytes(mask)
    return [image for image, _ in pairs]


def colors(batch: Batch) -> torch.Tensor:
    """Applies one view's color augmentation, which the released class applies too."""
    drawn = draw_color(len(batch.images), ViewsConfig(), generator=torch.Generator().manual_seed(0))
    return apply_color(batch.floats(), drawn)


def released_dataset(peer: Path, folder: Path, images: list[bytes]) -> torch.utils.data.Dataset[object]:
    """Returns the released training set for these files; skips its constructor, which only takes VOC's lists."""
    from benchmarks._released import released_module

    vars(Image).setdefault("CUBIC", Image.Resampling.BICUBIC)  # the name in older Pillow versions
    module, transforms = (released_module(peer, f"datasets.{name}") for name in ("pascal_voc", "transforms"))

    class Normalise(transforms.MaskNormalise):  # type: ignore[misc, name-defined]
        """Converts the mask in a way that NumPy 2 supports."""

        def _MaskNormalise__toByteTensor(self, mask: Image.Image) -> torch.Tensor:
            return torch.from_numpy(np.asarray(mask, np.int32))

    dataset = module.VOCSegmentation.__new__(module.VOCSegmentation)
    module.PascalVOC.__init__(dataset)
    dataset.images = [os.fspath(folder / f"{index}.jpg") for index in range(len(images))]
    dataset.masks = [os.fspath(folder / f"{index}.png") for index in range(len(images))]
    steps = [transforms.MaskRandResizedCrop(crop_size=CROP, scale=SCALE), transforms.MaskHFlip()]
    steps += [transforms.MaskColourJitter(p=1.0), Normalise(dataset.MEAN, dataset.STD)]
    dataset.transform = transforms.Compose([*steps, transforms.MaskToTensor()])
    return dataset  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(main())
