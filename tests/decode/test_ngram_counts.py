"""Counting by sorting, against counting in dictionaries."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from k2ssl.decode import ngram_counts
from k2ssl.decode.ngram_counts import NgramCounter, NgramCounts


def plain_counts(text: list[list[str]], order: int) -> dict[tuple[str, ...], int]:
    found: Counter[tuple[str, ...]] = Counter()
    for sentence in text:
        padded = ["<s>", *sentence, "</s>"]
        found.update(tuple(padded[i - n : i]) for n in range(1, order + 1) for i in range(n, len(padded) + 1) if i > 1)
    return found


def listed(counts: NgramCounts) -> list[dict[tuple[str, ...], tuple[int, int]]]:
    """For each order: n-gram -> (count, left)."""
    result, below = [], [()]
    for order in counts.orders:
        ngrams = [(counts.words[f - 1], *below[s]) for f, s in zip(order.first.tolist(), order.suffix.tolist(), strict=True)]
        result.append(dict(zip(ngrams, zip(order.count.tolist(), order.left.tolist(), strict=True), strict=True)))
        assert len(result[-1]) == len(ngrams)
        below = ngrams
    return result


def counted(text: list[list[str]], order: int) -> NgramCounts:
    counter = NgramCounter(order)
    for sentence in text:
        counter.add(sentence)
    return counter.counts()


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_counts_of_all_orders_are_those_of_a_dictionary(ngrams, order: int) -> None:  # type: ignore[no-untyped-def]
    text = ngrams.made_up_text(150, vocabulary=10)
    expected = plain_counts(text, order)
    found = listed(counted(text, order))
    everything = {ngram: count for of_order in found for ngram, (count, _) in of_order.items() if count}
    assert everything == expected and max(map(len, expected)) == order
    for of_order, above in pairwise(found):
        before = Counter(ngram[1:] for ngram in above)
        assert {ngram: left for ngram, (_, left) in of_order.items() if left} == dict(before)
    assert not any(left for _, left in found[-1].values())


def test_single_words_are_all_listed_even_those_that_never_occur() -> None:
    counter = NgramCounter(2, ["later", "b"])
    counter.add(["a", "b", "<unk>"])
    counts = counter.counts()
    assert counts.words == ("<s>", "</s>", "<unk>", "later", "b", "a")
    assert counts.orders[0].count.tolist() == [0, 1, 1, 0, 1, 1] and counts.orders[0].first.tolist() == [1, 2, 3, 4, 5, 6]
    assert (counts.num_sentences, counts.num_words) == (1, 3)


def test_a_text_counted_in_parts_gives_the_same(ngrams, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    text = ngrams.made_up_text(200)
    whole = listed(counted(text, 3))
    monkeypatch.setattr(ngram_counts, "_TOKENS_AT_ONCE", 20)
    counter = NgramCounter(3)
    lengths = []
    for sentence in text:
        counter.add(sentence)
        lengths.append([len(table.count) for table in counter._tables])
    assert listed(counter.counts()) == whole
    assert max(map(len, lengths)) > 1 and all(2 * b < a for row in lengths for a, b in pairwise(row))


def test_a_part_of_the_text_may_be_shorter_than_an_ngram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram_counts, "_TOKENS_AT_ONCE", 7)
    text = [["a", "b", "a", "b", "a"], ["a"]]  # the second one is counted apart, three words with its ends
    everything = {ngram: count for of_order in listed(counted(text, 5)) for ngram, (count, _) in of_order.items() if count}
    assert everything == plain_counts(text, 5)
    with pytest.raises(ValueError, match="no sentence is long enough for an n-gram of 4 words"):
        counted([["a"]], 9)


def test_counting_goes_on_after_it_was_asked_for_counts() -> None:
    counter = NgramCounter(2)
    counter.add(["a"])
    assert counter.counts().orders[0].count.sum() == 2
    counter.add(["a", "b"])
    assert listed(counter.counts()) == listed(counted([["a"], ["a", "b"]], 2))


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="order is 0, allowed are whole numbers >= 1"):
        NgramCounter(0)
    for mark in ("<s>", "</s>"):
        counter = NgramCounter(2)
        with pytest.raises(ValueError, match=f"a sentence holds the word {mark}"):
            counter.add(["a", mark])
        with pytest.raises(ValueError, match="there is no sentence to count"):
            counter.counts()
    with pytest.raises(ValueError, match="no sentence is long enough for an n-gram of 4 words"):
        counted([["a"], ["b"]], 4)
