"""Disturbs everything that slrnet writes, at each of its writes, and each phase of a training: part of `make chaos`.

    python benchmarks/write_faults.py [--only NAME ...] [--slow 10] [--steps 1]

Each output is written in a process of its own over an earlier one of its kind. Before the n-th change to its folder (a
file that is opened for writing, renamed or removed, a folder that is made), for each n:

- full: this change and all later ones that take space are refused (ENOSPC);
- read only: this change and all later ones are refused (EROFS);
- killed: the process is killed (SIGKILL);
- slow: the change waits for `--slow` seconds;
- two at once: another process writes the same output from beginning to end, then the first one continues.

Within files, also those that native code writes, no file may grow beyond some bytes, for the sizes of all files: the
disk is full (EFBIG) or the process is killed (SIGXFSZ) in the middle of a write.

Claims: afterwards each file is the earlier or the new one, to the byte, and what reads the output takes it; an error is
one of the system or of slrnet, and says why; the same command, once more, completes the output to the byte, and leaves
nothing else in the folder but files that the next hour removes.

A small training gets SIGTERM, SIGINT and SIGKILL at each place that it goes through, in all epochs, and is resumed.
Claims: its final weights equal the undisturbed ones to the bit; after SIGTERM and SIGINT no step is repeated.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks._cluster import NETWORK  # noqa: E402
from slrnet.launch.train import TrainingError  # noqa: E402
from slrnet.tracking.mlflow import load_mlflow  # noqa: E402

Act = Callable[[Path], None]
View = Callable[[Path], dict[str, str]]
KINDS = ("full", "read only", "killed", "slow", "two at once")
"""Before a change."""
WITHIN = ("full", "killed")
"""Within a file."""
CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}
"""Python's audit events of what changes a folder."""
SECONDS = 120
"""After which a process counts as hanging."""
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Folder for outputs: a disk takes longer than all else."""


def files_of(folder: Path) -> dict[str, str]:
    """Digests of the files that people see, by path."""
    paths = ((path, path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file())
    seen = (pair for pair in paths if not any(map(_is_own, pair[1].parts)))
    return {place.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path, place in seen}


def leftovers(folder: Path) -> list[str]:
    """What people do not see, less unfinished files and empty folders, which an hour later go by themselves."""
    paths = [path for path in folder.rglob("*") if _is_own(path.name) and not path.name.startswith(".incoming.")]
    return sorted(path.name for path in paths if path.is_file() or any(path.iterdir()))


def _is_own(name: str) -> bool:
    return name.startswith(".") or name == "lease.json"


@dataclass(frozen=True)
class Output:
    """Something that slrnet writes into a folder."""

    begin: Act
    """Writes what is there before."""
    write: Act
    """Writes over it."""
    read: Act
    """Reads it; raises an error if it is not whole."""
    view: View = files_of
    """What people see of it, by name."""


def load() -> None:
    """Imports what the outputs need, once and not in each process."""
    for name in ("checkpoints.checkpoint", "data.images", "recipes", "storage.lease", "tracking.run_log"):
        import_module(f"slrnet.{name}")


# Faults.


def in_process(act: Callable[[], object]) -> tuple[int, str]:
    """Runs an act in a forked process.

    Returns:
        0 and its result as text; 1 and its error, of the system or of slrnet; 2 and another error; or the negative
        signal that ended it and "".
    """
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(SECONDS)
        status, text = _outcome(act)
        os.write(send, text.encode()[-60_000:])
        os._exit(status)
    os.close(send)
    with open(receive, encoding="utf-8", errors="replace") as file:
        text = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def _outcome(act: Callable[[], object]) -> tuple[int, str]:
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return 0, str(act())
    except (OSError, ValueError, TrainingError) as error:
        return (1 if str(error) else 2), f"{type(error).__name__}: {error}"
    except BaseException as error:
        return 2, f"{type(error).__name__}: {error}"


def count_changes(output: Output, folder: Path) -> int:
    """The number of changes that writing makes to the folder."""
    count = 0

    def note(event: str) -> None:
        nonlocal count
        count += 1

    _on_changes(folder, note)
    output.write(folder)
    return count


def disturb(output: Output, folder: Path, number: int, kind: str, slow: float) -> None:
    """Writes an output, disturbed before change `number`, from 0."""
    count = 0

    def note(event: str) -> None:
        nonlocal count
        place, count = count, count + 1
        if kind == "read only" and place >= number:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if kind == "full" and place >= number and event in ("open", "os.mkdir", "os.link", "os.symlink"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if place != number:
            return
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "slow":
            time.sleep(slow)
        elif kind == "two at once":
            count = 10**9  # the other process has this hook too
            status, text = in_process(lambda: output.write(folder))
            if status not in (0, 1):
                raise AssertionError(f"the second process ended with {status}: {text}")

    _on_changes(folder, note)
    output.write(folder)


def _on_changes(folder: Path, note: Callable[[str], None]) -> None:
    """Calls `note` before each change that this process makes to a folder; there is no way back."""
    within, writing = f"{folder}/", os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or (event == "open" and not (arguments[2] or 0) & writing):
            return
        path = arguments[0]
        relative = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # within a folder that is removed
        if relative or (not isinstance(path, int) and os.fsdecode(path).startswith(within)):
            note(event)

    sys.addaudithook(hook)


def cut(output: Output, folder: Path, most: int, kind: str) -> None:
    """Writes an output while no file may have more than `most` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kind == "killed" else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    output.write(folder)


