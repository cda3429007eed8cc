from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from slrnet.cli.main import exit_code
from slrnet.launch.train import TrainingError


def fail(error: BaseException) -> Callable[[], int]:
    def run() -> int:
        raise error

    return run


@pytest.mark.parametrize("status", [0, 1])
def test_a_command_that_ends_gives_its_status(status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: status) == status
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("no such recipe"), 2),
        (FileNotFoundError("no such file"), 2),
        (TrainingError("rank 1 failed"), 1),
    ],
)
def test_a_mistake_or_a_failed_training_gets_one_line(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(fail(error)) == status
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="a defect"):
        exit_code(fail(RuntimeError("a defect")))


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_with_its_line(
    sent: signal.Signals, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> int:
        os.kill(os.getpid(), sent)
        signal.pause()
        return 0

    # A shell that starts tests in the background has them ignore the interrupt key.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert exit_code(run, interrupted="interrupted; rerun to continue") == status
    finally:
        signal.signal(signal.SIGINT, previous)
    assert capsys.readouterr().err == "interrupted; rerun to continue\n"


def test_the_handler_of_sigterm_is_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    during = []
    exit_code(lambda: during.append(signal.getsignal(signal.SIGTERM)) or 0)
    assert during != [before]
    assert signal.getsignal(signal.SIGTERM) == before
