"""Rates of the training loop, measured on the host."""

from __future__ import annotations

import time


class Meter:
    """What is measured on the host between two lines of the log."""

    def __init__(self, step: int = 0) -> None:
        self.counted_step = step
        self.samples = 0  # of this rank, since they were last counted
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0  # the seconds are of audio, over all ranks
        self.started = time.monotonic()

    def lap(self) -> dict[str, float]:
        """Rates since the last lap."""
        took = max(time.monotonic() - self.started, 1e-9)
        rates = {
            "hours_per_second": self.seconds / 3600 / took,
            "seconds_per_step": took / max(self.steps, 1),
            "data_wait": self.waited / took,
        }
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        self.started = time.monotonic()
        return rates
