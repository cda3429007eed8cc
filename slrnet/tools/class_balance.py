# PYTHON_ARGCOMPLETE_OK
"""What share of draws each class would have: `python -m slrnet.tools.class_balance SHARDS --strength 0.5`.

Exit status: 0, or 2 where the data set or a value is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from slrnet.completion import parse
from slrnet.data.class_balance import ClassLists, balance, table
from slrnet.data.manifest import load_dataset

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table of a data set; returns the exit status: 0, or 2 where the arguments do not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with shards")
    parser.add_argument("--split", default="train", metavar="NAME", help="split to balance (default: train)")
    parser.add_argument(
        "--strength", type=float, default=0.5, metavar="X", help="data.class_balance, 0 to 1 (default: 0.5)"
    )
    parser.add_argument("--limit", type=float, default=10.0, metavar="X", help="data.balance_limit, >= 1 (default: 10)")
    options = parse(parser, arguments)
    try:
        shards = load_dataset(options.data)
        split = shards.split(options.split)
        lists = ClassLists.of(split, np.arange(split.num_samples))
        found = balance(lists, strength=options.strength, limit=options.limit)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(found, shards.info.classes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
