"""Connectionist temporal classification on encoder frames.

Source: Graves et al. 2006, "Connectionist temporal classification"; sizes: upstream's ctc_output (dropout, one linear layer).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2ssl.losses.ctc import CtcSums, ctc_sums
from k2ssl.nn.dropout import Dropout
from k2ssl.nn.schedule import Clock
from k2ssl.structure import check_types


@dataclass(frozen=True)
class CtcConfig:
    """The head, whose classes are the model's vocabulary.

    Attributes:
        dropout: rate on the encoder's frames.
        deterministic: the same gradients bit by bit in every run; on a GPU the loss is then computed on the CPU, for which steps wait.

    Raises:
        ValueError: a rate out of range.
    """

    dropout: float = 0.1
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"CtcConfig: dropout is {self.dropout}, allowed is 0 <= dropout < 1")


class CtcHead(nn.Module):
    """Dropout and one linear layer."""

    def __init__(self, config: CtcConfig, input_dim: int, vocab_size: int, clock: Clock) -> None:
        super().__init__()
        self.config = config
        self.dropout = Dropout(config.dropout, clock)
        self.projection = nn.Linear(input_dim, vocab_size)

    def forward(self, frames: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, V) log-probabilities, float32 at least."""
        return linear_float32(self.projection, self.dropout(frames)).log_softmax(dim=-1)

    def loss(self, frames: Tensor, frame_lens: Tensor, tokens: Tensor, token_lens: Tensor, blank: int) -> CtcSums:
        """Sums over the utterances that have frames enough for their tokens; (N, T, C), (N,) CPU, (N, U), (N,) CPU."""
        return ctc_sums(self(frames), frame_lens, tokens, token_lens, blank=blank, deterministic=self.config.deterministic)


def linear_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)` in float32 at least, whatever the autocast: in bfloat16 a logit of 20 is off by up to 0.06."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), layer.weight.to(dtype), bias)
