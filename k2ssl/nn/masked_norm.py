"""Normalisation of every channel over time, with statistics that do not see padding.

A group normalisation over time whose statistics include padded frames makes an utterance's features depend on how far its batch
happens to be padded. Here the statistics run over the valid frames only, and for a batch without padding the plain, faster kernel
does the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class MaskedTimeNorm(nn.Module):
    """Per channel: subtract the mean over time, divide by the standard deviation, scale and shift.

    Without padding it equals `nn.GroupNorm` with as many groups as channels. Statistics are in float32 (float64 for float64 input),
    whatever the input's dtype; the result has the input's dtype.

    Args:
        channels: C.
        eps: added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(N, C, T), (N, T) bool with True at padding or None -> (N, C, T), zero at padding."""
        if padding_mask is not None:
            return masked_time_norm(x, padding_mask, self.weight, self.bias, self.eps)
        wide = _statistics_dtype(x)
        groups = self.weight.numel()
        return F.group_norm(x.to(wide), groups, self.weight.to(wide), self.bias.to(wide), self.eps).to(x.dtype)


def masked_time_norm(x: Tensor, padding_mask: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise each channel of each utterance over its valid frames; zero elsewhere.

    A custom backward keeps only `x` (in its own dtype) and one mean and one deviation per channel, because at the first layer of a
    waveform stack every further saved copy costs gigabytes.

    Args:
        x: (N, C, T).
        padding_mask: (N, T) bool, True at padding; each row has at least one False.
        weight, bias: (C,).

    Returns:
        (N, C, T) in the dtype of `x`.
    """
    return _MaskedTimeNorm.apply(x, padding_mask, weight, bias, eps)


class _MaskedTimeNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, padding_mask: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        wide = _statistics_dtype(x)
        padding = padding_mask.unsqueeze(1)
        count = (~padding).sum(-1, keepdim=True).to(wide)  # (N, 1, 1)
        centred = x.to(wide).masked_fill(padding, 0)
        mean = centred.sum(-1, keepdim=True) / count
        centred = (centred - mean).masked_fill_(padding, 0)
        inv_std = (torch.linalg.vector_norm(centred, dim=-1, keepdim=True).square() / count + eps).rsqrt()
        ctx.save_for_backward(x, padding, weight, count, mean, inv_std)
        scale = inv_std * weight.to(wide).unsqueeze(-1)
        return centred.mul_(scale).add_(bias.to(wide).unsqueeze(-1)).masked_fill_(padding, 0).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, padding, weight, count, mean, inv_std = ctx.saved_tensors
        wide = _statistics_dtype(x)
        grad = grad.to(wide).masked_fill(padding, 0)
        normal = ((x.to(wide) - mean) * inv_std).masked_fill_(padding, 0)
        grad_sum = grad.sum(-1, keepdim=True)  # (N, C, 1)
        product_sum = (grad * normal).sum(-1, keepdim=True)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad - grad_sum / count - normal * (product_sum / count)).masked_fill_(padding, 0)
            grad_x = grad_x.mul_(inv_std * weight.to(wide).unsqueeze(-1)).to(x.dtype)
        return grad_x, None, product_sum.sum((0, 2)).to(weight.dtype), grad_sum.sum((0, 2)).to(weight.dtype), None


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
