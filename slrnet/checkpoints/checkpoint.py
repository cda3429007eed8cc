"""Checkpoints: directories that appear whole or not at all, and load without running code.

A checkpoint holds `model.safetensors` (weights), `trainer.pt` (the optimizer's state, and the weights that train if
those in `model.safetensors` are their average, `train.ema`; tensors and plain values, read with `weights_only=True`),
`state.json` (schema version, progress, scores, classes, checksums) and `config.json`. It is
written beside its final place, flushed to the disk and renamed. A run keeps its last two checkpoints, in case the last
one is damaged, and its best one. `checkpoint-EPOCH-STEP` is of a step within an epoch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import ConfigDict, Field, NonNegativeInt, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from slrnet.checkpoints.run_store import CONFIG, FILES, STATE, TRAINER, WEIGHTS, rank
from slrnet.config import Config, load_config
from slrnet.storage.files import read_json, sha256_of
from slrnet.storage.folders import remove_folder, whole_folder
from slrnet.storage.names import check_text
from slrnet.storage.shown import logger_of

if TYPE_CHECKING:
    from tenacity import RetryCallState

    from slrnet.models.network import Network

__all__ = [
    "MOST_AT_A_TIME",
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "NotFiniteError",
    "TrainState",
    "check_classes",
    "find_checkpoint",
    "load_checkpoint",
    "load_whole",
    "not_finite",
    "prune_checkpoints",
    "read_state",
    "require_free_space",
    "restore_model",
    "restore_network",
    "save_checkpoint",
]

SCHEMA_VERSION = 1
_TRAINED = "network"
"""Key in `trainer.pt` of the weights that train."""
KEEP_LAST = 2
MOST_AT_A_TIME = KEEP_LAST + 2
"""Most checkpoints of a run on the disk: the last ones, the best one, and the one being written."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between two attempts to write: the first pause, doubled each time up to the longest."""

Byte: TypeAlias = Annotated[int, Field(ge=0, le=255)]

_log = logger_of(__name__)


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or does not fit what is asked of it."""


class NotFiniteError(CheckpointError):
    """A checkpoint has values that are infinite or NaN: nothing goes on from it."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """How far a training is. Values of other types are refused where they are read."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    epoch: NonNegativeInt
    """Finished epochs."""
    step: NonNegativeInt
    """Finished optimizer steps."""
    classes: tuple[str, ...]
    """Names of the K classes, background first."""
    data_fingerprint: str
    """Fingerprint of the data set that was trained on."""
    world_size: NonNegativeInt
    """Processes that trained together."""
    best_score: float | None = None
    """Highest validation mIoU so far, in [0, 1]."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Figures measured at this point, by their names in MLflow."""
    run_id: str = ""
    """MLflow run that the training reports to."""
    unfinished: Mapping[str, float] = field(default_factory=dict)
    """Loss parts summed over the finished steps of the current epoch; empty at the end of an epoch."""
    untracked: tuple[tuple[NonNegativeInt, Mapping[str, float]], ...] = ()
    """Step and figures that MLflow had not taken when this was saved."""
    depth: str = ""
    """How the data's images of more than 8 bits became 8-bit ones (`DatasetInfo.depth`); predictions do the same."""
    palette: tuple[tuple[Byte, Byte, Byte], ...] = ()
    """RGB colors of the K classes, of the data set that was trained on; empty in a checkpoint that knows none."""

    @property
    def name(self) -> str:
        """Name of the checkpoint of this state."""
        return f"checkpoint-{self.epoch:04d}" + (f"-{self.step:08d}" if self.unfinished else "")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    path: Path
    config: Config
    state: TrainState
    model: dict[str, Tensor]
    """The weights to predict with."""
    optimizer: dict[str, Any]
    trained: dict[str, Tensor] | None = None
    """The weights to train on with, if `model` is their average; None: `model`."""


