"""Scoring the results of one decoding: totals, speakers, confused words, worst utterances."""

from __future__ import annotations

import itertools
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from k2ssl.decode.results import Result
from k2ssl.decode.wer import ErrorCounts, Unit, WerReport, align, count_errors, report_of, split

Casing = Literal["as-is", "lower", "upper"]
UnicodeForm = Literal["nfc", "nfkc", "as-is"]

_CASINGS = {"as-is": "as they are, so that case counts", "lower": "in lower case", "upper": "in upper case"}
_FORMS = {"nfc": "in Unicode form NFC", "nfkc": "in Unicode form NFKC", "as-is": "code point by code point"}


@dataclass(frozen=True)
class TextRule:
    """What is done to references and hypotheses alike before they are compared. White space only separates words.

    Attributes:
        casing: as-is: case counts; lower, upper: it does not.
        unicode: nfc: ways to write the same character count as the same (an accent in one code point or two); nfkc: so do its widths and
            ligatures; as-is: code points count.

    Raises:
        ValueError: a value is not one of these.
    """

    casing: Casing = "as-is"
    unicode: UnicodeForm = "nfc"

    def __post_init__(self) -> None:
        if self.casing not in _CASINGS:
            raise ValueError(f"TextRule: casing is {self.casing!r}, allowed are {', '.join(_CASINGS)}")
        if self.unicode not in _FORMS:
            raise ValueError(f"TextRule: unicode is {self.unicode!r}, allowed are {', '.join(_FORMS)}")

    def __call__(self, text: str) -> str:
        """The text as it is compared."""
        text = self._form(text)
        if self.casing != "as-is":
            text = self._form(text.lower() if self.casing == "lower" else text.upper())  # changing case can undo the form
        return " ".join(text.split())

    def describe(self) -> str:
        """The rule in words, as reports state it."""
        return f"{_CASINGS[self.casing]}, {_FORMS[self.unicode]}"

    def _form(self, text: str) -> str:
        if self.unicode == "as-is" or text.isascii():
            return text
        return unicodedata.normalize("NFC" if self.unicode == "nfc" else "NFKC", text)


@dataclass(frozen=True, slots=True)
class Scored:
    """One utterance with its errors; texts are as they were compared.

    Attributes:
        id, speaker, duration: as in `Result`.
        ref, hyp: texts.
        word, char: errors.
    """

    id: str
    speaker: str | None
    duration: float
    ref: str
    hyp: str
    word: ErrorCounts
    char: ErrorCounts

    def counts(self, unit: Unit) -> ErrorCounts:
        """Errors in words or characters."""
        return self.word if unit == "word" else self.char


@dataclass(frozen=True)
class SpeakerScore:
    """Errors of one speaker.

    Attributes:
        speaker: None stands for the utterances without one.
        utterances: how many.
        duration: in seconds.
        word, char: errors.
    """

    speaker: str | None
    utterances: int
    duration: float
    word: ErrorCounts
    char: ErrorCounts

    def counts(self, unit: Unit) -> ErrorCounts:
        """Errors in words or characters."""
        return self.word if unit == "word" else self.char


@dataclass(frozen=True)
class Confusions:
    """Which words (or characters) the errors are, and how often.

    Attributes:
        substituted: by (reference's, hypothesis's).
        deleted, inserted: by word.
        spoken: by word, how often it is in the references.
    """

    substituted: Counter[tuple[str, str]] = field(default_factory=Counter)
    deleted: Counter[str] = field(default_factory=Counter)
    inserted: Counter[str] = field(default_factory=Counter)
    spoken: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Score:
    """All that is known about the errors of one decoding; it does not depend on the order of the results.

    Attributes:
        utterances: those with a reference, by id.
        without_reference: how many others there are; they count nowhere.
        word, char: error rates.
    """

    utterances: tuple[Scored, ...]
    without_reference: int
    word: WerReport
    char: WerReport

    @property
    def duration(self) -> float:
        """Seconds of audio that were scored."""
        return sum(utterance.duration for utterance in self.utterances)

    def report(self, unit: Unit) -> WerReport:
        """Error rate in words or characters."""
        return self.word if unit == "word" else self.char

    def speakers(self) -> list[SpeakerScore]:
        """One entry for each speaker, by name, those without one last."""
        groups: dict[str | None, list[Scored]] = {}
        for utterance in self.utterances:
            groups.setdefault(utterance.speaker, []).append(utterance)
        return [
            SpeakerScore(
                speaker,
                len(group),
                sum(utterance.duration for utterance in group),
                sum((utterance.word for utterance in group), ErrorCounts()),
                sum((utterance.char for utterance in group), ErrorCounts()),
            )
            for speaker, group in sorted(groups.items(), key=lambda item: (item[0] is None, item[0] or ""))
        ]

    def worst(self, number: int, unit: Unit) -> list[Scored]:
        """At most `number` utterances with the most errors; of equally many, those with the shorter references first."""
        wrong = [utterance for utterance in self.utterances if utterance.counts(unit).errors]
        return sorted(wrong, key=lambda u: (-u.counts(unit).errors, u.counts(unit).reference, u.id))[:number]

    def confusions(self, unit: Unit) -> Confusions:
        """Which words or characters the errors are."""
        found = Confusions()
        for utterance in self.utterances:
            reference = split(utterance.ref, unit)
            found.spoken.update(reference)
            if not utterance.counts(unit).errors:
                continue
            for left, right in align(reference, split(utterance.hyp, unit)):
                if left is None:
                    found.inserted[str(right)] += 1
                elif right is None:
                    found.deleted[left] += 1
                elif left != right:
                    found.substituted[left, right] += 1
        return found


