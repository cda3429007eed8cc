"""Peaks of this process's resident memory, from Linux' /proc: what getrusage says begins with the parent's peak."""

from __future__ import annotations

import re
from pathlib import Path


def peak_memory() -> float:
    """MiB at most since the process began, or since `forget_peak`."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    if found is None:
        raise SystemExit("error: memory is measured with /proc/self/status, which this system does not have")
    return int(found[1]) / 1024


def forget_peak() -> None:
    """Lets the peak begin anew with what the process has now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
