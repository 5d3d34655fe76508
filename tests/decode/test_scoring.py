"""Scores of a decoding: what is compared, what counts, and whose errors they are."""

from __future__ import annotations

import json
import random
from collections import Counter

import kaldialign
import pytest

from k2ssl.decode.results import Result
from k2ssl.decode.scoring import Confusions, TextRule, by_frequency, score, score_content
from k2ssl.decode.wer import ErrorCounts, count_errors, error_report


def result(name: str, ref: str | None, hyp: str, speaker: str | None = None, duration: float = 1.0) -> Result:
    return Result(name, hyp, 0.0, duration, ref, speaker)


def decoding(seed: int = 0, number: int = 60) -> list[Result]:
    """Results of three speakers and of nobody, with words of which about a third are wrong; some references empty or unknown."""
    draw = random.Random(seed)
    found = []
    for i in range(number):
        words = [draw.choice(["a", "cat", "sat", "on", "über"]) for _ in range(draw.randint(0, 9))]
        heard = [draw.choice(["a", "hat", "cat"]) if draw.random() < 0.3 else word for word in words if draw.random() < 0.9]
        ref = None if i % 10 == 7 else " ".join(words)
        found.append(result(f"u{i:03d}", ref, " ".join(heard), draw.choice(["anna", "ben", "cleo", None]), 0.5 + i))
    return found


def test_totals_are_those_of_kaldialign_over_all_utterances() -> None:
    results = decoding()
    scored = score(results)
    known = [r for r in results if r.ref is not None]
    theirs = kaldialign.batch_error_rate([str(r.ref).split() for r in known], [r.hyp.split() for r in known])
    counts = scored.word.counts
    assert (counts.substitutions, counts.insertions, counts.deletions) == (theirs["sub"], theirs["ins"], theirs["del"])
    assert scored.word.rate == theirs["err_rate"] > 0.2
    theirs = kaldialign.batch_error_rate([list(str(r.ref)) for r in known], [list(r.hyp) for r in known])
    assert scored.char.counts.errors == theirs["total"] and scored.char.rate == theirs["err_rate"]


def test_both_reports_are_those_of_the_texts_alone() -> None:
    results = decoding()
    pairs = [(r.ref, r.hyp) for r in results if r.ref is not None]
    scored = score(results, seed=3)
    assert scored.report("word") == error_report(pairs, "word", 3) and scored.report("char") == error_report(pairs, "char", 3)
    assert scored.word != score(results, seed=4).word


def test_utterances_without_reference_are_counted_and_left_out() -> None:
    results = decoding()
    known = [r for r in results if r.ref is not None]
    scored = score(results)
    assert scored.without_reference == 6 and len(scored.utterances) == 54 == scored.word.utterances
    assert scored.duration == pytest.approx(sum(r.duration for r in known))
    assert score(known).word == scored.word


def test_an_empty_reference_counts_what_was_heard_as_insertions() -> None:
    scored = score([result("a", "", "oh no"), result("b", "x", ""), result("c", " ", "")])
    assert scored.word.counts == ErrorCounts(insertions=2, deletions=1, reference=1)
    assert scored.word.rate == 3.0 and scored.word.wrong_utterances == 2


def test_without_any_word_to_recognise_there_is_no_score() -> None:
    with pytest.raises(ValueError, match="none of 2 utterances has a reference, at least one is needed"):
        score([result("a", None, "x"), result("b", None, "y")])
    with pytest.raises(ValueError, match="none of 0 utterances"):
        score([])
    with pytest.raises(ValueError, match="all 1 references are empty"):
        score([result("a", " ", "x")])


@pytest.mark.parametrize(
    ("rule", "text", "expected"),
    [
        (TextRule(), " The\tCat ", "The Cat"),
        (TextRule("lower"), "The ÜBER", "the über"),
        (TextRule("upper"), "the straße", "THE STRASSE"),
        (TextRule(), "u\u0308ber", "über"),
        (TextRule(unicode="as-is"), "u\u0308ber", "u\u0308ber"),
        (TextRule(), "\uff41 \ufb01", "\uff41 \ufb01"),
        (TextRule(unicode="nfkc"), "\uff41 \ufb01", "a fi"),
        (TextRule("lower", "as-is"), "\u1e9e", "\u00df"),
        (TextRule("upper"), "\u0390", "\u03aa\u0301"),  # changing case has taken the letter apart
        (TextRule("upper"), "\u1fb3\u0301", "\u0386\u0399"),
        (TextRule("lower"), "a\u00a0b\u2028c", "a b c"),
    ],
)
def test_texts_are_compared_as_the_rule_says(rule: TextRule, text: str, expected: str) -> None:
    assert rule(text) == expected
    assert rule(expected) == expected


def test_case_and_form_count_only_where_the_rule_says_so() -> None:
    results = [result("a", "Ein \u00c4pfel", "ein A\u0308pfel")]
    assert score(results).word.counts == ErrorCounts(substitutions=1, reference=2)
    assert score(results, TextRule("lower")).word.counts == ErrorCounts(reference=2)
    assert score(results, TextRule("upper", "as-is")).word.counts == ErrorCounts(substitutions=1, reference=2)
    assert score(results, TextRule("as-is", "as-is")).char.counts.errors == 3


