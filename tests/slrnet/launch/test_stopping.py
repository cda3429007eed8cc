"""Signals of the driver, and the mailbox through which workers hear of them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from types import SimpleNamespace

import pytest

from slrnet.launch import stopping
from slrnet.launch.stopping import Interruption, Mailbox, SignalRequests, follow, save_before_resize


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


@pytest.mark.parametrize("answer", [None, True, ArithmeticError("in the callback")])
def test_the_driver_hears_of_each_epoch_of_the_workers_and_may_stop_them(answer: bool | Exception | None) -> None:
    mailbox, interruption, heard, left = Mailbox(), Interruption(), list[float](), [1, 2, 3, 4]

    def ended() -> bool:
        """The workers finish an epoch, until they are asked to stop."""
        if not left or mailbox.look() == "stop":
            return True
        mailbox.tell({"epoch": left.pop(0)})
        return not left  # the last epoch comes together with the end

    def on_epoch(metrics: Mapping[str, float]) -> bool | None:
        heard.append(metrics["epoch"])
        if isinstance(answer, Exception) and heard == [1, 2]:
            raise answer
        return None if isinstance(answer, Exception) else answer

    def start() -> None:
        follow(ended, interruption, hear=mailbox.hear, stop=lambda: mailbox.ask("stop"), on_epoch=on_epoch)

    if isinstance(answer, Exception):
        with pytest.raises(ArithmeticError, match="in the callback"):
            start()
    else:
        start()
    assert heard == ([1, 2, 3, 4] if answer is None else [1] if answer is True else [1, 2])
    assert mailbox.look() == ("" if answer is None else "stop")


@pytest.mark.slow  # imports Ray
@pytest.mark.parametrize("trains", [True, False])
def test_a_resize_waits_for_the_checkpoint_of_those_who_train(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 writes it after three looks; if nobody trains, nobody is waited for."""
    mailbox, seen = Mailbox(), list[str]()
    near = SimpleNamespace(
        **{name: SimpleNamespace(remote=getattr(mailbox, name)) for name in ("ask", "waits", "saved")}
    )

    def work(seconds: float) -> None:
        seen.append(mailbox.look())
        if len(seen) == 3:
            mailbox.saved()

    monkeypatch.setattr("ray.get", lambda answer: answer)
    monkeypatch.setattr(stopping.time, "sleep", work)
    if trains:
        mailbox.look()
    save_before_resize(near)
    assert seen == ["save"] * (3 if trains else 0)
    assert mailbox.look() == ""
