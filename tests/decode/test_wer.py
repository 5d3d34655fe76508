"""Error rates against a plain Levenshtein distance, and intervals against what is known of them."""

from __future__ import annotations

import random

import kaldialign
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2ssl.decode.wer import ErrorCounts, align, bootstrap_interval, count_errors, error_report, resampled_rates, split

WORDS = ["a", "b", "c", "über", "it's"]


def best_divisions(reference: list[str], hypothesis: list[str]) -> set[tuple[int, int, int]]:
    """All (substitutions, insertions, deletions) with the smallest sum, by plain dynamic programming."""
    table: dict[tuple[int, int], set[tuple[int, int, int]]] = {}
    for i in range(len(reference) + 1):
        for j in range(len(hypothesis) + 1):
            ways = {(0, 0, 0)} if i == j == 0 else set()
            if i and j:
                wrong = reference[i - 1] != hypothesis[j - 1]
                ways |= {(s + wrong, n, d) for s, n, d in table[i - 1, j - 1]}
            if j:
                ways |= {(s, n + 1, d) for s, n, d in table[i, j - 1]}
            if i:
                ways |= {(s, n, d + 1) for s, n, d in table[i - 1, j]}
            fewest = min(map(sum, ways))
            table[i, j] = {way for way in ways if sum(way) == fewest}
    return table[len(reference), len(hypothesis)]


def random_text(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(0, 9)))


@pytest.mark.parametrize("unit", ["word", "char"])
def test_errors_are_those_of_a_plain_alignment(unit) -> None:
    draw = random.Random(1)
    total = 0
    for _ in range(200):
        reference, hypothesis = random_text(draw), random_text(draw)
        counts = count_errors(reference, hypothesis, unit)
        assert (counts.substitutions, counts.insertions, counts.deletions) in best_divisions(
            split(reference, unit), split(hypothesis, unit)
        )
        assert counts.reference == len(split(reference, unit))
        total += counts.errors
    assert total > 500


sentences = st.lists(st.sampled_from("ab"), max_size=8) | st.lists(st.sampled_from(WORDS), max_size=6)


@settings(max_examples=300, deadline=None)
@given(sentences, sentences)
def test_errors_are_divided_as_kaldialign_does(reference: list[str], hypothesis: list[str]) -> None:
    theirs = kaldialign.edit_distance(reference, hypothesis)
    counts = count_errors(" ".join(reference), " ".join(hypothesis))
    assert (counts.substitutions, counts.insertions, counts.deletions) == (theirs["sub"], theirs["ins"], theirs["del"])


@settings(max_examples=300, deadline=None)
@given(sentences, sentences)
def test_an_alignment_holds_both_texts_and_the_errors_that_are_counted(reference: list[str], hypothesis: list[str]) -> None:
    pairs = align(reference, hypothesis)
    assert [left for left, _ in pairs if left is not None] == reference
    assert [right for _, right in pairs if right is not None] == hypothesis
    inserted = sum(left is None for left, _ in pairs)
    deleted = sum(right is None for _, right in pairs)
    substituted = sum(left != right for left, right in pairs) - inserted - deleted
    assert (None, None) not in pairs
    assert count_errors(" ".join(reference), " ".join(hypothesis)) == ErrorCounts(substituted, inserted, deleted, len(reference))


def test_an_alignment_keeps_words_that_look_like_signs_for_nothing() -> None:
    assert align(["*", "<eps>", "a"], ["*", "a", "-"]) == [("*", "*"), ("<eps>", None), ("a", "a"), (None, "-")]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "unit", "expected"),
    [
        ("the cat sat", "the cat sat", "word", (0, 0, 0, 3)),
        ("the cat sat", "a cat sat down", "word", (1, 1, 0, 3)),
        ("the cat sat", "", "word", (0, 0, 3, 3)),
        ("", "the cat", "word", (0, 2, 0, 0)),
        ("", "", "word", (0, 0, 0, 0)),
        ("  the\tcat \n", "the cat", "word", (0, 0, 0, 2)),
        ("The cat", "the cat", "word", (1, 0, 0, 2)),  # case counts
        ("a  b", "a b", "char", (0, 0, 0, 3)),
        ("ab", "a b", "char", (0, 1, 0, 2)),  # and so does a space
        ("größe", "grosse", "char", (2, 1, 0, 5)),
        ("早上好", "早安", "char", (1, 0, 1, 3)),
    ],
)
def test_single_utterances(reference: str, hypothesis: str, unit, expected: tuple[int, ...]) -> None:
    assert count_errors(reference, hypothesis, unit) == ErrorCounts(*expected)


def test_a_report_adds_up_errors_and_words_before_it_divides() -> None:
    report = error_report([("a b c d", "a b c d"), ("a b", "a x y"), ("a", ""), ("", "a")])
    assert report.counts == ErrorCounts(substitutions=1, insertions=2, deletions=1, reference=7)
    assert report.rate == 4 / 7 and report.sentence_rate == 3 / 4
    assert report.low < report.rate < report.high


