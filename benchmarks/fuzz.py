"""Fuzzes every reader of users' bytes: `make fuzz`, or `python benchmarks/fuzz.py [--seconds 60] [--seed 0]`.

Each reader gets a small valid example whose files are changed at random: values of wrong types, sizes out of range,
missing and unknown fields, and flipped, cut and repeated bytes; often with checksums that fit again, as an attacker
would make them. Claim: each input ends in a value or in the project's own error, never in another exception, a crash,
more than 20 seconds or more than 8 GiB. A data set that is read has the pixels of the original, or names what it left
out. Each reader runs in a process of its own, `--processes` of them at a time, which reads one input after the other
in memory (/dev/shm). Each find is kept as a small folder, with the error, in `fuzz-finds/`;
`--reader NAME --only --seed NUMBER` repeats one.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import io
import json
import logging
import math
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

LIMIT = 20
"""Seconds that an input may take."""
MEMORY = 8 << 30
"""Bytes of address space that a reader may take, besides what it has when it starts."""
MEMORY_FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
"""For inputs: a hundred thousand folders take a disk longer than the readers."""
EXAMPLE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
MASK = (np.arange(24 * 32).reshape(24, 32) // 300).astype(np.uint8)
JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 10**30, -(2**63), 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "../../etc/passwd",
    "\x00", "\x1b[2J", "ü" * 300, [], [1, 2], [None], {}, {"a": 1}, "1", "none", [[[]]], "s3://a/b", "; true",
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """Something that reads users' bytes."""

    make: Callable[[Path], None]
    """Writes a valid example into an empty folder."""
    read: Callable[[Path], object]
    """Reads the example, changed, from the folder."""
    refit: Callable[[Path, random.Random], None] = lambda folder, rng: None
    """Makes checksums fit again, sometimes."""


# Examples and readers.


def _save(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _write_images(folder: Path) -> None:
    rgb, palette = Image.fromarray(EXAMPLE), Image.fromarray(MASK)
    palette.putpalette(list(range(256)) * 3)
    kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "JPEG": (rgb, {"progressive": True}), "PNG": (palette, {}), "TIFF": (rgb, {"compression": "tiff_lzw"}),
        "WEBP": (rgb, {}), "BMP": (rgb, {}), "GIF": (palette, {}), "PPM": (rgb, {}), "PCX": (rgb, {}), "QOI": (rgb, {}),
    }  # fmt: skip
    for kind, (image, options) in kinds.items():
        (folder / f"a.{kind.lower()}").write_bytes(_save(image, kind, **options))
    (folder / "deep.png").write_bytes(_save(Image.fromarray(EXAMPLE[..., 0].astype(np.uint16) * 200), "PNG"))


def _read_images(folder: Path) -> None:
    from slrnet.data.depth import Depth
    from slrnet.data.images import open_image, rgb_pixels, upright_rgb

    for path in sorted(folder.iterdir()):
        with open_image(path) as image:
            rgb_pixels(upright_rgb(image, Depth.parse("16")))


def _write_sample(folder: Path) -> None:
    (folder / "a.jpg").write_bytes(_save(Image.fromarray(EXAMPLE), "JPEG"))
    (folder / "a.png").write_bytes(_save(Image.fromarray(MASK), "PNG"))


def _read_sample(folder: Path) -> None:
    from slrnet.data.transforms import decode_image, decode_mask

    decode_image((folder / "a.jpg").read_bytes())
    decode_mask((folder / "a.png").read_bytes())


def _write_config(folder: Path) -> None:
    from slrnet.recipes import RECIPES

    for name in ("voc_wsss", "voc_sss_lite"):
        (folder / f"{name}.json").write_text(RECIPES[name]().to_json())


def _read_config(folder: Path) -> None:
    from slrnet.config import ConfigError, apply_overrides, config_from_dict, load_config

    for path in sorted(folder.iterdir()):
        config = load_config(path)
        assert config_from_dict(json.loads(config.to_json())) == config
        flat = list(config.flat().items())
        rng = random.Random(path.read_bytes())
        texts = [f"{rng.choice(flat)[0]}={rng.choice(JUNK)}" for _ in range(3)]
        with suppress(ConfigError):
            apply_overrides(config, texts)


