"""Writes checkpoints while the training continues, and tries again if the storage fails for a while."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_before_delay, wait_exponential
from torch import Tensor

from slrnet.checkpoints.checkpoint import CheckpointError, TrainState, prune_checkpoints, save_checkpoint
from slrnet.config import Config

__all__ = ["CheckpointWriter"]

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between two attempts: the first pause, doubled each time up to the longest."""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class CheckpointWriter:
    """Writes the checkpoints of a run in a thread, one at a time and in order.

    The training pays for a copy of the state; weights on a GPU are copied to main memory. A checkpoint that the storage
    refuses (full, unreachable) is tried again, less and less often, while the training continues.
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

    def save(self, state: TrainState, *, model: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint after the previous one is written; see `wait`."""
        self.wait()
        self._writing = self._thread.submit(self._write, state, _copied(model), _copied(optimizer))

    def wait(self) -> None:
        """Returns when all checkpoints are written; raises a `CheckpointError` if one could not be."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Ends the thread after the current checkpoint; does not raise."""
        self._thread.shutdown(wait=True)

    def _write(self, state: TrainState, model: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        save = partial(save_checkpoint, self.folder, config=self.config, state=state, model=model, optimizer=optimizer)
        self._try(save, state.name, str(self.folder))
        prune_checkpoints(self.folder)
        if self.upload is not None:
            self._try(self.upload, f"the copy of {state.name}", "the run's storage")

    def _try(self, act: Callable[[], object], what: str, place: str) -> None:
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


def _copied(value: Any) -> Any:
    """A copy with its own tensors in main memory, through dictionaries and lists."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(inner) for inner in value)
    return value
