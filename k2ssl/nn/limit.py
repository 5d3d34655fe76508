"""Keep a parameter inside a range by turning the gradients that push it out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from k2ssl.first_derivative import first_derivative_only
from k2ssl.nn.schedule import Clock

_PROBABILITY = 0.6  # acting on every step would make the limit a hard wall that the parameter sticks to


def limit_value(x: Tensor, low: float, high: float, clock: Clock) -> Tensor:
    """`x` unchanged; with probability .6 the gradients of elements outside [low, high] are made to point back inside.

    Source: arXiv 2310.11230, section 3.2; upstream limit_param_value.
    """
    if x.requires_grad and clock.chance(_PROBABILITY):
        return _LimitValue.apply(x, low, high)
    return x


class _LimitValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits = (low, high)
        return x.view_as(x)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        low, high = ctx.limits
        # a descent step is -grad: below the range the gradient must not be positive, above it not negative
        inside = x.clamp(low, high)
        return torch.where(x == inside, grad, grad.copysign(x - inside)), None, None
