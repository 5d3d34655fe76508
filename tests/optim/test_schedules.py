from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import Optimizer

from k2ssl.optim.schedules import Eden, Eden2, LearningRateSchedule, Polynomial, TriStage, stage_lengths


def optimizer(*rates: float) -> Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1)], "lr": rate} for rate in rates or (1.0,)], lr=1.0)


def test_eden_follows_the_recorded_rates(golden, agreement) -> None:
    recorded = golden("eden")
    sgd = optimizer(0.045)
    eden = Eden(sgd, lr_batches=7500, lr_epochs=10.5, warmup_batches=5000, warmup_start=0.0)
    rates = torch.empty_like(recorded["lr"])
    for i, batch in enumerate(recorded["batches"].tolist()):
        for j, epoch in enumerate(recorded["epochs"].tolist()):
            eden.advance(batch, epoch)
            rates[i, j] = sgd.param_groups[0]["lr"]
    difference = (rates - recorded["lr"]).abs() / recorded["lr"].clamp(min=1e-300)  # the rate of batch 0 is 0
    agreement.note("eden, worst rate", difference.max().item(), 1e-9)


def test_eden_has_the_values_of_the_pre_training_recipe() -> None:
    eden = Eden(optimizer(), lr_batches=7500, lr_epochs=10.5, warmup_batches=5000, warmup_start=0.0)
    for batch, epoch, expected in ((5_000, 6, 0.038), (50_000, 69, 0.0067), (216_000, 299, 0.00157)):
        assert 0.045 * eden.lr_factor(batch, epoch) == pytest.approx(expected, rel=0.02)


@given(st.floats(0, 1e6), st.floats(1, 1e5), st.floats(0, 1e4), st.floats(0, 1))
def test_eden2_is_its_formula(batch: float, lr_batches: float, warmup: float, start: float) -> None:
    schedule = Eden2(optimizer(), lr_batches, warmup, start)
    warm = 1.0 if batch >= warmup else start + (1 - start) * batch / warmup
    expected = ((batch**2 + lr_batches**2) / lr_batches**2) ** -0.5 * warm
    assert schedule.lr_factor(batch, 7.0) == pytest.approx(expected, rel=1e-12)


def test_tri_stage_meets_its_end_points() -> None:
    schedule = TriStage.from_ratios(optimizer(), 80_000, (0.1, 0.4, 0.5))
    assert schedule.lr_factor(0, 0) == 0.01
    assert schedule.lr_factor(4_000, 0) == pytest.approx(0.505)
    assert [schedule.lr_factor(batch, 0) for batch in (8_000, 20_000, 40_000)] == [1.0] * 3
    assert schedule.lr_factor(60_000, 0) == pytest.approx(0.1)  # half way down to 1/100, on a logarithmic scale
    assert schedule.lr_factor(80_000, 0) == schedule.lr_factor(1e6, 0) == 0.01


@given(st.floats(0, 1500), st.floats(1e-4, 1.0), st.floats(1e-4, 1.0))
def test_tri_stage_is_its_formula(batch: float, init: float, final: float) -> None:
    warmup, hold, decay = 100.0, 300.0, 600.0
    if batch < warmup:
        expected = init + (1 - init) / warmup * batch
    elif batch < warmup + hold:
        expected = 1.0
    elif batch <= warmup + hold + decay:
        expected = math.exp(math.log(final) / decay * (batch - warmup - hold))
    else:
        expected = final
    assert TriStage(optimizer(), warmup, hold, decay, init, final).lr_factor(batch, 0) == pytest.approx(expected, rel=1e-12)


def test_tri_stage_without_warm_up_or_decay() -> None:
    assert TriStage(optimizer(), 0, 10, 10).lr_factor(0, 0) == 1.0
    schedule = TriStage(optimizer(), 10, 10, 0)
    assert [schedule.lr_factor(batch, 0) for batch in (10, 19, 20)] == [1.0, 1.0, 0.01]


