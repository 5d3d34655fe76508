"""Dealing a corpus into parts: every cut in one, each from all over, none too small."""

from __future__ import annotations

import numpy as np
import pytest

from k2ssl.labelling.corpus_parts import PartCounter, part_of


def _counted(seconds: list[float], seed: int = 0, batch_seconds: float = 200.0) -> PartCounter:
    counter = PartCounter(seed, batch_seconds)
    for number, duration in enumerate(seconds):
        counter.add(f"cut-{number}", duration)
    return counter


def test_parts_have_at_most_about_the_size_asked_for() -> None:
    seconds = [5.0 + number % 7 for number in range(20_000)]
    wanted = 20_000.0
    number = _counted(seconds).num_parts(wanted, 2)
    assert number == -(-sum(seconds) // wanted) == 8
    sizes = np.bincount([part_of(f"cut-{i}", 0, number) for i in range(len(seconds))], seconds, number)
    assert sizes.sum() == sum(seconds)
    assert 0.9 * sum(seconds) / number < sizes.min() and sizes.max() < 1.05 * wanted


def test_a_part_is_from_all_over_the_corpus_and_another_seed_deals_otherwise() -> None:
    first, other = ({i for i in range(20_000) if part_of(f"cut-{i}", seed, 20) == 0} for seed in (0, 1))
    for begin in range(0, 20_000, 4_000):
        assert len(first & set(range(begin, begin + 4_000))) == pytest.approx(200, abs=60)
    assert len(first & other) == pytest.approx(50, abs=35)  # a twentieth of a twentieth


@pytest.mark.parametrize(("recordings", "seconds"), [(3, 100_000.0), (40, 10_000.0), (12, 1.0), (1, 5.0)])
@pytest.mark.parametrize("batches", [2, 16])
def test_no_part_lacks_the_batches_that_the_ranks_need(recordings: int, seconds: float, batches: int) -> None:
    number = _counted([seconds] * recordings).num_parts(seconds, batches)
    filled = np.bincount([part_of(f"cut-{i}", 0, number) for i in range(recordings)], [min(seconds, 200.0)] * recordings, number)
    assert number == 1 or filled.min() >= batches * 200.0
    assert (number > 1) == (recordings == 40 and batches == 2)


def test_a_corpus_no_larger_than_a_part_is_not_dealt() -> None:
    assert _counted([1000.0] * 50).num_parts(50_000.0, 2) == 1
    assert _counted([1000.0] * 50).num_parts(49_999.0, 2) == 2
    assert {part_of(f"cut-{i}", 0, 1) for i in range(100)} == {0}
