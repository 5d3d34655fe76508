"""BiasNorm: root-mean-square normalisation with a learnt bias inside the statistic and one learnt scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from k2ssl.first_derivative import first_derivative_only
from k2ssl.nn.fusion import fusible
from k2ssl.nn.limit import limit_value
from k2ssl.nn.schedule import Clock

_LOG_SCALE_LIMIT = 1.5


class BiasNorm(nn.Module):
    """y = x * exp(log_scale) / rms(x - bias) over the last axis.

    The bias lets a channel carry a large constant that keeps some length information through the normalisation.

    Args:
        dim: number of channels C.
        clock: source of randomness for the limit on `log_scale` (+-1.5, training only).

    Source: arXiv 2310.11230, section 3.2.
    """

    def __init__(self, dim: int, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.empty(dim).normal_(mean=0.0, std=1e-4))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C), same dtype; statistics in float32 at least."""
        log_scale: Tensor = self.log_scale
        if self.training:
            log_scale = limit_value(log_scale, -_LOG_SCALE_LIMIT, _LOG_SCALE_LIMIT, self.clock)
        return _BiasNorm.apply(x, self.bias, log_scale)


class _BiasNorm(torch.autograd.Function):
    """Keeps `x` in its own dtype and one scale per frame."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, log_scale: Tensor) -> Tensor:
        y, scale, mean_square = _normalise(x, bias, log_scale)
        ctx.save_for_backward(x, bias, scale, mean_square)
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _gradients(grad, *ctx.saved_tensors)


@fusible
def _normalise(x: Tensor, bias: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and per frame (..., 1) its scale and the mean square that it comes from."""
    wide = x.to(torch.promote_types(torch.promote_types(x.dtype, bias.dtype), torch.float32))
    # a frame of zeros (padding) with a zero bias has no direction to normalise: keep it zero instead of 0 / 0
    mean_square = (wide - bias).square().mean(dim=-1, keepdim=True).clamp_min(1e-20)
    scale = mean_square.rsqrt() * log_scale.to(wide.dtype).exp()
    return (wide * scale).to(x.dtype), scale, mean_square


@fusible
def _gradients(grad: Tensor, x: Tensor, bias: Tensor, scale: Tensor, mean_square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of `x`, the bias and the logarithmic scale."""
    wide = x.to(scale.dtype)
    grad = grad.to(scale.dtype)
    # y = x s with s = exp(log_scale) m^(-1/2), m = mean((x - bias)^2); the path through s gives -(sum g y) (x - bias) / (m C)
    through_scale = (grad * wide).sum(dim=-1, keepdim=True) * scale
    grad_centred = (wide - bias) * (through_scale / (mean_square * x.shape[-1]))
    grad_x = (grad * scale - grad_centred).to(x.dtype)
    grad_bias = grad_centred.reshape(-1, x.shape[-1]).sum(dim=0)
    return grad_x, grad_bias.to(bias.dtype), through_scale.sum().to(bias.dtype)
