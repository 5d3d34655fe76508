"""Learnt down-sampling and plain up-sampling in time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Downsample(nn.Module):
    """Weighted mean of every group of `factor` frames, weights softmax(bias), bias (factor,) starting at 0.

    A group that is cut by the end of an utterance is completed by repeating the utterance's *own last* frame, also when padding
    follows it, so that the result does not depend on what the utterance is batched with (upstream SimpleDownsample lets padding in).
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"Downsample: factor is {factor}, allowed is >= 1")
        self.factor = factor
        self.bias = nn.Parameter(torch.zeros(factor))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(N, T, C) -> (N, ceil(T / factor), C); `padding_mask` (N, T) True at padding, contiguous at the end."""
        num_groups = -(-x.shape[1] // self.factor)
        surplus = num_groups * self.factor - x.shape[1]
        weights = self.bias.softmax(dim=0).to(x.dtype)
        if padding_mask is None:
            if surplus:
                x = torch.cat((x, x[:, -1:].expand(-1, surplus, -1)), dim=1)
            return self._weigh(x, weights)

        # A frame that completes its group counts with the weights of all slots that it fills. (Gathering it into each of these slots
        # would be shorter, but its gradient would be added up in an order that differs from run to run on a GPU.)
        x = x.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        last = ((~padding_mask).sum(dim=1) - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, x.shape[2])
        empty = F.pad(padding_mask, (0, surplus), value=True).unflatten(1, (num_groups, self.factor))
        missing = (weights * empty).sum(dim=2).masked_fill(empty[:, :, 0], 0.0)
        return self._weigh(F.pad(x, (0, 0, 0, surplus)), weights) + missing.unsqueeze(-1) * x.gather(1, last)

    def _weigh(self, x: Tensor, weights: Tensor) -> Tensor:
        return (x.unflatten(1, (-1, self.factor)) * weights[:, None]).sum(dim=2)


def upsample(x: Tensor, factor: int, num_frames: int) -> Tensor:
    """Repeat each frame of (N, T, C) `factor` times and cut to `num_frames`."""
    return x.repeat_interleave(factor, dim=1)[:, :num_frames]


def downsample_mask(padding_mask: Tensor | None, factor: int) -> Tensor | None:
    """(N, T) -> (N, ceil(T / factor)): a group is padding when its first frame is."""
    return None if padding_mask is None else padding_mask[:, ::factor]
