"""The largest micro-batch that fits into a given memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from k2ssl.train.memory import gibibytes, is_out_of_memory

_MOST_MEASUREMENTS = 10


@dataclass(frozen=True)
class Tuned:
    """What `tune` found.

    Attributes:
        seconds: audio of a micro-batch, whole seconds; measured to fit.
        peak_bytes: what it took.
        budget_bytes: what it may take, the limit less the margin.
        measured: (seconds, peak bytes, or None where memory ran out), in the order of measuring.
    """

    seconds: int
    peak_bytes: int
    budget_bytes: int
    measured: tuple[tuple[int, int | None], ...]

    def text(self) -> str:
        """A table for people."""
        rows = [f"{seconds:>8} s  {'out of memory' if peak is None else gibibytes(peak):>13}" for seconds, peak in self.measured]
        found = f"{self.seconds} s of audio per micro-batch take {gibibytes(self.peak_bytes)} of {gibibytes(self.budget_bytes)}"
        return "\n".join([*rows, found])


def tune(measure: Callable[[float], int], limit_bytes: int, *, start: float, most: float, margin: float = 0.1) -> Tuned:
    """The largest whole number of seconds of audio whose peak memory is at most (1 - margin) * limit.

    Memory is nearly linear in seconds: two measurements give a line, the line the next measurement, until it promises less than a
    second more. Where memory is not linear the search goes on within the bracket of what fitted and what did not; after 10 measurements
    the largest that fitted is taken. The same measurements give the same result; with several ranks, measure in one process alone.

    Args:
        measure: seconds of audio per micro-batch -> peak bytes of one update. May raise `DoesNotFitError`, or what torch raises.
        limit_bytes: all the memory there is.
        start: seconds to begin with; halved until they fit.
        most: seconds never to exceed, such as all the audio of an update.
        margin: share of the limit to leave free, for batches worse than measured and for fragmentation.

    Raises:
        ValueError: arguments out of range, or not even one second fits.
    """
    _check(limit_bytes, start, most, margin)
    search = _Search(measure, int(limit_bytes * (1.0 - margin)), int(most))
    candidate: int | None = int(start)
    while candidate is not None and len(search.measured) < _MOST_MEASUREMENTS:
        search.try_out(candidate)
        candidate = search.next_candidate()
    if not search.fitted:
        tried = ", ".join(f"{seconds} s: {'out of memory' if peak is None else gibibytes(peak)}" for seconds, peak in search.measured)
        raise ValueError(
            f"tune: limit_bytes is {limit_bytes} ({gibibytes(search.budget)} after the margin), and nothing fits ({tried});"
            " allowed is a limit that one second of audio fits into: use a smaller model or lower precision"
        )
    seconds = max(search.fitted)
    return Tuned(seconds, search.fitted[seconds], search.budget, tuple(search.measured))


class _Search:
    """What has been measured, and what to measure next."""

    def __init__(self, measure: Callable[[float], int], budget: int, most: int) -> None:
        self.measure, self.budget, self.most = measure, budget, most
        self.measured: list[tuple[int, int | None]] = []
        self.fitted: dict[int, int] = {}
        self.failed = most + 1  # the fewest seconds known not to fit, or not allowed
        self.width = math.inf  # of the bracket when the last candidate was chosen

    def try_out(self, seconds: int) -> None:
        peak: int | None
        try:
            peak = self.measure(float(seconds))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            peak = None
        self.measured.append((seconds, peak))
        if peak is not None and peak <= self.budget:
            self.fitted[seconds] = peak
        else:
            self.failed = min(self.failed, seconds)

    def next_candidate(self) -> int | None:
        """Seconds strictly between what fitted and what did not; None where nothing is to be gained."""
        if not self.fitted:
            return self.failed // 2 or None
        best = max(self.fitted)
        bounded = self.failed <= self.most
        middle = (best + self.failed) // 2 if bounded else min(2 * best, self.most)
        if self.failed - best <= 1:
            return None
        promised = self._promised(best)
        if promised is None:
            return middle
        if promised <= best:
            return None
        width, before = self.failed - best, self.width
        self.width = width
        if not bounded:
            return min(promised, self.most)
        # a line that points beyond what failed, or that hardly narrows a wide bracket, says that memory is not linear here
        refuted = promised >= self.failed or width > max(before / 2, best / 50)
        return middle if refuted else promised

    def _promised(self, best: int) -> int | None:
        """Where the line through the measurements on both sides of the budget meets it; while none lies above, through the first and
        the last that fitted."""
        above = [(seconds, peak) for seconds, peak in self.measured if peak is not None and seconds >= self.failed]
        left, right = (best, min(above)[0]) if above else (min(self.fitted), best)
        known = {**self.fitted, **dict(above)}
        if right == left or known[right] <= known[left]:
            return None
        slope = (known[right] - known[left]) / (right - left)
        return math.floor(left + (self.budget - known[left]) / slope)


def _check(limit_bytes: int, start: float, most: float, margin: float) -> None:
    if limit_bytes < 1:
        raise ValueError(f"tune: limit_bytes is {limit_bytes}, a number > 0 is needed")
    if not (math.isfinite(most) and 1 <= start <= most):
        raise ValueError(f"tune: start is {start} and most is {most}, 1 <= start <= most is needed (seconds)")
    if not 0 <= margin < 1:
        raise ValueError(f"tune: margin is {margin}, allowed is 0 <= margin < 1")
