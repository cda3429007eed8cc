"""Peak resident memory of this process, from Linux's /proc.

getrusage does not work here: its peak starts at the parent's.
"""

from __future__ import annotations

import re
from pathlib import Path


def peak_memory() -> float:
    """Returns the peak in MiB since the process started, or since the last `forget_peak`."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise SystemExit("error: measuring memory needs Linux's /proc/self/status, which this system does not have")
    return int(found[1]) / 1024


def forget_peak() -> None:
    """Resets the peak to the current memory use."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
