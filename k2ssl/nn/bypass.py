"""Bypass: a learnt per-channel interpolation between a module's input and its output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from k2ssl.nn.dropout import keep_mask
from k2ssl.nn.fusion import fusible
from k2ssl.nn.limit import limit_value
from k2ssl.nn.schedule import Clock, Schedule, constant

_LOWEST_SCALE = Schedule((0.0, 0.9), (20000.0, 0.2))  # early on, keep every module in use


class Bypass(nn.Module):
    """before + scale * (after - before), scale per channel, starting at 0.5 and held in [.9 -> .2, 1] while training.

    Args:
        dim: number of channels C.
        clock: source of the batch count and of randomness.
        skip_rate: probability, per sequence and in training only, of taking `before` alone.

    Source: arXiv 2310.11230, section 3.1 (Bypass).
    """

    def __init__(self, dim: int, clock: Clock, skip_rate: Schedule | None = None) -> None:
        super().__init__()
        self.clock = clock
        self.skip_rate = constant(0.0) if skip_rate is None else skip_rate
        self.scale = nn.Parameter(torch.full((dim,), 0.5))  # upstream: bypass_scale

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Both (N, T, C) -> (N, T, C)."""
        scale: Tensor = self.scale
        if self.training:
            count = self.clock.batch_count
            scale = limit_value(scale, _LOWEST_SCALE(count), 1.0, self.clock)
            skip_rate = self.skip_rate(count)
            if skip_rate > 0.0:
                scale = scale * keep_mask((before.shape[0], 1, 1), skip_rate, self.clock, scale)
        return _interpolate(before, after, scale)


@fusible
def _interpolate(before: Tensor, after: Tensor, scale: Tensor) -> Tensor:
    # under autocast the float32 scale makes the sum float32, as in the published system: the stream that all layers add to is
    # then not rounded to 8 or 11 bits by each of them
    return before + (after - before) * scale