def save_checkpoint(
    folder: Path,
    *,
    config: Config,
    state: TrainState,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    trained: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes a checkpoint, as in `Checkpoint`, into `folder` under the state's name, whole or not at all.

    Returns:
        Its path.
    """
    for part in (model, optimizer, trained):
        if name := not_finite(part):
            raise NotFiniteError(f"{state.name} is not written: {name} has values that are not finite")
    target = folder / state.name
    with whole_folder(target, own=FILES) as incoming:
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model.items()}, incoming / WEIGHTS)
            torch.save(dict(optimizer) | ({} if trained is None else {_TRAINED: dict(trained)}), incoming / TRAINER)
        except (SafetensorError, RuntimeError) as error:  # both libraries hide the OSError
            free, reason = shutil.disk_usage(folder).free / 2**20, " ".join(str(error).split())
            raise OSError(f"tensors could not be written ({reason}; {free:.0f} MiB free)") from error
        (incoming / CONFIG).write_text(config.to_json(), encoding="utf-8")
        sums = {name: sha256_of(incoming / name) for name in (WEIGHTS, TRAINER, CONFIG)}
        record = {"schema_version": SCHEMA_VERSION, **asdict(state), "sha256": sums}
        (incoming / STATE).write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return target


@dataclass(eq=False)
class CheckpointWriter:
    """Writes the checkpoints of a run in a thread, one at a time and in order.

    The training pays for a copy of the state; weights on a GPU are copied to page-locked memory. A checkpoint that the
    storage refuses (full, unreachable) is tried again, less and less often, while the training continues.
    """

    folder: Path
    """The run's folder of checkpoints."""
    config: Config
    _: KW_ONLY
    patience: float = 300.0
    """Seconds for which a refused checkpoint is tried again."""
    upload: Callable[[], None] | None = None
    """Copies what was written to the run's storage; None if the folder is the storage."""

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._copies = _Copies()

    def save(
        self,
        state: TrainState,
        *,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Any],
        trained: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Starts to write a checkpoint, as `save_checkpoint` does, after the previous one is written; see `wait`."""
        self.wait()
        states = {"model": model, "optimizer": optimizer, "trained": trained}
        parts = {name: self._copies.of(values, name) for name, values in states.items()}
        self._copies.finish()
        self._writing = self._thread.submit(self._write, state, parts)

    def wait(self) -> None:
        """Returns when all checkpoints are written; raises a `CheckpointError` if one could not be."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Ends the thread after the current checkpoint; does not raise."""
        self._thread.shutdown(wait=True)

    def _write(self, state: TrainState, parts: Mapping[str, Any]) -> None:
        save = partial(save_checkpoint, self.folder, config=self.config, state=state, **parts)
        self._try(save, state.name, str(self.folder))
        prune_checkpoints(self.folder)
        if self.upload is not None:
            self._try(self.upload, f"the copy of {state.name}", "the run's storage")

    def _try(self, act: Callable[[], object], what: str, place: str) -> None:
        from tenacity import Retrying, retry_if_exception_type, stop_before_delay, wait_exponential

        def warn(attempt: RetryCallState) -> None:
            error = attempt.outcome and attempt.outcome.exception()
            _log.warning("%s cannot be written (%s); trying again in %.0f s", what, error, attempt.upcoming_sleep)

        attempts = Retrying(
            retry=retry_if_exception_type(OSError),
            wait=wait_exponential(FIRST_PAUSE, LONGEST_PAUSE),
            stop=stop_before_delay(self.patience),
            before_sleep=warn,
            reraise=True,
        )
        try:
            attempts(act)
        except OSError as error:
            raise CheckpointError(
                f"{what} could not be written to {place} for {attempts.statistics['delay_since_first_attempt']:.0f} s: "
                f"{error}; free some space or repair the storage, then continue with --resume: earlier checkpoints are "
                "whole"
            ) from None


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint; nothing in it can run code.

    `path` is a checkpoint directory, or a run's folder: then its best checkpoint is read.

    Raises:
        CheckpointError: it is missing, of another version, or a file in it is damaged.
    """
    path = Path(path)
    if (path / STATE).is_file():
        return _read(path)
    best = load_whole(path if path.name == "checkpoints" else path / "checkpoints", which="best")
    if best is None:
        runs = sorted(str(folder.parent) for folder in path.glob("*/checkpoints"))
        known = f"; runs in it: {', '.join(runs[:10])}" if runs else ""
        raise CheckpointError(
            f"{path} holds no checkpoint; give a directory with {STATE}, or the folder of a run that has finished "
            f"an epoch{known}"
        )
    return best


def load_whole(folder: Path, *, which: Literal["last", "best"] = "last") -> Checkpoint | None:
    """Reads the last, or best, checkpoint in a folder that is whole and finite; warns of those that it passes over."""
    left = _listed(folder)
    while (path := _choose(left, which)) is not None:
        try:
            return _read(path)
        except CheckpointError as error:
            _log.warning("skipping a checkpoint: %s", error)
            del left[path]
    return None


def find_checkpoint(folder: Path, *, which: Literal["last", "best"] = "last") -> Path | None:
    """The last, or best (highest validation mIoU, then later), checkpoint in a folder.

    Its files are there; it may be damaged, as no weights are read. See `load_whole`.
    """
    return _choose(_listed(folder), which)


def _read(path: Path) -> Checkpoint:
    state = read_state(path)
    try:
        tensors = load_file(path / WEIGHTS)
        optimizer = torch.load(path / TRAINER, map_location="cpu", weights_only=True)
        if not isinstance(optimizer, dict):
            raise TypeError(f"{TRAINER} holds a {type(optimizer).__name__}")
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}; take another checkpoint of the run") from None
    for part in (tensors, optimizer):
        if name := not_finite(part):
            raise NotFiniteError(f"{path} has values that are not finite, in {name}; take another checkpoint")
    return Checkpoint(path, load_config(path / CONFIG), state, tensors, optimizer, optimizer.pop(_TRAINED, None))


def not_finite(values: Any, name: str = "") -> str:
    """Name of the first tensor that holds an infinite value or NaN, through dictionaries and lists; "" for none.

    All tensors are on one device; for a GPU, the host waits once.
    """
    named = list(_floating(values, name))
    if not named:
        return ""
    broken = torch.stack([(~tensor.isfinite()).any() for _, tensor in named]).cpu().tolist()
    return next((found or "a tensor" for (found, _), wrong in zip(named, broken, strict=True) if wrong), "")


def _floating(values: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in dictionaries and lists, with their dotted names."""
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield name, values
        return
    pairs = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    for key, value in pairs:
        yield from _floating(value, f"{name}.{key}".lstrip("."))


def restore_model(checkpoint: Checkpoint) -> Network:
    """The network of a checkpoint with its weights, in training mode on the CPU."""
    from slrnet.models.slrnet import build_network  # takes seconds, and most users of checkpoints need no network

    model = build_network(checkpoint.config, num_classes=len(checkpoint.state.classes), weights=False)
    try:
        model.load_state_dict(checkpoint.model)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.path} does not fit its own configuration: {error}") from None
    return model


