"""Back-off models in dictionaries, as the definition has it, to hold the tables of language models against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from k2ssl.decode.arpa import Arpa, NgramTable


class PlainModel:
    """log10 of probabilities in float64, one word at a time."""

    def __init__(self, model: Arpa) -> None:
        self.entries = {
            tuple(model.words[word] for word in words): (float(log_prob), float(backoff))
            for table in model.orders
            for words, log_prob, backoff in zip(table.words, table.log_prob, table.backoff, strict=True)
        }
        self.order = len(model.orders)

    def log10(self, history: Sequence[str], word: str) -> float:
        """Of `word` after `history`, which begins with <s> if it is all of a sentence."""
        history = tuple(history)[-(self.order - 1) :] if self.order > 1 else ()
        total = 0.0
        while (*history, word) not in self.entries:
            assert history, f"{word} is no 1-gram"
            total += self.entries.get(history, (0.0, 0.0))[1]
            history = history[1:]
        return total + self.entries[(*history, word)][0]

    def contexts(self) -> set[tuple[str, ...]]:
        return {(), *(ngram for ngram in self.entries if len(ngram) < self.order and ngram[-1] != "</s>")}

    def total(self, history: Sequence[str]) -> float:
        """The sum of all probabilities after a context."""
        return sum(10 ** self.log10(history, word) for (word, *more) in self.entries if not more and word != "<s>")


def random_model(seed: int, words: Sequence[str], order: int, share: float = 0.3) -> Arpa:
    """N-grams whose first words are listed but whose last words may not be; no probability distribution."""
    draw = np.random.default_rng(seed)
    vocabulary = ("</s>", "<s>", *words)
    tables, shorter = [], np.array([[]], dtype=np.int32)
    for n in range(1, order + 1):
        grown = np.array(
            [[*row, w] for row in shorter for w in range(len(vocabulary)) if (n == 1 or w != 1) and 0 not in row], dtype=np.int32
        )
        shorter = grown if n == 1 else grown[draw.random(len(grown)) < share]
        shorter = draw.permutation(shorter)
        backoff = np.round(draw.normal(size=len(shorter)) * 0.5, 3) if n < order else np.zeros(len(shorter))
        tables.append(NgramTable(shorter, np.round(-3 * draw.random(len(shorter)), 3), np.where(shorter[:, -1] == 0, 0.0, backoff)))
    order_of_words = tables[0].words[:, 0]
    place = np.argsort(order_of_words).astype(np.int32)  # words stand in the order of the 1-grams
    tables = [NgramTable(place[table.words], table.log_prob, table.backoff) for table in tables]
    return Arpa(tuple(vocabulary[w] for w in order_of_words), tuple(tables))


def made_up_text(sentences: int, vocabulary: int = 40, seed: int = 1) -> list[list[str]]:
    """Sentences with some structure, by whole-number arithmetic: the same everywhere and for ever."""
    state, result = seed, []
    for _ in range(sentences):
        words, last = [], 0
        state = (state * 1103515245 + 12345) % 2**31
        for _ in range(1 + (state >> 16) % 9):
            state = (state * 1103515245 + 12345) % 2**31
            drawn = (state >> 12) % (vocabulary * vocabulary)
            last = (3 * last + 1 + math.isqrt(drawn) // 4) % vocabulary if drawn % 3 else math.isqrt(drawn)
            words.append(f"w{last}")
        result.append(words)
    return result


class Ngrams:
    """What tests of language models share."""

    plain = PlainModel
    random_model = staticmethod(random_model)
    made_up_text = staticmethod(made_up_text)


@pytest.fixture(scope="session")
def ngrams() -> type[Ngrams]:
    """`ngrams.plain(model)`, `ngrams.random_model(...)` and `ngrams.made_up_text(...)`."""
    return Ngrams
