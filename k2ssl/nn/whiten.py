"""Whiten: pushes the covariance of activations towards a multiple of the identity; the forward pass is the identity.

Source: arXiv 2310.11230, section 3.3 (whitener).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from k2ssl.first_derivative import first_derivative_only
from k2ssl.nn.fusion import fusible
from k2ssl.nn.schedule import Clock, Schedule, constant

_PROBABILITY_ABOVE = 0.25  # fraction of calls on which it acts while the metric was above the limit when last seen
_PROBABILITY_BELOW = 0.025
_EPS = 1e-20


class Whiten(nn.Module):
    """Identity on x (..., C); where the whitening metric exceeds `limit`, backward adds the metric's gradient.

    The added gradient has `grad_scale` times the norm of the incoming one. The metric is 1 for perfectly white data and C/groups for
    rank one. It acts on a quarter of the training calls while the metric was above the limit in the last step that computed it (on any
    micro-batch, in any process), else on one in forty; that memory is a flag of the clock, computed on the device and used on the
    host without waiting (see `Clock`).

    Args:
        clock: source of the batch count, of randomness, and of the flag.
        num_groups: groups of channels, each with a covariance of its own.
        limit: number or schedule, the metric above which it acts; at least 1.
        grad_scale: relative size of the added gradient.

    Raises:
        ValueError: a limit below 1 (the metric cannot go lower); channels that do not divide into the groups.
    """

    def __init__(self, clock: Clock, num_groups: int, limit: float | Schedule, grad_scale: float) -> None:
        super().__init__()
        if num_groups < 1:
            raise ValueError(f"Whiten: num_groups is {num_groups}, allowed is >= 1")
        self.clock = clock
        self.num_groups = num_groups
        self.limit = limit if isinstance(limit, Schedule) else constant(limit)
        for _, value in self.limit.points:
            if value < 1.0:
                raise ValueError(f"Whiten: limit is {value}, allowed is >= 1 (1 is perfectly white)")
        self.grad_scale = grad_scale
        self.above_limit = clock.add_flag()

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> the same tensor's values."""
        if not (self.training and x.requires_grad):
            return x
        if x.shape[-1] % self.num_groups:
            raise ValueError(f"Whiten: x has {x.shape[-1]} channels, a multiple of num_groups {self.num_groups} is needed")
        probability = _PROBABILITY_ABOVE if self.clock.flag(self.above_limit) else _PROBABILITY_BELOW
        if not self.clock.chance(probability):
            return x
        return _Whiten.apply(x, self)


def whitening_metric_and_gradient(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """mean(diag C^2) / mean(diag C)^2 of the centred covariance C per group, and its gradient with respect to x (..., channels).

    Both products of a bfloat16 `x`, which are nearly all of the cost, and so the gradient, are in bfloat16: it is off by half a percent,
    and is added as a hundredth of another. All else is in float32 at least; float16 would overflow in a product.
    """
    rows = x.reshape(-1, num_groups, x.shape[-1] // num_groups).transpose(0, 1)  # (groups, frames, channels per group)
    rows = rows.float() if x.dtype == torch.float16 else rows
    rows = rows - rows.mean(dim=1, keepdim=True)
    metric, matrix = _metric_and_matrix(rows.transpose(1, 2) @ rows)
    return metric, (rows @ matrix).transpose(0, 1).reshape(x.shape)


@fusible
def _metric_and_matrix(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The metric of covariances (groups, C, C), and what rows are multiplied by for its gradient."""
    channels = covariance.shape[0] * covariance.shape[1]
    wide = torch.promote_types(covariance.dtype, torch.float32)
    mean_diagonal = covariance.diagonal(dim1=1, dim2=2).sum(dtype=wide) / channels
    mean_square = covariance.to(wide).square().sum() / channels
    denominator = mean_diagonal.square() + _EPS
    metric = mean_square / denominator

    # d metric / dC = (2 C / denominator - 2 mean_square mean_diagonal I / denominator^2) / channels, and dC -> dx multiplies by 2 x
    factor = 4.0 / (channels * denominator)
    matrix = covariance * factor
    matrix.diagonal(dim1=1, dim2=2).sub_(metric * mean_diagonal * factor)
    return metric, matrix


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Whiten) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module = module
        ctx.limit = module.limit(module.clock.batch_count)
        return x.view_as(x)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        module: Whiten = ctx.module
        with torch.autocast(x.device.type, enabled=False):
            metric, penalty = whitening_metric_and_gradient(x, module.num_groups)
            above = metric > ctx.limit
            module.clock.set_flag(module.above_limit, above)
            return _with_penalty(grad, penalty, above, module.grad_scale), None


@fusible
def _with_penalty(grad: Tensor, penalty: Tensor, above: Tensor, grad_scale: float) -> Tensor:
    """`grad` plus the penalty, at `grad_scale` times the norm of `grad`, if it is `above` the limit."""
    wide = torch.promote_types(penalty.dtype, torch.float32)
    norm, penalty_norm = (torch.linalg.vector_norm(t, dtype=wide) for t in (grad, penalty))
    scale = torch.where(above, grad_scale * norm / (penalty_norm + _EPS), 0.0)
    return (penalty * scale).to(grad.dtype).add_(grad)
