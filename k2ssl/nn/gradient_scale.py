"""Identity in the forward pass, a factor on the gradient in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """`x` itself (any shape); its gradient is multiplied by `scale`.

    Lets a part of a model learn more slowly than the rest. Upstream: GradMultiply.
    """
    if scale == 1.0:
        return x
    return _ScaleGradient.apply(x, scale)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None
