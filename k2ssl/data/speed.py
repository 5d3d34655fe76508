"""Utterances at other speeds: shorter and higher, or longer and lower, as a tape that runs faster or slower.

Source: Ko et al., "Audio augmentation for speech recognition" (Interspeech 2015); lhotse's `perturb_speed` does the resampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lhotse.cut import Cut

from k2ssl.data.mixture import Corpora, repetition
from k2ssl.data.stable_hash import stable_index

_SLOWEST, _FASTEST = 0.5, 2.0
_STEPS = 100  # factors are hundredths: the filters that resample by a ratio of large numbers would take gigabytes


@dataclass(frozen=True)
class ChangedSpeed(Corpora):
    """Corpora whose cuts are read at one of several speeds.

    The speed of a cut is a function of the seed, the epoch, the cut's id and how often it was drawn in this epoch, as its crop is in
    pre-training: neither workers nor ranks nor an interruption change it. A cut keeps its id, and has the duration it is heard with, so
    that batches hold as much audio as without.

    Attributes:
        speeds: factors, from each of which a cut's is as likely to come; none: all as recorded.

    Raises:
        ValueError: see `Corpora`; a speed that is not allowed.
    """

    speeds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_speeds("ChangedSpeed", self.speeds)

    def cuts(self, seed: int, epoch: int) -> Iterator[Cut]:
        """As of `Corpora`, at the speeds of this epoch.

        Raises:
            ValueError: a speed that does not give a whole number of samples at the rate of a cut; names the cut.
        """
        for cut in super().cuts(seed, epoch):
            yield at_speed(cut, self._speed(cut, seed, epoch)) if self.speeds else cut

    def identity(self) -> dict[str, Any]:
        """As of `Corpora`; without speeds what states that know of none agree with."""
        return {**super().identity(), "speeds": list(self.speeds) or None}

    def _speed(self, cut: Cut, seed: int, epoch: int) -> float:
        return self.speeds[stable_index(len(self.speeds), "speed", seed, epoch, repetition(cut), cut.id)]


def at_speed(cut: Cut, speed: float) -> Cut:
    """`cut` under the same id, `speed` times as fast; nothing is read. ValueError: its rate does not allow it."""
    if speed == 1.0 or not cut.has_recording:  # a cut without audio is refused where it is read
        return cut
    rate = cut.sampling_rate * speed
    if abs(rate - round(rate)) > 1e-6 * rate:
        raise ValueError(f"cut {cut.id} is at {cut.sampling_rate} Hz, of which a speed of {speed} makes {rate:g} Hz, not a whole number")
    return cut.perturb_speed(round(rate) / cut.sampling_rate, affix_id=False)


def mean_length(speeds: Sequence[float]) -> float:
    """How much longer an epoch is than its recordings, on average."""
    return sum(1.0 / speed for speed in speeds) / len(speeds) if speeds else 1.0


def check_speeds(owner: str, speeds: Sequence[float]) -> None:
    """ValueError unless all are hundredths from 0.5 to 2; `owner` is the configuration class to name."""
    for speed in speeds:
        if not (_SLOWEST <= speed <= _FASTEST and abs(_STEPS * speed - round(_STEPS * speed)) < 1e-6):
            raise ValueError(f"{owner}: speeds holds {speed}, allowed are {_SLOWEST} to {_FASTEST} in steps of {1 / _STEPS}")
