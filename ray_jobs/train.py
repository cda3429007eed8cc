# PYTHON_ARGCOMPLETE_OK
"""Trains one run: `slrnet train`, as a script that Ray can run.

ray job submit --working-dir . -- python ray_jobs/train.py ...
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slrnet.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
