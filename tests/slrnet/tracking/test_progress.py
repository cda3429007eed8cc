"""Progress lines with a clock of their own: rate, time left, and when a line is due."""

from __future__ import annotations

import io

import pytest

from slrnet.tracking import progress as progress_module
from slrnet.tracking.progress import Progress


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_rate_and_time_left(clock: Clock) -> None:
    progress = Progress(4000, stream=io.StringIO())
    assert (progress.rate(), progress.eta()) == (0.0, "0:00:00")
    for _ in range(10):
        clock.now += 2.0
        progress.advance(16, loss=1.0)
    assert progress.rate() == 8.0
    assert progress.eta() == "2:13:00"  # 3990 steps of 2 s


def test_a_line_every_quarter_of_a_minute_and_at_the_end(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(9, stream=stream)
    for _ in range(9):
        clock.now += 4.0
        progress.advance(8, loss=0.5)
    assert stream.getvalue().splitlines() == [
        "step 4/9, loss 0.500, 2.00 images/s, ETA 0:00:20",
        "step 8/9, loss 0.500, 2.00 images/s, ETA 0:00:04",
        "step 9/9, loss 0.500, 2.00 images/s, ETA 0:00:00",
    ]


def test_time_before_a_note_is_not_training(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(10, stream=stream)
    clock.now += 1.0
    progress.advance(4, loss=1.0)
    clock.now += 100.0  # measuring
    progress.note("measured")
    clock.now += 1.0
    progress.advance(4, loss=1.0)
    assert progress.rate() == 4.0
    assert progress.eta() == "0:00:08"
    assert stream.getvalue().splitlines()[0] == "measured"


def test_a_resumed_training_counts_from_where_it_was(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(10, done=8, stream=stream)
    for _ in range(2):
        clock.now += 10.0
        progress.advance(5, loss=1.0)
    assert stream.getvalue() == ("step 10/10, loss 1.000, 0.50 images/s, ETA 0:00:00\n")
    assert (progress.steps, progress.done) == (2, 10)


def test_other_ranks_say_nothing(clock: Clock) -> None:
    stream = Terminal()
    progress = Progress(1, show=False, stream=stream)
    clock.now += 60.0
    progress.note("a note")
    progress.advance(5, loss=1.0)
    progress.close()
    assert stream.getvalue() == ""
    assert progress.steps == 1


def test_a_terminal_gets_a_bar_and_notes_above_it() -> None:
    stream = Terminal()
    progress = Progress(2, epochs=2, stream=stream)
    progress.advance(5, loss=1.25)
    progress.note("a note")
    progress.score = "val mIoU 43.9 %"
    progress.advance(5, loss=0.75)
    progress.close()
    text = stream.getvalue()
    assert "a note\n" in text
    assert "2/2" in text
    assert "epoch 2/2" in text
    assert "loss 0.750, val mIoU 43.9 %" in text
    assert "ETA" not in text  # the bar has its own
