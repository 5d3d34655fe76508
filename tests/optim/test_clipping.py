from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2ssl.optim.clipping import RunningMedianClipper


def make(scale: float | None = 2.0, period: int = 100, num_parameters: int = 1) -> RunningMedianClipper:
    return RunningMedianClipper(scale, period, num_parameters, torch.zeros((), dtype=torch.float64))


def factors(clipper: RunningMedianClipper, norms: list[float]) -> list[float]:
    return [clipper(torch.tensor([norm], dtype=torch.float64))[0].item() for norm in norms]


def test_nothing_is_clipped_before_the_tenth_step() -> None:
    assert factors(make(), [1.0] * 9 + [1e9]) == [1.0] * 10


def test_early_thresholds_are_twice_as_generous() -> None:
    result = factors(make(), [1.0] * 11 + [8.0, 3.9] + [1.0] * 87 + [1.0, 8.0, 2.5])
    assert result[11] == pytest.approx(0.5) and result[12] == 1.0
    assert result[101] == pytest.approx(0.25) and result[102] == pytest.approx(0.8)


def test_step_zero_leaves_no_trace_in_the_median() -> None:
    assert factors(make(period=2), [1e9, 1.0, 1.0, 4.0])[3] == pytest.approx(0.5)


def test_the_period_bounds_the_early_steps() -> None:
    # with a period of 10, step 10 is a regular renewal with the plain threshold
    assert factors(make(period=10), [1.0] * 11 + [4.0])[11] == pytest.approx(0.5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 100.0), min_size=30, max_size=60), st.integers(1, 25))
def test_factors_follow_the_running_median(norms: list[float], period: int) -> None:
    threshold, expected = math.inf, []
    for t, norm in enumerate(norms):
        early = t in (10, 20, 40) and t < period
        if t and (early or t % period == 0):
            recent = np.sort(norms[1 : t + 1][-period:])
            threshold = 2.0 * recent[len(recent) // 4 * 2] * (2.0 if early else 1.0)
        expected.append(min(1.0, threshold / norm))
    assert factors(make(period=period), norms) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_norms_give_zero_and_are_counted(bad: float) -> None:
    clipper = make()
    factor, finite = clipper(torch.tensor([bad], dtype=torch.float64))
    assert factor.item() == 0.0 and not finite
    assert factors(clipper, [1.0] * 20)[-1] == 1.0
    report = clipper.report(["a"])
    assert (report["non_finite"], report["clipped"], report["steps"]) == (1, 0, 21)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_median_that_is_not_usable_keeps_the_threshold(bad: float) -> None:
    clipper = make(period=4)
    factors(clipper, [1.0] * 5)  # threshold 2 from step 4 on
    factors(clipper, [bad] * 4)
    assert factors(clipper, [4.0]) == [0.5]
    report = clipper.report(["a"])
    assert report["threshold"] == 2.0 and not math.isfinite(report["median_norm"])
    zeros = make(period=4)
    assert factors(zeros, [0.0] * 8 + [1.0]) == [1.0] * 9  # a threshold of zero would stop training for good


def test_without_a_scale_only_non_finite_steps_are_dropped() -> None:
    assert factors(make(scale=None, period=2), [1.0] * 10 + [1e9, math.nan]) == [1.0] * 11 + [0.0]


def test_the_report_shares_out_the_squared_norm() -> None:
    clipper = make(period=2, num_parameters=3)
    for _ in range(3):
        clipper(torch.ones(3, dtype=torch.float64))
    clipper(torch.tensor([3.0, 0.0, 30.0], dtype=torch.float64))
    clipper(torch.ones(3, dtype=torch.float64))  # not clipped, not remembered
    report = clipper.report(["a", "b", "c"], num_culprits=2)
    assert [name for name, _ in report["dominating"]] == ["c", "a"]
    assert report["dominating"][0][1] == pytest.approx(900 / 909)
    assert report["last_norm"] == pytest.approx(math.sqrt(3.0))


def test_state_of_another_period_is_refused() -> None:
    with pytest.raises(ValueError, match="norms has 100 entries"):
        make(period=50).load_state_dict(make(period=100).state_dict())


def test_a_report_before_the_first_step_is_empty() -> None:
    report = make().report(["a"])
    assert report["steps"] == 0 and not math.isfinite(report["median_norm"]) and report["dominating"] == []
