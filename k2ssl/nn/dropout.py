"""Dropout whose rate follows a schedule and whose masks come from the clock's explicit generators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from k2ssl.nn.schedule import Clock, Schedule, constant


class Dropout(nn.Module):
    """Zero elements at random and rescale the rest, in training only.

    Args:
        rate: probability of zeroing, or a schedule of it, in [0, 1).
        clock: source of the batch count and of random numbers.
        shared_dim: axis along which one mask is shared (1: the same channels are dropped at all time steps); None: no sharing.

    Raises:
        ValueError: a rate outside [0, 1).
    """

    def __init__(self, rate: float | Schedule, clock: Clock, shared_dim: int | None = None) -> None:
        super().__init__()
        self.rate = rate if isinstance(rate, Schedule) else constant(rate)
        for _, value in self.rate.points:
            if not 0.0 <= value < 1.0:
                raise ValueError(f"Dropout: rate is {value}, allowed is 0 <= rate < 1")
        self.clock = clock
        self.shared_dim = shared_dim

    def forward(self, x: Tensor) -> Tensor:
        """`x` of any shape, dropped out in training."""
        mask = self.mask(x)
        return x if mask is None else x * mask

    def mask(self, x: Tensor) -> Tensor | None:
        """The multiplicative mask for `x`, values 0 or 1/(1 - rate); None where nothing is dropped."""
        rate = self.rate(self.clock.batch_count)
        if not self.training or rate == 0.0:
            return None
        shape = list(x.shape)
        if self.shared_dim is not None:
            shape[self.shared_dim] = 1
        return keep_mask(tuple(shape), rate, self.clock, x) * (1.0 / (1.0 - rate))


def keep_mask(shape: tuple[int, ...], drop_rate: float, clock: Clock, like: Tensor) -> Tensor:
    """Ones with probability 1 - `drop_rate`, else zeros, in the dtype and on the device of `like`."""
    uniform = torch.rand(shape, generator=clock.generator(like.device), device=like.device)
    return uniform.ge_(drop_rate).to(like.dtype)  # in place: the result of a comparison need not be converted


def drop_sequences(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x` (N, T, C) times a per-sequence keep mask (N, 1, 1); None keeps all."""
    return x if mask is None else x * mask
