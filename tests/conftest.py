"""What all tests share: a clean environment, the marker scheme, and the photographs that some of them need.

Tests are fast unless marked `slow`: whatever starts Ray, a server, other processes or a training run, or computes for
seconds, is slow, runs after the fast ones, and is left out by `make test-fast`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
VOC6 = ROOT.parent / "shared" / "data" / "voc6" / "VOCdevkit" / "VOC2012"

# Kernels run on the CPU, in Triton's interpreter; it must be chosen before anything imports triton.
os.environ["TRITON_INTERPRET"] = "1"

# No test is about time, and a busy machine must not fail one. In continuous integration the examples do not change.
settings.register_profile(
    "slrnet", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("slrnet")

pytest_plugins = [
    f"tests.fixtures.{name}"
    for name in ("tiny_data", "training", "checkpoints", "object_store", "servers", "stores", "browser")
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The sort is stable, so the order within the fast and within the slow tests stays.
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(autouse=True, scope="session")
def _own_environment() -> Iterator[None]:
    """Keeps tests away from the tracking server and the Ray cluster that the person running them may have."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "RAY_ADDRESS"):
            patch.delenv(name, raising=False)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


@pytest.fixture(autouse=True)
def _subnormal_numbers() -> Iterator[None]:
    """A training in this process leaves them flushed to zero; Hypothesis refuses to draw floats then."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="session")
def voc6() -> Path:
    """The folder (VOC 2012 layout) of six classes' photographs; skips where it does not lie beside the project."""
    if not VOC6.is_dir():
        pytest.skip("needs the photographs in ../shared/data/voc6, which are not part of the project")
    return VOC6
