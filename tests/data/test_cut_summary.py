"""Counts of cuts against numpy and against counting in one go."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import MonoCut, SupervisionSegment

from k2ssl.data.cut_summary import QUANTILES, CutSummary, SummaryCounter, summarize


def make_cut(number: int, duration: float, text: str | None = None, speaker: str | None = None) -> MonoCut:
    supervision = SupervisionSegment(f"{number}", f"{number}", 0.0, duration, text=text, speaker=speaker)
    return MonoCut(f"{number}", 0.0, duration, 0, supervisions=[supervision])


def test_hours_and_durations_are_those_of_numpy() -> None:
    durations = np.random.default_rng(3).gamma(2.0, 5.0, size=1001)
    summary = summarize(make_cut(i, float(d)) for i, d in enumerate(durations))
    assert summary.cuts == 1001
    assert summary.hours == pytest.approx(durations.sum() / 3600)
    assert (summary.shortest, summary.longest) == (durations.min(), durations.max())
    assert summary.mean == pytest.approx(durations.mean())
    expected = np.quantile(durations, QUANTILES, method="inverted_cdf")
    np.testing.assert_allclose(list(summary.quantiles.values()), expected, atol=0.0051)
    assert list(summary.quantiles) == ["5%", "25%", "50%", "75%", "95%"]


def test_speakers_and_transcripts_are_told_from_missing_and_empty_ones() -> None:
    cuts = [make_cut(0, 1, "HI", "a"), make_cut(1, 1, "", "b"), make_cut(2, 1, " ", "a"), make_cut(3, 1), MonoCut("4", 0.0, 1.0, 0)]
    summary = summarize(cuts)
    assert (summary.speakers, summary.without_speaker, summary.with_text, summary.empty_text) == (2, 2, 1, 2)
    table = summary.table("title")
    assert "2 (2 utterances name none)" in table
    assert "1 (2 more are empty)" in table
    assert table.startswith("title\n")


@given(st.lists(st.tuples(st.floats(0.001, 2000), st.sampled_from([None, "", "A"]), st.sampled_from([None, "x", "y"]))), st.integers(0, 20))
@settings(deadline=None, max_examples=50)
def test_parts_add_up_to_the_whole_after_being_stored(rows: list[tuple[float, str | None, str | None]], middle: int) -> None:
    cuts = [make_cut(i, *row) for i, row in enumerate(rows)]
    total = SummaryCounter()
    for part in (cuts[:middle], cuts[middle:]):
        counter = SummaryCounter()
        for cut in part:
            counter.add(cut)
        total.merge(json.loads(json.dumps(counter.to_dict())))
    one, whole = total.summary().to_dict(), summarize(cuts).to_dict()
    assert {key: pytest.approx(value) for key, value in whole.items()} == one


def test_a_summary_comes_back_from_json() -> None:
    summary = summarize([make_cut(0, 1.5)])
    assert CutSummary.from_dict(json.loads(json.dumps(summary.to_dict()))) == summary
    with pytest.raises(ValueError, match="not a summary of cuts"):
        CutSummary.from_dict({"cuts": 3})


def test_no_cuts_are_all_zeros() -> None:
    summary = summarize([])
    assert (summary.cuts, summary.hours, summary.shortest, summary.quantiles["50%"]) == (0, 0.0, 0.0, 0.0)
