# PYTHON_ARGCOMPLETE_OK
"""Pseudo masks for a data set: `python ray_jobs/pseudo_label.py --checkpoint RUN --data DIR --out PSEUDO`.

Writes shards like those of DIR, in whose train split (or --splits) the masks are the network's, and prints how good
they are where there are true ones. A job that was stopped goes on when the same command is given again.
Exit status: 0, 1 where a worker failed or --verify found damage, 2 where something was refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ray_jobs.exit_codes import exit_code  # noqa: E402
from slrnet.checkpoints.run_store import run_argument  # noqa: E402
from slrnet.completion import parse  # noqa: E402
from slrnet.config import GATINGS, PROTOCOLS, apply_overrides  # noqa: E402


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=run_argument, metavar="RUN", help="checkpoint, or a run's folder for its best one")
    add("--data", metavar="DIR", help="folder with shards (default: what the checkpoint was trained on)")
    add("--out", type=Path, metavar="DIR", help="folder to make")
    add("--splits", default="train", metavar="A,B", help="or all (default: train); others are copied")
    add("--protocol", choices=PROTOCOLS, default="ms", help="default: ms")
    add("--gating", choices=GATINGS, default="image_labels", help="default: image_labels")
    add("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="other settings; repeatable")
    add("--voc-folder", type=Path, metavar="DIR", help="also a folder in VOC's layout")
    add("--num-workers", type=int, default=0, metavar="N", help="Ray workers; 0 (default): in this process")
    add("--cpus-per-worker", type=int, metavar="N", help="CPU cores each (default: an equal share)")
    add("--verify", type=Path, metavar="DIR", help="instead: compare its shards with its manifest")
    options = parse(parser, arguments)
    if options.verify is None and (options.checkpoint is None or options.out is None):
        parser.error("give --checkpoint RUN and --out DIR, or --verify DIR")
    return options


def pseudo_label(options: argparse.Namespace) -> None:
    from slrnet.checkpoints.checkpoint import load_checkpoint
    from slrnet.data.manifest import load_dataset
    from slrnet.data.voc_folder import check_voc_folder, write_voc_folder
    from slrnet.launch.pseudo_label import launch_pseudo_labels

    checkpoint = load_checkpoint(options.checkpoint.expanduser())
    changes = [f"evaluation.protocol={options.protocol}", f"evaluation.gating={options.gating}", *options.set]
    config = apply_overrides(checkpoint.config, changes)
    shards = load_dataset(options.data or config.data.path)
    splits = shards.splits if options.splits == "all" else tuple(options.splits.split(","))
    if options.voc_folder is not None:
        check_voc_folder(options.voc_folder)
    workers = {"num_workers": options.num_workers, "cpus_per_worker": options.cpus_per_worker}
    record = launch_pseudo_labels(checkpoint, shards, splits=splits, config=config, out=options.out, **workers)
    if options.voc_folder is not None:
        write_voc_folder(load_dataset(options.out.expanduser()), options.voc_folder, splits=splits)
    for split, protocols in record["quality"].items():
        for protocol, found in protocols.items():
            values = {
                name: 100 * found["metrics"].get(name, float("nan")) for name in ("miou", "mfdr", "mfnr", "coverage")
            }
            shown = ", ".join(f"{name} {value:.1f} %" for name, value in values.items())
            print(f"{split}, {protocol}, {found['images']} images: {shown}")
    print(f"pseudo masks: {options.out}; MLflow: {record['mlflow'] or 'the run of the training is out of reach'}")


def main() -> int:
    options = parse_arguments()
    if options.verify is not None:
        from data_prep.conversion import print_verification

        return print_verification(options.verify, processes=1)
    return exit_code(lambda: pseudo_label(options))


if __name__ == "__main__":
    sys.exit(main())
