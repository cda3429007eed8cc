"""`python -m slrnet`: the `slrnet` command where the package is not installed."""

from __future__ import annotations

import sys

from slrnet.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