def test_stage_lengths_are_whole_batches() -> None:
    assert stage_lengths(100, (0.29, 0.21, 0.5)) == (29.0, 21.0, 50.0)
    assert stage_lengths(25, (0.1, 0.4, 0.5)) == (2.0, 10.0, 12.0)


@given(st.floats(0, 500_000), st.floats(0.5, 3.0), st.floats(0, 0.5))
def test_polynomial_is_its_formula(batch: float, power: float, end: float) -> None:
    if batch < 32_000:
        expected = batch / 32_000
    elif batch >= 250_000:
        expected = end
    else:
        expected = (1 - end) * (1 - (batch - 32_000) / (250_000 - 32_000)) ** power + end
    schedule = Polynomial(optimizer(), 32_000, 250_000, power, end)
    assert schedule.lr_factor(batch, 0) == pytest.approx(expected, rel=1e-9, abs=1e-12)


MAKERS: list[Callable[[Optimizer], LearningRateSchedule]] = [
    lambda o: Eden(o, 100, 5, 50),
    lambda o: Eden2(o, 100, 50, 0.1),
    lambda o: TriStage(o, 10, 20, 100),
    lambda o: Polynomial(o, 10, 200),
]


@pytest.mark.parametrize("make", MAKERS)
def test_groups_keep_the_ratio_of_their_rates(make: Callable[[Optimizer], LearningRateSchedule]) -> None:
    sgd = optimizer(1.0, 0.25)
    schedule = make(sgd)
    for batch in (1, 10, 70):
        schedule.advance(batch, 0.5)
        first, second = (group["lr"] for group in sgd.param_groups)
        assert first == schedule.lr_factor(batch, 0.5) > 0 and second == pytest.approx(0.25 * first, rel=1e-15)


@pytest.mark.parametrize("make", MAKERS)
def test_a_reloaded_schedule_continues_from_the_base_rate(make: Callable[[Optimizer], LearningRateSchedule]) -> None:
    sgd = optimizer(0.3)
    schedule = make(sgd)
    schedule.advance(60, 2)
    resumed_sgd = optimizer(0.3)
    resumed_sgd.load_state_dict(sgd.state_dict())
    resumed = make(resumed_sgd)  # made after loading: the decayed rate must not be taken for the base
    resumed.load_state_dict(schedule.state_dict())
    assert resumed_sgd.param_groups[0]["lr"] == sgd.param_groups[0]["lr"] == 0.3 * schedule.lr_factor(60, 2)
    resumed.advance(90, 3)
    assert resumed_sgd.param_groups[0]["lr"] == 0.3 * schedule.lr_factor(90, 3)


def test_a_new_schedule_stands_at_batch_zero() -> None:
    sgd = optimizer(0.5)
    Eden(sgd, 100, 5, warmup_batches=10, warmup_start=0.2)
    assert sgd.param_groups[0]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o: Eden(o, 0, 5), "Eden: lr_batches is 0"),
        (lambda o: Eden(o, 10, -1), "Eden: lr_epochs is -1"),
        (lambda o: Eden(o, 10, 5, warmup_batches=-1), "warmup_batches is -1"),
        (lambda o: Eden(o, 10, 5, warmup_start=1.5), "warmup_start is 1.5"),
        (lambda o: Eden2(o, math.nan), "Eden2: lr_batches is nan"),
        (lambda o: TriStage(o, 0, 0, 0), "not all three 0"),
        (lambda o: TriStage(o, 1, 1, -1), "decay_batches is -1"),
        (lambda o: TriStage(o, 1, 1, 1, final_scale=0.0), "final_scale is 0.0"),
        (lambda o: TriStage.from_ratios(o, 100, (0.5, 0.5, 0.5)), "phase_ratio is"),
        (lambda o: TriStage.from_ratios(o, 0), "max_batches is 0"),
        (lambda o: Polynomial(o, 10, 10), "max_batches is 10"),
        (lambda o: Polynomial(o, 10, 20, power=0), "power is 0"),
        (lambda o: Eden(o, 10, 5).advance(-1, 0), "batch is -1"),
        (lambda o: Eden(o, 10, 5).advance(1, math.inf), "epoch is inf"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[Optimizer], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(optimizer())
