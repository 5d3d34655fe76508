"""Normalisation of every channel over time, with statistics that do not see padding.

A group normalisation over time whose statistics include padded frames makes an utterance's features depend on how far its batch
happens to be padded. Here the statistics run over the valid frames only, and for a batch without padding the plain, faster kernel
does the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2ssl.first_derivative import first_derivative_only

_SLICE = 64  # channels worked on at a time


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
        if padding_mask is not None or x.shape[2] == 1 or x.dtype not in (torch.float32, torch.float64):  # of one frame torch refuses it
            return masked_time_norm(x, padding_mask, self.weight, self.bias, self.eps)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, weight.numel(), weight, bias, self.eps)


def masked_time_norm(x: Tensor, padding_mask: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise each channel of each utterance over its valid frames; zero elsewhere.

    A custom backward keeps only `x` (in its own dtype) and one mean and one deviation per channel, and both passes work through the
    channels in slices, because at the first layer of a waveform stack every further copy of `x` costs gigabytes.

    Args:
        x: (N, C, T).
        padding_mask: (N, T) bool, True at padding, each row with at least one False; None when nothing is padded.
        weight, bias: (C,).

    Returns:
        (N, C, T) in the dtype of `x`.
    """
    return _MaskedTimeNorm.apply(x, padding_mask, weight, bias, eps)


class _MaskedTimeNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, padding_mask: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        wide = _statistics_dtype(x)
        padding = None if padding_mask is None else padding_mask.unsqueeze(1)
        count = torch.full((1, 1, 1), x.shape[2], dtype=wide, device=x.device)
        if padding is not None:
            count = (~padding).sum(-1, keepdim=True).to(wide)  # (N, 1, 1)
        y = torch.empty_like(x)
        means, inv_stds = [], []
        for part in _slices(x.shape[1]):
            centred = _zero(x[:, part].to(wide, copy=True), padding)
            mean = centred.sum(-1, keepdim=True) / count
            centred = _zero(centred.sub_(mean), padding)
            inv_std = (torch.linalg.vector_norm(centred, dim=-1, keepdim=True).square() / count + eps).rsqrt()
            scale = inv_std * weight[part].to(wide).unsqueeze(-1)
            y[:, part] = _zero(centred.mul_(scale).add_(bias[part].to(wide).unsqueeze(-1)), padding)
            means.append(mean)
            inv_stds.append(inv_std)
        ctx.save_for_backward(x, padding, weight, count, torch.cat(means, dim=1), torch.cat(inv_stds, dim=1))
        return y

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, padding, weight, count, mean, inv_std = ctx.saved_tensors
        wide = _statistics_dtype(x)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(weight)
        for part in _slices(x.shape[1]):
            grad_part = _zero(grad[:, part].to(wide, copy=True), padding)
            normal = _zero((x[:, part].to(wide) - mean[:, part]).mul_(inv_std[:, part]), padding)
            grad_sum = grad_part.sum(-1, keepdim=True)  # (N, part, 1)
            product_sum = (grad_part * normal).sum(-1, keepdim=True)
            grad_weight[part] = product_sum.sum((0, 2)).to(weight.dtype)
            grad_bias[part] = grad_sum.sum((0, 2)).to(weight.dtype)
            if grad_x is not None:
                grad_part.sub_(grad_sum / count).sub_(normal.mul_(product_sum / count))
                grad_part.mul_(inv_std[:, part] * weight[part].to(wide).unsqueeze(-1))
                grad_x[:, part] = _zero(grad_part, padding)
        return grad_x, None, grad_weight, grad_bias, None


def _slices(channels: int) -> Iterator[slice]:
    return (slice(start, start + _SLICE) for start in range(0, channels, _SLICE))


def _zero(x: Tensor, padding: Tensor | None) -> Tensor:
    """`x` with zeros at padding, in place."""
    return x if padding is None else x.masked_fill_(padding, 0)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