def test_another_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="TextRule: casing is 'title', allowed are as-is, lower, upper"):
        TextRule("title")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="TextRule: unicode is 'nfd', allowed are nfc, nfkc, as-is"):
        TextRule(unicode="nfd")  # type: ignore[arg-type]


def test_the_errors_of_speakers_add_up_and_those_of_nobody_come_last() -> None:
    scored = score(decoding())
    speakers = scored.speakers()
    assert [row.speaker for row in speakers] == ["anna", "ben", "cleo", None]
    assert sum((row.word for row in speakers), ErrorCounts()) == scored.word.counts
    assert sum((row.char for row in speakers), ErrorCounts()) == scored.char.counts
    assert sum(row.utterances for row in speakers) == 54 and sum(row.duration for row in speakers) == pytest.approx(scored.duration)
    bens = [r for r in decoding() if r.speaker == "ben" and r.ref is not None]
    assert speakers[1].utterances == len(bens)
    assert speakers[1].counts("word") == sum((count_errors(str(r.ref), r.hyp) for r in bens), ErrorCounts())
    assert speakers[1].counts("char") == sum((count_errors(str(r.ref), r.hyp, "char") for r in bens), ErrorCounts())


def test_confusions_say_which_words_the_errors_are() -> None:
    results = [
        result("a", "the cat sat", "the hat sat"),
        result("b", "the cat sat on", "the hat sat"),
        result("c", "on", "oh on"),
        result("d", "the cat", "the cat"),
    ]
    found = score(results).confusions("word")
    assert found.substituted == {("cat", "hat"): 2}
    assert found.deleted == {"on": 1} and found.inserted == {"oh": 1}
    assert found.spoken == {"the": 3, "cat": 3, "sat": 2, "on": 2}
    letters = score(results).confusions("char")
    assert letters.substituted == {("c", "h"): 2} and letters.inserted[" "] == 1 and letters.spoken[" "] == 6


@pytest.mark.parametrize("unit", ["word", "char"])
def test_confusions_are_as_many_as_there_are_errors(unit) -> None:
    scored = score(decoding())
    found: Confusions = scored.confusions(unit)
    counts = scored.report(unit).counts
    assert (found.substituted.total(), found.inserted.total(), found.deleted.total(), found.spoken.total()) == (
        counts.substitutions,
        counts.insertions,
        counts.deletions,
        counts.reference,
    )


def test_the_worst_utterances_have_the_most_errors() -> None:
    results = [result("0long", "a b c d", "x y c d"), result("b", "a b", "x y"), result("a", "a b", "y x"), result("fine", "a", "a")]
    scored = score([*results, result("one", "a b c", "a b")])
    assert [u.id for u in scored.worst(10, "word")] == ["a", "b", "0long", "one"]
    assert [u.id for u in scored.worst(2, "word")] == ["a", "b"]
    by_char = [result("x", "abcdef", "uvwxyz"), result("y", "a b", "c d")]
    assert [u.id for u in score(by_char).worst(9, "word")] == ["y", "x"]
    assert [u.id for u in score(by_char).worst(9, "char")] == ["x", "y"]


def test_the_order_of_the_results_changes_nothing() -> None:
    results = decoding()
    shuffled = list(results)
    random.Random(1).shuffle(shuffled)
    assert score(shuffled) == score(results)
    assert json.dumps(score_content(score(shuffled), "word")) == json.dumps(score_content(score(results), "word"))


def test_an_utterance_that_was_decoded_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="two utterances have the id 'u003'"):
        score([*decoding(), result("u003", "a", "b")])


def test_the_content_holds_every_number() -> None:
    results = [
        result("a", "the cat sat", "the hat sat", "anna", 2.0),
        result("b", "the cat", "a the hat", None, 1.0),
        result("c", "", "", "ben", 0.5),
        result("d", None, "x"),
    ]
    scored = score(results)
    content = score_content(scored, "word")
    assert (content["utterances"], content["without_reference"], content["seconds"]) == (3, 1, 3.5)
    assert content["word"] == {
        "rate": 3 / 5,
        "errors": 3,
        "substitutions": 2,
        "insertions": 1,
        "deletions": 0,
        "reference": 5,
        "low": scored.word.low,
        "high": scored.word.high,
        "wrong_utterances": 2,
        "sentence_rate": 2 / 3,
    }
    assert content["char"]["errors"] == 4 and content["char"]["reference"] == 18
    assert [(row["speaker"], row["utterances"], row["seconds"], row["word"]["rate"]) for row in content["speakers"]] == [
        ("anna", 1, 2.0, 1 / 3),
        ("ben", 1, 0.5, None),
        (None, 1, 1.0, 1.0),
    ]
    assert content["substituted"] == [["cat", "hat", 2]] and content["inserted"] == [["a", 1]] and content["deleted"] == []
    assert score_content(scored, "char")["substituted"] == [["c", "h", 2]]
    deleted = score_content(score([result("a", "x y x", "y x")]), "word")
    assert deleted["deleted"] == [["x", 1, 2]]  # of two that were said


def test_equally_frequent_entries_come_in_alphabetical_order() -> None:
    assert by_frequency(Counter({"b": 1, "c": 2, "a": 1})) == [("c", 2), ("a", 1), ("b", 1)]
