"""Whiten: recorded gradients, plain autograd, and when it acts."""

from __future__ import annotations

import pytest
import torch

from k2ssl.nn.schedule import Clock
from k2ssl.nn.whiten import Whiten, whitening_metric_and_gradient


class AlwaysClock(Clock):
    """A clock whose every chance comes true."""

    def chance(self, probability: float) -> bool:
        return True


@pytest.mark.parametrize(("name", "groups", "limit"), [("whiten_0", 1, 1.5), ("whiten_1", 4, 2.0), ("whiten_2", 1, 50.0)])
def test_metric_and_modified_gradient_agree_with_the_recorded_ones(golden, agreement, name: str, groups: int, limit: float) -> None:
    recorded = golden(name)
    metric, _ = whitening_metric_and_gradient(recorded["x"], groups)
    agreement.relative(f"{name} metric", metric, recorded["metric"], 1e-5)
    x = recorded["x"].requires_grad_()
    y = Whiten(AlwaysClock(), groups, limit, grad_scale=0.02)(x)
    y.backward(recorded["dy"])
    assert torch.equal(y, x)
    agreement.relative(f"{name} gradient", x.grad, recorded["dx"], 1e-4)
    assert (x.grad - recorded["dx"]).norm() <= 1e-5 * recorded["dx"].norm()
    assert torch.equal(x.grad, recorded["dy"]) == (metric <= limit).item()


@pytest.mark.parametrize("groups", [1, 3])
def test_the_closed_form_is_the_gradient_of_the_metric(groups: int) -> None:
    x = (torch.randn(4, 9, 6, dtype=torch.float64) + 1.5).requires_grad_()
    rows = x.reshape(36, groups, 6 // groups)
    covariances = [torch.cov(rows[:, g].t(), correction=0) * 36 for g in range(groups)]
    diagonal = torch.cat([c.diagonal() for c in covariances]).mean()
    squares = torch.cat([(c @ c).diagonal() for c in covariances]).mean()
    expected = squares / diagonal.square()
    metric, gradient = whitening_metric_and_gradient(x.detach(), groups)
    torch.testing.assert_close(metric, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0], atol=1e-12, rtol=1e-9)


def test_white_data_has_metric_one_and_rank_one_data_the_number_of_channels() -> None:
    white = torch.linalg.qr(torch.randn(64, 8, dtype=torch.float64) - 0.0)[0]
    white = torch.linalg.qr(white - white.mean(0))[0]
    assert whitening_metric_and_gradient(white, 1)[0].item() == pytest.approx(1.0, abs=1e-9)
    line = torch.randn(64, 1, dtype=torch.float64) * torch.ones(8, dtype=torch.float64)
    assert whitening_metric_and_gradient(line, 1)[0].item() == pytest.approx(8.0, rel=1e-9)


@pytest.mark.parametrize(("dtype", "of_gradient"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-5)])
def test_half_precision_has_the_metric_in_float32_and_a_gradient_within_a_hundredth(dtype: torch.dtype, of_gradient: float) -> None:
    x = (torch.randn(300, 24) @ torch.randn(24, 24) * 200.0 + 30.0).to(dtype)  # sums of its squares are beyond float16
    exact_metric, exact = whitening_metric_and_gradient(x.double(), 2)
    metric, gradient = whitening_metric_and_gradient(x, 2)
    assert metric.dtype == torch.float32 and metric.item() == pytest.approx(exact_metric.item(), rel=2e-3)
    assert (gradient.double() - exact).norm() < of_gradient * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_penalty_has_its_size_and_the_gradient_its_dtype(dtype: torch.dtype) -> None:
    x = (torch.randn(300, 24) @ torch.randn(24, 24)).to(dtype).requires_grad_()
    grad = torch.randn_like(x)
    y = Whiten(AlwaysClock(), 1, limit=1.0, grad_scale=0.25)(x)
    y.backward(grad)
    assert x.grad is not None and x.grad.dtype == dtype
    assert ((x.grad.double() - grad.double()).norm() / grad.double().norm()).item() == pytest.approx(0.25, rel=1e-2)


def _acts(whiten: Whiten, clock: Clock, x: torch.Tensor, calls: int) -> float:
    count = 0
    for _ in range(calls):
        y = whiten(x)
        if y is not x:
            count += 1
            y.sum().backward()
        clock.advance(0)
    return count / calls


def test_it_acts_on_a_quarter_of_calls_above_the_limit_and_on_a_fortieth_below() -> None:
    x = torch.randn(40, 8, requires_grad=True)
    clock = Clock(4)
    assert _acts(Whiten(clock, 1, limit=1.0, grad_scale=0.01), clock, x, 1200) == pytest.approx(0.25, abs=0.05)
    clock = Clock(4)
    assert _acts(Whiten(clock, 1, limit=100.0, grad_scale=0.01), clock, x, 2000) == pytest.approx(0.025, abs=0.014)


def test_channels_that_do_not_divide_into_the_groups_are_refused_on_every_call() -> None:
    with pytest.raises(ValueError, match="x has 5 channels, a multiple of num_groups 3"):
        Whiten(Clock(), 3, 2.0, 0.01)(torch.randn(4, 5, requires_grad=True))
    with pytest.raises(ValueError, match="num_groups is 0"):
        Whiten(Clock(), 0, 2.0, 0.01)


def test_a_step_is_replayed_exactly_from_the_clock_before_it_and_not_always_from_its_seed() -> None:
    clock = Clock()
    whiten = Whiten(clock, 1, limit=2.0, grad_scale=0.5)
    white, line = torch.randn(60, 4), torch.randn(60, 1) * torch.ones(4)

    def step(number: int) -> torch.Tensor:
        clock.seed(1, number)
        clock.advance(number)
        x = (line if number // 10 % 2 else white).clone().requires_grad_()
        whiten(x).backward(torch.ones_like(x))
        return x.grad

    by_seed_alone = 0
    for number in range(400):
        state = clock.state_dict()
        first = step(number)
        after = clock.state_dict()
        clock.load_state_dict(state)
        assert torch.equal(step(number), first)
        clock.load_state_dict(after)
        by_seed_alone += torch.equal(step(number), first)
        clock.load_state_dict(after)
    assert by_seed_alone < 400


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"limit is 0\.5, allowed is >= 1"):
        Whiten(Clock(), 1, 0.5, 0.01)
