"""The Zipformer's feed-forward module: projection, SwooshL, dropout shared over time, projection."""

from __future__ import annotations

from torch import Tensor, nn

from k2ssl.nn.activation import SwooshDropoutLinear, swoosh_l
from k2ssl.nn.balancer import Balancer
from k2ssl.nn.schedule import Clock, Schedule
from k2ssl.nn.whiten import Whiten


class FeedForward(nn.Module):
    """linear -> SwooshL -> dropout (one mask for all time steps of a sequence) -> linear.

    Args:
        dim: channels C of input and output; hidden_dim: channels in between.
        dropout: rate or schedule.
        clock: source of the batch count and of randomness.

    Limits: upstream FeedforwardModule.
    """

    def __init__(self, dim: int, hidden_dim: int, dropout: float | Schedule, clock: Clock) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, hidden_dim)
        self.balancer = Balancer(clock, min_positive=0.3, max_positive=1.0, min_abs=0.75, max_abs=5.0)
        self.out_proj = SwooshDropoutLinear(hidden_dim, dim, swoosh_l, clock, dropout=dropout, initial_scale=0.1)
        self.whiten = Whiten(clock, num_groups=1, limit=Schedule((0, 7.5), (20000, 15.0)), grad_scale=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, C)."""
        return self.whiten(self.out_proj(self.balancer(self.in_proj(x))))
