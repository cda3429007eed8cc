"""The process that reads SBD's .mat files for `data_prep.mat_files`.

A line of standard input is the path of a file, as JSON. The answer is a line of JSON: a text that says what is wrong,
or height and width, followed by as many bytes, the ids.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.io import loadmat

MAX_MEMORY = 4 << 30
"""Bytes of address space."""


def read(path: str) -> npt.NDArray[np.uint8]:
    """Ids (H, W) of a class mask, GTcls.Segmentation.

    Raises:
        ValueError: they are no ids of a mask.
        Exception: whatever scipy raises; it documents nothing, and damaged files raise a dozen kinds.
    """
    content: dict[str, Any] = loadmat(path, squeeze_me=True, struct_as_record=False, variable_names=["GTcls"])
    ids = np.asarray(content["GTcls"].Segmentation)
    if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "uif" or not np.isin(ids, np.arange(256)).all():
        raise ValueError(f"it holds an array of shape {ids.shape} and type {ids.dtype}, no mask with ids 0 to 255")
    return ids.astype(np.uint8)


def main() -> None:
    """Answers until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        try:
            ids = read(json.loads(line))
        except Exception as error:
            answer, data = json.dumps(f"{type(error).__name__}: {error}"), b""
        else:
            answer, data = json.dumps(ids.shape), ids.tobytes()
        sys.stdout.buffer.write(answer.encode() + b"\n" + data)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
