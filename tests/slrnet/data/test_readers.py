"""What reader processes do before they read."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from slrnet.data.manifest import DataError
from slrnet.data.readers import _LOCKS, Deliveries, Delivery, read_ahead, reader_processes

SCRIPT = """
import gc, os
from slrnet.data.readers import _begin_reader

print(len(gc.get_objects()))
_begin_reader(os.getpid(), 0)
print(len(gc.get_objects()))
"""


@pytest.mark.slow
def test_the_garbage_collector_does_not_look_through_a_reader() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    before, after = map(int, run.stdout.split())
    assert after < before / 4


def _deliver(worker: int, epoch: int, start: int) -> Iterator[Delivery]:
    yield Delivery(None, failure=f"{worker} {epoch} {start}")


@pytest.mark.parametrize(("free", "packed"), [(2 * _LOCKS + 100 * 5, False), (2 * _LOCKS + 100 * 5 - 1, True)])
def test_batches_need_no_shared_memory_where_there_is_too_little(
    free: int, packed: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two readers have two batches each, and one is in use; the readers themselves run in this process."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    deliveries = Deliveries(_deliver)
    processes = reader_processes(deliveries, workers=2, pin_memory=False, batch_bytes=100, free=free)
    (sent,) = deliveries
    assert isinstance(sent, bytes) == packed == ("--shm-size" in caplog.text)
    if packed:
        object.__setattr__(processes, "loader", [sent])
        assert list(processes) == [Delivery(None, failure="0 0 0")]
    assert caplog.records == [] or caplog.records[0].levelno == logging.WARNING


def test_items_are_fetched_ahead_in_order_and_an_error_comes_in_its_place() -> None:
    fetched: list[int] = []

    def items() -> Iterator[int]:
        for number in range(9):
            fetched.append(number)
            if number == 7:
                raise ValueError("seven")
            yield number

    ahead = read_ahead(items(), 3)
    assert next(ahead) == 0
    deadline = time.monotonic() + 60
    while len(fetched) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert fetched == [0, 1, 2, 3]
    assert [next(ahead) for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="seven"):
        next(ahead)
    assert list(read_ahead([], 2)) == []


def test_readers_without_room_for_their_locks_are_no_processes(caplog: pytest.LogCaptureFixture) -> None:
    def deliver(worker: int, epoch: int, start: int) -> Iterator[Delivery]:
        for step in range(start + worker, 5, 2):
            if step == 4:
                raise DataError("damaged")
            yield Delivery(None, failure=f"{epoch}: step {step}")

    deliveries = Deliveries(deliver)
    processes = reader_processes(deliveries, workers=2, pin_memory=False, batch_bytes=1, free=2 * _LOCKS - 1)
    deliveries.epoch_and_start.copy_(torch.tensor([7, 1]))
    assert [delivery.failure for delivery in processes] == ["7: step 1", "7: step 2", "7: step 3", "damaged"]
    assert not deliveries.epoch_and_start.is_shared()
    assert "the training process reads by itself, which is slower. Give it more: `docker run --shm-size" in caplog.text


def test_a_batch_comes_out_of_a_pipe_as_it_went_in() -> None:
    import pickle

    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    again = pickle.loads(pickle.dumps(images))
    assert again.equal(images)
    assert again.stride() == images.stride()