def test_the_text_of_a_report_tells_all_numbers() -> None:
    pairs = [("a b c d", "a b c d")] * 9 + [("a b c d", "a x c e f")]
    report = error_report(pairs)
    first, second = report.text().splitlines()
    assert first.startswith("WER 7.50% (95 % interval ") and f"{report.low:.2%} to {report.high:.2%}" in first
    assert first.endswith("3 errors in 40 words; 2 substituted, 0 deleted, 1 inserted")
    assert second == "SER 10.00%: 1 of 10 utterances have an error"
    assert error_report(pairs, "char").text().startswith("CER ")


def test_the_interval_is_as_wide_as_theory_has_it_and_the_same_for_the_same_seed() -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(5, 40, 2000)
    errors = draw.binomial(lengths, 0.1)
    rate = errors.sum() / lengths.sum()
    deviation = np.sqrt(((errors - rate * lengths) ** 2).sum()) / lengths.sum()  # of a ratio of sums over utterances
    low, high = bootstrap_interval(errors.tolist(), lengths.tolist(), seed=3)
    assert (low, high) == bootstrap_interval(errors.tolist(), lengths.tolist(), seed=3)
    assert (low, high) != bootstrap_interval(errors.tolist(), lengths.tolist(), seed=4)
    assert low == pytest.approx(rate - 1.96 * deviation, abs=0.2 * deviation)
    assert high == pytest.approx(rate + 1.96 * deviation, abs=0.2 * deviation)
    half = bootstrap_interval(errors.tolist(), lengths.tolist(), seed=3, share=0.5)
    assert half[1] - half[0] == pytest.approx(2 * 0.6745 * deviation, abs=0.2 * deviation)


def test_the_interval_does_not_depend_on_how_many_draws_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    errors, lengths = [0, 1, 2, 0, 5], [3, 4, 5, 1, 9]
    whole = bootstrap_interval(errors, lengths)
    monkeypatch.setattr("k2ssl.decode.wer._CELLS", 35)
    assert bootstrap_interval(errors, lengths) == whole


def test_the_interval_does_not_depend_on_the_order_of_the_utterances() -> None:
    errors, lengths = [0, 1, 2, 0, 5, 1], [3, 4, 5, 1, 9, 4]
    order = [3, 5, 0, 1, 4, 2]
    assert bootstrap_interval([errors[i] for i in order], [lengths[i] for i in order]) == bootstrap_interval(errors, lengths)


def test_the_interval_holds_the_true_rate_in_95_of_100_corpora() -> None:
    draw = np.random.default_rng(5)
    held = 0
    for seed in range(400):
        lengths = draw.integers(3, 9, 150)
        errors = draw.binomial(lengths, draw.beta(1, 9, 150))  # utterances differ in how hard they are; a word is wrong with 0.1
        low, high = bootstrap_interval(errors.tolist(), lengths.tolist(), seed)
        held += low <= 0.1 <= high
    assert 0.95 - 3 * 0.011 <= held / 400 <= 0.95 + 3 * 0.011  # 0.011: deviation of a share of 400


def test_a_draw_takes_as_many_utterances_as_there_are_each_as_likely_as_another() -> None:
    rates = resampled_rates([1, 0, 0, 0], [1, 1, 1, 1], draws=20_000, seed=2)
    shares = [np.mean(rates == k / 4) for k in range(5)]
    expected = [0.75**4, 4 * 0.25 * 0.75**3, 6 * 0.25**2 * 0.75**2, 4 * 0.25**3 * 0.75, 0.25**4]
    assert len(rates) == 20_000 and shares == pytest.approx(expected, abs=0.012)


def test_draws_of_empty_references_alone_are_drawn_again() -> None:
    low, high = bootstrap_interval([1, 1], [0, 2])
    assert low == 0.5 and high == 1.0  # the second alone, or one of each


@pytest.mark.parametrize("errors", [[], [1, 0]])
def test_an_interval_of_no_words_is_refused(errors: list[int]) -> None:
    with pytest.raises(ValueError, match=f"{len(errors)} utterances have references of length 0 in all"):
        bootstrap_interval(errors, [0] * len(errors))


def test_errors_of_one_speaker_together_widen_the_interval() -> None:
    spread = bootstrap_interval([1] * 100, [10] * 100)
    bundled = bootstrap_interval([10] * 10 + [0] * 90, [10] * 100)
    assert spread == (0.1, 0.1) and bundled[1] - bundled[0] > 0.08


def test_without_a_word_to_recognise_there_is_no_rate() -> None:
    with pytest.raises(ValueError, match="0 utterances with 0 words"):
        error_report([])
    with pytest.raises(ValueError, match="1 utterances with 0 chars"):
        error_report([("", "a")], "char")


def test_another_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="unit is 'phone', allowed are 'word', 'char'"):
        count_errors("a", "a", "phone")  # type: ignore[arg-type]
