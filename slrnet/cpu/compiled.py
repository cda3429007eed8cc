"""C kernels for CPUs, compiled by the machine's own compiler.

The first use of a kernel compiles it for this processor, which takes half a second. The library lives as long as the
process. There is no cache, so no kernel can be stale, made for another processor, or written by somebody else. Without
a compiler, PyTorch's operators do the work, and the log says so.
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
_log = logging.getLogger(__name__)


@functools.cache
def compiled(name: str) -> ctypes.CDLL | None:
    """Compiles the file `name`.c beside this one; None, with the reason in the log, if that fails."""
    source = Path(__file__).with_name(f"{name}.c")
    try:
        # The linker finds OpenMP's library by name: the one that PyTorch has loaded, so both share its threads.
        with tempfile.TemporaryDirectory(prefix="slrnet-kernel-") as folder:
            library = Path(folder) / f"{name}.so"
            command = [_compiler(), *_OPTIONS, "-o", str(library), str(source)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
            return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        _log.warning("kernel %s is not used; PyTorch's slower operators do its work: %s", source.name, reason)
        return None


def _compiler() -> str:
    named = os.environ.get(COMPILER_VARIABLE)
    names = (named,) if named else _COMPILERS
    for name in names:
        if path := shutil.which(name):
            return path
    tried = ", ".join(names)
    raise FileNotFoundError(f"there is no C compiler ({tried}); install one, or name it with {COMPILER_VARIABLE}")
