"""Ctrl-C and SIGTERM as a request that the training loop answers between two steps."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

_SAME_REQUEST = 5.0  # seconds


class StopRequest:
    """Inside the block, the first SIGINT or SIGTERM is only noted; another one, five seconds later or more, interrupts at once.

    What comes sooner is the same request: a scheduler that signals every process, and a launcher that passes its own signal on.

    A scheduler sends SIGTERM some seconds before it takes the machine back: time to finish the step and write a checkpoint.

    Attributes:
        requested: whether such a signal has come; forgotten at the end of the block.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
        self.requested = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
        elif time.monotonic() - self._since >= _SAME_REQUEST:
            raise KeyboardInterrupt