def prune_checkpoints(folder: Path, *, last: int = KEEP_LAST, best: bool = True) -> None:
    """Removes all but the `last` last ones and the best checkpoint, and what interrupted writes left behind.

    Reads no weights: whoever loads a checkpoint compares it with its checksums.
    """
    listed = _listed(folder)
    by_step = sorted(listed, key=lambda path: listed[path].step)
    keep = {*by_step[len(by_step) - last :], *([_choose(listed, "best")] if best else [])}
    for path in (*folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*.partial")) if listed else ():
        if path not in keep:
            try:
                remove_folder(path, within=folder, own=FILES)
            except (OSError, ValueError) as error:
                _log.warning("a checkpoint stays: %s", error)


def check_classes(state: TrainState, classes: tuple[str, ...], *, data: str) -> None:
    """Raises a `CheckpointError` that names both lists if the classes are not those of the data in `data`."""
    if state.classes == classes:
        return
    known, given = ", ".join(state.classes), ", ".join(classes)
    raise CheckpointError(
        f"the checkpoint knows {len(state.classes)} classes ({known}), the data in {data} has {len(classes)} "
        f"({given}); use the data set that the checkpoint was trained on, or one prepared with the same --classes"
    )


def require_free_space(folder: Path, needed: int) -> None:
    """Raises a `CheckpointError` if the folder, created if missing, has fewer than `needed` bytes free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise CheckpointError(
            f"the folder {folder} cannot be made: {error.strerror or error}; give another one with --storage"
        ) from None
    if free < needed:
        raise CheckpointError(
            f"{folder} has {free / 2**20:.0f} MiB free, checkpoints of this run need {needed / 2**20:.0f} MiB; "
            "free some space or give another folder with --storage"
        )


class _Copies:
    """Copies of states in main memory.

    Those of tensors on a GPU are page-locked and stay for the next state: the GPU copies them all without the host.
    """

    def __init__(self) -> None:
        self._locked: dict[str, Tensor] = {}

    def of(self, value: Any, name: str) -> Any:
        """A copy with its own tensors, through dictionaries and lists; complete after `finish`."""
        if isinstance(value, Tensor):
            return self._of_tensor(value.detach(), name)
        if isinstance(value, Mapping):
            return {key: self.of(inner, f"{name}.{key}") for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.of(inner, f"{name}.{place}") for place, inner in enumerate(value))
        return value

    def _of_tensor(self, tensor: Tensor, name: str) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor.to("cpu", copy=True)
        kept = self._locked.get(name)
        if kept is None or (kept.shape, kept.dtype, kept.stride()) != (tensor.shape, tensor.dtype, tensor.stride()):
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            kept = self._locked[name] = empty.pin_memory()
        return kept.copy_(tensor, non_blocking=True)

    def finish(self) -> None:
        """Waits for the GPU."""
        if self._locked:
            torch.cuda.synchronize()


def _listed(folder: Path) -> dict[Path, TrainState]:
    """The checkpoints in a folder, without reading weights."""
    listed = {}
    for path in sorted(folder.glob("checkpoint-*")):
        try:
            listed[path] = read_state(path, verify=False)
        except CheckpointError as error:
            _log.warning("skipping a checkpoint: %s", error)
    return listed


def _choose(listed: Mapping[Path, TrainState], which: Literal["last", "best"]) -> Path | None:
    def order(path: Path) -> tuple[float, int, str]:
        return rank(listed[path].metrics if which == "best" else {}, listed[path].step, path.name)

    return max(listed, key=order, default=None)


@cache
def _states() -> TypeAdapter[TrainState]:
    """Takes longer to make than to use."""
    return TypeAdapter(TrainState)


def read_state(path: Path, *, verify: bool = True) -> TrainState:
    """Reads a checkpoint's `state.json` and compares the other files with its checksums; no weights are loaded.

    Without `verify`, the other files must be there and are not read.

    Raises:
        CheckpointError: it is missing, of another version, or a file is damaged.
    """
    try:
        record = read_json(path / STATE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / STATE} cannot be read: {error}; take another checkpoint of the run") from None
    version = record.pop("schema_version", None) if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {version}, this slrnet reads {SCHEMA_VERSION}; use the slrnet that wrote it"
        )
    sums = record.pop("sha256", None)
    if not isinstance(sums, dict) or set(sums) != {WEIGHTS, TRAINER, CONFIG}:
        raise CheckpointError(f"{path / STATE} lacks the checksums of the other files; take another checkpoint")
    for name, expected in sums.items():
        if not (path / name).is_file() or (verify and sha256_of(path / name) != expected):
            raise CheckpointError(f"{path / name} is damaged or missing; take another checkpoint of the run")
    try:
        state = _states().validate_json(json.dumps(record))
        for name in state.classes:
            check_text("class", name)
        return state
    except ValueError as error:
        raise CheckpointError(f"{path / STATE} lacks or has foreign fields: {error}") from None


def restore_network(checkpoint: Checkpoint, device: torch.device | str | None) -> Network:
    """The network as the trainer measures it: in evaluation mode, channels last. Device None: a GPU if there is one."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = restore_model(checkpoint).eval()
    if device.type == "cpu":
        from slrnet.cpu import speed_up

        speed_up(model)
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
