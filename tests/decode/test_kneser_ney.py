"""Kneser-Ney smoothing against its definition, written down in dictionaries, and against what lmplz made of the same text."""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import pytest

from k2ssl.decode.arpa import Arpa, read_arpa, write_arpa
from k2ssl.decode.kneser_ney import FALLBACK, discounts, kneser_ney
from k2ssl.decode.ngram_counts import NgramCounter, NgramCounts


def counts_of(text: list[list[str]], order: int, words: Sequence[str] = ()) -> NgramCounts:
    counter = NgramCounter(order, words)
    for sentence in text:
        counter.add(sentence)
    return counter.counts()


class Textbook:
    """Chen and Goodman's interpolated model, equations 17 to 21, one probability at a time; no ARPA file in between."""

    def __init__(self, text: list[list[str]], order: int, limits: Sequence[int]) -> None:
        self.raw: Counter[tuple[str, ...]] = Counter()
        for sentence in text:
            padded = ["<s>", *sentence, "</s>"]
            self.raw.update(tuple(padded[i - n : i]) for n in range(1, order + 1) for i in range(max(2, n), len(padded) + 1))
        self.vocab_size = len({ngram[-1] for ngram in self.raw} | {"<unk>"})
        self.limits = limits
        before = defaultdict(set)
        for ngram in self.raw:
            before[ngram[1:]].add(ngram[0])
        self.counts = {g: c if len(g) == order or g[0] == "<s>" else len(before[g]) for g, c in self.raw.items()}
        self.after = defaultdict(list)
        for ngram in self.raw:
            self.after[ngram[:-1]].append(ngram)
        self.discount = {n: self._discounts([c for g, c in self.counts.items() if len(g) == n]) for n in range(1, order + 1)}

    @staticmethod
    def _discounts(counts: list[int]) -> list[float]:
        n1, n2, n3, n4 = (counts.count(i) for i in (1, 2, 3, 4))
        if not n1 * n2 * n3:
            return [0.0, *FALLBACK]
        y = n1 / (n1 + 2 * n2)
        d = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        return d if all(0 < d[i] <= i for i in (1, 2, 3)) else [0.0, *FALLBACK]

    def prob(self, history: tuple[str, ...], word: str) -> float:
        lower = self.prob(history[1:], word) if history else 1 / self.vocab_size
        following = self.after[history]
        if not following:
            return lower
        discount = self.discount[len(history) + 1]
        total = sum(self.counts[g] for g in following)
        own, given = 0.0, 0.0
        for ngram in following:
            count = self.counts[ngram]
            kept = not history or self.raw[ngram] > self.limits[len(history)]
            taken = discount[min(count, 3)] if kept else count
            given += taken
            own += (count - taken) if ngram[-1] == word else 0.0
        return own / total + given / total * lower


SETTINGS = [(1, (0,)), (2, (0,)), (3, (0,)), (3, (0, 0, 1)), (4, (0, 1, 1, 2)), (4, (0, 1))]


