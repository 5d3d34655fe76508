"""Two decodings held against each other: the test is right as often as it says, and refuses what cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from k2ssl.decode.compare import compare, most_different, paired
from k2ssl.decode.results import Result
from k2ssl.decode.scoring import Score, Scored, score
from k2ssl.decode.wer import ErrorCounts, WerReport, bootstrap_interval


def decoding(*texts: tuple[str, str | None, str]) -> Score:
    return score([Result(name, hyp, 0.0, 1.0, ref) for name, ref, hyp in texts])


def with_errors(errors: Sequence[int], lengths: Sequence[int]) -> Score:
    """A score of utterances with so many errors."""
    counts = [ErrorCounts(substitutions=int(e), reference=int(n)) for e, n in zip(errors, lengths, strict=True)]
    utterances = tuple(Scored(f"u{i:04d}", None, 1.0, "", "", count, count) for i, count in enumerate(counts))
    total = sum(counts, ErrorCounts())
    word, char = (WerReport(unit, total, len(counts), 0, 0.0, 1.0) for unit in ("word", "char"))
    return Score(utterances, 0, word, char)


FIRST = decoding(("a", "one two", "one two"), ("b", "three", "tree"), ("c", "four five six", "for five"), ("d", "", "x"))
SECOND = decoding(("d", "", ""), ("c", "four five six", "four five six"), ("b", "three", "tree"), ("a", "one two", "won"))


def test_rates_and_utterances_are_counted_pairwise() -> None:
    found = compare(FIRST, SECOND)
    assert (found.first, found.second, found.difference) == (4 / 6, 3 / 6, -1 / 6)
    assert (found.better, found.worse, found.equal, found.utterances) == (2, 1, 1, 4)
    assert found.low <= found.difference <= found.high and 0 < found.p_value <= 1
    by_char = compare(FIRST, SECOND, "char")
    assert (by_char.unit, by_char.first) == ("char", FIRST.char.rate) and by_char.first != found.first


def test_to_exchange_the_systems_exchanges_the_signs() -> None:
    one, two = compare(FIRST, SECOND), compare(SECOND, FIRST)
    assert two.difference == -one.difference and (two.better, two.worse) == (one.worse, one.better)
    assert (two.low, two.high) == pytest.approx((-one.high, -one.low), abs=0.05)
    assert two.p_value == pytest.approx(one.p_value, abs=0.05)


def test_a_system_is_not_better_than_itself() -> None:
    found = compare(FIRST, FIRST)
    assert (found.difference, found.low, found.high, found.p_value, found.probability_of_improvement) == (0, 0, 0, 1, 0)
    assert found.equal == 4


def test_the_same_seed_gives_the_same_comparison_and_another_another() -> None:
    assert compare(FIRST, SECOND, seed=1) == compare(FIRST, SECOND, seed=1) != compare(FIRST, SECOND, seed=2)


def test_interval_and_p_are_those_of_a_paired_normal_test_on_many_utterances() -> None:
    draw = np.random.default_rng(3)
    lengths = draw.integers(5, 40, 3000)
    hard = draw.beta(1, 9, 3000)
    one, two = draw.binomial(lengths, hard), draw.binomial(lengths, 0.965 * hard)
    gain = (two.sum() - one.sum()) / lengths.sum()
    deviation = np.sqrt(((two - one - gain * lengths) ** 2).sum()) / lengths.sum()
    found = compare(with_errors(one, lengths), with_errors(two, lengths))
    assert found.difference == pytest.approx(gain)
    assert (found.low, found.high) == pytest.approx((gain - 1.96 * deviation, gain + 1.96 * deviation), abs=0.1 * deviation)
    below = 0.5 * math.erfc(gain / deviation / math.sqrt(2))  # probability that a draw is below 0
    assert 0.005 < 1 - below < 0.1  # a case in which the test could err
    assert found.probability_of_improvement == pytest.approx(below, abs=0.01)
    assert found.p_value == pytest.approx(2 * (1 - below), abs=0.02)


def test_between_equally_good_systems_5_of_100_comparisons_find_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("k2ssl.decode.compare.DRAWS", 1000)
    draw = np.random.default_rng(7)
    wrong = outside = 0
    for seed in range(400):
        lengths = draw.integers(3, 9, 100)
        hard = draw.beta(1, 9, 100)
        found = compare(with_errors(draw.binomial(lengths, hard), lengths), with_errors(draw.binomial(lengths, hard), lengths), seed=seed)
        wrong += found.p_value < 0.05
        outside += not found.low <= 0 <= found.high
    assert 0.05 - 3 * 0.011 <= wrong / 400 <= 0.05 + 3 * 0.011  # 0.011: deviation of a share of 400
    assert abs(outside - wrong) <= 4  # p and interval say the same, but for draws that are at the edge


def test_pairing_finds_what_two_intervals_do_not() -> None:
    draw = np.random.default_rng(11)
    lengths = draw.integers(5, 40, 500)
    one = draw.binomial(lengths, draw.beta(0.5, 4.5, 500))
    two = one - draw.binomial(one, 0.06)  # the same errors, a few of them gone
    assert bootstrap_interval(one, lengths)[0] < bootstrap_interval(two, lengths)[1]  # the intervals overlap
    found = compare(with_errors(one, lengths), with_errors(two, lengths))
    assert found.high < 0 and found.p_value == 2 / 10_001 and found.probability_of_improvement == 1


def test_a_difference_that_no_draw_loses_has_the_smallest_p() -> None:
    lengths = [5] * 50
    better, worse = with_errors([1] * 50, lengths), with_errors([2] * 50, lengths)
    assert compare(worse, better).p_value == compare(better, worse).p_value == 2 / 10_001
    assert (compare(worse, better).probability_of_improvement, compare(better, worse).probability_of_improvement) == (1, 0)


def test_other_utterances_are_refused_by_name() -> None:
    more = decoding(*((f"x{i}", "a", "a") for i in range(5)), ("a", "a", "b"))
    less = decoding(("a", "a", "b"))
    with pytest.raises(
        ValueError, match="the first has and the second lacks references of 5 utterances: 'x0', 'x1', 'x2' and 2 more; the same"
    ):
        compare(more, less)
    with pytest.raises(ValueError, match="the second has and the first lacks references of 5 utterances: 'x0'"):
        compare(less, more)
    with pytest.raises(ValueError, match="the first has and the second lacks references of 1 utterances: 'b'; the same"):
        compare(decoding(("a", "a", "b"), ("b", "b", "b")), decoding(("a", "a", "b"), ("b", None, "b")))


def test_other_references_are_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match="the references of 1 utterances differ: 'a'; that of 'a' is 'one' in the first, 'One' in the second"
    ):
        paired(decoding(("a", "one", "one")), decoding(("a", "One", "one")))


def test_utterances_that_differ_most_come_first() -> None:
    found = most_different(FIRST, SECOND, 10, "word")
    assert [(one.id, two.id) for one, two in found] == [("a", "a"), ("c", "c"), ("d", "d")]  # by 2, 2 and 1 errors
    assert [one.id for one, _ in most_different(FIRST, SECOND, 1, "word")] == ["a"]
    one, two = decoding(("a", "x y", "x y"), ("b", "long", "long")), decoding(("a", "x y", ""), ("b", "long", "quick"))
    assert [left.id for left, _ in most_different(one, two, 2, "word")] == ["a", "b"]  # by 2 words and 1
    assert [left.id for left, _ in most_different(one, two, 2, "char")] == ["b", "a"]  # by 5 letters and 3
    one, two = decoding(("a", "x y z", "x y z"), ("b", "x", "x")), decoding(("a", "x y z", "x y"), ("b", "x", ""))
    assert [left.id for left, _ in most_different(one, two, 2, "word")] == ["b", "a"]  # by 1 of 1 and 1 of 3


def test_the_text_tells_all_numbers() -> None:
    found = compare(FIRST, SECOND)
    first, second = found.text().splitlines()
    assert first.startswith("WER 66.67% and 50.00%; the second's is -16.67 points (95 % interval -")
    assert first.endswith(f"{100 * found.high:+.2f}), p = {found.p_value:.2g}")
    assert second.startswith("It has fewer errors in 2 utterances, more in 1, as many in 1; it is better in ")
    assert second.endswith(f"{found.probability_of_improvement:.1%} of the draws")
    assert compare(FIRST, SECOND, "char").text().startswith("CER ")