def _write_shards(folder: Path) -> None:
    from data_prep.demo import build_demo

    folder.rmdir()
    build_demo(folder, num_train=4, num_val=2, image_size=32, samples_per_shard=2)


def _refit_shards(folder: Path, rng: random.Random) -> None:
    """Changes rows of the manifest, and lets the table of shards and the fingerprint fit them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from slrnet.data.manifest import DATASET_FILE, MANIFEST_FILE
    from slrnet.data.manifest_rows import ManifestWriter, fingerprint

    if rng.random() < 0.5:
        return
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException, OverflowError):
        table = pq.read_table(folder / MANIFEST_FILE)
        columns = table.to_pydict()
        for _ in range(rng.randint(1, 3)):
            name, row = rng.choice(table.column_names), rng.randrange(table.num_rows)
            kind, values = table.schema.field(name).type, columns[name]
            choices: list[Any] = [None, values[rng.randrange(len(values))]]
            if pa.types.is_string(kind):
                choices += ["", "../../x", "/etc/x", "a/b", "a.b", "x" * 1000, "train-000000.tar", "\x00", "\x9b31m"]
            elif pa.types.is_list(kind):
                choices += [[], [None], [-1], [0], [300], [1, 1]] if name == "classes" else [[], ["../x"], ["a", "a"]]
            elif not pa.types.is_boolean(kind):
                choices += [-1, 0, 1, 7, 2**31 - 1, 512, 10**6]
            values[row] = rng.choice(choices)
        writer = ManifestWriter(folder / MANIFEST_FILE)
        writer.add(pa.table(columns, schema=table.schema).replace_schema_metadata(None))
        description = json.loads((folder / DATASET_FILE).read_text())
        description["fingerprint"] = fingerprint(description["classes"], writer.close())
        (folder / DATASET_FILE).write_text(json.dumps(description))


def _read_shards(folder: Path) -> None:
    from slrnet.data.eval_loader import EvalLoader
    from slrnet.data.manifest import MANIFEST_FILE, load_dataset

    known, digest = _known()
    same = hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).digest() == digest
    shards = load_dataset(folder)
    for split in shards.splits:
        for sample in EvalLoader(shards, split=split, on_error="skip"):
            assert not same or sample.image.equal(known[sample.key]), "wrong pixels without an error"


@cache
def _known() -> tuple[dict[str, Any], bytes]:
    """Pixels by key, and the manifest's digest, of the example."""
    from slrnet.data.eval_loader import EvalLoader
    from slrnet.data.manifest import MANIFEST_FILE, load_dataset

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        folder.mkdir()
        _write_shards(folder)
        shards = load_dataset(folder)
        images = {sample.key: sample.image for split in shards.splits for sample in EvalLoader(shards, split=split)}
        return images, hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).digest()


def _write_checkpoint(folder: Path) -> None:
    import torch

    from slrnet.checkpoints.checkpoint import TrainState, save_checkpoint
    from slrnet.recipes import RECIPES

    state = TrainState(
        epoch=1, step=2, classes=("background", "cat"), data_fingerprint="a", world_size=1, metrics={"val/miou_ss": 0.5}
    )
    parts = {"model": {"a": torch.ones(3)}, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}}}
    save_checkpoint(folder / "checkpoints", config=RECIPES["voc_wsss"](), state=state, **parts)
    logs = folder / "logs"
    logs.mkdir()
    record = {"rank": 0, "node": "n", "pid": 1, "step": 1, "exception": "E", "message": "m", "event": "failure"}
    (logs / "rank-0.jsonl").write_text(json.dumps({"time": "2030-01-01T00:00:00.000+00:00"} | record) + "\n")
    (folder / "evaluation.json").write_text(
        json.dumps({"checkpoint": "c", "epoch": 1, "protocol": "ss", "metrics": {"val/miou": 0.5}, "before_crf": {}})
    )


