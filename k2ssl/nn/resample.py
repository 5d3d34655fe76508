"""Learnt down-sampling and plain up-sampling in time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Downsample(nn.Module):
    """Weighted mean of every group of `factor` frames, weights softmax(bias), bias (factor,) starting at 0.

    A group that is cut by the end of an utterance is completed by repeating the utterance's *own last* frame, also when padding
    follows it, so that the result does not depend on what the utterance is batched with (upstream SimpleDownsample lets padding in).
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.bias = nn.Parameter(torch.zeros(factor))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(N, T, C) -> (N, ceil(T / factor), C); `padding_mask` (N, T) True at padding, contiguous at the end."""
        num_groups = -(-x.shape[1] // self.factor)
        source = torch.arange(num_groups * self.factor, device=x.device)
        if padding_mask is None:
            if num_groups * self.factor != x.shape[1]:
                x = x.index_select(1, source.clamp(max=x.shape[1] - 1))
        else:
            last = ((~padding_mask).sum(dim=1, keepdim=True) - 1).clamp(min=0)
            source = torch.minimum(source.unsqueeze(0), last).unsqueeze(-1).expand(-1, -1, x.shape[2])
            x = x.gather(1, source)
        weights = self.bias.softmax(dim=0).to(x.dtype)
        return (x.unflatten(1, (num_groups, self.factor)) * weights[:, None]).sum(dim=2)


def upsample(x: Tensor, factor: int, num_frames: int) -> Tensor:
    """Repeat each frame of (N, T, C) `factor` times and cut to `num_frames`."""
    return x.repeat_interleave(factor, dim=1)[:, :num_frames]


def downsample_mask(padding_mask: Tensor | None, factor: int) -> Tensor | None:
    """(N, T) -> (N, ceil(T / factor)): a group is padding when its first frame is."""
    return None if padding_mask is None else padding_mask[:, ::factor]
