"""Balancer: nudges the gradients of badly distributed channels; the forward pass is the identity.

Per channel, over all other axes, it watches mean/std (through which the proportion of positive values is limited, under a Gaussian
assumption) and the root mean square (through which the mean absolute value is limited). Where a limit is violated, the gradient of
the violation, scaled to a fixed relative size, is added to the incoming gradient.

Source: arXiv 2310.11230, section 3.3; the constants of the conversions are upstream's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from k2ssl.first_derivative import first_derivative_only
from k2ssl.nn.schedule import Clock, Schedule, constant

_EPS = 1e-20
_ABS_TO_RMS = math.sqrt(math.pi / 2)  # a Gaussian's rms over its mean absolute value


@dataclass(frozen=True)
class BalancerLimits:
    """Limits in the form they are applied: on mean/std and on rms, per channel."""

    min_mean: float
    max_mean: float
    min_rms: float
    max_rms: float
    grad_scale: float


class Balancer(nn.Module):
    """Identity on x (..., C) whose backward pass keeps channels in range; acts on a random fraction of training calls.

    Args:
        clock: source of the batch count and of randomness.
        min_positive, max_positive: limits on the proportion of positive values of a channel.
        min_abs, max_abs: limits on the mean absolute value of a channel.
        probability: fraction of calls on which it acts.
        grad_scale: size of the added gradient relative to the incoming one.
    Each but grad_scale may be a number or a `Schedule`.

    Raises:
        ValueError: a proportion or probability outside [0, 1], a mean absolute value or grad_scale that is negative or not finite, or a
            lower limit above its upper one.

    Upstream: Balancer. Unlike there, whether it acts never depends on the state of the GPU's memory allocator.
    """

    def __init__(
        self,
        clock: Clock,
        min_positive: float | Schedule = 0.05,
        max_positive: float | Schedule = 0.95,
        min_abs: float | Schedule = 0.2,
        max_abs: float | Schedule = 100.0,
        probability: float | Schedule | None = None,
        grad_scale: float = 0.04,
    ) -> None:
        super().__init__()
        self.clock = clock
        self.min_positive = _as_schedule(min_positive)
        self.max_positive = _as_schedule(max_positive)
        self.min_abs = _as_schedule(min_abs)
        self.max_abs = _as_schedule(max_abs)
        self.probability = Schedule((0.0, 0.5), (8000.0, 0.125)) if probability is None else _as_schedule(probability)
        self.grad_scale = grad_scale
        for name in ("min_positive", "max_positive", "probability"):
            for _, value in getattr(self, name).points:
                if not 0.0 <= value <= 1.0:
                    raise ValueError(f"Balancer: {name} is {value}, allowed is 0 <= {name} <= 1")
        for name, schedule in (("min_abs", self.min_abs), ("max_abs", self.max_abs), ("grad_scale", _as_schedule(grad_scale))):
            for _, value in schedule.points:  # finite, as schedules are
                if value < 0.0:
                    raise ValueError(f"Balancer: {name} is {value}, a number >= 0 is needed")
        for low, high in (("min_positive", "max_positive"), ("min_abs", "max_abs")):
            self._check_order(low, high)

    def _check_order(self, low: str, high: str) -> None:
        lower, upper = getattr(self, low), getattr(self, high)
        for count in {count for schedule in (lower, upper) for count, _ in schedule.points}:  # both are linear in between
            if lower(count) > upper(count):
                raise ValueError(f"Balancer: {low} is {lower(count)} at batch count {count:g}, allowed is at most {high}, {upper(count)}")

    def forward(self, x: Tensor) -> Tensor:
        """(..., F, C) -> the same tensor's values."""
        if not (self.training and x.requires_grad and self.clock.chance(self.probability(self.clock.batch_count))):
            return x
        return _Balance.apply(x, self.limits())

    def limits(self) -> BalancerLimits:
        """The limits at the clock's present batch count."""
        count = self.clock.batch_count
        return BalancerLimits(
            min_mean=_proportion_to_mean(self.min_positive(count)),
            max_mean=_proportion_to_mean(self.max_positive(count)),
            min_rms=self.min_abs(count) * _ABS_TO_RMS,
            max_rms=self.max_abs(count) * _ABS_TO_RMS,
            grad_scale=self.grad_scale,
        )


def balanced_gradient(x: Tensor, grad: Tensor, limits: BalancerLimits) -> Tensor:
    """The gradient `grad` of x (..., F, C), modified for channels outside `limits`; float32 at least.

    With mu, sd and r the mean, standard deviation and rms of a channel, z = (x - mu) / sd and m = mu / sd, the gradient of the penalty
    |m - clamp(m)| + |log(clamp(r) / r)| is, up to a constant that the normalisation removes, s + w m + (w - s m) z, where s is the sign
    of what the clamp takes from m, and w that for r over 1 + m^2 = (r / sd)^2. Its rms is sqrt((s^2 + w^2) (1 + m^2)).

    Raises:
        ValueError: x has fewer than two dimensions.
    """
    if x.ndim < 2:
        raise ValueError(f"balanced_gradient: x has shape {tuple(x.shape)}, (..., frames, channels) is needed")
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(dim=axes, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    centred = x - mean
    std = centred.square().mean(dim=axes, keepdim=True).clamp_(min=_EPS).sqrt_()  # `var_mean` takes a CPU several times as long
    ratio = mean / std
    growth = ratio.square().add_(1.0)
    root = growth.sqrt()
    rms = std * root

    ratio_sign = torch.sign(ratio - ratio.clamp(limits.min_mean, limits.max_mean))
    rms_part = torch.sign(rms - rms.clamp(limits.min_rms, limits.max_rms)).div_(growth)
    scale = limits.grad_scale / torch.hypot(ratio_sign, rms_part).mul_(root).clamp_(min=_EPS)
    offset = torch.addcmul(ratio_sign, rms_part, ratio).mul_(scale)
    slope = torch.addcmul(rms_part, ratio_sign, ratio, value=-1.0).mul_(scale).div_(std)
    return centred.mul_(slope).add_(offset).mul_(grad.abs()).add_(grad)  # in place: memory is what costs here


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limits: BalancerLimits) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits = limits
        return x.view_as(x)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return balanced_gradient(x, grad, ctx.limits).to(grad.dtype), None


def _proportion_to_mean(proportion: float) -> float:
    """mean/std of a distribution with this proportion of positive values, by upstream's approximation of the inverse error function.

    The factor 0.8139535143 = 1 / (sqrt(pi) ln 2) makes atanh a rough inverse of erf; 1e-10 keeps proportions 0 and 1 finite (they
    mean "no limit").
    """
    y = 2.0 * proportion - 1.0
    return 0.8139535143 * (math.log(1.0 + y + 1e-10) - math.log(1.0 - y + 1e-10)) / 2.0


def _as_schedule(value: float | Schedule) -> Schedule:
    return value if isinstance(value, Schedule) else constant(value)
