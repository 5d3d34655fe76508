"""How far a run over audio is: hours done, speed in multiples of real time, remaining time.

In a terminal one line is redrawn; elsewhere, or when asked to be quiet, a plain line appears now and then, fit for a log.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from k2ssl.train.status_line import bar, clock_time


class AudioProgress:
    """A context manager to which the seconds of audio are added as they are done.

    Attributes:
        seconds: of audio done in this run.
    """

    def __init__(
        self,
        what: str,
        total_seconds: float | None,
        *,
        quiet: bool = False,
        silent: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        line_every: float = 30.0,
    ) -> None:
        """
        Args:
            what: shown first.
            total_seconds: of audio to be done; None if unknown.
            quiet: plain lines even in a terminal.
            silent: show nothing, as on all ranks but one.
            stream: standard error by default.
            clock: seconds.
            line_every: seconds between plain lines.
        """
        self.what, self.total, self._clock = what, total_seconds, clock
        self._stream = sys.stderr if stream is None else stream
        self._silent = silent
        self._redraws = not quiet and self._stream.isatty()
        self._every = 0.2 if self._redraws else line_every
        self.seconds = 0.0
        self._started = self._shown = clock()
        self._note = ""

    def add(self, seconds: float, note: str = "") -> None:
        """`seconds` more of audio are done; `note` says what else there is to say."""
        self.seconds += seconds
        self._note = note
        if not self._silent and self._clock() - self._shown >= self._every:
            self._show()

    @property
    def speed(self) -> float:
        """Seconds of audio per second."""
        return self.seconds / max(self._clock() - self._started, 1e-9)

    def line(self) -> str:
        """What is shown: `label: 1.20 of 2.00 h (60 %), 350 x real time, 0:00:08 left`."""
        done = f"{self.seconds / 3600:.2f}"
        if self.total:
            share = min(1.0, self.seconds / self.total)
            drawn = f"{bar(share)} " if self._redraws else ""
            done = f"{drawn}{done} of {self.total / 3600:.2f} h ({share:.0%})"
        else:
            done += " h"
        parts = [f"{self.what}: {done}", f"{self.speed:,.0f} x real time"]
        if self.total and self.seconds:
            parts.append(f"{clock_time(max(0.0, self.total - self.seconds) / self.speed)} left")
        return ", ".join([*parts, *([self._note] if self._note else [])])

    def _show(self) -> None:
        self._shown = self._clock()
        if self._redraws:
            self._stream.write(f"\r\x1b[K{self.line()}")  # the escape clears what a longer line left
        else:
            self._stream.write(f"{self.line()}\n")
        self._stream.flush()

    def __enter__(self) -> AudioProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Show how much was done, for good."""
        if self._silent:
            return
        took = self._clock() - self._started
        note = f", {self._note}" if self._note else ""
        line = f"{self.what}: {self.seconds / 3600:.2f} h in {clock_time(took)}, {self.speed:,.0f} x real time{note}"
        self._stream.write(f"\r\x1b[K{line}\n" if self._redraws else f"{line}\n")
        self._stream.flush()
