"""Which cuts make a batch: lhotse's bucketing sampler, dealt to the ranks in whole rounds."""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from random import Random

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset.sampling.base import TimeConstraint
from lhotse.dataset.sampling.dynamic_bucketing import DynamicBucketer, estimate_duration_buckets

from k2ssl.data.stable_hash import stable_hash

ORDER = 2  # how batches are drawn: a loader's state is of no use where it has changed
_BIN_RATIO = 1.15  # between neighbouring bucket limits that are set, not estimated: padding is at most this
_SHORTEST_BIN = 1.0  # seconds


@dataclass
class BatchSeconds(TimeConstraint):
    """lhotse's limit on the duration of a batch, where a cut counts as `length(its duration)` seconds.

    A batch of one cut is never too long: what is longer than a batch goes alone.
    """

    length: Callable[[float], float] = float

    def measure_length(self, example: Cut) -> float:
        return self.length(example.duration)

    def add(self, example: Cut) -> None:
        length = self.length(example.duration)
        if self.quadratic_duration is not None:
            length += length**2 / self.quadratic_duration
        self.current += length
        self.longest_seen: int | float = max(self.longest_seen, length)
        self.num_cuts += 1

    def exceeded(self) -> bool:
        return self.num_cuts > 1 and super().exceeded()


@dataclass(frozen=True)
class Cropped:
    """Counts a cut as at most `max_seconds`: the rest is cropped away."""

    max_seconds: float

    def __call__(self, duration: float) -> float:
        return min(duration, self.max_seconds)


@dataclass(frozen=True)
class Padded:
    """Counts a cut as the upper limit of its bucket, the longest that it can be padded to.

    lhotse closes a batch after a cut that made it too long; counted like this no batch is, unless it is a cut alone.
    """

    bins: tuple[float, ...]

    def __call__(self, duration: float) -> float:
        bucket = bisect_left(self.bins, duration)
        return self.bins[bucket] if bucket < len(self.bins) else duration


class RoundSampler:
    """lhotse's dynamic bucketing, drawing as many batches as there are ranks for every round; each rank gets its own.

    Every rank iterates the same cuts with the same seed. lhotse's own sampler deals the cuts of an incomplete last round anew, duplicating
    some; here it is dropped, or with `drop_incomplete=False` dealt to the first ranks. And it draws the bucket of a round, which all ranks
    share, with the same seed in every epoch of every run: runs would have the same lengths in the same order, and a small corpus the same
    cuts in the round that is dropped. Here it is drawn from `seed`.

    Attributes:
        dropped: cuts of the incomplete last round, known at the end.
        digest: checksum of the ids of all rounds so far, the same on all ranks; tells cut sets apart when a state is restored.
    """

    def __init__(
        self,
        cuts: Iterable[Cut],
        *,
        constraint: BatchSeconds,
        duration_bins: list[float],
        shuffle: bool,
        buffer_size: int,
        drop_incomplete: bool,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._bucketing = partial(
            DynamicBucketer,
            duration_bins=duration_bins,
            world_size=world_size,
            constraint=constraint,
            buffer_size=buffer_size,
            shuffle=shuffle,
        )
        self.cuts = cuts
        self.drop_incomplete = drop_incomplete
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.dropped = 0
        self.digest = 0

    def __iter__(self) -> RoundSampler:
        self.dropped = self.digest = 0
        own = {"rng": Random(self.seed), "bucket_rng": Random(stable_hash("buckets", self.seed))}
        self._batches = iter(self._bucketing(zip(self.cuts, strict=True), **own))  # lhotse takes cuts in tuples, of one here
        return self

    def __next__(self) -> CutSet:
        dealt = list(islice(self._batches, self.world_size))
        self.digest = stable_hash(self.digest, *(cut.id for batch in dealt for cut in batch))
        if len(dealt) < self.world_size and self.drop_incomplete:
            self.dropped = sum(len(batch) for batch in dealt)
            raise StopIteration
        if self.rank >= len(dealt):
            raise StopIteration
        return dealt[self.rank]


@contextmanager
def collection_paused() -> Iterator[None]:
    """Without garbage collection inside, for going over many cuts.

    The collector looks through the 20,000 cuts that a sampler holds again and again, which takes a third of the time; cuts hold no cycles
    and are freed without it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def estimated_bins(cuts: Iterable[Cut], num_buckets: int, length: Callable[[float], float], num_cuts: int) -> list[float]:
    """Limits between at most `num_buckets` buckets of equal total duration, judged by the first `num_cuts` cuts. Seconds, ascending."""
    sample = list(islice(cuts, num_cuts))
    num_buckets = min(num_buckets, len(sample))
    if num_buckets < 2:
        return []
    bins = estimate_duration_buckets(sample, num_buckets, BatchSeconds(length=length))
    return sorted({float(limit) for limit in bins})  # many cuts of exactly the longest length give the same limit several times


def even_bins(max_duration: float, first: Sequence[float] = ()) -> tuple[float, ...]:
    """Limits that go on from `first` at a fixed ratio up to half of `max_duration`, beyond which every cut is a batch alone."""
    bins = [limit for limit in first if limit < max_duration / 2]
    limit = bins[-1] * _BIN_RATIO if bins else _SHORTEST_BIN
    while limit < max_duration / 2:
        bins.append(limit)
        limit *= _BIN_RATIO
    return (*bins, max_duration / 2)
