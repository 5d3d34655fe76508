"""One line of a terminal that is redrawn, below lines that stay; elsewhere only the lines that stay."""

from __future__ import annotations

import os
import sys
from typing import TextIO

_BAR = 20  # characters
_CLEAR = "\r\x1b[K"  # the escape clears what a longer line left


class StatusLine:
    """What a long run shows to people.

    Attributes:
        redraws: whether there is a terminal in which a line can be redrawn.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False, silent: bool = False) -> None:
        """
        Args:
            stream: standard error by default.
            quiet: no redrawn line even in a terminal.
            silent: show nothing, as on all ranks but one.
        """
        self._stream = sys.stderr if stream is None else stream
        self._silent = silent
        self.redraws = not quiet and not silent and self._stream.isatty()
        self._drawn = ""

    def draw(self, text: str) -> None:
        """Put `text` into the line that is redrawn, cut to the width of the terminal; does nothing where there is none."""
        if self.redraws:
            self._drawn = text
            self._write(f"{_CLEAR}{text[: self._width() - 1]}")  # a line that wraps cannot be redrawn

    def say(self, text: str) -> None:
        """Write a line that stays."""
        if self.redraws:
            self._write(f"{_CLEAR}{text}\n")
            if self._drawn:
                self.draw(self._drawn)
        elif not self._silent:
            self._write(f"{text}\n")

    def close(self) -> None:
        """Let what is drawn stay, and begin a new line."""
        if self._drawn:
            self._write("\n")
            self._drawn = ""

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80  # some terminals say 0
        except OSError:
            return 80


def bar(share: float) -> str:
    """`[#####...............]` for a share of 0 to 1."""
    filled = round(min(1.0, max(0.0, share)) * _BAR)
    return f"[{'#' * filled}{'.' * (_BAR - filled)}]"


def clock_time(seconds: float) -> str:
    """`h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
