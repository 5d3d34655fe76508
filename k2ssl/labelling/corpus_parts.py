"""A large corpus dealt into parts, each of them from all over it, for work that needs only some of the audio."""

from __future__ import annotations

import math

import numpy as np

from k2ssl.data.stable_hash import stable_hash

_BITS = 16  # of a hash are used: at most 65,536 parts


class PartCounter:
    """Decides into how many parts to deal a corpus; adds up the audio in bounded memory.

    Args:
        seed: of the dealing.
        batch_seconds: audio in a batch at most, but for a recording that is longer.
    """

    def __init__(self, seed: int, batch_seconds: float) -> None:
        self.seed, self.batch_seconds = seed, batch_seconds
        self._seconds = 0.0
        self._capped = np.zeros(1 << _BITS)  # seconds by hash, where no cut counts more than a batch

    def add(self, cut_id: str, seconds: float) -> None:
        """Count one cut."""
        self._seconds += seconds
        self._capped[_bin(cut_id, self.seed)] += min(seconds, self.batch_seconds)

    def num_parts(self, part_seconds: float, batches: int) -> int:
        """So many parts that each has about `part_seconds` of audio at most; fewer where one would not fill so many `batches`."""
        number = max(1, min(1 << _BITS, math.ceil(self._seconds / part_seconds)))
        while number > 1 and self._smallest(number) < batches * self.batch_seconds:
            number = number * 9 // 10
        return number

    def _smallest(self, number: int) -> float:
        parts = np.arange(1 << _BITS) * number >> _BITS
        return float(np.bincount(parts, self._capped, number).min())


def part_of(cut_id: str, seed: int, number: int) -> int:
    """The part, of `number` parts, that a cut belongs to."""
    return _bin(cut_id, seed) * number >> _BITS


def _bin(cut_id: str, seed: int) -> int:
    return stable_hash("part", seed, cut_id) >> 64 - _BITS
