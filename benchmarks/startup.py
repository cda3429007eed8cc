"""Measures startup time: `python benchmarks/startup.py`.

The first figure is the time from `ray job submit --working-dir . -- python ray_jobs/train.py` to the first optimizer
step, for two workers of the recipe `voc_wsss_lite` on the embedded data and a private cluster that has already run a
job. Claim: at most 25 seconds. The second is the time to start Python and import `slrnet`. Claim: at most 3 seconds.
Both are medians. Also shown: importing what `slrnet.load` needs when you call it: PyTorch, timm and torchvision.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks._cluster import submission, words_of  # noqa: E402
from data_prep.demo import build_demo  # noqa: E402
from ray_jobs.demo import local_cluster  # noqa: E402

CLAIMED_START, CLAIMED_IMPORT = 25.0, 3.0
SETTINGS = ("data.crop_size=96", "train.epochs=9", "tracking.uri=")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="measured submissions (default: 3)")
    options = parser.parse_args()
    names = ("slrnet", "slrnet.inference.predictor")
    times = [[_import(name) for name in names] for _ in range(2 * options.repeats + 1)][1:]
    starts: list[float] = []
    with tempfile.TemporaryDirectory(prefix="startup-") as temporary, local_cluster("--num-cpus=2") as (address, env):
        build_demo(Path(temporary) / "data", num_train=64, num_val=4, image_size=128)
        for number in range(options.repeats + 1):
            starts.append(_start(address, env, Path(temporary), number))
            print(f"from submission to the first step: {starts[-1]:.1f} s{'' if number else ' (cold)'}", flush=True)
    start, (imported, loading) = statistics.median(starts[1:]), map(statistics.median, zip(*times, strict=True))
    print(f"from submission to the first step, median {start:.1f} s (claimed: at most {CLAIMED_START:.0f})")
    print(f"import of slrnet, median {imported:.2f} s (claimed: at most {CLAIMED_IMPORT:.0f})")
    print(f"import of what slrnet.load uses, median {loading:.2f} s")
    return 0 if start <= CLAIMED_START and imported <= CLAIMED_IMPORT else 1


def _start(address: str, environment: dict[str, str], folder: Path, number: int) -> float:
    command = [*submission(address), "ray_jobs/train.py", "--recipe", "voc_wsss_lite", "--data", str(folder / "data")]
    command += ["--storage", str(folder / "runs"), "--name", f"start-{number}", "--num-workers", "2"]
    command += ["--cpus-per-worker", "1", *words_of(SETTINGS)]
    begun, seen = time.perf_counter(), []
    job = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert job.stdout is not None
    for line in job.stdout:
        seen.append(line)
        if "first step:" in line:
            taken = time.perf_counter() - begun
            name = next(text.split("'")[1] for text in seen if "submitted" in text and "'" in text)
            stop = ["ray", "job", "stop", "--address", address, name]
            subprocess.run(stop, env=environment, cwd=ROOT, capture_output=True, check=True)
            job.wait(timeout=60)
            return taken
    raise SystemExit(f"error: the job ended before its first step:\n{''.join(seen)[-3000:]}")


def _import(name: str) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, check=True)
    return time.perf_counter() - begun


if __name__ == "__main__":
    sys.exit(main())
