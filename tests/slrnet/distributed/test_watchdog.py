"""A rank that hangs is found and named, by the rank itself and by those that wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from slrnet.distributed.process import Process
from slrnet.distributed.watchdog import Hang, Position, Watchdog, find_hang


class FakeStore(dict[str, str]):
    """A store in this process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def position(count: int, place: str, step: int = 5) -> Position:
    return Position(count, step, place, "node")


def test_the_rank_behind_is_the_one_that_hangs() -> None:
    positions = {0: position(12, "going backward"), 1: position(11, "going forward"), 2: position(12, "going backward")}
    for own in (0, 2):
        hang = find_hang(positions, own=own, stood=60.4)
        assert (hang.rank, hang.step, hang.node) == (1, 5, "node")
        assert hang.message == (
            f"rank 1 on node hangs while going forward in step 5; rank {own}, going backward, waited for it for 60 s"
        )
    alone = find_hang(positions, own=1, stood=60.4)
    assert alone.message == "rank 1 on node hangs while going forward in step 5 for 60 s"


def test_where_all_stand_in_the_same_place_none_is_blamed() -> None:
    hang = find_hang({rank: position(3, "comparing losses") for rank in range(2)}, own=1, stood=10)
    assert hang.message == "no rank moved for 10 s; all are comparing losses in step 5"


def test_a_single_process_names_itself() -> None:
    assert find_hang({0: position(3, "waiting for data")}, own=0, stood=9).message == (
        "rank 0 on node hangs while waiting for data in step 5 for 9 s"
    )


@pytest.fixture
def watch() -> Callable[..., tuple[Watchdog, list[Hang], threading.Event]]:
    def start(rank: int, store: FakeStore | None, limit: float) -> tuple[Watchdog, list[Hang], threading.Event]:
        found: list[Hang] = []
        told = threading.Event()

        def on_hang(hang: Hang) -> None:
            found.append(hang)
            told.set()

        return Watchdog(Process(rank, 2), limit=limit, store=store, on_hang=on_hang), found, told

    return start


def test_two_ranks_agree_on_the_one_that_hangs(
    watch: Callable[..., tuple[Watchdog, list[Hang], threading.Event]],
) -> None:
    store = FakeStore()
    (first, found, told), (second, own, noticed) = (watch(rank, store, 1.0) for rank in range(2))
    for watchdog in (first, second):
        watchdog.at("waiting for data", 0)
    first.at("going forward", 0)  # rank 1 is still waiting for data
    assert told.wait(60)
    assert noticed.wait(60)
    assert [hang.rank for hang in (*found, *own)] == [1, 1]
    assert "waiting for data in step 0; rank 0, going forward, waited" in found[0].message
    first.close()
    second.close()


def test_a_rank_that_works_is_left_alone(
    watch: Callable[..., tuple[Watchdog, list[Hang], threading.Event]],
) -> None:
    watchdog, found, told = watch(0, None, 3.0)  # seconds: a busy machine may keep this thread waiting
    for _ in range(35):
        time.sleep(0.1)
        watchdog.at("measuring", 0)
    assert not found
    assert watchdog.position.count == 1
    assert told.wait(60)  # now that it stands still
    watchdog.close()


def test_a_wait_within_a_place_counts(watch: Callable[..., tuple[Watchdog, list[Hang], threading.Event]]) -> None:
    """As with batch norms over all ranks: all are in one place, and one of them does not come to the next wait."""
    ranks = [watch(rank, None, 0.0)[0] for rank in range(2)]
    for watchdog in ranks:
        watchdog.at("going forward", 2)
        watchdog.meet()
    ranks[0].meet()
    hang = find_hang({rank: watchdog.position for rank, watchdog in enumerate(ranks)}, own=0, stood=9)
    assert hang.rank == 1
    assert "hangs while going forward in step 2; rank 0, going forward, waited" in hang.message


def test_off_it_has_no_thread(watch: Callable[..., tuple[Watchdog, list[Hang], threading.Event]]) -> None:
    before = threading.active_count()
    watchdog, _, _ = watch(0, None, 0.0)
    assert threading.active_count() == before
    watchdog.at("going forward", 3)
    assert watchdog.position.step == 3
    watchdog.close()


def test_ending_it_ends_the_thread(watch: Callable[..., tuple[Watchdog, list[Hang], threading.Event]]) -> None:
    before = threading.active_count()
    watchdog, found, _ = watch(0, None, 1e6)
    assert threading.active_count() == before + 1
    watchdog.close()
    assert threading.active_count() == before
    assert not found