def _refit_checkpoint(folder: Path, rng: random.Random) -> None:
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        (path,) = (folder / "checkpoints").iterdir()
        state = json.loads((path / "state.json").read_text())
        for name in state["sha256"]:
            state["sha256"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
        (path / "state.json").write_text(json.dumps(state))


def _read_run(folder: Path) -> None:
    from slrnet.checkpoints.checkpoint import load_checkpoint, load_whole
    from slrnet.tools.figures.tables import read_results
    from slrnet.tracking.run_log import find_failure

    find_failure(folder, since=0.0)
    load_whole(folder / "checkpoints")
    read_results([folder])
    load_checkpoint(folder)


def _write_weights(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"a.weight": torch.ones(3, 2), "b": torch.arange(4)}
    torch.save({"state_dict": tensors}, folder / "w.pth")
    save_file(tensors, folder / "w.safetensors")


def _read_weights(folder: Path) -> None:
    from slrnet.models.encoders import read_tensors

    for name in ("w.pth", "w.safetensors"):
        read_tensors(folder / name)


def _write_voc(folder: Path) -> None:
    from data_prep.demo import write_voc_folder

    write_voc_folder(folder, seed=0, num_train=2, num_val=1, image_size=32)


def _write_folder(folder: Path) -> None:
    (folder / "images").mkdir()
    for name in ("a", "b"):
        (folder / "images" / f"{name}.jpg").write_bytes(_save(Image.fromarray(EXAMPLE), "JPEG"))
    (folder / "labels.csv").write_text("image,labels,split\na.jpg,cat;dog,train\nb.jpg,dog,val\n")
    (folder / "masks").mkdir()
    (folder / "masks" / "a.png").write_bytes(_save(Image.fromarray(MASK), "PNG"))


def _write_coco(folder: Path) -> None:
    (folder / "annotations").mkdir()
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    for split in ("train", "val"):
        (folder / f"{split}2017").mkdir()
        (folder / f"{split}2017" / "1.jpg").write_bytes(_save(Image.fromarray(EXAMPLE), "JPEG"))
        image = {"id": 1, "file_name": "1.jpg", "width": 32, "height": 24}
        common = {"image_id": 1, "bbox": [2, 2, 9, 9], "area": 81}
        entries = [
            {"id": 1, "category_id": 3, "iscrowd": 0, "segmentation": [[2, 2, 11, 2, 11, 11]]} | common,
            {"id": 2, "category_id": 7, "iscrowd": 1, "segmentation": {"size": [24, 32], "counts": [100, 68, 600]}}
            | common,
        ]
        record = {"images": [image], "annotations": entries, "categories": categories}
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(record))


def _write_labelme(folder: Path) -> None:
    (folder / "images").mkdir()
    (folder / "images" / "a.jpg").write_bytes(_save(Image.fromarray(EXAMPLE), "JPEG"))
    shape = {"label": "cat", "points": [[1, 1], [9, 1], [9, 9]], "shape_type": "polygon", "flags": {}, "group_id": None}
    record = {"version": "5.5", "flags": {}, "shapes": [shape], "imagePath": "a.jpg", "imageData": None}
    (folder / "images" / "a.json").write_text(json.dumps(record | {"imageHeight": 24, "imageWidth": 32}))


def _write_cvat(folder: Path) -> None:
    (folder / "images").mkdir()
    (folder / "images" / "a.jpg").write_bytes(_save(Image.fromarray(EXAMPLE), "JPEG"))
    (folder / "annotations.xml").write_text(
        '<?xml version="1.0"?><annotations><version>1.1</version><image id="0" name="a.jpg" width="32" height="24">'
        '<polygon label="cat" points="1,1;9,1;9,9" z_order="0"/><mask label="dog" rle="3, 4" left="1" top="1" '
        'width="7" height="1"/></image></annotations>'
    )


def _write_mat(folder: Path) -> None:
    from scipy.io import savemat

    savemat(folder / "a.mat", {"GTcls": {"Segmentation": MASK}}, do_compression=True)


def _read_mat(folder: Path) -> None:
    from data_prep.mat_files import read_mat_mask

    read_mat_mask(folder / "a.mat")


def _write_tars(folder: Path) -> None:
    from slrnet.data.tars import tar_end, tar_members

    files = {"a.jpg": _save(Image.fromarray(EXAMPLE), "JPEG"), "a.png": _save(Image.fromarray(MASK), "PNG")}
    data = tar_members(files | {"a.json": b'{"classes": ["cat"]}'})
    (folder / "train-000000.tar").write_bytes(data + tar_end(len(data)))


