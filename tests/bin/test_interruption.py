"""A signal at a moment when Python could only print its exception and forget it: the program ends all the same, and says one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from k2ssl.bin.interruption import interruptible

HEAD = """
import os, signal, sys, time
from dataclasses import dataclass

armed = False

def hit():
    global armed
    if armed:
        armed = False
        os.kill(os.getpid(), signal.NUMBER)
        for _ in range(10):  # here the signal is handled
            pass

def fork():
    global armed
    armed = True
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)

class Loader:
    def __del__(self):
        hit()

class Half:
    def __init__(self):
        global armed
        armed = True
        hit()
        self.workers = []

    def __del__(self):
        self.workers.clear()

def delete():
    global armed
    loader, armed = Loader(), True
    del loader
"""
TAIL = """
from k2ssl.bin.program import run_program
AFTER

@dataclass(frozen=True)
class Job:
    '''A job.'''

def main(job):
    WHAT()
    time.sleep(3)
    print("went on")

sys.exit(run_program(main, Job, [], "job", "Does it."))
"""
MOMENTS = {  # where the function around the fork is registered: before or after our own, and what sets the signal off
    "before a fork": ("os.register_at_fork(before=hit)", "", "fork"),
    "before a fork, registered late": ("", "os.register_at_fork(before=hit)", "fork"),
    "after a fork": ("os.register_at_fork(after_in_parent=hit)", "", "fork"),
    "after a fork, registered late": ("", "os.register_at_fork(after_in_parent=hit)", "fork"),
    "while an object goes away": ("", "", "delete"),
    "while an object is made": ("", "", "Half"),
}


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_that_python_would_print_and_forget_ends_the_program_with_one_line(moment: str, number: str) -> None:
    early, late, what = MOMENTS[moment]
    program = HEAD.replace("NUMBER", number) + early + TAIL.replace("AFTER", late).replace("WHAT", what)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, preexec_fn=_hears)
    assert done.stderr == "job: interrupted; the same command goes on, or begins again where nothing was kept\n"
    assert (done.returncode, done.stdout) == (130, "")


def _hears() -> None:
    """Undo that signals are ignored where the tests run in the background, or behind `nohup`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def test_everything_is_as_it_was_afterwards() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers], sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(5)
    assert ([signal.getsignal(number) for number in numbers], sys.unraisablehook) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_interrupt_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_exceptions_that_cannot_be_passed_on_are_still_told(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[type[BaseException]] = []
    before, sys.unraisablehook = sys.unraisablehook, lambda unraisable: told.append(unraisable.exc_type)

    class Broken:
        def __del__(self) -> None:
            raise OSError

    try:
        with interruptible():
            Broken()
    finally:
        sys.unraisablehook = before
    assert told == [OSError]
