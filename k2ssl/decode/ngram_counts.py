"""How often each sequence of up to N words occurs in a text, counted by sorting.

Memory is that of the different N-grams, 8 bytes for every two words and 8 for the count, two to three times over while tables are merged;
the text itself is never held. Statistics of words that know nothing of speech: they stand beside the ARPA files that are made of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from k2ssl.decode.arpa import END, START, UNKNOWN

_PAD, _START, _END = 0, 1, 2  # _PAD is what stands before <s>
SPECIAL = (START, END, UNKNOWN)  # the words 1, 2, 3

_BITS = 31  # of a word in a key of two
_TOKENS_AT_ONCE = 2_000_000

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class OrderCounts:
    """The different n-grams of one order, G of them, sorted by `suffix` and then `first`.

    Attributes:
        suffix: (G,) place of the n-gram without its first word among those of the order below; 0 for single words.
        first: (G,) its first word, counted from 1.
        count: (G,) how often it occurs.
        left: (G,) how many different words it follows, the start of a sentence counted as one; all 0 for the highest order.
    """

    suffix: Ints
    first: Ints
    count: Ints
    left: Ints


@dataclass(frozen=True)
class NgramCounts:
    """Counts of all orders. Single words are all listed, word w in place w - 1, with counts that may be 0; `<s>` counts as never said.

    Attributes:
        words: `<s>`, `</s>`, `<unk>`, then those of the text.
        orders: of single words, of two, and so on.
        num_sentences, num_words: of the text; neither `<s>` nor `</s>` is counted.
    """

    words: tuple[str, ...]
    orders: tuple[OrderCounts, ...]
    num_sentences: int
    num_words: int


class NgramCounter:
    """Takes in sentences one by one.

    Args:
        order: most words of an n-gram, at least 1.
        words: what belongs to the vocabulary even if the text does not hold it.

    Raises:
        ValueError: `order` below 1.
    """

    def __init__(self, order: int, words: Iterable[str] = ()) -> None:
        if order < 1:
            raise ValueError(f"NgramCounter: order is {order}, allowed are whole numbers >= 1")
        self.order = order
        self.num_sentences = self.num_words = 0
        self._ids: dict[str, int] = {}
        for word in (*SPECIAL, *words):
            self._ids.setdefault(word, len(self._ids) + 1)
        self._text = array("i")
        self._tables: list[_Table] = []  # each less than half as long as the one before

    def add(self, sentence: Sequence[str]) -> None:
        """Count a sentence; `<unk>` may be among its words.

        Raises:
            ValueError: `<s>` or `</s>` is.
        """
        ids = self._ids
        numbers = [ids.setdefault(word, len(ids) + 1) for word in sentence]
        if numbers and min(numbers) <= _END:
            raise ValueError(
                f"a sentence holds the word {START if _START in numbers else END}, which marks its ends and is put there by itself"
            )
        self._text.append(_START)
        self._text.extend(numbers)
        self._text.append(_END)
        self.num_sentences += 1
        self.num_words += len(numbers)
        if len(self._text) >= _TOKENS_AT_ONCE:
            self._flush()

    def counts(self) -> NgramCounts:
        """What was counted so far.

        Raises:
            ValueError: no sentence was added, or none is long enough for the highest order.
        """
        if not self.num_sentences:
            raise ValueError("there is no sentence to count")
        self._flush()
        while len(self._tables) > 1:
            self._tables.append(_merged(self._tables.pop(), self._tables.pop()))
        orders = _by_order(self._tables[0], self.order, len(self._ids))
        return NgramCounts(tuple(self._ids), orders, self.num_sentences, self.num_words)

    def _flush(self) -> None:
        if not self._text:
            return
        self._tables.append(_counted(np.array(self._text, dtype=np.int64), self.order))
        self._text = array("i")
        # like the digits of a binary number: every n-gram is merged only so often as the table doubles
        while len(self._tables) > 1 and 2 * len(self._tables[-1].count) >= len(self._tables[-2].count):
            self._tables.append(_merged(self._tables.pop(), self._tables.pop()))


@dataclass(frozen=True)
class _Table:
    """Different N-grams, sorted by their last word, then the last but one, and so on; keys hold two words each in that order."""

    keys: list[Ints]
    count: Ints

    def words(self, order: int) -> list[Ints]:
        """The last words, the last but one, ..."""
        low = (1 << _BITS) - 1
        halves = [half for key in self.keys for half in (key >> _BITS, key & low)]
        return halves[:order]


def _counted(text: Ints, order: int) -> _Table:
    """The N-grams that end in each word of sentences, those near a start filled up with `_PAD`."""
    place = np.arange(len(text))
    starts = text == _START
    position = place - np.maximum.accumulate(np.where(starts, place, 0))
    ends = np.flatnonzero(~starts)
    position = position[ends]
    columns = [np.where(back <= position, text[(ends - back).clip(min=0)], _PAD) for back in range(order)]
    if order % 2:
        columns.append(np.zeros_like(ends))
    keys = [(columns[i] << _BITS) | columns[i + 1] for i in range(0, len(columns), 2)]
    return _unique(keys, np.ones(len(ends), np.int64))


def _merged(one: _Table, two: _Table) -> _Table:
    keys = [np.concatenate(pair) for pair in zip(one.keys, two.keys, strict=True)]
    return _unique(keys, np.concatenate([one.count, two.count]))


def _unique(keys: list[Ints], count: Ints) -> _Table:
    sorting = np.lexsort(keys[::-1])
    keys = [key[sorting] for key in keys]
    starts = np.flatnonzero(_changes(keys))
    return _Table([key[starts] for key in keys], np.add.reduceat(count[sorting], starts))


def _changes(columns: Sequence[Ints]) -> NDArray[np.bool_]:
    """Where a row differs from the one before; the first always does."""
    changed = np.zeros(len(columns[0]), np.bool_)
    changed[0] = True
    for column in columns:
        changed[1:] |= column[1:] != column[:-1]
    return changed


def _by_order(table: _Table, order: int, vocab_size: int) -> tuple[OrderCounts, ...]:
    """All orders from the highest: in this order of sorting, n-grams with the same last words stand together."""
    columns = table.words(order)
    orders = [(np.zeros(vocab_size, np.int64), np.arange(1, vocab_size + 1), np.bincount(columns[0] - 1, table.count, vocab_size))]
    group = columns[0] - 1  # of each row, among those of the order below
    for n in range(2, order + 1):
        there = columns[n - 1] != _PAD
        new = _changes(columns[:n]) & there
        starts = np.flatnonzero(new)
        if not len(starts):
            raise ValueError(f"no sentence is long enough for an n-gram of {n} words; an order below is needed")
        count = np.add.reduceat(np.where(there, table.count, 0), starts)
        orders.append((group[starts], columns[n - 1][starts], count))
        group = np.cumsum(new) - 1
    lefts = [np.bincount(above[0], minlength=len(below[0])) for below, above in pairwise(orders)]
    lefts.append(np.zeros_like(orders[-1][0]))
    return tuple(OrderCounts(s, f, c.astype(np.int64), left) for (s, f, c), left in zip(orders, lefts, strict=True))
