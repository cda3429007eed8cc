"""Parts of a job on actors that are slow, die, hang or fail."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slrnet.distributed.process import Process
from slrnet.launch.cluster import WorkerRequest
from slrnet.launch.hand_out import Alive, Work, hand_out
from slrnet.launch.train import TrainingError

ALONE = WorkerRequest(num_workers=0)


def open_squares(values: dict[str, Any], process: Process, alive: Alive) -> Work:
    """Squares numbers; words say what goes wrong: once, if it leaves a trace in a folder, or each time."""

    def square(part: Any) -> Any:
        alive()
        if not isinstance(part, str):
            return part * part
        word, _, trace = part.partition(" ")
        if trace and Path(trace).exists():
            return word
        if trace:
            Path(trace).write_text(str(os.getpid()))
        if word == "slow":
            time.sleep(3)
        if word == "dies":
            os._exit(1)
        if word == "hangs":
            time.sleep(600)
        if word == "fails":
            raise ValueError("no such image")
        return word

    def work(parts: Iterable[Any]) -> Iterator[Any]:
        yield from map(square, parts)

    return work


def test_without_workers_this_process_does_all_in_order() -> None:
    assert list(hand_out(open_squares, {}, [1, 3, 2], ALONE)) == [1, 9, 4]
    with pytest.raises(TrainingError, match="^ValueError: no such image$"):
        list(hand_out(open_squares, {}, [1, "fails"], ALONE))


@pytest.mark.slow
class TestActors:
    @pytest.fixture(autouse=True, scope="class")
    def ray(self) -> Iterator[None]:
        import ray

        ray.shutdown()  # an earlier test of this process may have left its connection
        root = str(Path(__file__).resolve().parents[3])
        ray.init(address="local", num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": root}})
        yield
        ray.shutdown()

    def test_a_slow_one_holds_up_nobody_and_lost_ones_are_replaced(self, tmp_path: Path) -> None:
        said: list[str] = []
        parts = ["slow", f"dies {tmp_path / 'died'}", f"hangs {tmp_path / 'hung'}", *range(6)]
        request = WorkerRequest(num_workers=2, cpus_per_worker=1, max_failures=2, hang_limit=20)
        results = list(hand_out(open_squares, {}, parts, request, say=said.append))
        assert sorted(map(str, results)) == sorted(["slow", "dies", "hangs", *(str(n * n) for n in range(6))])
        assert results.index("slow") < results.index("hangs")
        assert len(said) == 2

    @pytest.mark.parametrize(
        ("part", "message"), [("fails", "^ValueError: no such image$"), ("dies", "a worker died.*--max-failures 3")]
    )
    def test_what_cannot_be_done_is_said(self, part: str, message: str) -> None:
        with pytest.raises(TrainingError, match=message):
            list(hand_out(open_squares, {}, [1, part], WorkerRequest(num_workers=1, cpus_per_worker=1)))