@pytest.mark.parametrize(("order", "prune"), SETTINGS)
def test_probabilities_are_those_of_the_textbook(ngrams, agreement, order: int, prune: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    text = ngrams.made_up_text(160, vocabulary=50)
    book = Textbook(text, order, [*prune, *[prune[-1]] * (order - len(prune))])
    model = kneser_ney(counts_of(text, order), prune)
    plain = ngrams.plain(model)
    contexts = plain.contexts() | {("w1", "<unk>"), ("<s>", "<unk>", "w2"), ("w8",) * 3}
    assert len(contexts) > (5 if order > 1 else 2)
    worst = max(
        abs(10 ** plain.log10(history, word) - book.prob(tuple(history)[-(order - 1) :] if order > 1 else (), word))
        for history in sorted(contexts)[:400]
        for word in ("w0", "w1", "w5", "w8", "</s>", "<unk>")
    )
    agreement.note("Kneser-Ney against the textbook", worst, 1e-12)


@pytest.mark.parametrize(("order", "prune"), SETTINGS)
def test_the_probabilities_after_every_context_sum_to_one(ngrams, order: int, prune: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    plain = ngrams.plain(kneser_ney(counts_of(ngrams.made_up_text(150, vocabulary=8), order, ["never"]), prune))
    assert ("never",) in plain.entries
    for context in plain.contexts():
        assert plain.total(context) == pytest.approx(1.0, abs=1e-9)


def sums(model: Arpa) -> list[tuple[int, float, float]]:
    """Number of n-grams, sum of log-probabilities and of back-off weights, by order; what stands with <s> alone is left out."""
    found = []
    for table in model.orders:
        said = table.log_prob[table.log_prob > -99]
        found.append((len(table.log_prob), float(said.sum()), float(table.backoff.sum())))
    return found


@pytest.mark.parametrize(
    ("order", "prune", "theirs"),
    [
        (3, (0,), [(43, -69.7889, -19.3437), (1142, -1855.1065, -179.118), (4024, -4188.5204, 0.0)]),
        (4, (0, 1, 1, 2), [(43, -69.7889, -17.097), (774, -1156.7351, -42.2308), (993, -933.1355, -5.2821), (35, -15.7669, 0.0)]),
    ],
)
def test_the_model_is_that_of_lmplz(ngrams, order: int, prune: tuple[int, ...], theirs: list[tuple[int, float, float]]) -> None:  # type: ignore[no-untyped-def]
    """Recorded with lmplz of KenLM 0.3.0 and --discount_fallback, without which it takes no words whose counts are all large."""
    model = kneser_ney(counts_of(ngrams.made_up_text(1200), order), prune)
    for ours, expected in zip(sums(model), theirs, strict=True):
        assert ours[0] == expected[0] and ours[1:] == pytest.approx(expected[1:], abs=2e-4)
    entries = ngrams.plain(model).entries
    assert entries["<unk>",][0] == pytest.approx(-2.8920403, abs=1e-6)
    assert entries["w1",] == pytest.approx((-1.9797794, -0.34177136 if order == 3 else -0.25472766), abs=1e-6)


def test_discounts_are_those_of_the_formula() -> None:
    import numpy as np

    counted = np.repeat([0, 1, 2, 3, 4, 5], [9, 40, 12, 6, 3, 2])
    y = 40 / 64
    assert discounts(counted) == pytest.approx((1 - 2 * y * 12 / 40, 2 - 3 * y * 6 / 12, 3 - 4 * y * 3 / 6))
    for impossible in ([1, 1, 3], [1, 2, 4], [2, 3], [1, 2, 3, 3, 3], [1, 2, 3, *[4] * 9]):
        assert discounts(np.array(impossible)) is None


def test_counts_without_discounts_are_told_of_by_order(ngrams, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    with caplog.at_level(logging.WARNING):
        kneser_ney(counts_of([["a", "b"], ["a"]], 2))
    assert [record.message.partition(":")[0] for record in caplog.records] == ["order 1", "order 2"]
    assert "admit no Kneser-Ney discounts, 0.5, 1, 1.5 are taken" in caplog.text
    caplog.clear()
    kneser_ney(counts_of(ngrams.made_up_text(300, vocabulary=300), 2))
    assert not caplog.records


def test_a_discount_of_nothing_is_none_so_that_every_context_passes_something_on(  # type: ignore[no-untyped-def]
    ngrams, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    text = ["e", "f c a b", "f a", "c a b", "c a c b", "a", "f e", "c b", "c a"]
    with caplog.at_level(logging.WARNING):
        model = kneser_ney(counts_of([line.split() for line in text], 2), (0,))
    assert "order 2: the counts of" in caplog.text and "0.5, 1, 1.5 are taken" in caplog.text
    file = BytesIO()
    write_arpa(file, model)
    (tmp_path / "lm.arpa").write_bytes(file.getvalue())
    plain = ngrams.plain(read_arpa(tmp_path / "lm.arpa"))
    assert all(plain.total(context) == pytest.approx(1.0, abs=1e-5) for context in plain.contexts())


@pytest.mark.parametrize("prune", [(1,), (0, 2, 1), (0, 0, 0), (0, -1)])
def test_other_limits_are_refused(prune: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"prune is .*; 0 for single words is needed first"):
        kneser_ney(counts_of([["a", "b"]], 2), prune)


def test_held_out_text_is_better_predicted_than_by_adding_one(ngrams) -> None:  # type: ignore[no-untyped-def]
    text = ngrams.made_up_text(400)
    train, heldout = text[:200], text[200:]
    words = sorted({word for sentence in train for word in sentence})
    heldout = [["<s>", *(word for word in sentence if word in words), "</s>"] for sentence in heldout]
    plain = ngrams.plain(kneser_ney(counts_of(train, 2)))
    seen = Counter(pair for sentence in train for pair in zip(["<s>", *sentence], [*sentence, "</s>"], strict=True))
    before = Counter(word for (word, _), count in seen.items() for _ in range(count))
    ours, added, count = 0.0, 0.0, 0
    for sentence in heldout:
        for history, word in pairwise(sentence):
            ours -= plain.log10((history,), word) * math.log(10)
            added -= math.log((seen[history, word] + 1) / (before[history] + len(words) + 1))
            count += 1
    assert math.exp(ours / count) < 0.95 * math.exp(added / count)
