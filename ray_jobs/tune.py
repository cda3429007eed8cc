# PYTHON_ARGCOMPLETE_OK
"""Searches settings, or runs one of the paper's ablations: `slrnet tune`, as a script that Ray can run.

ray job submit --working-dir . -- python ray_jobs/tune.py ...
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slrnet.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
