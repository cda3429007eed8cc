"""Simulates data loading at the scale of a large cluster: `python benchmarks/scale.py [--rows 100000000]`.

Measures each of the following in a separate process, so that peak memory is its own:

- Planning an epoch of 100,000 shards of 1,000 samples on one of 1,024 ranks with 8 readers and 16 images per step: the
  time until the first batch is known, and the time of all draws of the rank in the epoch. Claim: under 1 s and under
  200 MB, including Python and libraries; neither grows with the number of ranks.
- Drawing every sample exactly once: for all ranks and readers of a smaller epoch, with the loader's own division, and
  at full size on consecutive slices. Ranks draw equally many samples if the global batch is a multiple of their number,
  and differ by at most one per step otherwise.
- Opening a manifest of `--rows` rows, which the script first writes in parts. Claim: under 5 s and under 400 MB, and
  less than a tenth of the file's bytes are read. Also printed: the time to read a shard's rows afterwards.

Seconds are CPU time, because all of this is single-threaded and other programs may run at the same time; wall-clock
time is printed too. `--out` plots the scaling with shards, samples, ranks and rows: scale.png and scale.svg. Exit
status: 0, or 1 if a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SHARDS, SAMPLES, RANKS, READERS, SHARE, WINDOW = 100_000, 1000, 1024, 8, 16, 1000
CLAIMED_SECONDS, CLAIMED_MEGABYTES = 1.0, 200.0
OPENING_SECONDS, OPENING_MEGABYTES, OPENING_SHARE = 5.0, 400.0, 0.1
SLICE = 1 << 20
FEW_STEPS = 500
"""Number of steps to plan for the plots."""

Figures = dict[str, float]


def main() -> None:
    args = parse_arguments()
    if args.measure:
        print(json.dumps(MEASURES[args.measure[0]](**json.loads(args.measure[1]))))
        return
    claims = [*claims_of_planning(), *claims_of_exactness(args.shards)]
    with tempfile.TemporaryDirectory(prefix="scale-", dir=args.folder) as folder:
        opened = {rows: measure_opening(rows, Path(folder)) for rows in (args.rows // 100, args.rows // 10, args.rows)}
    claims += claims_of_opening(opened)
    if args.out:
        draw(args.out, opened)
    for holds, text in claims:
        print(f"{'holds' if holds else 'FAILS'}: {text}")
    sys.exit(not all(holds for holds, _ in claims))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, default=10_000_000, help="rows of the largest manifest (default: 10 million)"
    )
    parser.add_argument("--shards", type=int, default=SHARDS, help="shards of the full-size check (default: 100,000)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the plots there")
    parser.add_argument("--folder", type=Path, help="where to write manifests (default: the system's temporary one)")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(name: str, **arguments: Any) -> Figures:
    """Runs a measurement in a separate process and returns its figures, including that process's peak memory."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", name, json.dumps(arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"measuring {name} failed:\n{done.stderr}")
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    return found


# The claims.


def claims_of_planning() -> list[tuple[bool, str]]:
    found = measured("plan", steps=None)
    print(
        f"planning, {SHARDS:,} shards of {SAMPLES:,} on one of {RANKS:,} ranks with {READERS} readers: first batch "
        f"after {1e3 * found['first']:.0f} ms, all {found['steps']:.0f} steps {found['seconds']:.2f} s "
        f"({found['wall']:.2f} s wall-clock), peak {found['peak']:.0f} MB, of which {found['before']:.0f} MB at start",
        flush=True,
    )
    others = {ranks: measured("plan", ranks=ranks, steps=FEW_STEPS) for ranks in (1, 32, RANKS)}
    for ranks, other in others.items():
        print(f"  with {ranks:,} ranks: first batch after {1e3 * other['first']:.0f} ms, peak {other['peak']:.0f} MB")
    peaks = [other["peak"] for other in others.values()]
    return [
        (found["seconds"] < CLAIMED_SECONDS, f"planning an epoch takes {found['seconds']:.2f} s (claimed: under 1 s)"),
        (found["peak"] < CLAIMED_MEGABYTES, f"planning takes at most {found['peak']:.0f} MB (claimed: under 200 MB)"),
        (
            max(other["first"] for other in others.values()) < CLAIMED_SECONDS and max(peaks) - min(peaks) < 20,
            f"the number of ranks changes the peak by {max(peaks) - min(peaks):.0f} MB (claimed: under 20 MB)",
        ),
    ]


