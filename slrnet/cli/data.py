"""Commands about data sets: `slrnet prepare`, `browse`, `class-balance`."""

from __future__ import annotations

import argparse
from functools import partial
from importlib import import_module

from slrnet.cli.arguments import SKIP_DAMAGED, command, describe, option, output_folder, place
from slrnet.storage.shown import LEFT_OUT, say

__all__ = ["KINDS", "browse", "class_balance", "prepare"]

KINDS = ("voc", "coco", "l2id", "folder", "tars", "demo")
"""What can be prepared, each by the module of that name in data_prep."""


def prepare(parser: argparse.ArgumentParser) -> None:
    """Make shards of a data set: `slrnet prepare voc|coco|l2id|folder|tars|demo --out DIR ...`.

    `slrnet prepare KIND --help` explains what each kind reads and writes.
    """
    from data_prep.conversion import run_conversion

    describe(parser, prepare.__doc__, [])
    kinds = parser.add_subparsers(metavar="KIND", required=True, help="what to prepare")
    for name in KINDS:
        converter = import_module(f"data_prep.{name}")
        line = (converter.__doc__ or "").partition("\n")[0]
        run = partial(run_conversion, make=converter.make)
        describe(kinds.add_parser(name, help=line), converter.__doc__, [converter.add_arguments], run=run)


@command(
    option("folder", type=place, metavar="DIR", help="folder with shards from `slrnet prepare`"),
    option("--out", type=output_folder, metavar="FOLDER", help="where to write (default: browse/NAME)"),
    option("--samples", type=int, default=24, metavar="N", help="images on each sheet (default: %(default)s)"),
    option("--masks", type=int, default=1000, metavar="N", help="masks to measure per split (default: 1000)"),
    option("--seed", type=int, default=0, metavar="N", help="seed that draws the images and masks (default: 0)"),
    option("--no-duplicates", action="store_true", help="do not read all images, see above"),
    SKIP_DAMAGED,
)
def browse(options: argparse.Namespace) -> int:
    """Check a prepared data set: `slrnet browse DIR [--out FOLDER]`.

    For every split it writes SPLIT.jpg, a contact sheet of images beside their masks with the names of their labels,
    and for all of them report.txt, which is printed too: the kinds of labels, a histogram of the classes, warnings and
    errors. A warning says what it means and what to do.

    Labels that contradict masks, masks of two values and void are counted in --masks masks of each split. One pass over
    all images finds equal files, images of two splits that look alike (64-bit difference hashes) and nearly constant
    ones: about 3 ms for an image of 500 x 375 pixels. Equal files in two splits are an error, because a score on images
    that were trained on is worthless. The exit status is 1 when there is an error. Samples that cannot be read are
    named and left out.
    """
    from slrnet.storage.lease import beside, owned
    from slrnet.tools.browse import browse

    if options.samples < 1 or options.masks < 0:
        raise ValueError(f"--samples {options.samples}, --masks {options.masks}: at least 1 and 0 are allowed")
    out = options.out or output_folder(f"browse/{options.folder.resolve().name}")
    counts = {"samples": options.samples, "masks": options.masks, "seed": options.seed}
    with owned(beside(out), f"output {out}"):
        found = browse(options.folder, out, **counts, duplicates=not options.no_duplicates)
    say(found.text.rstrip("\n"))
    say(f"in {out}: report.txt, {', '.join(found.sheets)}")
    if found.errors:
        return 1
    return LEFT_OUT if found.num_damaged and not options.skip_damaged else 0


@command(
    option("data", help="folder with shards"),
    option("--split", default="train", metavar="NAME", help="split to balance (default: train)"),
    option("--strength", type=float, default=0.5, metavar="X", help="data.class_balance, 0 to 1 (default: 0.5)"),
    option("--limit", type=float, default=10.0, metavar="X", help="data.balance_limit, >= 1 (default: 10)"),
)
def class_balance(options: argparse.Namespace) -> None:
    """Show how often training draws each class: `slrnet class-balance SHARDS --strength 0.5`.

    The table has the share of draws that each class has, should have and would have with `data.class_balance`.
    """
    import numpy as np

    from slrnet.data.class_balance import ClassLists, balance, table
    from slrnet.data.manifest import load_dataset

    shards = load_dataset(options.data)
    split = shards.split(options.split)
    lists = ClassLists.of(split, np.arange(split.num_samples))
    say(table(balance(lists, strength=options.strength, limit=options.limit), shards.info.classes))
