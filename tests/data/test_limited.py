"""Sets with little supervision: how much is drawn, and that it is spread over speakers and drawn from ids alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from lhotse import MonoCut, SupervisionSegment

from k2ssl.data.limited import draw_limited


def make_cut(number: int, speaker: str | None, duration: float) -> MonoCut:
    supervision = SupervisionSegment(f"s{number}", "r", 0.0, duration, speaker=speaker)
    return MonoCut(f"cut-{number:03d}", 0.0, duration, 0, [] if speaker == "nobody" else [supervision])


@pytest.fixture
def corpus() -> list[MonoCut]:
    """Forty cuts each of five speakers, and two of a sixth."""
    durations = np.random.default_rng(1).uniform(1, 5, 202).round(2)
    return [make_cut(i, "few" if i >= 200 else f"speaker{i % 5}", float(duration)) for i, duration in enumerate(durations)]


@pytest.mark.parametrize("seconds", [60.0, 150.0, 300.0])
def test_as_much_is_drawn_as_fits_and_evenly_from_speakers(corpus: list[MonoCut], seconds: float) -> None:
    drawn = draw_limited(corpus, seconds)
    assert seconds - 5 < sum(cut.duration for cut in drawn) <= seconds
    counts = Counter(cut.supervisions[0].speaker for cut in drawn)
    assert counts.pop("few") == 2
    assert len(counts) == 5 and max(counts.values()) - min(counts.values()) <= 1


def test_a_set_depends_on_ids_and_seed_alone_and_keeps_the_order(corpus: list[MonoCut]) -> None:
    drawn = draw_limited(corpus, 100.0)
    assert drawn == [cut for cut in corpus if cut in drawn]
    assert {cut.id for cut in draw_limited(corpus[::-1], 100.0)} == {cut.id for cut in drawn}
    assert {cut.id for cut in draw_limited(corpus, 100.0, seed=1)} != {cut.id for cut in drawn}


def test_the_smaller_set_lies_within_the_larger(corpus: list[MonoCut]) -> None:
    small, large = ({cut.id for cut in draw_limited(corpus, seconds)} for seconds in (50.0, 200.0))
    assert small < large


def test_all_may_be_drawn_and_cuts_without_a_speaker_too(corpus: list[MonoCut]) -> None:
    cuts = [*corpus, make_cut(300, None, 2.0), make_cut(301, "nobody", 1.0)]
    assert draw_limited(cuts, sum(cut.duration for cut in cuts)) == cuts


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf"), 2000.0])
def test_durations_that_cannot_be_drawn_are_refused(corpus: list[MonoCut], seconds: float) -> None:
    with pytest.raises(ValueError, match=rf"seconds is {seconds:g}, allowed is more than 0 and at most what there is, \d+\.\d"):
        draw_limited(corpus, seconds)


def test_less_than_one_cut_is_refused(corpus: list[MonoCut]) -> None:
    with pytest.raises(ValueError, match=r"seconds is 0\.5, less than the first cut"):
        draw_limited(corpus, 0.5)
