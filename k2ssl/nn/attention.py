"""Zipformer attention: weights computed once per layer, used by two self-attentions and one non-linear attention.

Source: arXiv 2310.11230, section 3.1; constants: upstream RelPositionMultiheadAttentionWeights, SelfAttention, NonlinAttention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2ssl.first_derivative import first_derivative_only
from k2ssl.nn.balancer import Balancer
from k2ssl.nn.fusion import fusible
from k2ssl.nn.initial import scale_initial
from k2ssl.nn.keep_in_graph import keep_in_graph
from k2ssl.nn.precision import product_dtype
from k2ssl.nn.schedule import Clock, Schedule
from k2ssl.nn.whiten import Whiten

_PADDING_SCORE = -1000.0  # its exponential is exactly 0 next to any score above -890
_SCORE_LIMIT = 25.0
_SCORE_PENALTY = 1e-4  # absolute, so it assumes gradients of a loss summed over frames, as published
_SCORE_PENALTY_PROBABILITY = 0.1


class AttentionWeights(nn.Module):
    """softmax(q k^T + p P(relative position)) for all heads, without the usual 1/sqrt(d).

    Args:
        dim: width of the input.
        num_heads: H.
        query_head_dim, pos_head_dim: widths per head of q and k, and of p.
        pos_dim: width of the relative-position table.
        clock: source of the batch count and of randomness.
    """

    def __init__(self, dim: int, num_heads: int, query_head_dim: int, pos_head_dim: int, pos_dim: int, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.num_heads = num_heads
        self.widths = (num_heads * query_head_dim, num_heads * query_head_dim, num_heads * pos_head_dim)
        # the scale that 1/sqrt(d) would give, split between q and k and left to the optimizer from there on
        self.in_proj = scale_initial(nn.Linear(dim, sum(self.widths)), query_head_dim**-0.25)
        self.linear_pos = scale_initial(nn.Linear(pos_dim, num_heads * pos_head_dim, bias=False), 0.05)
        self.key_balancer = Balancer(clock, min_positive=0.4, max_positive=0.6, min_abs=0.0, max_abs=100.0, probability=0.025)
        self.key_whiten = Whiten(clock, num_groups=num_heads, limit=Schedule((0, 3.0), (20000, 6.0)), grad_scale=0.025)
        self.skip_position_rate = Schedule((0, 0.5), (4000, 0.0))

    def forward(self, x: Tensor, positions: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(N, T, C), table (2T-1, pos_dim), mask (N, T) True at padding -> weights (N, H, T, T), rows sum to 1."""
        if positions.shape[0] != 2 * x.shape[1] - 1:
            raise ValueError(
                f"AttentionWeights: positions has {positions.shape[0]} rows, {2 * x.shape[1] - 1} are needed for {x.shape[1]} frames"
            )
        query, key, pos_query = self.in_proj(x).split(self.widths, dim=-1)
        key = self.key_whiten(self.key_balancer(key))
        query, key, pos_query = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, pos_query))
        positional: Tensor | None = None
        if self.training and self.clock.chance(self.skip_position_rate(self.clock.batch_count)):
            query = keep_in_graph(query, (self.linear_pos.weight,))
        else:
            pos_key = self.linear_pos(positions).unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0)  # (H, pos_head_dim, 2T-1)
            positional = _align_relative(pos_query @ pos_key)
        content = query @ key.transpose(2, 3)
        penalise = self.training and self.clock.chance(_SCORE_PENALTY_PROBABILITY)
        return score_softmax(content, positional, padding_mask, penalise)


class SelfAttention(nn.Module):
    """Weighted mean of projected values, projected back.

    Args:
        dim: width of input and output; num_heads: H; value_head_dim: width per head of the values; clock: source of randomness.
    """

    def __init__(self, dim: int, num_heads: int, value_head_dim: int, clock: Clock) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = nn.Linear(dim, num_heads * value_head_dim)
        self.out_proj = scale_initial(nn.Linear(num_heads * value_head_dim, dim), 0.05)
        self.whiten = Whiten(clock, num_groups=1, limit=Schedule((0, 7.5), (20000, 22.5)), grad_scale=0.01)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """(N, T, C), weights (N, H, T, T) -> (N, T, C)."""
        return self.whiten(self.out_proj(_attend(self.in_proj(x), weights, self.num_heads)))