def score(results: Iterable[Result], rule: TextRule | None = None, seed: int = 0) -> Score:
    """Compare hypotheses with references.

    Args:
        results: of one decoding; each is needed only until the next. Those without reference are counted and left out.
        rule: how texts are compared; `TextRule()` by default.
        seed: of the bootstrap intervals.

    Raises:
        ValueError: no utterance has a reference, all references are empty, or two utterances have one id.
    """
    rule = TextRule() if rule is None else rule
    scored, without = [], 0
    for result in results:
        if result.ref is None:
            without += 1
            continue
        ref, hyp = rule(result.ref), rule(result.hyp)
        word, char = count_errors(ref, hyp, "word"), count_errors(ref, hyp, "char")
        scored.append(Scored(result.id, result.speaker, result.duration, ref, hyp, word, char))
    if not scored:
        raise ValueError(f"none of {without} utterances has a reference, at least one is needed")
    if not any(utterance.word.reference for utterance in scored):
        raise ValueError(f"all {len(scored)} references are empty, there is no error rate")
    scored.sort(key=lambda utterance: utterance.id)
    for one, other in itertools.pairwise(scored):
        if one.id == other.id:
            raise ValueError(f"two utterances have the id {one.id!r}, each may be decoded once")
    words = report_of([utterance.word for utterance in scored], "word", seed)
    chars = report_of([utterance.char for utterance in scored], "char", seed)
    return Score(tuple(scored), without, words, chars)


def score_content(score: Score, unit: Unit) -> dict[str, Any]:
    """Everything about a decoding that JSON can hold, but the utterances.

    Args:
        score: of the decoding.
        unit: of the confused pairs, deleted and inserted ones; all that occur, the most frequent first.
    """
    confusions = score.confusions(unit)
    return {
        "utterances": len(score.utterances),
        "without_reference": score.without_reference,
        "seconds": score.duration,
        **{name: _report_content(score.report(name)) for name in ("word", "char")},
        "speakers": [
            {
                "speaker": row.speaker,
                "utterances": row.utterances,
                "seconds": row.duration,
                "word": _counts_content(row.word),
                "char": _counts_content(row.char),
            }
            for row in score.speakers()
        ],
        "substituted": [[*pair, times] for pair, times in by_frequency(confusions.substituted)],
        "deleted": [[text, times, confusions.spoken[text]] for text, times in by_frequency(confusions.deleted)],
        "inserted": [[text, times] for text, times in by_frequency(confusions.inserted)],
    }


def by_frequency(counter: Counter[Any]) -> list[tuple[Any, int]]:
    """Entries of a counter, the most frequent first, equally frequent ones in alphabetical order."""
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))


def rate_of(counts: ErrorCounts) -> float | None:
    """Errors per word or character; None if the reference has none."""
    return counts.errors / counts.reference if counts.reference else None


def _counts_content(counts: ErrorCounts) -> dict[str, Any]:
    return {
        "rate": rate_of(counts),
        "errors": counts.errors,
        "substitutions": counts.substitutions,
        "insertions": counts.insertions,
        "deletions": counts.deletions,
        "reference": counts.reference,
    }


def _report_content(report: WerReport) -> dict[str, Any]:
    wrong = {"wrong_utterances": report.wrong_utterances, "sentence_rate": report.sentence_rate}
    return {**_counts_content(report.counts), "low": report.low, "high": report.high, **wrong}
