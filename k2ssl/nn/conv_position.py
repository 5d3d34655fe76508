"""Relative position by convolution: a wide grouped convolution whose output is added to the frames."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.nn.utils.parametrizations import weight_norm


class ConvPosition(nn.Module):
    """Grouped convolution over time with weight normalisation, then GELU; as many frames out as in.

    Frame t sees the frames t - kernel // 2 to t + (kernel - 1) // 2. Frames before the start and after the end count as zeros, so an
    utterance gets the same positions alone and padded, provided that its padded frames are zero.

    Args:
        dim: channels in and out.
        kernel: width in frames.
        groups: groups of channels convolved apart.

    Raises:
        ValueError: a number below 1, or `dim` not a multiple of `groups`.

    Source: arXiv 2006.11477 (wav2vec 2.0), section 2; weight norm over the kernel positions (one gain per tap).
    """

    def __init__(self, dim: int, kernel: int, groups: int) -> None:
        super().__init__()
        if min(dim, kernel, groups) < 1:
            raise ValueError(f"ConvPosition: dim {dim}, kernel {kernel} and groups {groups} must be at least 1")
        if dim % groups:
            raise ValueError(f"ConvPosition: dim {dim} must be a multiple of groups {groups}")
        conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups)
        nn.init.normal_(conv.weight, std=math.sqrt(4.0 / (kernel * dim)))  # before the norm, which takes its gains from the weight
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.conv = weight_norm(conv, dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to (N, T, C)."""
        positions = self.conv(x.transpose(1, 2))
        return gelu(positions[:, :, : x.shape[1]]).transpose(1, 2)  # an even kernel gives one frame too many
