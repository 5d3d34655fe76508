"""Balancer: recorded gradients, plain autograd, and when it acts."""

from __future__ import annotations

import math

import pytest
import torch

from k2ssl.nn.balancer import Balancer, BalancerLimits, balanced_gradient
from k2ssl.nn.schedule import Clock, Schedule


@pytest.mark.parametrize(
    ("name", "limits"),
    [("balancer_0", (0.05, 0.95, 0.2, 100.0)), ("balancer_1", (0.3, 0.6, 0.5, 1.0)), ("balancer_2", (0.45, 0.55, 0.2, 4.0))],
)
def test_the_modified_gradient_agrees_with_the_recorded_one(golden, agreement, name: str, limits: tuple[float, ...]) -> None:
    recorded = golden(name)
    x = recorded["x"].requires_grad_()
    y = Balancer(Clock(), *limits, probability=1.0)(x)
    y.backward(recorded["dy"])
    assert torch.equal(y, x)
    agreement.relative(f"{name} gradient", x.grad, recorded["dx"], 1e-4)
    assert (x.grad - recorded["dx"]).norm() <= 1e-5 * recorded["dx"].norm()


def _by_autograd(x: torch.Tensor, grad: torch.Tensor, limits: BalancerLimits) -> torch.Tensor:
    x = x.detach().requires_grad_()
    mean, rms = x.mean(dim=(0, 1)), x.square().mean(dim=(0, 1)).sqrt()
    ratio = mean / (x.square().mean(dim=(0, 1)) - mean.square()).sqrt()
    penalty = (ratio - ratio.clamp(limits.min_mean, limits.max_mean)).abs() + (rms.clamp(limits.min_rms, limits.max_rms) / rms).log().abs()
    (direction,) = torch.autograd.grad(penalty.sum(), x)
    size = direction.square().mean(dim=(0, 1)).sqrt().clamp(min=1e-20)
    return grad + grad.abs() * direction * limits.grad_scale / size


def test_the_closed_form_is_the_gradient_of_the_penalty() -> None:
    x = torch.randn(7, 5, 12, dtype=torch.float64) * torch.logspace(-1, 1, 12, dtype=torch.float64)
    x = x + torch.linspace(-3, 3, 12, dtype=torch.float64)
    x[..., 5] = torch.linspace(-1, 1, 35, dtype=torch.float64).view(7, 5)  # inside all limits
    grad = torch.randn_like(x)
    limits = BalancerLimits(min_mean=-0.3, max_mean=0.4, min_rms=0.5, max_rms=4.0, grad_scale=0.04)
    ours = balanced_gradient(x, grad, limits)
    torch.testing.assert_close(ours, _by_autograd(x, grad, limits), atol=1e-12, rtol=1e-10)
    touched = (ours != grad).any(dim=0).any(dim=0)
    assert touched.tolist() == [channel != 5 for channel in range(12)]


@pytest.mark.parametrize("x", [1e8, 1e-12, 0.0])
def test_a_channel_that_never_moves_has_a_finite_gradient(x: float) -> None:
    grad = torch.randn(3, 4, 2)
    limits = BalancerLimits(min_mean=-0.3, max_mean=0.4, min_rms=0.5, max_rms=4.0, grad_scale=0.04)
    ours = balanced_gradient(torch.full((3, 4, 2), x), grad, limits)
    assert ours.isfinite().all()
    assert (ours - grad).abs().max() <= 0.05 * grad.abs().max()


def test_a_channel_whose_values_are_too_small_for_their_squares_is_made_larger() -> None:
    x = torch.randn(30, 4, 2) * 1.5e-10
    limits = BalancerLimits(min_mean=-10.0, max_mean=10.0, min_rms=0.5, max_rms=4.0, grad_scale=0.04)
    added = balanced_gradient(x, torch.ones_like(x), limits) - 1.0
    assert torch.equal(added.sign(), -x.sign())  # a step against the gradient moves every value away from zero
    assert added.square().mean().sqrt().item() == pytest.approx(0.04, rel=1e-3)


def test_it_acts_on_the_scheduled_fraction_of_training_calls_and_never_in_evaluation() -> None:
    clock = Clock(2)
    balancer = Balancer(clock, min_abs=10.0, probability=Schedule((0, 0.5), (8000, 0.125)))
    x = torch.randn(20, 3, requires_grad=True)

    def fraction(calls: int = 1000) -> float:
        return sum(balancer(x) is not x for _ in range(calls)) / calls

    assert fraction() == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 1000))
    clock.advance(8000)
    assert fraction() == pytest.approx(0.125, abs=4 * math.sqrt(0.11 / 1000))
    assert balancer(x.detach()) is not None and Balancer(clock, probability=1.0)(x.detach()).grad_fn is None
    balancer.eval()
    assert fraction(100) == 0.0


def test_impossible_proportions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_positive is 1\.5"):
        Balancer(Clock(), max_positive=1.5)
    with pytest.raises(ValueError, match=r"x has shape \(4,\), \(\.\.\., frames, channels\)"):
        balanced_gradient(torch.ones(4), torch.ones(4), Balancer(Clock()).limits())
    with pytest.raises(ValueError, match=r"min_abs is -1\.0, a number >= 0"):
        Balancer(Clock(), min_abs=-1.0)
    with pytest.raises(ValueError, match="must be finite"):
        Balancer(Clock(), grad_scale=math.nan)
    with pytest.raises(ValueError, match=r"min_abs is 3\.0 at batch count 7, allowed is at most max_abs, 2\.0"):
        Balancer(Clock(), min_abs=Schedule((0.0, 0.1), (7.0, 3.0)), max_abs=2.0)
    with pytest.raises(ValueError, match="probability is 3"):
        Balancer(Clock(), probability=3.0)


def test_limits_follow_their_schedules() -> None:
    clock = Clock()
    balancer = Balancer(clock, min_abs=Schedule((0, 0.2), (20000, 0.5)))
    assert balancer.limits().min_rms == pytest.approx(0.2 * math.sqrt(math.pi / 2))
    clock.advance(20000)
    assert balancer.limits().min_rms == pytest.approx(0.5 * math.sqrt(math.pi / 2))