class NonlinearAttention(nn.Module):
    """Attention over gated values: y * (weights (x tanh(s))), with one head's weights.

    Args:
        dim: width of input and output; hidden_dim: width of s, x and y; clock: source of the batch count and of randomness.
    """

    def __init__(self, dim: int, hidden_dim: int, clock: Clock) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 3 * hidden_dim)
        self.balancer = Balancer(
            clock,
            min_positive=Schedule((0, 0.25), (20000, 0.05)),
            max_positive=Schedule((0, 0.75), (20000, 0.95)),
            min_abs=0.5,
            max_abs=5.0,
        )
        self.value_whiten = Whiten(clock, num_groups=1, limit=Schedule((0, 5.0), (20000, 10.0)), grad_scale=0.01)
        self.out_proj = scale_initial(nn.Linear(hidden_dim, dim), 0.05)
        self.whiten = Whiten(clock, num_groups=1, limit=Schedule((0, 5.0), (20000, 15.0)), grad_scale=0.01)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """(N, T, C), weights (N, 1, T, T) -> (N, T, C)."""
        gate, value, factor = self.in_proj(x).chunk(3, dim=-1)
        gate = self.balancer(gate).tanh()
        value = self.value_whiten(value) * gate
        return self.whiten(self.out_proj(_attend(value, weights, 1) * factor))


def make_uniform(weights: Tensor) -> Tensor:
    """Replace every row by a uniform average over the positions whose weight is > 0."""
    positive = (weights > 0.0).to(weights.dtype)
    return positive / positive.sum(dim=-1, keepdim=True)


def score_softmax(content: Tensor, positional: Tensor | None = None, padding_mask: Tensor | None = None, penalise: bool = False) -> Tensor:
    """Softmax over keys of the sum of scores, in float32 inside; under autocast the result is kept, and returned, in the autocast dtype.

    Args:
        content: (N, H, T, T) scores.
        positional: the same, to be added; None for none.
        padding_mask: (N, T) bool, True at keys that get the weight 0.
        penalise: add a constant gradient that pulls back sums whose size exceeds 25. Only then the scores are kept for the backward pass.
    """
    return _ScoreSoftmax.apply(content, positional, padding_mask, penalise, product_dtype(content))


def _attend(values: Tensor, weights: Tensor, num_heads: int) -> Tensor:
    """Values (N, T, H * d) averaged with weights (N, H, T, T) -> (N, T, H * d)."""
    heads = values.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    return (weights @ heads).transpose(1, 2).flatten(2)


def _align_relative(scores: Tensor) -> Tensor:
    """(N, H, T, 2T-1) scores by offset -> (N, H, T, T) by key: out[t1, t2] = scores[t1, T - 1 + t2 - t1], a view."""
    n, heads, frames, _ = scores.shape
    scores = scores.contiguous()
    stride_n, stride_h, stride_t, _ = scores.stride()
    return scores.as_strided((n, heads, frames, frames), (stride_n, stride_h, stride_t - 1, 1), scores.storage_offset() + frames - 1)


class _ScoreSoftmax(torch.autograd.Function):
    """Saves only its result, in the reduced precision it is used in."""

    @staticmethod
    def forward(
        ctx: Any, content: Tensor, positional: Tensor | None, padding_mask: Tensor | None, penalise: bool, dtype: torch.dtype
    ) -> Tensor:
        weights = _weights(content, positional, padding_mask, dtype)
        scores = None
        if penalise:
            scores = content if positional is None else content + positional
        ctx.save_for_backward(weights, scores)
        ctx.dtype = content.dtype
        return weights

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, scores = ctx.saved_tensors
        # PyTorch's own function is one pass, in float32 inside
        grad = torch._softmax_backward_data(grad.to(weights.dtype), weights, -1, weights.dtype).to(ctx.dtype)
        if scores is not None:  # hardshrink is 0 inside +-limit
            grad += _SCORE_PENALTY * F.hardshrink(scores, _SCORE_LIMIT).sign().to(grad.dtype)
        return grad, grad if ctx.needs_input_grad[1] else None, None, None, None


@fusible
def _weights(content: Tensor, positional: Tensor | None, padding_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    scores = content if positional is None else content + positional
    if padding_mask is not None:
        scores = scores.masked_fill(padding_mask[:, None, None, :], _PADDING_SCORE)
    return F.softmax(scores, dim=-1, dtype=scores.dtype).to(dtype)  # dtype: autocast would make a copy in float32 first
