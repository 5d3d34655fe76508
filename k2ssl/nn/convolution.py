"""The Zipformer's convolution module: gate, depthwise convolution over time, SwooshR, projection."""

from __future__ import annotations

from torch import Tensor, nn

from k2ssl.nn.activation import SwooshDropoutLinear, swoosh_r
from k2ssl.nn.balancer import Balancer
from k2ssl.nn.depthwise import DepthwiseConvolution
from k2ssl.nn.fusion import fusible
from k2ssl.nn.schedule import Clock, Schedule
from k2ssl.nn.whiten import Whiten


class ConvolutionModule(nn.Module):
    """x sigmoid(s) of one projection, zero at padding, "same" depthwise convolution, SwooshR, projection.

    Args:
        dim: channels C.
        kernel: odd number of taps.
        clock: source of the batch count and of randomness.

    Raises:
        ValueError: an even or non-positive kernel.

    Source: arXiv 2310.11230, section 3.1; limits: upstream ConvolutionModule.
    """

    def __init__(self, dim: int, kernel: int, clock: Clock) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * dim)
        self.gate_balancer = Balancer(
            clock,
            min_positive=Schedule((0, 0.05), (8000, 0.025)),
            max_positive=1.0,
            min_abs=1.5,
            max_abs=Schedule((0, 5.0), (8000, 10.0)),
        )
        self.depthwise = DepthwiseConvolution(dim, kernel)
        self.balancer = Balancer(
            clock,
            min_positive=Schedule((0, 0.1), (8000, 0.05)),
            max_positive=1.0,
            min_abs=Schedule((0, 0.2), (20000, 0.5)),
            max_abs=10.0,
        )
        self.whiten = Whiten(clock, num_groups=1, limit=Schedule((0, 7.5), (20000, 15.0)), grad_scale=0.01)
        self.out_proj = SwooshDropoutLinear(dim, dim, swoosh_r, clock, initial_scale=0.05)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(N, T, C) -> (N, T, C); `padding_mask` (N, T) True at padding."""
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x = self.depthwise(_gated(x, self.gate_balancer(gate), padding_mask))
        return self.out_proj(self.whiten(self.balancer(x)))


@fusible
def _gated(x: Tensor, gate: Tensor, padding_mask: Tensor | None) -> Tensor:
    """x sigmoid(gate), zero at padding."""
    x = x * gate.sigmoid()
    return x if padding_mask is None else x.masked_fill(padding_mask.unsqueeze(-1), 0.0)
