"""Ctrl-C and SIGTERM as a `KeyboardInterrupt`, wherever they come.

Python cannot pass on an exception out of functions that it calls by itself: those around a fork, which logging has and data workers set off, and
`__del__`, by which their loader ends them. It prints `Exception ignored in` with a traceback, forgets the exception, and the program goes on as
though nobody had told it to end. A signal that comes at such a moment is therefore put off until a timer brings it again. What `__del__` has to say
of an object that was interrupted while it was made, such as torch's loader, is left out.
"""

from __future__ import annotations

import logging  # noqa: F401  # its functions around a fork have to be registered before ours, which then enclose them
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_AGAIN = 0.02  # seconds

_forking = False


def _begin_fork() -> None:
    global _forking
    _forking = True


def _end_fork() -> None:  # calls nothing, so that no signal is handled behind the first line
    global _forking
    _forking = False


os.register_at_fork(before=_begin_fork, after_in_parent=_end_fork, after_in_child=_end_fork)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGTERM, which a scheduler sends that wants the machine back, is treated like Ctrl-C: programs save what they have.

    Where SIGINT is ignored, or answered by someone else, that stays. In threads other than the main one nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM, signal.SIGALRM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    hook, interrupted = sys.unraisablehook, False

    def tell(unraisable: UnraisableHookArgs) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            _put_off()
        elif not interrupted:
            hook(unraisable)

    before = {number: signal.signal(number, _interrupt) for number in numbers}
    sys.unraisablehook = tell
    try:
        yield
    except KeyboardInterrupt as error:
        interrupted = True
        traceback.clear_frames(error.__traceback__)  # what was half made goes away now, and not when its errors would be told
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _forking:
        _put_off()
    else:
        raise KeyboardInterrupt


def _put_off() -> None:
    signal.setitimer(signal.ITIMER_REAL, _AGAIN)
