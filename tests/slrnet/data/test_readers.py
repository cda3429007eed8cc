"""What reader processes do before they read."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc, os
from slrnet.data.readers import _begin_reader

print(len(gc.get_objects()))
_begin_reader(os.getpid(), 0)
print(len(gc.get_objects()))
"""


def test_the_garbage_collector_does_not_look_through_a_reader() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    before, after = map(int, run.stdout.split())
    assert after < before / 4
