"""Hours, utterances, speakers and durations of a list of cuts, counted in one pass over it in bounded memory."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lhotse.cut import Cut

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_STEPS_PER_SECOND = 100  # durations are binned to 10 ms, so that quantiles of 22 million cuts need no list of them


@dataclass(frozen=True)
class CutSummary:
    """What a list of cuts holds. Durations are in seconds; quantiles are accurate to 10 ms, all else is exact.

    `with_text` counts cuts with a transcript that is not empty, `empty_text` those whose transcript is.
    """

    cuts: int
    hours: float
    speakers: int
    without_speaker: int
    with_text: int
    empty_text: int
    shortest: float
    longest: float
    mean: float
    quantiles: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "quantiles": dict(self.quantiles)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CutSummary:
        """The inverse of `to_dict`.

        Raises:
            ValueError: keys are missing or unknown.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"not a summary of cuts: {error}") from error

    def table(self, title: str = "cuts") -> str:
        """The summary as a text table."""
        speakers = f"{self.speakers:,}" + (f" ({self.without_speaker:,} utterances name none)" if self.without_speaker else "")
        transcripts = f"{self.with_text:,}" + (f" ({self.empty_text:,} more are empty)" if self.empty_text else "")
        spread = "  ".join(f"{name} {value:.2f}" for name, value in self.quantiles.items())
        rows = [
            ("hours", f"{self.hours:,.3f}"),
            ("utterances", f"{self.cuts:,}"),
            ("speakers", speakers),
            ("transcripts", transcripts),
            ("durations (s)", f"mean {self.mean:.2f}  shortest {self.shortest:.2f}  longest {self.longest:.2f}"),
            ("quantiles (s)", spread),
        ]
        return "\n".join([title, *(f"  {name:14} {value}" for name, value in rows)])


class SummaryCounter:
    """Counts cuts one by one; counts of parts of a list can be stored and added up."""

    def __init__(self) -> None:
        self.cuts = 0
        self.seconds = 0.0
        self.without_speaker = 0
        self.with_text = 0
        self.empty_text = 0
        self.shortest = math.inf
        self.longest = 0.0
        self.speakers: set[str] = set()
        self.bins: Counter[int] = Counter()  # duration in steps of 10 ms -> number of cuts

    def add(self, cut: Cut) -> None:
        """Count one cut. Its transcript and speaker are those of its supervisions, the texts joined."""
        duration = float(cut.duration)
        self.cuts += 1
        self.seconds += duration
        self.shortest = min(self.shortest, duration)
        self.longest = max(self.longest, duration)
        self.bins[round(duration * _STEPS_PER_SECOND)] += 1
        speakers = {s.speaker for s in cut.supervisions if s.speaker is not None}
        self.speakers |= speakers
        self.without_speaker += not speakers
        texts = [s.text for s in cut.supervisions if s.text is not None]
        if texts:
            empty = not any(text.strip() for text in texts)
            self.empty_text += empty
            self.with_text += not empty

    def merge(self, stored: Mapping[str, Any]) -> None:
        """Add counts that `to_dict` gave."""
        for name in ("cuts", "seconds", "without_speaker", "with_text", "empty_text"):
            setattr(self, name, getattr(self, name) + stored[name])
        if stored["cuts"]:
            self.shortest = min(self.shortest, stored["shortest"])
            self.longest = max(self.longest, stored["longest"])
        self.speakers.update(stored["speakers"])
        self.bins.update({int(step): count for step, count in stored["bins"].items()})

    def to_dict(self) -> dict[str, Any]:
        """Counts as plain values, for JSON."""
        return {
            "cuts": self.cuts,
            "seconds": self.seconds,
            "without_speaker": self.without_speaker,
            "with_text": self.with_text,
            "empty_text": self.empty_text,
            "shortest": self.shortest if self.cuts else 0.0,
            "longest": self.longest,
            "speakers": sorted(self.speakers),
            "bins": dict(self.bins),
        }

    def summary(self) -> CutSummary:
        """What was counted so far; all zero if nothing was."""
        return CutSummary(
            cuts=self.cuts,
            hours=self.seconds / 3600,
            speakers=len(self.speakers),
            without_speaker=self.without_speaker,
            with_text=self.with_text,
            empty_text=self.empty_text,
            shortest=self.shortest if self.cuts else 0.0,
            longest=self.longest,
            mean=self.seconds / self.cuts if self.cuts else 0.0,
            quantiles={f"{round(100 * share)}%": self._quantile(share) for share in QUANTILES},
        )

    def _quantile(self, share: float) -> float:
        """The shortest duration that at least this share of the cuts does not exceed, in seconds."""
        seen = 0
        for step in sorted(self.bins):
            seen += self.bins[step]
            if seen >= share * self.cuts:
                return step / _STEPS_PER_SECOND
        return 0.0


def summarize(cuts: Iterable[Cut]) -> CutSummary:
    """Count a list of cuts in one pass."""
    counter = SummaryCounter()
    for cut in cuts:
        counter.add(cut)
    return counter.summary()
