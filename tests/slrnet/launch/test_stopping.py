"""Signals of the driver, and the mailbox through which workers hear of them."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from slrnet.launch import stopping
from slrnet.launch.stopping import Interruption, Mailbox, SignalRequests


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_and_a_later_one_ends(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with Interruption() as interruption:
        requests = SignalRequests(interruption)
        assert requests.asked() == ""
        send(number)
        send(number)  # a terminal's and a process group's: one
        assert interruption.number == number
        assert requests.asked() == "stop"
        monkeypatch.setattr(stopping, "ONE_SIGNAL", -1.0)
        with pytest.raises(KeyboardInterrupt) as raised:
            send(number)
        assert raised.value.args == (number,)
    assert signal.getsignal(number) == before
    assert capfd.readouterr().err.count("stopping: writing a checkpoint after this step") == 1


def test_other_threads_get_no_signals() -> None:
    seen: list[bool] = []

    def enter() -> None:
        with Interruption() as interruption:
            seen.append(interruption.can_be_asked)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_request_to_save_is_open_until_it_is_answered_while_somebody_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    mailbox = Mailbox()
    mailbox.ask("save")
    assert not mailbox.waits()  # nobody has looked
    assert mailbox.look() == "save"
    assert mailbox.waits()
    now = time.monotonic()
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now + stopping.SILENT + 1)
    assert not mailbox.waits()
    monkeypatch.undo()
    mailbox.saved()
    assert (mailbox.look(), mailbox.waits()) == ("", False)


def test_a_request_to_stop_stays() -> None:
    mailbox = Mailbox()
    mailbox.ask("stop")
    mailbox.ask("save")
    mailbox.saved()
    assert mailbox.look() == "stop"
