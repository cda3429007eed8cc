"""Measures the memory of a dataset conversion and its growth with the number of images.

    python benchmarks/conversion_memory.py [--images 100000] [--processes 2] [--folder DIR]

Writes small JPEG images with masks, converts a quarter of them and then all of them with `data_prep/folder.py`, and
samples the resident memory of the parent and its workers. Only the list of images and the manifest grow, not the image
data. Claim: the parent grows by at most 1.5 kB per image and the workers do not grow, so half a million images fit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.conversion_speed import CLASSES, write_pairs

CLAIMED_BYTES = 1500
HALF_A_MILLION = 500_000
MEGABYTE = 1e6


def main() -> None:
    args = parse_arguments()
    peaks: list[tuple[int, int, int]] = []
    with tempfile.TemporaryDirectory(prefix="conversion-", dir=args.folder) as temporary:
        for number in (args.images // 4, args.images):
            root = Path(temporary) / str(number)
            write_pairs(root, number, size=(args.size, args.size))
            start = time.perf_counter()
            parent, worker = follow(root, processes=args.processes)
            seconds = time.perf_counter() - start
            print(
                f"{number:>8} images: parent {parent / MEGABYTE:.0f} MB, largest worker {worker / MEGABYTE:.0f} MB, "
                f"{number / seconds:.0f} images/s",
                flush=True,
            )
            peaks.append((number, parent, worker))
    (few, few_parent, few_worker), (many, many_parent, many_worker) = peaks
    growth = (many_parent - few_parent) / (many - few)
    print(f"the parent grows by {growth:.0f} bytes per image (claimed: at most {CLAIMED_BYTES})")
    print(f"a worker grows by {(many_worker - few_worker) / (many - few):.0f} bytes per image")
    reached = (many_parent + growth * (HALF_A_MILLION - many)) / MEGABYTE
    print(f"at this rate, half a million images take {reached:.0f} MB in the parent")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, help="number of images (default: 100000)")
    parser.add_argument("--size", type=int, default=32, help="side of the square images in pixels")
    parser.add_argument("--processes", type=int, default=2, help="worker processes of the conversion (default: 2)")
    parser.add_argument("--folder", type=Path, help="where to write the images (default: the system's temporary one)")
    return parser.parse_args()


def follow(root: Path, *, processes: int) -> tuple[int, int]:
    """Converts the images in `root`; returns the peak resident memory of the parent and of any worker, in bytes."""
    script = Path(__file__).resolve().parents[1] / "data_prep" / "folder.py"
    command = [sys.executable, str(script), "--images", str(root / "images"), "--masks", str(root / "masks")]
    command += ["--classes", ",".join(CLASSES), "--out", str(root / "out"), "--processes", str(processes)]
    running = psutil.Popen(command, stdout=subprocess.DEVNULL)
    parent = worker = 0
    while running.poll() is None:
        try:
            parent = max(parent, running.memory_info().rss)
            worker = max([worker, *(child.memory_info().rss for child in running.children(recursive=True))])
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.1)
    if running.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with status {running.returncode}")
    return parent, worker


if __name__ == "__main__":
    main()
