"""From encoder frames to logits over codes: the two heads of masked prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2ssl.structure import check_types


@dataclass(frozen=True)
class HeadConfig:
    """Which head, and over how many classes.

    Attributes:
        num_classes: classes of each label set, one head per set. The published 504 is 500 clusters rounded up.
        similarity: "linear" (k2SSL: cross-entropy over a linear layer) or "cosine" (HuBERT: noise-contrastive over code embeddings).
        temperature: logits are divided by it.
        code_dim: width of the code embeddings of the cosine head; HuBERT: 256 in Base, 768 in Large.
    """

    num_classes: tuple[int, ...] = (504,)
    similarity: Literal["linear", "cosine"] = "linear"
    temperature: float = 0.1
    code_dim: int = 256

    def __post_init__(self) -> None:
        check_types(self)
        if not self.num_classes or min(self.num_classes) < 2:
            raise ValueError(f"HeadConfig: num_classes is {self.num_classes}, allowed are one or more numbers >= 2")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"HeadConfig: temperature is {self.temperature}, allowed is > 0")
        if self.code_dim < 1:
            raise ValueError(f"HeadConfig: code_dim is {self.code_dim}, allowed is >= 1")


class LinearHead(nn.Module):
    """logits = (W x + b) / temperature. Source: arXiv 2411.17100; upstream hubert_ce."""

    def __init__(self, input_dim: int, num_classes: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.projection = nn.Linear(input_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(M, input_dim) -> (M, K), float32 at least."""
        with torch.autocast(x.device.type, enabled=False):  # rounding errors would be multiplied by 1 / temperature
            return F.linear(_wide(x), _wide(self.projection.weight), _wide(self.projection.bias)) / self.temperature


class CosineHead(nn.Module):
    """logits = cosine(W x + b, code embedding) / temperature.

    HuBERT takes the softmax over the label's code and all *other* codes as negatives, which is the softmax over all codes: one matrix
    product instead of a (K + 1, M, code_dim) tensor.

    Source: arXiv 2106.07447, equation 3.
    """

    def __init__(self, input_dim: int, num_classes: int, code_dim: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.projection = nn.Linear(input_dim, code_dim)
        self.codes = nn.Parameter(torch.rand(num_classes, code_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(M, input_dim) -> (M, K), float32 at least."""
        x = F.normalize(_wide(self.projection(x)), dim=-1)
        codes = F.normalize(_wide(self.codes), dim=-1)
        with torch.autocast(x.device.type, enabled=False):  # a cosine in half precision, times 1 / temperature, is off by several percent
            return x @ codes.t() / self.temperature


def build_head(config: HeadConfig, input_dim: int, num_classes: int) -> nn.Module:
    """The head for one label set."""
    if config.similarity == "cosine":
        return CosineHead(input_dim, num_classes, config.code_dim, config.temperature)
    return LinearHead(input_dim, num_classes, config.temperature)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
