"""One Zipformer layer: three feed-forwards, two self-attentions and a non-linear attention on shared weights, two convolutions.

Source: arXiv 2310.11230, figure 2; rates and limits: upstream Zipformer2EncoderLayer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from k2ssl.nn.attention import AttentionWeights, NonlinearAttention, SelfAttention, make_uniform
from k2ssl.nn.balancer import Balancer
from k2ssl.nn.bypass import Bypass
from k2ssl.nn.convolution import ConvolutionModule
from k2ssl.nn.dropout import drop_sequences, keep_mask
from k2ssl.nn.feedforward import FeedForward
from k2ssl.nn.norm import BiasNorm
from k2ssl.nn.precision import product_dtype
from k2ssl.nn.schedule import Clock, Schedule
from k2ssl.nn.whiten import Whiten

_SKIP_RATE = Schedule((0, 0.2), (4000, 0.05), (16000, 0.0))  # attentions and convolutions, per sequence
_FEEDFORWARD_SKIP_RATE = Schedule((0, 0.1), (4000, 0.01), (50000, 0.0))
_UNIFORM_ATTENTION_RATE = Schedule((0, 0.25), (4000, 0.025))  # per call; dead upstream in SSL, where it tested `not training`


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one layer; every layer of a stack has the same."""

    dim: int
    feedforward_dim: int
    num_heads: int
    query_head_dim: int
    pos_head_dim: int
    value_head_dim: int
    pos_dim: int
    kernel: int


class ZipformerLayer(nn.Module):
    """(N, T, C) -> (N, T, C).

    Args:
        sizes: widths, heads and kernel.
        skip_rate: schedule of the probability of skipping the whole layer, per sequence.
        dropout: rate or schedule inside the feed-forward modules.
        clock: source of the batch count and of randomness.
    """

    def __init__(self, sizes: LayerSizes, skip_rate: Schedule, dropout: float | Schedule, clock: Clock) -> None:
        super().__init__()
        dim, hidden = sizes.dim, sizes.feedforward_dim
        self.clock = clock
        self.attention_weights = AttentionWeights(dim, sizes.num_heads, sizes.query_head_dim, sizes.pos_head_dim, sizes.pos_dim, clock)
        self.self_attention1 = SelfAttention(dim, sizes.num_heads, sizes.value_head_dim, clock)
        self.self_attention2 = SelfAttention(dim, sizes.num_heads, sizes.value_head_dim, clock)
        self.nonlinear_attention = NonlinearAttention(dim, 3 * dim // 4, clock)
        self.feedforward1 = FeedForward(dim, hidden * 3 // 4, dropout, clock)
        self.feedforward2 = FeedForward(dim, hidden, dropout, clock)
        self.feedforward3 = FeedForward(dim, hidden * 5 // 4, dropout, clock)
        self.convolution1 = ConvolutionModule(dim, sizes.kernel, clock)
        self.convolution2 = ConvolutionModule(dim, sizes.kernel, clock)
        self.bypass_mid = Bypass(dim, clock)
        self.norm = BiasNorm(dim, clock)
        self.bypass = Bypass(dim, clock, skip_rate)

        self.nonlinear_attention_balancer = Balancer(
            clock, 0.3, 0.7, min_abs=Schedule((0, 0.004), (4000, 0.02)), max_abs=100.0, probability=0.05
        )
        self.feedforward2_balancer = Balancer(clock, 0.3, 0.7, min_abs=Schedule((0, 0.0), (4000, 0.1)), max_abs=2.0, probability=0.05)
        self.feedforward3_balancer = Balancer(clock, 0.3, 0.7, min_abs=Schedule((0, 0.0), (4000, 0.2)), max_abs=4.0, probability=0.05)
        self.norm_balancer = Balancer(clock, 0.45, 0.55, min_abs=0.2, max_abs=4.0)
        self.output_balancer = Balancer(clock, 0.45, 0.55, min_abs=0.1, max_abs=4.0)
        self.output_whiten = Whiten(clock, num_groups=1, limit=Schedule((0, 4.0), (20000, 12.0)), grad_scale=0.01)

    def forward(self, x: Tensor, positions: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(N, T, C), table (2T-1, pos_dim), mask (N, T) True at padding -> (N, T, C)."""
        start = x
        weights = self.attention_weights(x, positions, padding_mask)
        attention_mask = self._sequence_mask(x, _SKIP_RATE)  # one draw for all three uses of the attention weights

        x = x + self.feedforward1(x)
        attended = self.nonlinear_attention(x, self._first_head(weights))
        x = x + drop_sequences(self.nonlinear_attention_balancer(attended), attention_mask)
        x = x + drop_sequences(self.self_attention1(x, weights), attention_mask)
        x = x + drop_sequences(self.convolution1(x, padding_mask), self._sequence_mask(x, _SKIP_RATE))
        x = x + drop_sequences(self.feedforward2_balancer(self.feedforward2(x)), self._sequence_mask(x, _FEEDFORWARD_SKIP_RATE))
        x = self.bypass_mid(start, x)

        x = x + drop_sequences(self.self_attention2(x, weights), attention_mask)
        x = x + drop_sequences(self.convolution2(x, padding_mask), self._sequence_mask(x, _SKIP_RATE))
        x = x + drop_sequences(self.feedforward3_balancer(self.feedforward3(x)), self._sequence_mask(x, _FEEDFORWARD_SKIP_RATE))
        x = self.bypass(start, self.norm(self.norm_balancer(x)))
        return self.output_whiten(self.output_balancer(x))

    def _first_head(self, weights: Tensor) -> Tensor:
        first = weights[:, :1]
        if self.training and self.clock.chance(_UNIFORM_ATTENTION_RATE(self.clock.batch_count)):
            return make_uniform(first)
        return first

    def _sequence_mask(self, x: Tensor, rate: Schedule) -> Tensor | None:
        """(N, 1, 1): a sequence's contribution is dropped with the given rate, without rescaling; None outside training.

        In the dtype of the contributions, which under autocast is not that of the stream `x`.
        """
        drop_rate = rate(self.clock.batch_count)
        if not self.training or drop_rate == 0.0:
            return None
        return keep_mask((x.shape[0], 1, 1), drop_rate, self.clock, x).to(product_dtype(x))
