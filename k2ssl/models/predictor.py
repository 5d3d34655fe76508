"""The stateless predictor and the joint network of the transducer.

The predictor sees only the last few symbols: an embedding and a grouped convolution over `context_size` of them. A negative symbol
means "before the start" (or padding) and embeds to zero. A transcript's row of contexts begins with blank, which plays the start
symbol: `with_start`.

Source: arXiv 2109.07513 (stateless predictor), arXiv 2310.11230 (sizes and balancers). Upstream: Decoder and Joiner.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2ssl.nn.balancer import Balancer
from k2ssl.nn.schedule import Clock
from k2ssl.structure import check_types

_CHANNELS_PER_GROUP = 4


@dataclass(frozen=True)
class PredictorConfig:
    """Size of `Predictor`.

    Attributes:
        vocab_size: number of symbols, blank among them.
        dim: width of embedding and output, a multiple of 4 (of the convolution's groups) unless `context_size` is 1.
        context_size: how many symbols an output depends on; 1 leaves the convolution out.
        blank: id of blank, which is also the start symbol.

    Raises:
        ValueError: a field outside its range.
    """

    vocab_size: int
    dim: int = 512
    context_size: int = 2
    blank: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in (("vocab_size", 2), ("dim", 1), ("context_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"PredictorConfig: {name} is {getattr(self, name)}, at least {least} is needed")
        if not 0 <= self.blank < self.vocab_size:
            raise ValueError(f"PredictorConfig: blank is {self.blank}, allowed are 0..{self.vocab_size - 1}")
        if self.context_size > 1 and self.dim % _CHANNELS_PER_GROUP:
            raise ValueError(f"PredictorConfig: dim is {self.dim}, a multiple of {_CHANNELS_PER_GROUP} is needed")


class Predictor(nn.Module):
    """Embedding and context of the symbols emitted so far.

    Args:
        config: its size.
        clock: what the balancers draw from in training.
    """

    def __init__(self, config: PredictorConfig, clock: Clock) -> None:
        super().__init__()
        self.config = config
        self.context_size = config.context_size
        self.blank = config.blank
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.embedding_balancer = _balancer(clock)
        self.conv: nn.Conv1d | None = None
        if config.context_size > 1:
            groups = config.dim // _CHANNELS_PER_GROUP
            self.conv = nn.Conv1d(config.dim, config.dim, kernel_size=config.context_size, groups=groups, bias=False)
            self.conv_balancer = _balancer(clock)

    def forward(self, symbols: Tensor) -> Tensor:
        """All contexts of a transcript at once, for training.

        Args:
            symbols: (N, U) int64, usually of `with_start`; negative where there is no symbol.

        Returns:
            (N, U, C): row u depends on symbols u - context_size + 1 .. u.

        Raises:
            ValueError: not a two-dimensional int64 tensor.
        """
        _check_symbols(symbols)
        return self._context(F.pad(symbols, (self.context_size - 1, 0), value=-1))

    def step(self, context: Tensor) -> Tensor:
        """The one output after the last `context_size` symbols, for searches: (M, context_size) int64 -> (M, C).

        Raises:
            ValueError: not an int64 tensor of that shape.
        """
        _check_symbols(context)
        if context.shape[1] != self.context_size:
            raise ValueError(f"Predictor.step: context has shape {tuple(context.shape)}, (M, {self.context_size}) is needed")
        embedded = self._embed(context)
        if self.conv is None:
            return embedded.squeeze(1)
        # The convolution at its one place, as matrix products: on a CPU several times faster for the few rows of a search, most of all where
        # their number changes from step to step.
        columns = embedded.mT.unflatten(1, (self.conv.groups, -1)).flatten(2).transpose(0, 1)
        weight = self.conv.weight.unflatten(0, (self.conv.groups, -1)).flatten(2)
        return self.conv_balancer(torch.bmm(columns, weight.mT).transpose(0, 1).flatten(1).relu())

    def _context(self, symbols: Tensor) -> Tensor:
        """(N, U + context_size - 1) symbols -> (N, U, C)."""
        embedded = self._embed(symbols)
        if self.conv is None:
            return embedded
        return self.conv_balancer(self.conv(embedded.mT).mT.relu())

    def _embed(self, symbols: Tensor) -> Tensor:
        """(N, U) -> (N, U, C), zero where a symbol is negative."""
        embedded = self.embedding(symbols.clamp(min=0)) * (symbols >= 0).unsqueeze(-1)
        return self.embedding_balancer(embedded)


def with_start(symbols: Tensor, blank: int = 0) -> Tensor:
    """(N, S) -> (N, S+1): blank in front of every transcript, as the start symbol."""
    return F.pad(symbols, (1, 0), value=blank)


@dataclass(frozen=True)
class JoinerConfig:
    """Size of `Joiner`.

    Attributes:
        encoder_dim: width of the encoder's output.
        predictor_dim: width of the predictor's output.
        vocab_size: number of symbols, blank among them.
        dim: width in which the two are added.

    Raises:
        ValueError: a field outside its range.
    """

    encoder_dim: int
    predictor_dim: int
    vocab_size: int
    dim: int = 512

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in (("encoder_dim", 1), ("predictor_dim", 1), ("vocab_size", 2), ("dim", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"JoinerConfig: {name} is {getattr(self, name)}, at least {least} is needed")


class Joiner(nn.Module):
    """Logits of the next symbol (or blank) from one frame and one context."""

    def __init__(self, config: JoinerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder_proj = nn.Linear(config.encoder_dim, config.dim)
        self.decoder_proj = nn.Linear(config.predictor_dim, config.dim)
        self.output_linear = nn.Linear(config.dim, config.vocab_size)

    def project_encoder(self, encoder_out: Tensor) -> Tensor:
        """(..., encoder_dim) -> (..., dim)."""
        return self.encoder_proj(encoder_out)

    def project_predictor(self, predictor_out: Tensor) -> Tensor:
        """(..., predictor_dim) -> (..., dim)."""
        return self.decoder_proj(predictor_out)

    def forward(self, encoder_out: Tensor, predictor_out: Tensor, project_input: bool = True) -> Tensor:
        """Unnormalised logits.

        Args:
            encoder_out, predictor_out: (..., encoder_dim) and (..., predictor_dim), leading axes equal or broadcastable; with
                `project_input` False already projected, (..., dim). Pruned training projects once per frame and per symbol and then
                gathers; searches project each frame once.

        Returns:
            (..., V).
        """
        if project_input:
            encoder_out, predictor_out = self.project_encoder(encoder_out), self.project_predictor(predictor_out)
        return self.output_linear(torch.tanh(encoder_out + predictor_out))


def _balancer(clock: Clock) -> Balancer:
    return Balancer(clock, min_positive=0.0, max_positive=1.0, min_abs=0.5, max_abs=1.0, probability=0.05)


def _check_symbols(symbols: Tensor) -> None:
    if symbols.dim() != 2 or symbols.dtype != torch.int64:
        raise ValueError(f"Predictor: symbols must be (N, U) int64, got {symbols.dtype} {tuple(symbols.shape)}")
