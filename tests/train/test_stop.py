"""Signals as a request to stop."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from k2ssl.train import stop as module
from k2ssl.train.stop import StopRequest


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of the module under test, in seconds."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_a_later_one_interrupts(number: signal.Signals, now: list[float]) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        now[0] += 4.9
        os.kill(os.getpid(), number)  # the same request, come another way
        now[0] += 0.1
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_signals_of_both_kinds_count_together(now: list[float]) -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] += 6
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGINT) is not handlers[0] and signal.getsignal(signal.SIGTERM) is not handlers[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers and not stop.requested


def test_outside_of_the_main_thread_signals_are_left_alone() -> None:
    found: list[object] = []

    def work() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with StopRequest() as stop:
            found.extend([signal.getsignal(signal.SIGTERM) is before, stop.requested])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True, False]
