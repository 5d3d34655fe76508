"""Multi-head self-attention on PyTorch's fused kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from k2ssl.nn.schedule import Clock
from k2ssl.nn.seeded import seeded_default_generator


class FusedSelfAttention(nn.Module):
    """Softmax attention of every frame to every visible frame.

    Queries, keys and values come from one matrix product, `qkv`, whose output channels are the queries, then the keys, then the values.

    Args:
        dim: channels in and out.
        num_heads: heads of dim / num_heads channels each.
        dropout: rate at which attention weights are dropped in training.
        clock: where the dropout takes its seeds.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.

    Source: arXiv 1706.03762.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float, clock: Clock) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"FusedSelfAttention: dim {dim} must be a multiple of num_heads {num_heads}, which must be at least 1")
        self.num_heads = num_heads
        self.dropout = dropout
        self.clock = clock
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (N, T, C) frames.
            visible: (N, 1, 1, T) bool, True at frames that may be attended to, at least one per utterance; None, which admits the
                fastest kernels, means all.

        Returns:
            (N, T, C).
        """
        batch, frames, dim = x.shape
        qkv = self.qkv(x).view(batch, frames, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (N, H, T, C / H)
        dropout = self.dropout if self.training else 0.0
        with self._seeded(x.device, dropout):
            context = scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)
        return self.out(context.transpose(1, 2).reshape(batch, frames, dim))

    def _seeded(self, device: torch.device, dropout: float) -> AbstractContextManager[None]:
        return seeded_default_generator(self.clock.draw_seed(), device) if dropout > 0 else nullcontext()
