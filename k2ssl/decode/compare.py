"""Is one decoding better than another of the same utterances, or was it luck?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from k2ssl.decode.scoring import Score, Scored
from k2ssl.decode.wer import ErrorCounts, Unit, resampled_rates

DRAWS = 10_000

_NAMED = 3  # ids in a refusal


@dataclass(frozen=True)
class Comparison:
    """Two decodings of the same utterances. Rates are shares, and a difference is the second's minus the first's.

    Attributes:
        unit: "word" or "char".
        utterances: how many have a reference; only these count.
        first, second: error rates.
        difference: of the rates; below 0 the second is better.
        low, high: 95 % interval of the difference.
        p_value: how often a difference at least as large, in either direction, appears between equally good systems.
        probability_of_improvement: share of the draws in which the second has the lower rate.
        better, worse, equal: in how many utterances the second has fewer, more, as many errors.
        draws: of the bootstrap.
    """

    unit: Unit
    utterances: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    p_value: float
    probability_of_improvement: float
    better: int
    worse: int
    equal: int
    draws: int

    def text(self) -> str:
        """The comparison in a few lines."""
        name = "WER" if self.unit == "word" else "CER"
        return (
            f"{name} {self.first:.2%} and {self.second:.2%}; the second's is {100 * self.difference:+.2f} points (95 % interval "
            f"{100 * self.low:+.2f} to {100 * self.high:+.2f}), p = {self.p_value:.2g}\n"
            f"It has fewer errors in {self.better:,} utterances, more in {self.worse:,}, as many in {self.equal:,}; "
            f"it is better in {self.probability_of_improvement:.1%} of the draws"
        )

    def to_dict(self) -> dict[str, Any]:
        """All numbers by name."""
        return asdict(self)


def compare(first: Score, second: Score, unit: Unit = "word", seed: int = 0) -> Comparison:
    """Paired bootstrap over utterances, 10,000 draws.

    Each draw takes as many utterances as there are, with replacement, the same ones for both systems, and looks at the difference of the
    error rates. p is twice the smaller share of draws on one side of 0 (0 itself counted on both), so below 0.05 about when the 95 %
    interval leaves 0 out; it cannot fall below 2 / 10,001. Source: Bisani and Ney 2004, "Bootstrap estimates for confidence intervals in
    ASR performance evaluation", who call the share of draws with a lower rate the probability of improvement.

    Args:
        first, second: scores of the two decodings, with texts compared by the same rule.
        unit: what errors are counted in.
        seed: of the draws.

    Raises:
        ValueError: the utterances with a reference, or their references, are not the same; names some.
    """
    pairs = paired(first, second)
    gains = [_errors(two, unit) - _errors(one, unit) for one, two in pairs]
    lengths = [one.counts(unit).reference for one, _ in pairs]
    drawn = resampled_rates(gains, lengths, DRAWS, seed)
    low, high = np.quantile(drawn, [0.025, 0.975])
    smaller_side = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
    rates = first.report(unit).rate, second.report(unit).rate
    return Comparison(
        unit,
        len(pairs),
        *rates,
        sum(gains) / sum(lengths),
        float(low),
        float(high),
        min(1.0, 2 * (1 + int(smaller_side)) / (1 + DRAWS)),
        np.count_nonzero(drawn < 0) / DRAWS,
        sum(gain < 0 for gain in gains),
        sum(gain > 0 for gain in gains),
        sum(gain == 0 for gain in gains),
        DRAWS,
    )


def paired(first: Score, second: Score) -> list[tuple[Scored, Scored]]:
    """The utterances of two decodings side by side, by id.

    Raises:
        ValueError: the utterances with a reference, or their references, are not the same; names some.
    """
    one, two = ({utterance.id: utterance for utterance in score.utterances} for score in (first, second))
    for has, lacks, words in ((one, two, "the first has and the second lacks"), (two, one, "the second has and the first lacks")):
        if missing := [name for name in has if name not in lacks]:
            raise ValueError(f"{words} references of {len(missing)} utterances: {_some(missing)}; the same ones are needed")
    if other := [name for name in one if one[name].ref != two[name].ref]:
        name = other[0]
        raise ValueError(
            f"the references of {len(other)} utterances differ: {_some(other)}; that of {name!r} is {one[name].ref!r} in the first, "
            f"{two[name].ref!r} in the second"
        )
    return [(one[name], two[name]) for name in one]


def most_different(first: Score, second: Score, number: int, unit: Unit) -> list[tuple[Scored, Scored]]:
    """At most `number` pairs whose numbers of errors differ most; of equally different ones, those with shorter references first."""
    different = [(one, two) for one, two in paired(first, second) if _errors(one, unit) != _errors(two, unit)]
    return sorted(different, key=lambda p: (-abs(_errors(p[0], unit) - _errors(p[1], unit)), p[0].counts(unit).reference, p[0].id))[:number]


def _errors(utterance: Scored, unit: Unit) -> int:
    counts: ErrorCounts = utterance.counts(unit)
    return counts.errors


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(repr(name) for name in names[:_NAMED]) + more
