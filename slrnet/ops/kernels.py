"""The switch that turns off all kernels, whether Triton can run its own, and the constants of Algorithm 1."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["MASS_FLOOR", "NORM_FLOOR", "SWITCH", "on_device_of_first", "triton_obstacle", "triton_serves", "wanted"]

SWITCH = "SLRNET_KERNELS"
"""Environment variable; with `off`, PyTorch's operators replace the kernels in Triton and C."""
MASS_FLOOR = 1e-6
"""Smallest code mass to divide an atom by."""
NORM_FLOOR = 1e-6
"""Smallest norm to divide an atom by."""

Rest = ParamSpec("Rest")
Result = TypeVar("Result")
_log = logging.getLogger(__name__)


def wanted() -> bool:
    """Whether kernels may be used.

    Raises:
        ValueError: the variable is neither `on` nor `off`.
    """
    value = os.environ.get(SWITCH, "on")
    if value not in ("on", "off"):
        raise ValueError(f"{SWITCH} is {value!r}; allowed are 'on' (the default) and 'off'")
    return value == "on"


def triton_serves(like: Tensor) -> bool:
    """Whether Triton kernels may be used for tensors like this one: on a GPU, if Triton can run there."""
    return like.device.type == "cuda" and wanted() and triton_obstacle() is None


@functools.cache
def triton_obstacle() -> str | None:
    """Why Triton cannot launch kernels on this machine's GPUs, and the remedy; None if it can.

    Triton compiles a C file against Python.h before its first launch. The first call tries that, and logs a failure.
    """
    obstacle = _missing_for_launches() if find_spec("triton") else "the package triton is not installed; install it"
    if obstacle is not None:
        _log.warning("Triton's kernels are not used, and PyTorch's slower operators do their work: %s", obstacle)
    return obstacle


def _missing_for_launches() -> str | None:
    named = os.environ.get("CC")  # Triton's choice of the compiler, in this order
    compiler = shutil.which(named or "gcc") or (None if named else shutil.which("clang"))
    if compiler is None:
        return f"Triton needs a C compiler and finds no {named or 'gcc or clang'}; install one, or name it with CC"
    folder = sysconfig.get_paths(scheme="posix_prefix")["include"]
    command = [compiler, "-fsyntax-only", "-x", "c", f"-I{folder}", "-"]
    try:
        subprocess.run(command, input="#include <Python.h>\n", check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        reason = " ".join(str(getattr(error, "stderr", None) or error).split())[:300]
        return f"{compiler} cannot compile with Python.h in {folder} ({reason}); install Python's headers (python3-dev)"
    return None


def on_device_of_first(
    launch: Callable[Concatenate[Tensor, Rest], Result],
) -> Callable[Concatenate[Tensor, Rest], Result]:
    """Makes the first tensor's GPU current while a function runs: Triton launches on the current one."""

    @functools.wraps(launch)
    def guarded(first: Tensor, /, *rest: Rest.args, **named: Rest.kwargs) -> Result:
        with torch.cuda.device_of(first):  # does nothing for a tensor on the CPU
            return launch(first, *rest, **named)

    return guarded