# Claims.


@dataclass(frozen=True)
class Reference:
    """An output undisturbed."""

    before: Mapping[str, str]
    after: Mapping[str, str]
    changes: int
    sizes: tuple[int, ...]
    """Of its files, bytes."""


def reference(output: Output, earlier: Path) -> Reference:
    """Writes an output undisturbed and checks it; leaves what was there before in the folder `earlier`."""
    _succeed(lambda: output.begin(earlier))
    with _copy(earlier) as folder:
        before = _view(output, folder)
        changes = int(_succeed(lambda: count_changes(output, folder)))
        _succeed(lambda: output.read(folder))
        sizes = {path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        return Reference(before, _view(output, folder), changes, tuple(sorted(sizes)))


@contextmanager
def _copy(earlier: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as temporary:
        yield Path(shutil.copytree(earlier, Path(temporary) / "folder"))


def _succeed(act: Callable[[], object]) -> str:
    status, text = in_process(act)
    if status:
        raise RuntimeError(f"without a fault, it ended with {status}: {text}")
    return text


def _view(output: Output, folder: Path) -> dict[str, str]:
    seen: dict[str, str] = json.loads(_succeed(lambda: json.dumps(output.view(folder))))
    return seen


def examine(output: Output, earlier: Path, known: Reference, injection: Injection) -> str:
    """Writes an output with a fault, over what was there before, then once more in peace; returns what is wrong."""
    kind, place, fault = injection
    with _copy(earlier) as folder:
        status, text = in_process(lambda: fault(folder))
        killed = "killed" in kind and status in (-signal.SIGKILL, -signal.SIGXFSZ)
        if status and not killed and (status != 1 or kind == "slow"):
            return f"{kind} at {place}: ended with {status}: {text}"
        problem = _succeed(lambda: _examine_after(output, known, folder))
        return problem and f"{kind} at {place} ({status}: {text}): {problem}"


def _examine_after(output: Output, known: Reference, folder: Path) -> str:
    """What is wrong with an output after a fault, and after it was written once more; "" for nothing."""
    if torn := _torn(output.view(folder), known):
        return f"{torn} is neither the earlier nor the new one"
    if (status_text := _outcome(lambda: output.read(folder)))[0]:
        return f"cannot be read: {status_text[1]}"
    status, text = _outcome(lambda: output.write(folder))
    if (seen := output.view(folder)) != known.after:
        return f"is not completed ({status}: {text}): {sorted(seen.items() ^ known.after.items())[:2]}"
    left = leftovers(folder)
    return f"leaves {left}" if left and not status else ""  # a new output, once complete, is not begun again


def _torn(seen: Mapping[str, str], known: Reference) -> str:
    """The first thing that is neither as before nor as after, or missing although it is always there."""
    for name in sorted({*seen, *known.before, *known.after}):
        if seen.get(name) not in (known.before.get(name), known.after.get(name)):
            return name
    return ""


Injection = tuple[str, int, Act]
"""Kind of a fault, its place, and the act that writes with it."""


def injections(output: Output, known: Reference, *, slow: float, step: int = 1) -> Iterator[Injection]:
    """All faults of an output, or of each kind every `step`-th."""
    for kind in KINDS:
        for number in range(0, known.changes, step):
            yield kind, number, partial(disturb, output, number=number, kind=kind, slow=slow)
    places = sorted({most for size in known.sizes for most in (0, size // 2, size - 1) if most >= 0})
    for kind in WITHIN:
        for most in places[::step]:
            yield f"{kind} within a file", most, partial(cut, output, most=most, kind=kind)


def inject(output: Output, *, slow: float, step: int = 1, at_a_time: int = 1) -> tuple[Counter[str], list[str]]:
    """Injects all faults into an output, some at a time; returns how many of each kind, and what went wrong."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as temporary:
        earlier = Path(temporary)
        known = reference(output, earlier)
        chosen = list(injections(output, known, slow=slow, step=step))

        def share(index: int) -> list[str]:
            return [examine(output, earlier, known, injection) for injection in chosen[index::at_a_time]]

        return Counter(kind for kind, _, _ in chosen), _side_by_side(share, at_a_time)


def _side_by_side(act: Callable[[int], list[str]], number: int) -> list[str]:
    """The problems that an act finds, in processes of its own: threads would hold locks while others fork."""
    if number == 1:
        return [problem for problem in act(0) if problem]
    with tempfile.TemporaryDirectory(dir=MEMORY) as temporary:
        places = [Path(temporary) / str(index) for index in range(number)]
        pids = []
        for index, place in enumerate(places):
            if (pid := os.fork()) == 0:
                place.write_text(json.dumps(act(index)))
                os._exit(0)
            pids.append(pid)
        if sum(os.waitpid(pid, 0)[1] for pid in pids):
            raise RuntimeError("a process that injects faults ended early")
        return [problem for place in places for problem in json.loads(place.read_text()) if problem]


# Outputs.


def _state(epoch: int) -> Any:
    from slrnet.checkpoints.checkpoint import TrainState

    return TrainState(
        epoch=epoch, step=2 * epoch, classes=("background", "cat"), data_fingerprint="a", world_size=1,
        metrics={"val/miou_ss": 0.5},
    )  # fmt: skip


def _save(epoch: int, value: float, folder: Path) -> None:
    import torch

    from slrnet.checkpoints.checkpoint import CheckpointWriter
    from slrnet.recipes import RECIPES
    from slrnet.storage.lease import LEASE, owned

    with owned(folder / LEASE, "run"):
        writer = CheckpointWriter(folder / "checkpoints", RECIPES["demo"](), patience=0.0)
        try:
            tensors = {"a": torch.full((300,), value)}
            writer.save(_state(epoch), model=tensors, optimizer={"state": {0: dict(tensors)}})
            writer.wait()
        finally:
            writer.close()


def _save_three(folder: Path) -> None:
    for epoch in (1, 2, 3):
        _save(epoch, float(epoch), folder)


def _load(folder: Path) -> None:
    from slrnet.checkpoints.checkpoint import load_checkpoint

    load_checkpoint(folder)


def _write_shards(folder: Path) -> None:
    from data_prep.demo import build_demo

    with suppress(FileExistsError):
        build_demo(folder / "data", num_train=3, num_val=1, image_size=32, samples_per_shard=2)


def _verify_shards(folder: Path) -> None:
    from data_prep.shard_writer import verify

    if (folder / "data").exists() and (damage := verify(folder / "data")):
        raise ValueError(f"damaged: {damage[0]}")


def _write_report(text: str, folder: Path) -> None:
    import numpy as np
    from PIL import Image

    from slrnet.storage.files import write_json, write_text, written_whole

    write_text(folder / "report.html", f"<p>{text}</p>" * 300)
    write_json(folder / "results" / "trials.json", {"trials": [text] * 100})
    with written_whole(folder / "panels" / "a.png") as incoming:
        Image.fromarray(np.full((24, 32, 3), len(text), dtype=np.uint8)).save(incoming)


def _read_report(folder: Path) -> None:
    from slrnet.data.images import open_image
    from slrnet.storage.files import read_json

    read_json(folder / "results" / "trials.json")
    with open_image(folder / "panels" / "a.png") as image:
        image.load()


def _log_step(step: int, folder: Path) -> None:
    from slrnet.storage.lease import LEASE, owned
    from slrnet.tracking.run_log import RunLog

    with owned(folder / LEASE, "run"):
        if step not in _logged(folder):
            RunLog(folder, rank=0).write("step", step=step)


def _logged(folder: Path) -> list[int]:
    from slrnet.tracking.run_log import read_log

    path = folder / "logs" / "rank-0.jsonl"
    return [record["step"] for record in read_log(path)] if path.is_file() else []


@dataclass(frozen=True)
class Materials:
    """What some outputs are made of: a small data set and a run that was trained on it."""

    data: Path
    run: Path


def _label(materials: Materials, folder: Path) -> None:
    from slrnet.checkpoints.checkpoint import load_checkpoint
    from slrnet.data.manifest import load_dataset
    from slrnet.launch.prediction import MaskJob
    from slrnet.launch.pseudo_label import launch_pseudo_labels

    checkpoint = load_checkpoint(materials.run)
    shards = load_dataset(materials.data)
    launch_pseudo_labels(MaskJob(checkpoint, checkpoint.config, shards, ("train",)), folder / "pseudo")


def _read_labels(folder: Path) -> None:
    from data_prep.shard_writer import verify
    from slrnet.launch.pseudo_label import read_record

    if (folder / "pseudo").exists() and (read_record(folder / "pseudo") is None or verify(folder / "pseudo")):
        raise ValueError("the pseudo labels are damaged")


def _begin_curves(folder: Path) -> None:
    from slrnet.tracking.mlflow import create_run

    handle = create_run(_store(folder), "chaos", "a", params={}, tags={}, resume=False)
    (folder / "handle.json").write_text(json.dumps([handle.run_id, handle.experiment_id]))
    _log_point(1, folder)


def _log_point(step: int, folder: Path) -> None:
    from slrnet.tracking.mlflow import MlflowTracker

    MlflowTracker(_handle(folder), once=True).log_metrics({"train/loss": 1 / step}, step)


def _points(folder: Path) -> dict[str, str]:
    from slrnet.tracking.reader import metric_history

    return {"curve": str(metric_history(_handle(folder), "train/loss"))}


def _store(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def _handle(folder: Path) -> Any:
    from slrnet.tracking.protocol import RunHandle

    run_id, experiment_id = json.loads((folder / "handle.json").read_text())
    return RunHandle(uri=_store(folder), run_id=run_id, experiment_id=experiment_id)


def _log(folder: Path) -> dict[str, str]:
    return {"steps": str(_logged(folder))}


def _nothing(folder: Path) -> None:
    """Begins without an earlier output, or leaves reading to the view."""


def outputs(materials: Materials | None) -> dict[str, Output]:
    """What is disturbed, by name; without materials what needs none."""
    chosen = {
        "checkpoint": Output(_save_three, partial(_save, 4, 4.0), _load),
        "checkpoint in place of another": Output(partial(_save, 1, 1.0), partial(_save, 1, 2.0), _load),
        "data set": Output(_nothing, _write_shards, _verify_shards),
        "report, table, picture": Output(partial(_write_report, "a"), partial(_write_report, "ab"), _read_report),
        "log of a rank": Output(partial(_log_step, 1), partial(_log_step, 2), _nothing, view=_log),
    }
    if materials is not None:
        chosen["pseudo labels"] = Output(_nothing, partial(_label, materials), _read_labels)
        chosen["curves"] = Output(_begin_curves, partial(_log_point, 2), _nothing, view=_points)
    return chosen


# A training.

SETTINGS = (
    *NETWORK, "model.decoder_dim=8", "model.skip_dim=4", "cvlr.dim=8", "data.crop_size=64", "train.batch_size=4",
    "train.epochs=2", "train.pretrain_epochs=1", "train.log_every=1", "evaluation.pseudo_mask_images=2",
    "evaluation.panel_images=1",
)  # fmt: skip
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)


def train(data: Path, folder: Path, number: int = -1, name: signal.Signals = signal.SIGTERM) -> int:
    """Trains, or continues a training, which gets a signal at the place `number`, from 0; returns how many it has."""
    from slrnet.config import apply_overrides
    from slrnet.data.manifest import load_dataset
    from slrnet.distributed.process import Process
    from slrnet.launch.stopping import Interruption, SignalRequests
    from slrnet.recipes import RECIPES
    from slrnet.storage.lease import LEASE, owned
    from slrnet.tracking.protocol import NullTracker
    from slrnet.tracking.run_log import RunLog
    from slrnet.training.listener import RunListener
    from slrnet.training.trainer import Trainer

    config, shards, count = apply_overrides(RECIPES["demo"](), [*SETTINGS, f"data.path={data}"]), load_dataset(data), 0

    class Disturbed(RunListener):
        def at(self, place: str, step: int) -> None:
            nonlocal count
            super().at(place, step)
            count += 1
            if count == number + 1:
                os.kill(os.getpid(), name)

    log = RunLog(folder, rank=0)
    with owned(folder / LEASE, "run"), Interruption() as interruption:
        about: dict[str, Any] = {"process": Process(), "folder": folder}
        listener = Disturbed(config, shards.info, **about, tracker=NullTracker(), log=log)
        trainer = Trainer(config, shards, **about, listener=listener)
        trainer.resume()
        log.write("start", step=trainer.state.step)
        listener.at("starting", trainer.state.step)
        trainer.fit(report=lambda metrics: None, requests=SignalRequests(interruption))
        listener.at("ending", trainer.state.step)
    return count


def prepare(materials: Materials) -> int:
    """Makes a data set and trains on it undisturbed; returns how many places the training has."""
    from data_prep.demo import build_demo

    build_demo(materials.data, num_train=8, num_val=2, image_size=64, samples_per_shard=4)
    return train(materials.data, materials.run)


def disturb_training(materials: Materials, places: Sequence[int], at_a_time: int) -> tuple[Counter[str], list[str]]:
    """Trains with a signal at each of some places, and resumes; returns how many, and what went wrong."""
    chosen = [(name, place) for name in SIGNALS for place in places]

    def share(index: int) -> list[str]:
        found = [(name, place, _examine_training(materials, place, name)) for name, place in chosen[index::at_a_time]]
        return [f"{name.name} at place {place}: {problem}" for name, place, problem in found if problem]

    return Counter(name.name for name, _ in chosen), _side_by_side(share, at_a_time)


def _examine_training(materials: Materials, place: int, name: signal.Signals) -> str:
    from slrnet.tracking.run_log import read_log

    with tempfile.TemporaryDirectory(dir=MEMORY) as temporary:
        folder = Path(temporary) / "run"
        status, text = in_process(lambda: train(materials.data, folder, place, name))
        if status != (-signal.SIGKILL if name == signal.SIGKILL else 0):
            return f"ended with {status}: {text}"
        status, text = in_process(lambda: train(materials.data, folder))
        if status:
            return f"cannot be resumed: {text}"
        if _weights(folder) != _weights(materials.run):
            return "its final weights differ"
        steps = [record["step"] for record in read_log(folder / "logs" / "rank-0.jsonl") if record["event"] == "step"]
        if name != signal.SIGKILL and len(steps) != len(set(steps)):
            return f"it repeats steps: {steps}"
    return ""


def _weights(run: Path) -> str:
    """Digest of the weights of a run's last checkpoint; what else it holds has times and rates in it."""
    last = max((run / "checkpoints").glob("checkpoint-*")).name
    return files_of(run / "checkpoints")[f"{last}/model.safetensors"]


# Running.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="outputs to disturb, or `training` (default: all)")
    parser.add_argument("--slow", type=float, default=10.0, help="seconds that a slow write waits (default: 10)")
    parser.add_argument("--step", type=int, default=1, help="disturb every N-th write of a kind (default: 1)")
    parser.add_argument("--at-a-time", type=int, default=16, help="processes, which mostly wait (default: 16)")
    options = parser.parse_args()
    load()
    load_mlflow()
    for name in ("data_prep.demo", "slrnet.launch.pseudo_label", "slrnet.training.trainer"):
        import_module(name)
    failed = False
    with tempfile.TemporaryDirectory(dir=MEMORY) as temporary:
        materials = Materials(Path(temporary) / "data", Path(temporary) / "run")
        status, text = in_process(lambda: prepare(materials))
        if status:
            raise SystemExit(f"the undisturbed training failed: {text}")
        chosen = {name: partial(inject, output, slow=options.slow, step=options.step, at_a_time=options.at_a_time)
                  for name, output in outputs(materials).items()}  # fmt: skip
        at_once = min(options.at_a_time, os.cpu_count() or 1)
        chosen["training"] = partial(disturb_training, materials, range(0, int(text), options.step), at_once)
        for name, act in chosen.items():
            if not options.only or name in options.only:
                begun = time.monotonic()
                counts, problems = act()
                failed |= bool(problems)
                listed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
                verdict = f"{'FAILS' if problems else 'holds'}: {name}: {counts.total()} faults ({listed})"
                print(f"{verdict} in {time.monotonic() - begun:.0f} s", *problems[:20], sep="\n  ", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
