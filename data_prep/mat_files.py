"""SBD's masks in MATLAB files, read by scipy in a process of its own.

A damaged .mat file can end the process that reads it: scipy's reader trusts sizes and types that it finds there. So a
helper process reads, with limits of memory and time, and what goes wrong costs that file alone. The helper ends when
its standard input does, even if the process that started it was killed.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["read_mat_mask"]

SCRIPT = Path(__file__).with_name("mat_reader.py")
MAX_SECONDS = 60.0
"""Time that the reading of one file may take; SBD's take a hundredth of a second."""


def read_mat_mask(path: Path) -> npt.NDArray[np.uint8]:
    """Ids of one of SBD's class masks, GTcls.Segmentation: (H, W) uint8.

    Raises:
        ValueError: it cannot be read, or holds something else; the message says why.
    """
    answer = _helper().ask(path)
    if isinstance(answer, str):
        raise ValueError(answer)
    return answer


class _Helper:
    """A process that reads files, one after the other; it starts when there is work, and again after it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, path: Path) -> npt.NDArray[np.uint8] | str:
        """The mask in a file, or why there is none."""
        process = self._process = self._process or _start()
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):  # it has died; no answer will come
            process.stdin.write(json.dumps(str(path)).encode() + b"\n")
            process.stdin.flush()
        if not select.select([process.stdout], [], [], MAX_SECONDS)[0]:
            self.end()
            return f"reading it takes more than {MAX_SECONDS:.0f} seconds"
        if not (line := process.stdout.readline()):
            self.end()
            return f"reading it ended the process that did (status {process.returncode})"
        answer = json.loads(line)
        if isinstance(answer, str):
            return answer
        return np.frombuffer(process.stdout.read(answer[0] * answer[1]), dtype=np.uint8).reshape(answer)

    def end(self) -> None:
        """Ends the process; the next file starts another one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None


@cache
def _helper() -> _Helper:
    helper = _Helper()
    atexit.register(helper.end)
    return helper


def _start() -> subprocess.Popen[bytes]:
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each would reserve address space
    return subprocess.Popen(
        [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | threads
    )