def claims_of_exactness(shards: int) -> list[tuple[bool, str]]:
    claims = []
    for ranks, batch in ((48, 48 * 4), (48, 210)):
        found = measured("division", shards=1000, samples=100, ranks=ranks, readers=READERS, batch=batch)
        text = (
            f"{ranks} ranks of {READERS} readers, batch {batch}: {found['drawn']:.0f} draws and {found['left']:.0f} "
            f"left over of 100,000, {found['twice']:.0f} twice; per rank {found['least']:.0f} to {found['most']:.0f}"
        )
        spread = found["most"] - found["least"]
        exact = found["twice"] == 0 and found["drawn"] + found["left"] == 100_000 and found["left"] < batch
        claims.append((exact and spread <= (found["steps"] if batch % ranks else 0), text))
    found = measured("slices", shards=shards)
    total = shards * SAMPLES
    text = f"of {total:,} samples {found['missing']:.0f} are missing and {found['twice']:.0f} are drawn twice"
    claims.append((found["missing"] == found["twice"] == 0, f"{text} ({found['seconds']:.0f} s for all slices)"))
    shares = [SHARE * RANKS * (rank + 1) // RANKS - SHARE * RANKS * rank // RANKS for rank in range(RANKS)]
    spread = (max(shares) - min(shares)) * (total // (SHARE * RANKS))
    claims.append((spread == 0, f"the numbers of samples of {RANKS:,} ranks differ by at most {spread}"))
    return claims


def measure_opening(rows: int, folder: Path) -> Figures:
    """Writes and opens a manifest; prints and returns the figures."""
    place = folder / str(rows)
    written = measured("write", folder=str(place), rows=rows)
    found = measured("open", folder=str(place))
    print(
        f"manifest of {rows:,} rows ({written['bytes'] / 1e6:,.0f} MB, written in {written['wall']:.0f} s with "
        f"at most {written['peak']:.0f} MB): opened in {found['seconds']:.2f} s ({found['wall']:.2f} s wall-clock), "
        f"peak {found['peak']:.0f} MB, of which {found['before']:.0f} MB at start; {100 * found['share']:.1f} % of it "
        f"read; a shard's rows take {1e3 * found['shard']:.1f} ms",
        flush=True,
    )
    for file in place.iterdir():
        file.unlink()
    return found


def claims_of_opening(opened: Mapping[int, Figures]) -> list[tuple[bool, str]]:
    rows, found = max(opened), opened[max(opened)]
    return [
        (
            found["seconds"] < OPENING_SECONDS,
            f"opening {rows:,} rows takes {found['seconds']:.2f} s (claimed: under 5 s)",
        ),
        (found["peak"] < OPENING_MEGABYTES, f"opening takes at most {found['peak']:.0f} MB (claimed: under 400 MB)"),
        (found["share"] < OPENING_SHARE, f"{100 * found['share']:.1f} % of the file is read (claimed: under 10 %)"),
    ]


# The measurements, each in its own process.


def plan(
    *, shards: int = SHARDS, samples: int = SAMPLES, ranks: int = RANKS, steps: int | None = None, rank: int = 1
) -> Figures:
    """Plans the steps of all readers of a rank, one reader after the other."""
    from slrnet.data.epoch_plan import EpochPlan, Pool
    from slrnet.data.sample_set import SampleSet

    before, wall, begun = peak(), time.perf_counter(), time.process_time()
    firsts = np.arange(shards + 1, dtype=np.int64) * samples
    order = EpochPlan([Pool(SampleSet.all(shards * samples), 1.0)], firsts, seed=0, epoch=0, window=WINDOW)
    batch, share = SHARE * ranks, rank % ranks * SHARE
    wanted = len(order) // batch if steps is None else min(steps, len(order) // batch)
    order.draws(share, share + SHARE)
    first = time.process_time() - begun
    for reader in range(READERS):
        for step in range(reader, wanted, READERS):
            order.draws(step * batch + share, step * batch + share + SHARE)
    seconds = time.process_time() - begun
    return {
        "first": first, "seconds": seconds, "wall": time.perf_counter() - wall, "steps": wanted,
        "step": (seconds - first) / max(1, wanted), "before": before, "peak": peak(),
    }  # fmt: skip


def division(*, shards: int, samples: int, ranks: int, readers: int, batch: int) -> Figures:
    """Counts the draws of all readers of all ranks, using the loader's own reader."""
    from slrnet.config import DataConfig
    from slrnet.data.epoch_plan import Pool
    from slrnet.data.sample_set import SampleSet
    from slrnet.data.supervision import Supervision
    from slrnet.data.train_loader import _TrainReader

    number = shards * samples
    everything = SampleSet.all(number)
    index: Any = SimpleNamespace(split=SimpleNamespace(firsts=np.arange(shards + 1, dtype=np.int64) * samples))
    drawn, by_rank = np.zeros(number, dtype=np.int64), []
    for rank in range(ranks):
        reader = _TrainReader(
            index=index,
            config=DataConfig(shuffle_buffer=WINDOW),
            supervision=Supervision(SampleSet.all(0), everything, (Pool(everything, 1.0),)),
            batch_size=batch,
            seed=0,
            steps=number // batch,
            share=range(batch * rank // ranks, batch * (rank + 1) // ranks),
        )
        before = drawn.sum()
        for worker in range(readers):
            steps = range(worker, reader.steps, readers)
            for draws in reader.draws(steps, 0):
                np.add.at(drawn, draws.samples, 1)
        by_rank.append(int(drawn.sum() - before))
    return {
        "drawn": int((drawn > 0).sum()), "twice": int((drawn > 1).sum()), "left": int((drawn == 0).sum()),
        "least": min(by_rank), "most": max(by_rank), "steps": number // batch,
    }  # fmt: skip


def slices(*, shards: int) -> Figures:
    """Marks every draw of an epoch, slice by slice."""
    from slrnet.data.epoch_plan import EpochPlan, Pool
    from slrnet.data.sample_set import SampleSet

    begun = time.process_time()
    firsts = np.arange(shards + 1, dtype=np.int64) * SAMPLES
    order = EpochPlan([Pool(SampleSet.all(shards * SAMPLES), 1.0)], firsts, seed=0, epoch=0, window=WINDOW)
    seen, drawn = np.zeros(len(order), dtype=np.bool_), 0
    for start in range(0, len(order), SLICE):
        found = order.draws(start, min(start + SLICE, len(order))).samples
        seen[found] = True
        drawn += len(found)
    met = int(seen.sum())
    return {"missing": len(seen) - met, "twice": drawn - met, "seconds": time.process_time() - begun}


def write(*, folder: str, rows: int) -> Figures:
    """Writes a manifest of shards of 1,000 rows, one shard at a time."""
    import pyarrow as pa

    from slrnet.data.catalog import voc_palette
    from slrnet.data.manifest import save_dataset

    Path(folder).mkdir()
    wall, rng = time.perf_counter(), np.random.default_rng(0)
    parts = (shard_rows(pa, shard, rng) for shard in range(rows // SAMPLES))
    classes = ["background", *(f"class {i}" for i in range(1, 1000))]
    palette = np.resize(voc_palette(), (1000, 3))
    save_dataset(folder, parts, name="scale", classes=classes, palette=palette, made_by="scale.py")
    size = (Path(folder) / "manifest.parquet").stat().st_size
    return {"bytes": size, "wall": time.perf_counter() - wall, "peak": peak()}


def shard_rows(pa: Any, shard: int, rng: np.random.Generator) -> Any:
    """Returns the rows of one shard. Builds arrays from buffers, because lists of Python objects would take minutes."""
    from slrnet.data.manifest import SCHEMA

    def texts(data: bytes, length: int) -> Any:
        ends = np.arange(SAMPLES + 1, dtype=np.int32) * length
        return pa.StringArray.from_buffers(SAMPLES, pa.py_buffer(ends.tobytes()), pa.py_buffer(data))

    def repeated(text: str) -> Any:
        return texts(text.encode() * SAMPLES, len(text))

    sizes = rng.integers(40, 400, SAMPLES) * 512
    keys = "".join(f"{shard * SAMPLES + i:012d}" for i in range(SAMPLES)).encode()
    ends = pa.array(np.arange(SAMPLES + 1, dtype=np.int32))
    columns = {
        "key": texts(keys, 12),
        "split": repeated("train"),
        "subsets": pa.ListArray.from_arrays(pa.array(np.zeros(SAMPLES + 1, dtype=np.int32)), pa.array([], pa.string())),
        "shard": repeated(f"train-{shard:06d}.tar"),
        "offset": pa.array(np.cumsum(sizes) - sizes),
        "width": pa.array(rng.integers(300, 600, SAMPLES).astype(np.int32)),
        "height": pa.array(rng.integers(300, 600, SAMPLES).astype(np.int32)),
        "classes": pa.ListArray.from_arrays(ends, pa.array(rng.integers(1, 1000, SAMPLES).astype(np.int16))),
        "has_mask": pa.array(np.zeros(SAMPLES, dtype=np.bool_)),
        "has_image_labels": pa.array(np.ones(SAMPLES, dtype=np.bool_)),
        "bytes": pa.array(sizes),
        "sha256": texts(rng.bytes(32 * SAMPLES).hex().encode(), 64),
    }
    return pa.Table.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def open_manifest(*, folder: str) -> Figures:
    """Opens a manifest as training does, finds its labeled samples, and then reads the rows of some shards."""
    import psutil
    import pyarrow as pa

    from slrnet.data.manifest import load_dataset

    pa.table({"a": [0]}).take(np.arange(1))  # on first use Arrow imports modules, which would count as bytes read
    process = psutil.Process()
    before, wall, begun = peak(), time.perf_counter(), time.process_time()
    read = process.io_counters().read_chars
    split = load_dataset(folder, check=False).split("train")
    labeled = len(split.with_image_labels)
    seconds, wall = time.process_time() - begun, time.perf_counter() - wall
    share = (process.io_counters().read_chars - read) / (Path(folder) / "manifest.parquet").stat().st_size
    found = {"seconds": seconds, "wall": wall, "share": share, "before": before, "peak": peak(), "labeled": labeled}
    begun, chosen = time.process_time(), np.random.default_rng(0).integers(split.num_samples, size=20)
    for sample in chosen.tolist():
        split.row(sample)
    return found | {"shard": (time.process_time() - begun) / len(chosen)}


def peak() -> float:
    """Returns the peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


MEASURES: dict[str, Callable[..., Figures]] = {
    "plan": plan,
    "division": division,
    "slices": slices,
    "write": write,
    "open": open_manifest,
}


# Plots.


def draw(out: Path, opened: Mapping[int, Figures]) -> None:
    """Plots seconds and memory over shards, samples and ranks for planning, and over rows for a manifest."""
    from matplotlib.figure import Figure

    grown = {
        "shards": {n: measured("plan", shards=n, steps=FEW_STEPS) for n in (100, 1000, 10_000, SHARDS)},
        "samples per shard": {n: measured("plan", samples=n, steps=FEW_STEPS) for n in (10, 100, 1000, 10_000)},
        "ranks": {n: measured("plan", ranks=n, steps=FEW_STEPS) for n in (1, 32, RANKS, 4 * RANKS)},
    }
    figure = Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplots(2, 4, sharey="row")
    for column, (name, found) in enumerate(grown.items()):
        plot(axes[0, column], found, {"first batch": "first", "one step": "step"})
        axes[0, column].set_title(f"planning over {name}")
        plot(axes[1, column], found, {"peak": "peak", "at start": "before"})
        axes[1, column].set_xlabel(name)
    plot(axes[0, 3], opened, {"opening": "seconds", "a shard's rows": "shard"})
    axes[0, 3].set_title("opening a manifest over rows")
    plot(axes[1, 3], opened, {"peak": "peak", "at start": "before"})
    axes[1, 3].set_xlabel("rows")
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylabel("CPU seconds")
    axes[1, 0].set_ylabel("memory, MB")
    axes[1, 0].set_ylim(bottom=0)
    out.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "svg"):
        figure.savefig(out / f"scale.{suffix}")
    print(f"wrote scale.png and scale.svg to {out}")


def plot(axis: Any, found: Mapping[int, Figures], lines: Mapping[str, str]) -> None:
    for label, name in lines.items():
        values: Sequence[float] = [figures[name] for figures in found.values()]
        axis.plot(list(found), values, marker="o", label=label)
    axis.set_xscale("log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


if __name__ == "__main__":
    main()
