"""The pruned transducer on encoder frames: predictor, joint network and the simple loss that tells where to prune.

Source: arXiv 2206.13236 (pruning), arXiv 2109.07513 (stateless predictor). Upstream: AsrModel.forward_transducer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from k2ssl.losses.transducer import pruned_loss, simple_loss
from k2ssl.losses.transducer_lattice import make_boundary
from k2ssl.losses.transducer_pruning import prune, prune_ranges
from k2ssl.models.ctc_head import linear_float32
from k2ssl.models.predictor import Joiner, JoinerConfig, Predictor, PredictorConfig, with_start
from k2ssl.nn.initial import scale_initial
from k2ssl.nn.schedule import Clock
from k2ssl.structure import check_types

_SIMPLE_INITIAL_SCALE = 0.25


@dataclass(frozen=True)
class TransducerConfig:
    """Sizes and loss of the transducer; the defaults are the published ones.

    Attributes:
        predictor_dim: width of the predictor.
        context_size: how many symbols the predictor sees.
        joiner_dim: width in which encoder and predictor are added.
        prune_range: symbol positions that the joint network computes per frame, at least 2. Utterances of more than prune_range - 1
            tokens a frame are left out and counted.
        lm_scale: share of the predictor alone in the log-probabilities of the simple loss, which finds what the pruned one computes.
        am_scale: share in them of the encoder alone. If it is not 0 the loss of an utterance depends on what it is batched with.

    Raises:
        ValueError: a value out of range.
    """

    predictor_dim: int = 512
    context_size: int = 2
    joiner_dim: int = 512
    prune_range: int = 5
    lm_scale: float = 0.25
    am_scale: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in (("predictor_dim", 1), ("context_size", 1), ("joiner_dim", 1), ("prune_range", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"TransducerConfig: {name} is {getattr(self, name)}, allowed are whole numbers >= {least}")
        if not (0.0 <= self.lm_scale <= 1.0 and 0.0 <= self.am_scale <= 1.0 and self.lm_scale + self.am_scale <= 1.0):
            raise ValueError(
                f"TransducerConfig: lm_scale is {self.lm_scale} and am_scale {self.am_scale}, allowed are numbers in 0..1 that sum to at most 1"
            )


@dataclass(frozen=True)
class TransducerSums:
    """Sums over the utterances of a batch that fit into the pruning window.

    Attributes:
        simple, pruned: scalar losses in nats, float32 at least, with gradient.
        fits: (N,) bool on the CPU, which utterances are meant.
    """

    simple: Tensor
    pruned: Tensor
    fits: Tensor


class TransducerHead(nn.Module):
    """Predictor, joint network, and the two projections of the simple loss.

    Args:
        config: sizes.
        input_dim: channels of the encoder's frames.
        vocab_size: number of tokens, blank among them.
        blank: blank's id.
        clock: what the predictor draws from in training.
    """

    def __init__(self, config: TransducerConfig, input_dim: int, vocab_size: int, blank: int, clock: Clock) -> None:
        super().__init__()
        self.config = config
        self.blank = blank
        self.predictor = Predictor(PredictorConfig(vocab_size, config.predictor_dim, config.context_size, blank), clock)
        self.joiner = Joiner(JoinerConfig(input_dim, config.predictor_dim, vocab_size, config.joiner_dim))
        self.simple_am = scale_initial(nn.Linear(input_dim, vocab_size), _SIMPLE_INITIAL_SCALE)
        self.simple_lm = scale_initial(nn.Linear(config.predictor_dim, vocab_size), _SIMPLE_INITIAL_SCALE)

    def loss(self, frames: Tensor, frame_lens: Tensor, tokens: Tensor, token_lens: Tensor) -> TransducerSums:
        """Simple and pruned loss.

        Args:
            frames: (N, T, C) of the encoder.
            frame_lens: (N,) int64 CPU.
            tokens: (N, U) int64, anything at padding.
            token_lens: (N,) int64 CPU.
        """
        inside = torch.arange(tokens.shape[1], device=tokens.device) < token_lens.to(tokens.device, non_blocking=True).unsqueeze(1)
        tokens = tokens.masked_fill(~inside, self.blank)  # an embedding has no row for what may stand at padding
        boundary = make_boundary(token_lens, frame_lens)
        context = self.predictor(with_start(tokens, self.blank))
        simple = simple_loss(
            linear_float32(self.simple_am, frames),
            linear_float32(self.simple_lm, context),
            tokens,
            boundary,
            self.blank,
            self.config.lm_scale,
            self.config.am_scale,
        )
        ranges = prune_ranges(simple.px_grad, simple.py_grad, boundary, self.config.prune_range)
        am, lm = prune(self.joiner.project_encoder(frames), self.joiner.project_predictor(context), ranges)
        pruned = pruned_loss(self.joiner(am, lm, project_input=False), tokens, ranges, boundary, self.blank)
        fits = token_lens <= (self.config.prune_range - 1) * frame_lens
        return TransducerSums(_sum_of(simple.loss, fits), _sum_of(pruned, fits), fits)


def _sum_of(losses: Tensor, chosen: Tensor) -> Tensor:
    """The loss of an utterance that does not fit is infinite, its gradient zero."""
    return torch.where(chosen.to(losses.device, non_blocking=True), losses, 0.0).sum()
