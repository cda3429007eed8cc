"""C kernels for CPUs, compiled where they run by the machine's own compiler.

A kernel is compiled for exactly this processor when it is first asked for (half a second) and lives as long as the
process: there is no cache that could be stale, of another processor, or written by somebody else. Without a compiler
the operators of PyTorch that a kernel replaces do the work, and the log says so.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["COMPILER_VARIABLE", "compiled"]

COMPILER_VARIABLE = "SLRNET_CC"
"""Environment variable with the C compiler to use."""
_COMPILERS = ("cc", "gcc", "clang")
_OPTIONS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
_SECONDS = 60
_log = logging.getLogger(__name__)


@functools.cache
def compiled(name: str) -> ctypes.CDLL | None:
    """The library of a kernel's source beside this file.

    Args:
        name: of the file, without `.c`.

    Returns:
        None where it cannot be compiled or loaded; the log has the reason, once a process.
    """
    source = Path(__file__).with_name(f"{name}.c")
    try:
        return _load(source)
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None)
        _log.warning(
            "the kernel %s is not used; PyTorch's slower operators do its work: %s", source.name, output or error
        )
        return None


def _load(source: Path) -> ctypes.CDLL:
    # OpenMP's library is found by its name: PyTorch has loaded its own already, so both share one set of threads.
    with tempfile.TemporaryDirectory(prefix="slrnet-kernel-") as folder:
        library = Path(folder) / f"{source.stem}.so"
        command = [_compiler(), *_OPTIONS, "-o", str(library), str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        return ctypes.CDLL(str(library))


def _compiler() -> str:
    named = os.environ.get(COMPILER_VARIABLE)
    names = (named,) if named else _COMPILERS
    for name in names:
        if path := shutil.which(name):
            return path
    raise FileNotFoundError(
        f"there is no C compiler ({', '.join(names)}); install one, or name it with {COMPILER_VARIABLE}"
    )
