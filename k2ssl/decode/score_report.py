"""The report of a scoring that people read: plain text, for a fixed-width font."""

from __future__ import annotations

from collections.abc import Sequence

from k2ssl.decode.aligned_text import aligned_text, pad, shown, text_width
from k2ssl.decode.compare import Comparison, most_different
from k2ssl.decode.scoring import Score, Scored, SpeakerScore, TextRule, by_frequency, rate_of
from k2ssl.decode.wer import DRAWS, ErrorCounts, Unit

Row = tuple[str, ...]

_FEW = 30  # with fewer utterances than this, drawing them anew shows too little of how much they differ


def conditions(rule: TextRule, seed: int) -> str:
    """What the numbers of a report rest on."""
    return (
        f"Texts are compared {rule.describe()}. White space only separates words; for the CER it is one character.\n"
        f"Errors are the fewest that turn the reference into the hypothesis. SER is the share of utterances with an error.\n"
        f"Intervals: bootstrap over utterances (Bisani and Ney 2004), {DRAWS:,} draws, seed {seed}."
    )


def overview(scores: Sequence[tuple[str, Score]]) -> str:
    """A table with one line for each decoding."""
    header = ("hypotheses", "utterances", "words", "WER", "95 % interval", "sub", "del", "ins", "SER", "CER")
    rows: list[Row] = []
    for name, score in scores:
        word, char = score.word, score.char
        counts = (f"{number / word.counts.reference:.2%}" for number in _kinds(word.counts))
        interval = f"{word.low:.2%} to {word.high:.2%}"
        size = (f"{word.utterances:,}", f"{word.counts.reference:,}")
        rows.append((name, *size, f"{word.rate:.2%}", interval, *counts, f"{word.sentence_rate:.2%}", f"{char.rate:.2%}"))
    return table(header, rows)


def score_text(name: str, score: Score, unit: Unit, top: int, worst: int) -> str:
    """The report of one decoding.

    Args:
        name: of the decoding, as its title.
        score: of the decoding.
        unit: of all tables, and of the worst utterances.
        top: longest that a table gets.
        worst: how many utterances are shown.
    """
    left_out = f"; {score.without_reference:,} without a reference are left out" if score.without_reference else ""
    word_lines, char_lines = score.word.text(), score.char.text()
    summary = [f"{len(score.utterances):,} utterances, {score.duration / 3600:.2f} h{left_out}", word_lines, char_lines.splitlines()[0]]
    parts = [f"{name}\n{'=' * text_width(name)}", "\n".join([*summary, *_caution(len(score.utterances))])]
    parts += _speaker_part(score.speakers(), unit, top)
    parts += _confusion_parts(score, unit, top)
    wrong = score.worst(worst, unit)
    if wrong:
        parts.append(f"Utterances with the most errors ({len(wrong)} of {score.report(unit).wrong_utterances:,} that have any)")
        parts += [f"{_title(utterance, unit)}\n{aligned_text(utterance.ref, [('hyp', utterance.hyp)], unit)}" for utterance in wrong]
    return "\n\n".join(parts)


def comparison_text(names: tuple[str, str], scores: tuple[Score, Score], comparison: Comparison, seed: int, worst: int) -> str:
    """The report of a comparison of two decodings, with the utterances that differ most."""
    title = "Comparison"
    method = (
        f"Paired bootstrap over {comparison.utterances:,} utterances (Bisani and Ney 2004), {comparison.draws:,} draws, seed {seed}; "
        "p is two-sided."
    )
    parts = [
        f"{title}\n{'=' * len(title)}",
        f"first   {names[0]}\nsecond  {names[1]}",
        comparison.text(),
        "\n".join([method, *_caution(comparison.utterances)]),
    ]
    pairs = most_different(*scores, worst, comparison.unit)
    if pairs:
        parts.append(f"Utterances that differ most ({len(pairs)} of {comparison.better + comparison.worse:,} that differ)")
    for one, two in pairs:
        errors = f"{one.counts(comparison.unit).errors} and {two.counts(comparison.unit).errors} errors"
        hypotheses = [("first", one.hyp), ("second", two.hyp)]
        parts.append(f"{one.id}: {errors}\n{aligned_text(one.ref, hypotheses, comparison.unit)}")
    return "\n\n".join(parts)


def table(header: Row, rows: Sequence[Row]) -> str:
    """Columns below their headers, the first on the left and the others on the right of their width."""
    widths = [max(text_width(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join("  ".join(pad(cell, widths[i], right=i > 0) for i, cell in enumerate(row)).rstrip() for row in (header, *rows))


def _caution(utterances: int) -> list[str]:
    """A line where the bootstrap is not to be trusted."""
    return (
        [f"Of {utterances} utterances intervals are too narrow and p-values too small; {_FEW} or more are needed."]
        if utterances < _FEW
        else []
    )


def _speaker_part(speakers: Sequence[SpeakerScore], unit: Unit, top: int) -> list[str]:
    """Speakers with the highest rates; nothing where no speaker is known."""
    if not top or all(row.speaker is None for row in speakers):
        return []
    ordered = sorted(speakers, key=lambda row: -(rate_of(row.counts(unit)) or 0.0))[:top]
    rows: list[Row] = []
    for row in ordered:
        counts = row.counts(unit)
        name = "(unknown)" if row.speaker is None else row.speaker
        kinds = (f"{number:,}" for number in _kinds(counts))
        rates = (_percent(row.word), _percent(row.char))
        rows.append((name, f"{row.utterances:,}", f"{counts.reference:,}", *kinds, *rates))
    head = f"Speakers ({len(rows)} of {len(speakers):,}, highest {'WER' if unit == 'word' else 'CER'} first)"
    return [f"{head}\n{table(('speaker', 'utterances', f'{unit}s', 'sub', 'del', 'ins', 'WER', 'CER'), rows)}"]


def _confusion_parts(score: Score, unit: Unit, top: int) -> list[str]:
    found = score.confusions(unit)
    parts = []
    pairs = [(f"{shown(left)} → {shown(right)}", f"{times:,}") for (left, right), times in by_frequency(found.substituted)[:top]]
    if pairs:
        parts.append(_titled("Substituted", ("reference → hypothesis", "times"), pairs, len(found.substituted)))
    lost = [(shown(text), f"{times:,}", f"{found.spoken[text]:,}") for text, times in by_frequency(found.deleted)[:top]]
    if lost:
        parts.append(_titled("Deleted", (unit, "times", "of"), lost, len(found.deleted)))
    added = [(shown(text), f"{times:,}") for text, times in by_frequency(found.inserted)[:top]]
    if added:
        parts.append(_titled("Inserted", (unit, "times"), added, len(found.inserted)))
    return parts


def _titled(title: str, header: Row, rows: Sequence[Row], number: int) -> str:
    return f"{title} ({len(rows)} of {number:,}, the most frequent first)\n{table(header, rows)}"


def _title(utterance: Scored, unit: Unit) -> str:
    counts = utterance.counts(unit)
    speaker = "" if utterance.speaker is None else f", speaker {utterance.speaker}"
    return f"{utterance.id}{speaker}: {counts.errors} errors in {counts.reference} {unit}s"


def _kinds(counts: ErrorCounts) -> tuple[int, int, int]:
    """In the order of the headers."""
    return counts.substitutions, counts.deletions, counts.insertions


def _percent(counts: ErrorCounts) -> str:
    rate = rate_of(counts)
    return "-" if rate is None else f"{rate:.2%}"
