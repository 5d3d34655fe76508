"""Interpolated modified Kneser-Ney smoothing: from counts to a back-off model.

Source: S. F. Chen and J. Goodman, "An empirical study of smoothing techniques for language modeling", Harvard TR-10-98 (1998), equations
17 and following; leaving out rare n-grams and the uniform share of single words as Heafield et al., "Scalable modified Kneser-Ney language
model estimation" (ACL 2013), whose program is lmplz.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from k2ssl.decode.arpa import Arpa, NgramTable
from k2ssl.decode.ngram_counts import NgramCounts, OrderCounts

_log = logging.getLogger(__name__)

FALLBACK = (0.5, 1.0, 1.5)  # of lmplz, too
_START = 1  # <s> among the words

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Smoothed:
    """The n-grams of one order after smoothing, G of them as in their counts.

    Attributes:
        prefix: (G,) place of the n-gram without its last word among those of the order below.
        kept: (G,) whether it is in the model.
        prob: (G,) probability of its last word; of no meaning if not kept.
        weight: (contexts,) what the order below gets, by context; 1 where a context has no n-grams.
    """

    prefix: Ints
    kept: NDArray[np.bool_]
    prob: Floats
    weight: Floats


def kneser_ney(counts: NgramCounts, prune: Sequence[int] = ()) -> Arpa:
    """Estimate a model.

    An n-gram below the highest order counts once for every different word before it; as often as it occurs if it begins with `<s>`. The
    three discounts of an order come from how many of its n-grams have the counts 1, 2, 3 and 4. Where these admit none (a text of a few
    sentences, an order of tokens that all occur often) they are 0.5, 1 and 1.5, and a warning says so. `<unk>` gets a share of the uniform
    distribution, as every word does.

    Args:
        counts: of all orders, before anything is left out.
        prune: for the orders from 1 on, n-grams that occur so often or less are left out; the last number holds for the orders above. The
            first is 0: words stay.

    Raises:
        ValueError: `prune` has other numbers than these.
    """
    limits = _limits(prune, len(counts.orders))
    prob, prefix = np.zeros(0), np.zeros(0, np.int64)
    results: list[_Smoothed] = []
    for n, (order, limit) in enumerate(zip(counts.orders, limits, strict=True), start=1):
        prefix = _prefixes(counts.orders, n, prefix)
        contexts = len(counts.orders[n - 2].count) if n > 1 else 1
        lower = prob[order.suffix] if n > 1 else np.full(len(order.count), 1 / (len(order.count) - 1))  # <s> is never said
        result = _smooth(order, prefix, contexts, lower, limit, n, n == len(counts.orders))
        prob = result.prob
        results.append(result)
    return _model(counts, results)


def discounts(counted: Ints) -> tuple[float, float, float] | None:
    """What is taken from n-grams that count 1, 2, and 3 or more; None if the counts admit none. Chen and Goodman, equation 17.

    All must be above 0, or a context would pass on nothing.
    """
    n = [int((counted == i).sum()) for i in range(5)]
    if not (n[1] and n[2] and n[3]):
        return None
    whole = n[1] + 2 * n[2]
    one, two, three = ((i * n[i] * whole - (i + 1) * n[1] * n[i + 1]) / (n[i] * whole) for i in (1, 2, 3))  # integers, so that 0 is exact
    return (one, two, three) if min(one, two, three) > 0 else None


def _limits(prune: Sequence[int], order: int) -> list[int]:
    limits = list(prune) or [0]
    if limits[0] != 0 or any(b < a for a, b in pairwise(limits)) or len(limits) > order:
        raise ValueError(
            f"prune is {', '.join(map(str, limits))}; 0 for single words is needed first, then numbers none smaller than the one before, "
            f"at most {order} in all"
        )
    return limits + [limits[-1]] * (order - len(limits))


def _prefixes(orders: Sequence[OrderCounts], n: int, below: Ints) -> Ints:
    """The places of n-grams without their last word; `below` are those of the order below."""
    order = orders[n - 1]
    if n == 1:
        return np.zeros(len(order.count), np.int64)
    if n == 2:
        return order.first - 1
    shorter, width = orders[n - 2], len(orders[0].count) + 1
    # w1 .. wn-1 is the n-gram that has w1 before w2 .. wn-1, and this is the prefix of w2 .. wn
    return np.searchsorted(shorter.suffix * width + shorter.first, below[order.suffix] * width + order.first)


def _smooth(order: OrderCounts, prefix: Ints, contexts: int, lower: Floats, limit: int, n: int, highest: bool) -> _Smoothed:
    counted = order.count if highest else np.where((order.first == _START) & (n > 1), order.count, order.left)
    if n == 1:
        counted = np.where(order.first == _START, 0, counted)
    found = discounts(counted)
    if found is None:
        _log.warning(
            f"order {n}: the counts of {len(counted):,} n-grams admit no Kneser-Ney discounts, {', '.join(f'{d:g}' for d in FALLBACK)} are "
            "taken; usual for small texts, and for the single words of a small vocabulary"
        )
    amount = np.array([0.0, *(found or FALLBACK)])[counted.clip(max=3)]
    kept = (order.count > limit) | (n == 1)
    total = np.bincount(prefix, counted, contexts)
    freed = np.bincount(prefix, np.where(kept, amount, counted), contexts)
    weight = np.divide(freed, total, out=np.ones(contexts), where=total > 0)
    return _Smoothed(prefix, kept, (counted - amount) / total[prefix] + weight[prefix] * lower, weight)


def _model(counts: NgramCounts, results: Sequence[_Smoothed]) -> Arpa:
    tables, words = [], np.zeros((1, 0), np.int32)
    for n, (order, result) in enumerate(zip(counts.orders, results, strict=True), start=1):
        words = np.concatenate([(order.first - 1).astype(np.int32)[:, None], words[order.suffix]], axis=1)
        backoff = np.log10(results[n].weight) if n < len(results) else np.zeros(len(words))
        log_prob = np.log10(result.prob)
        if n == 1:
            log_prob[_START - 1] = -99.0
        tables.append(NgramTable(words[result.kept], log_prob[result.kept], backoff[result.kept]))
    return Arpa(counts.words, tuple(tables))
