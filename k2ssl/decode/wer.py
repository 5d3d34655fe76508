"""Word and character error rates, with their uncertainty.

Texts are compared as they are: case, punctuation and Unicode forms count, so that both sides must be normalised in the same way before.
White space only separates words; between words it counts as one character.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import kaldialign
import numpy as np
from numpy.typing import NDArray

Unit = Literal["word", "char"]

DRAWS = 1000

_CELLS = 2_000_000  # of the table of draws that is held at a time
_NOTHING = ""  # no unit is empty


@dataclass(frozen=True, slots=True)
class ErrorCounts:
    """What turns a reference into a hypothesis with the fewest errors, in words or characters.

    Attributes:
        substitutions, insertions, deletions: numbers of errors. Their sum is unique; of several ways to divide it kaldialign's is taken.
        reference: length of the reference.
    """

    substitutions: int = 0
    insertions: int = 0
    deletions: int = 0
    reference: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.insertions + self.deletions

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(
            self.substitutions + other.substitutions,
            self.insertions + other.insertions,
            self.deletions + other.deletions,
            self.reference + other.reference,
        )


@dataclass(frozen=True)
class WerReport:
    """Error rate of a set of utterances; rates are shares, not percentages, and may exceed 1.

    Attributes:
        unit: "word" or "char".
        counts: summed over utterances.
        utterances: how many.
        wrong_utterances: how many have an error.
        low, high: 95 % interval of the rate.
    """

    unit: Unit
    counts: ErrorCounts
    utterances: int
    wrong_utterances: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """Errors per word or character of the references."""
        return self.counts.errors / self.counts.reference

    @property
    def sentence_rate(self) -> float:
        """Share of the utterances that have an error."""
        return self.wrong_utterances / self.utterances

    def text(self) -> str:
        """The report in two lines."""
        counts = self.counts
        name = "WER" if self.unit == "word" else "CER"
        return (
            f"{name} {self.rate:.2%} (95 % interval {self.low:.2%} to {self.high:.2%}): {counts.errors:,} errors in {counts.reference:,} "
            f"{self.unit}s; {counts.substitutions:,} substituted, {counts.deletions:,} deleted, {counts.insertions:,} inserted\n"
            f"SER {self.sentence_rate:.2%}: {self.wrong_utterances:,} of {self.utterances:,} utterances have an error"
        )


def count_errors(reference: str, hypothesis: str, unit: Unit = "word") -> ErrorCounts:
    """Errors of one utterance; either text may be empty.

    Raises:
        ValueError: `unit` is neither "word" nor "char".
    """
    left, right = split(reference, unit), split(hypothesis, unit)
    if left == right:
        return ErrorCounts(reference=len(left))
    same = _equal_at_the_beginning(left, right)
    found = kaldialign.edit_distance(left[same:], right[same:])
    return ErrorCounts(int(found["sub"]), int(found["ins"]), int(found["del"]), len(left))


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[tuple[str | None, str | None]]:
    """What stands for what, with the errors that `count_errors` counts.

    Args:
        reference, hypothesis: words or characters, as `split` gives them; none is empty.

    Returns:
        (reference's, hypothesis's) in order; None on the left is an insertion, on the right a deletion.
    """
    same = _equal_at_the_beginning(reference, hypothesis)
    rest = kaldialign.align(list(reference[same:]), list(hypothesis[same:]), _NOTHING)
    return [(unit, unit) for unit in reference[:same]] + [(left or None, right or None) for left, right in rest]


def _equal_at_the_beginning(left: Sequence[str], right: Sequence[str]) -> int:
    """How many units; kaldialign takes them for equal too, and as its time grows with the square of the length they are not given to it."""
    return next((i for i, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), min(len(left), len(right)))


def split(text: str, unit: Unit) -> list[str]:
    """The words of a text, or its characters with one space between words.

    Raises:
        ValueError: `unit` is neither "word" nor "char".
    """
    if unit not in ("word", "char"):
        raise ValueError(f"unit is {unit!r}, allowed are 'word', 'char'")
    words = text.split()
    return words if unit == "word" else list(" ".join(words))


def error_report(pairs: Iterable[tuple[str, str]], unit: Unit = "word", seed: int = 0) -> WerReport:
    """Error rate over utterances.

    Args:
        pairs: reference and hypothesis of each utterance.
        unit: what is counted.
        seed: of the bootstrap.

    Raises:
        ValueError: no utterances, or all references are empty, for which there is no rate.
    """
    return report_of([count_errors(reference, hypothesis, unit) for reference, hypothesis in pairs], unit, seed)


def report_of(counts: Sequence[ErrorCounts], unit: Unit, seed: int = 0) -> WerReport:
    """Error rate over utterances whose errors are counted already.

    Raises:
        ValueError: no utterances, or all references are empty, for which there is no rate.
    """
    total = sum(counts, ErrorCounts())
    if not total.reference:
        raise ValueError(f"error_report: {len(counts)} utterances with 0 {unit}s in their references, at least 1 is needed")
    low, high = bootstrap_interval([c.errors for c in counts], [c.reference for c in counts], seed)
    return WerReport(unit, total, len(counts), sum(c.errors > 0 for c in counts), low, high)


def bootstrap_interval(errors: Sequence[int], lengths: Sequence[int], seed: int = 0, share: float = 0.95) -> tuple[float, float]:
    """Interval that holds the error rate with probability `share`, by drawing the utterances anew 1000 times.

    Utterances are drawn, not words, because errors within an utterance depend on each other. Source: Bisani and Ney 2004, "Bootstrap
    estimates for confidence intervals in ASR performance evaluation". Of a few utterances it is too narrow, of one it is a point.

    Args:
        errors: of each utterance.
        lengths: of each utterance's reference; not all 0.
        seed: of the draws; the same seed gives the same interval, in whatever order the utterances come.
        share: between 0 and 1.

    Raises:
        ValueError: no utterances, or all lengths are 0.
    """
    low, high = np.quantile(resampled_rates(errors, lengths, DRAWS, seed), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def resampled_rates(errors: Sequence[int], lengths: Sequence[int], draws: int, seed: int) -> NDArray[np.float64]:
    """Sum of errors by sum of lengths, (draws,), where each draw takes as many utterances as there are, with replacement.

    Utterances with equal numbers are drawn together, which is the same distribution: 100,000 utterances have some hundred different
    numbers of errors and words. Draws of empty references alone have no rate and are drawn again.

    Raises:
        ValueError: no utterances, or all lengths are 0.
    """
    if not any(lengths):
        raise ValueError(f"resampled_rates: {len(lengths)} utterances have references of length 0 in all, at least 1 is needed")
    kinds, times = np.unique(np.array([errors, lengths], dtype=np.int64), axis=1, return_counts=True)
    draw, number = np.random.default_rng(seed), len(errors)
    rates: list[float] = []
    while len(rates) < draws:
        rows = min(draws - len(rates), max(1, _CELLS // len(times)))
        times_drawn = draw.multinomial(number, times / number, size=rows)  # (rows, kinds)
        drawn = times_drawn @ kinds.T  # (rows, 2)
        drawn = drawn[drawn[:, 1] > 0]
        rates += (drawn[:, 0] / drawn[:, 1]).tolist()
    return np.array(rates)
