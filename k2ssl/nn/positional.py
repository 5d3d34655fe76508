"""Relative positions, compressed so that near offsets are told apart finely and far ones coarsely."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def relative_positions(num_frames: int, dim: int, device: torch.device, length_factor: float = 1.0) -> Tensor:
    """(2 T - 1, dim) float32 table; row r encodes the offset r - (T - 1) between two of T frames.

    An offset x becomes c = L sign(x) (log(|x| + L) - log L) with L = sqrt(dim), then an angle a = atan(2 pi c / (dim * length_factor));
    columns are cos(k a), sin(k a) for k = 1 .. dim/2 in turn, and the last column is the constant 1.

    Source: arXiv 2310.11230, section 3.1 and its code; upstream CompactRelPositionalEncoding.

    Raises:
        ValueError: `dim` is odd, or less than 2.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"relative_positions: dim is {dim}, an even number >= 2 is needed")
    offsets = torch.arange(-(num_frames - 1), num_frames, device=device, dtype=torch.float32)
    compression = math.sqrt(dim)
    compressed = compression * offsets.sign() * ((offsets.abs() + compression).log() - math.log(compression))
    angles = (compressed / (length_factor * dim / (2.0 * math.pi))).atan().unsqueeze(1)
    angles = angles * torch.arange(1, dim // 2 + 1, device=device, dtype=torch.float32)
    table = torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(1)
    table[:, -1] = 1.0
    return table
