"""Fuzzes configurations, manifests and shards: `python benchmarks/fuzz.py [--cases 12000] [--seed 0]`.

Randomly changes configurations, override strings, dataset.json, manifest.parquet and tars of a small dataset: values of
wrong types, sizes out of range, missing and unknown fields, and flipped, truncated and repeated bytes. Most changed
manifests get a matching fingerprint, as an attacker would make it. Claim: each case ends in a clear error (ConfigError,
DataError) or a correct result, and never in another exception, a crash, or more than 20 seconds. A result is correct if
a configuration survives writing and reading, and samples equal the original ones or are reported as skipped. Datasets
are read in separate processes, because a crash would end this one.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from slrnet.config import Config, ConfigError, apply_overrides, config_from_dict  # noqa: E402
from slrnet.data.batch import EvalSample  # noqa: E402
from slrnet.data.eval_loader import EvalLoader  # noqa: E402
from slrnet.data.manifest import DATASET_FILE, MANIFEST_FILE, DataError, load_dataset  # noqa: E402
from slrnet.data.manifest_rows import ManifestWriter, fingerprint  # noqa: E402
from slrnet.recipes import RECIPES  # noqa: E402

LIMIT = 20
"""Time limit per case in seconds."""
CHUNK = 50
JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 10**30, -(2**63), 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "../../etc/passwd",
    "\x00", "ü" * 300, [], [1, 2], [None], {}, {"a": 1}, "1", "none", [[[]]], "s3://a/b", "; rm -r x",
)  # fmt: skip
Outcome = str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", type=int, default=12_000, help="number of cases, a third of each kind (default: 12,000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case (default: 0)")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="worker processes (default: one per core)"
    )
    options = parser.parse_args()
    begun = time.monotonic()
    found: Counter[tuple[str, Outcome]] = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        original = Path(temporary) / "original"
        _write(original)
        context = multiprocessing.get_context("spawn")
        with context.Pool(options.processes, maxtasksperchild=40) as pool:
            jobs = [
                (kind, str(original), options.seed + start, min(CHUNK, options.cases // 3 - start))
                for kind in ("configuration", "manifest", "tar")
                for start in range(0, options.cases // 3, CHUNK)
            ]
            for kind, outcomes, wrong in pool.imap_unordered(_chunk, jobs):
                found += Counter({(kind, outcome): count for outcome, count in outcomes.items()})
                failures += wrong
    for (kind, outcome), count in sorted(found.items()):
        print(f"{kind}: {outcome} {count}")
    for failure in failures[:5]:
        print(failure)
    print(f"{'FAILS' if failures else 'holds'}: {len(failures)} of {sum(found.values())} cases without a proper end")
    print(f"{time.monotonic() - begun:.0f} s")
    sys.exit(bool(failures))


def _write(folder: Path) -> None:
    from data_prep.demo import build_demo

    build_demo(folder, num_train=4, num_val=2, image_size=32, samples_per_shard=2)


def _chunk(job: tuple[str, str, int, int]) -> tuple[str, Counter[Outcome], list[str]]:
    kind, original, first, count = job
    cases: dict[str, Callable[[random.Random, Path], Outcome]] = {
        "configuration": _configuration,
        "manifest": _manifest,
        "tar": _tar,
    }
    outcomes: Counter[Outcome] = Counter()
    wrong = []
    signal.signal(signal.SIGALRM, _too_long)
    logging.disable(logging.WARNING)  # the outcomes already count skipped samples
    for seed in range(first, first + count):
        signal.alarm(LIMIT)
        try:
            outcomes[cases[kind](random.Random(f"{kind} {seed}"), Path(original))] += 1
        except Exception:
            outcomes["other exception"] += 1
            wrong.append(f"{kind} {seed}: {traceback.format_exc()}")
        finally:
            signal.alarm(0)
    return kind, outcomes, wrong


def _too_long(number: int, frame: Any) -> None:
    raise TimeoutError(f"more than {LIMIT} s")


def _configuration(rng: random.Random, original: Path) -> Outcome:
    config = RECIPES[rng.choice(list(RECIPES))]()
    try:
        if rng.random() < 0.5:
            made = config_from_dict(_changed(rng, config.model_dump(mode="json")))
        else:
            flat = list(config.flat())
            texts = [f"{rng.choice(flat)}={rng.choice(JUNK)}" for _ in range(rng.randint(1, 3))]
            made = apply_overrides(config, [_scrambled(rng, text) if rng.random() < 0.3 else text for text in texts])
    except ConfigError as error:
        return _refused(error)
    assert config_from_dict(json.loads(made.to_json())) == made
    assert isinstance(made, Config)
    return "accepted"


def _manifest(rng: random.Random, original: Path) -> Outcome:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        shutil.copytree(original, folder)
        description = folder / DATASET_FILE
        choice = rng.random()
        if choice < 0.25:
            description.write_text(json.dumps(_changed(rng, json.loads(description.read_text()))))
        elif choice < 0.4:
            _damage(rng, rng.choice([description, folder / MANIFEST_FILE]))
        else:
            _change_rows(rng, folder, fitting=rng.random() < 0.7)
        return _read(folder, original, on_error="stop")


def _tar(rng: random.Random, original: Path) -> Outcome:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        shutil.copytree(original, folder)
        for _ in range(rng.randint(1, 3)):
            _damage(rng, rng.choice(sorted(folder.glob("*.tar"))))
        return _read(folder, original, on_error=rng.choice(["stop", "skip"]))


def _read(folder: Path, original: Path, *, on_error: Any) -> Outcome:
    """Reads all samples and checks that they equal the original ones, unless the manifest was changed."""
    known = _known(original)
    manifest = (folder / MANIFEST_FILE).read_bytes() == (original / MANIFEST_FILE).read_bytes()
    try:
        shards = load_dataset(folder)
        skipped = 0
        for split in shards.splits:
            loader = EvalLoader(shards, split=split, on_error=on_error)
            for sample in loader:
                assert not manifest or sample.image.equal(known[sample.key].image), "wrong pixels without an error"
            skipped += len(loader.skipped)
    except DataError as error:
        return _refused(error)
    return "skipped" if skipped else "read"


@cache
def _known(original: Path) -> dict[str, EvalSample]:
    return {
        sample.key: sample for split in ("train", "val") for sample in EvalLoader(load_dataset(original), split=split)
    }


def _refused(error: ValueError) -> Outcome:
    if len(str(error)) < 20:
        raise RuntimeError("an error without an explanation") from error
    return "refused"


def _changed(rng: random.Random, values: Any) -> Any:
    """Returns a copy with some fields replaced, removed, renamed or added."""
    values = json.loads(json.dumps(values))
    for _ in range(rng.randint(1, 3)):
        place = values
        while isinstance(place, (dict, list)) and place and rng.random() < 0.8:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], (dict, list)) or not place[key]:
                break
            place = place[key]
        if isinstance(place, dict) and place:
            key = rng.choice(list(place))
            action = rng.randrange(4)
            if action == 0:
                del place[key]
            elif action == 1:
                place[_scrambled(rng, str(key))] = place[key]
            else:
                place[key] = rng.choice(JUNK)
        elif isinstance(place, list):
            place.insert(rng.randint(0, len(place)), rng.choice(JUNK))
    return values


def _scrambled(rng: random.Random, text: str) -> str:
    letters = list(text) or ["x"]
    place = rng.randrange(len(letters))
    letters[place] = rng.choice(["", "=", ".", "é", letters[place] * 2, "\x00"])
    return "".join(letters)


def _change_rows(rng: random.Random, folder: Path, *, fitting: bool) -> None:
    """Changes values in the manifest; `fitting` also updates the table of shards and the fingerprint to match."""
    table = pq.read_table(folder / MANIFEST_FILE)
    columns = table.to_pydict()
    for _ in range(rng.randint(1, 3)):
        name, row = rng.choice(table.column_names), rng.randrange(table.num_rows)
        values, kind = columns[name], table.schema.field(name).type
        choices: list[Any] = [None, values[rng.randrange(len(values))]]
        if pa.types.is_string(kind):
            choices += ["", "../../etc/passwd", "/etc/passwd", "a/b", "a.b", "x" * 1000, "train-000000.tar", "\x00"]
        elif pa.types.is_list(kind):
            choices += [[], [None], [-1], [0], [300], [1, 1]] if name == "classes" else [[], ["../x"], ["a", "a"]]
        elif not pa.types.is_boolean(kind):
            choices += [-1, 0, 1, 7, 2**31 - 1, 512, 10**6]
        values[row] = rng.choice(choices)
    changed = pa.table(columns, schema=table.schema)
    if not fitting:
        pq.write_table(changed, folder / MANIFEST_FILE)
        return
    writer = ManifestWriter(folder / MANIFEST_FILE)
    writer.add(changed.replace_schema_metadata(None))
    description = json.loads((folder / DATASET_FILE).read_text())
    description["fingerprint"] = fingerprint(description["classes"], writer.close())
    (folder / DATASET_FILE).write_text(json.dumps(description))


def _damage(rng: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data) or 1)
    action = rng.randrange(5)
    if action == 0:
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif action == 1:
        del data[place:]
    elif action == 2:
        data[place : place + 512] = bytes(512)
    elif action == 3:
        data[place:place] = data[max(0, place - 700) : place]
    else:
        del data[place : place + rng.randint(1, 600)]
    path.write_bytes(data)


if __name__ == "__main__":
    main()