def _prepare(*words: str) -> Callable[[Path], None]:
    """`slrnet prepare` with `{}` for the example's folder, up to its errors, which the command would print."""

    def read(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as out:
            given = ["prepare", *(word.format(folder) for word in words), "--out", f"{out}/o", "--processes", "1"]
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                options = _prepare_parser().parse_args(given)
                options.run(options)

    return read


@cache
def _prepare_parser() -> argparse.ArgumentParser:
    """Takes as long to build as an input to read."""
    from slrnet.cli.main import build_parser

    return build_parser(["prepare"])


READERS = {
    "images": Reader(_write_images, _read_images),
    "samples": Reader(_write_sample, _read_sample),
    "configurations": Reader(_write_config, _read_config),
    "shards": Reader(_write_shards, _read_shards, _refit_shards),
    "runs": Reader(_write_checkpoint, _read_run, _refit_checkpoint),
    "weights": Reader(_write_weights, _read_weights),
    "matrices": Reader(_write_mat, _read_mat),
    "voc": Reader(_write_voc, _prepare("voc", "--root", "{}")),
    "folders": Reader(
        _write_folder,
        _prepare(
            "folder",
            "--images",
            "{}/images",
            "--labels",
            "{}/labels.csv",
            "--masks",
            "{}/masks",
            "--classes",
            "cat,dog",
        ),
    ),
    "coco": Reader(_write_coco, _prepare("coco", "--root", "{}")),
    "labelme": Reader(_write_labelme, _prepare("folder", "--images", "{}/images", "--annotations", "{}/images")),
    "cvat": Reader(_write_cvat, _prepare("folder", "--images", "{}/images", "--annotations", "{}/annotations.xml")),
    "tars": Reader(_write_tars, _prepare("tars", "--tars", "{}", "--classes", "cat,dog")),
}
"""By name."""


# Changes.


def change(folder: Path, rng: random.Random) -> None:
    """Changes one to three of the files in a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in rng.sample(paths, min(len(paths), rng.choice([1, 1, 1, 2, 3]))):
        data = path.read_bytes()
        if path.suffix == ".json" and rng.random() < 0.7:
            with suppress(ValueError):
                path.write_text(json.dumps(_changed_values(rng, json.loads(data))))
                continue
        path.write_bytes(_changed_bytes(rng, data))


def _changed_values(rng: random.Random, values: Any) -> Any:
    """Some fields replaced, removed, renamed or added."""
    for _ in range(rng.randint(1, 3)):
        place = values
        while isinstance(place, (dict, list)) and place and rng.random() < 0.8:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], (dict, list)) or not place[key]:
                break
            place = place[key]
        if isinstance(place, dict) and place:
            key, action = rng.choice(list(place)), rng.randrange(4)
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


def _changed_bytes(rng: random.Random, given: bytes) -> bytes:
    data = bytearray(given)
    for _ in range(rng.choice([1, 1, 2, 4, 12])):
        place, action = rng.randrange(len(data) or 1), rng.randrange(7)
        if not data:
            break
        if action == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif action == 1:
            data[place] = rng.choice([0, 1, 127, 128, 255])
        elif action == 2:
            del data[place:]
        elif action == 3:
            del data[place : place + rng.randint(1, 600)]
        elif action == 4:
            data[place:place] = data[max(0, place - 700) : place]
        elif action == 5:
            data[place : place + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\x80\0\0\0"])
        else:
            place = rng.randrange(min(len(data), 64))
            data[place] = rng.randrange(256)
    return bytes(data)


# Running.


def examine(name: str, number: int, folder: Path, original: dict[str, bytes]) -> tuple[str, str]:
    """Changes an example, numbered, in an empty folder and reads it; returns the outcome and what is wrong, if so."""
    reader, rng = READERS[name], random.Random(f"{name} {number}")
    for file, data in original.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
    change(folder, rng)
    reader.refit(folder, rng)
    try:
        reader.read(folder)
    except Exception as error:
        return ("refused", "") if is_own(error) else ("other", traceback.format_exc())
    return "value", ""


def is_own(error: BaseException) -> bool:
    """Whether an error is the project's: a ValueError that its own code raised, and that explains itself."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = any(str(ROOT / room) in frames[-1].filename for room in ("slrnet", "data_prep"))
    if isinstance(error, FileNotFoundError):  # the system's own words for a file that the change took away
        return True
    return isinstance(error, ValueError) and ours and len(str(error)) >= 12


def example(name: str) -> dict[str, bytes]:
    """The files of a reader's valid example, by path, which it must read."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "example"
        folder.mkdir()
        READERS[name].make(folder)
        READERS[name].read(folder)
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def _limits() -> Iterator[None]:
    """Raises an error after `LIMIT` seconds, and soon after ends the process if native code does not return."""

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"more than {LIMIT} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    faulthandler.dump_traceback_later(LIMIT + 10, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()


def work(name: str, first: int, seconds: float, finds: Path, report: Path) -> None:
    """Fuzzes one reader in this process; writes after each input what it found so far."""
    logging.disable(logging.CRITICAL)
    original, outcomes, number = example(name), Counter[str](), first
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    end = time.monotonic() + seconds
    with report.open("w", buffering=1) as file:
        while time.monotonic() < end:
            file.write(f"{number}\n")
            with tempfile.TemporaryDirectory() as temporary:
                with _limits():
                    outcome, wrong = examine(name, number, Path(temporary), original)
                if wrong:
                    keep(finds / f"{name}-{number}", Path(temporary), original, wrong)
            outcomes[outcome] += 1
            number += 1
        file.write(json.dumps(outcomes) + "\n")


def keep(place: Path, folder: Path, original: dict[str, bytes], wrong: str) -> None:
    """Keeps the changed files of an input, and what was wrong."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "why.txt").write_text(wrong)
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.read_bytes() != original.get(name):
            (place / name.replace("/", "__")).write_bytes(path.read_bytes())


def fuzz(name: str, seed: int, seconds: float, finds: Path) -> Counter[str]:
    """Fuzzes one reader in processes of its own: another one takes over where an input ended the first."""
    total, end, first = Counter[str](), time.monotonic() + seconds, seed
    while (left := end - time.monotonic()) > 0:
        with tempfile.TemporaryDirectory() as temporary:
            report = Path(temporary) / "report"
            words = ["--reader", name, "--seed", str(first), "--seconds", f"{left:.1f}", "--finds", str(finds)]
            done = subprocess.run(
                [sys.executable, __file__, *words, "--report", str(report)],
                cwd=temporary,
                env=os.environ | {"TMPDIR": MEMORY_FOLDER},
                capture_output=True,
                text=True,
            )
            lines = report.read_text().splitlines() if report.exists() else []
        if done.returncode == 0:
            return total + Counter(json.loads(lines[-1]))
        if not lines:
            raise RuntimeError(f"the reader {name} cannot be started: {done.stderr[-2000:]}")
        number = int(lines[-1])
        total += Counter({"other": 1, "before a crash": number - first})
        keep(finds / f"{name}-{number}", Path(temporary), {}, f"exit status {done.returncode}\n{done.stderr[-4000:]}")
        first = number + 1
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="time for all readers (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first input (default: 0)")
    parser.add_argument("--reader", choices=READERS, help="one reader (default: all)")
    parser.add_argument("--only", action="store_true", help="with --reader: the one input of number --seed, here")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="readers at a time (default: all cores)")
    parser.add_argument("--finds", type=Path, default=Path("fuzz-finds"), help="folder of finds (default: fuzz-finds)")
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report:
        work(options.reader, options.seed, options.seconds, options.finds, options.report)
        return
    if options.only:
        with tempfile.TemporaryDirectory() as temporary:
            print(*examine(options.reader, options.seed, Path(temporary), example(options.reader)))
        return
    names = [options.reader] if options.reader else list(READERS)
    seconds = options.seconds / math.ceil(len(names) / options.processes)
    print(f"seed {options.seed}, {seconds:.0f} s for each of {len(names)} readers", flush=True)

    def run(name: str) -> Counter[str]:
        found = fuzz(name, options.seed, seconds, options.finds.resolve())
        shown = ", ".join(f"{count} {outcome}" for outcome, count in sorted(found.items()))
        print(f"{name}: {found.total()} inputs, {found.total() / seconds:.1f} a second: {shown}", flush=True)
        return found

    with ThreadPoolExecutor(options.processes) as pool:
        total = sum(pool.map(run, names), Counter[str]())
    wrong = total["other"]
    print(f"{'FAILS' if wrong else 'holds'}: {wrong} of {total.total()} inputs without a proper end")
    if wrong:
        print(f"they are in {options.finds}; repeat one with --reader NAME --only --seed NUMBER")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
