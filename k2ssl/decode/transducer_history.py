"""What a transducer search evaluates after the tokens of a hypothesis: predictor, language model and biasing list.

Everything here depends on the tokens only, so it is kept per hypothesis and computed anew only after a token: most frames emit blank.

Letters beside those of `k2ssl.batch`: M hypotheses of all utterances, V vocabulary size, D width of the joint network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from k2ssl.decode.biasing import ContextGraph
from k2ssl.decode.lm import TokenLm, waiting_is_free


class PredictorLike(Protocol):
    """What a search asks of a predictor; `k2ssl.models.predictor.Predictor` is one."""

    @property
    def context_size(self) -> int: ...

    @property
    def blank(self) -> int: ...

    def step(self, context: Tensor) -> Tensor:
        """(M, context_size) last symbols, -1 before the start -> (M, C)."""


class JoinerLike(Protocol):
    """What a search asks of a joint network; `k2ssl.models.predictor.Joiner` is one."""

    def project_encoder(self, encoder_out: Tensor) -> Tensor: ...

    def project_predictor(self, predictor_out: Tensor) -> Tensor: ...

    def __call__(self, encoder_out: Tensor, predictor_out: Tensor, project_input: bool) -> Tensor:
        """Projected frames and contexts that broadcast against each other -> (..., V) logits."""


@dataclass(frozen=True)
class Fusion:
    """What is added to the log-probabilities of tokens.

    Attributes:
        lm: a language model over the same tokens; None: none.
        lm_scale: its weight, > 0 if there is one.
        lm_final: whether the probability that the sentence ends is added when its frames are used up.
        biasing: phrases that score higher; None: none.
    """

    lm: TokenLm | None = None
    lm_scale: float = 0.0
    lm_final: bool = False
    biasing: ContextGraph | None = None


@dataclass(frozen=True)
class History:
    """What M hypotheses have behind them.

    Attributes:
        context: (M, context_size) last symbols.
        projected: (M, D) the predictor's output as the joint network adds it.
        added: (M, V) what fusion adds to the log-probabilities of the next symbol, 0 for blank; None without fusion.
        lm_state: (M, ...); None without a language model.
        biasing_state: (M,); None without biasing.
    """

    context: Tensor
    projected: Tensor
    added: Tensor | None = None
    lm_state: Tensor | None = None
    biasing_state: Tensor | None = None

    def __getitem__(self, rows: Tensor | slice) -> History:
        return self._map(lambda mine: mine[rows])

    def replace(self, other: History, where: Tensor) -> History:
        """Rows of `other`, which has as many, where the mask (M,) is True."""
        return self._map(lambda mine, its: torch.where(where.view(-1, *[1] * (mine.dim() - 1)), its, mine), other)

    def write(self, rows: Tensor, other: History) -> History:
        """`other` in the rows (indices), the rest as before."""
        return self._map(lambda mine, its: mine.index_copy(0, rows, its), other)

    def _map(self, function: Callable[..., Tensor], *others: History) -> History:
        columns = [[getattr(history, field.name) for history in (self, *others)] for field in fields(self)]
        return History(*[None if column[0] is None else function(*column) for column in columns])  # type: ignore[arg-type]


class HistoryScorer:
    """Makes histories and log-probabilities.

    Args:
        predictor, joiner: the networks.
        device: where the frames are.
        fusion: what is added.

    Raises:
        ValueError: a language model or phrases with another vocabulary than the joint network's.
    """

    def __init__(self, predictor: PredictorLike, joiner: JoinerLike, device: torch.device, fusion: Fusion) -> None:
        self.predictor, self.joiner, self.device = predictor, joiner, device
        self.lm, self.lm_scale, self.lm_final = fusion.lm, fusion.lm_scale, fusion.lm_final
        self.biasing = None if fusion.biasing is None else fusion.biasing.to(device)
        self.skip_unchanged = waiting_is_free(device)
        self.vocab_size = 0
        if self.lm is not None or self.biasing is not None:
            self.vocab_size = self._ask_vocab_size()
            self._check_vocabulary()

    def start(self, batch: int) -> History:
        """`batch` hypotheses without tokens."""
        lm_state = None if self.lm is None else self.lm.start(batch, self.device)
        biasing_state = None if self.biasing is None else self.biasing.start(batch)
        return self._history(self._start_context().repeat(batch, 1), lm_state, biasing_state)

    def advance(self, history: History, token: Tensor, emitted: Tensor) -> History:
        """After the tokens (M,) int64 of the hypotheses for which the mask `emitted` (M,) is True."""
        if not self.skip_unchanged:
            other = 1 if self.predictor.blank == 0 else 0  # a language model never sees blank
            return history.replace(self._after(history, token.where(emitted, other)), emitted)
        rows = emitted.nonzero().squeeze(1)
        if rows.numel() == 0:
            return history
        return history.write(rows, self._after(history[rows], token[rows]))

    def knows_that_none(self, mask: Tensor) -> bool:
        """Whether the mask is False everywhere; False also where the answer would have to be waited for."""
        return self.skip_unchanged and not bool(mask.any())

    def log_probs(self, frames: Tensor, history: History, beam: int, blank_penalty: float, temperature: float) -> Tensor:
        """(N, beam, V) scores of the next symbol at projected frames (N, D), for the histories of N x beam hypotheses."""
        projected = history.projected.unflatten(0, (-1, beam))
        logits = self.joiner(frames.unsqueeze(1), projected, project_input=False)
        scores = log_probs(logits, self.predictor.blank, blank_penalty, temperature)
        return scores if history.added is None else scores + history.added.view_as(scores)

    def final(self, history: History) -> Tensor | None:
        """(M,) what the end of the utterance adds; None: nothing."""
        parts = []
        if self.lm is not None and self.lm_final:
            assert history.lm_state is not None
            parts.append(self.lm_scale * self.lm.final(history.lm_state).float())
        if self.biasing is not None:
            assert history.biasing_state is not None
            parts.append(self.biasing.final(history.biasing_state))
        return sum(parts[1:], parts[0]) if parts else None

    def _after(self, history: History, token: Tensor) -> History:
        lm_state = biasing_state = None
        if self.lm is not None:
            assert history.lm_state is not None
            lm_state = self.lm.advance(history.lm_state, token)
        if self.biasing is not None:
            assert history.biasing_state is not None
            biasing_state = self.biasing.advance(history.biasing_state, token)
        return self._history(torch.cat([history.context[:, 1:], token.unsqueeze(1)], dim=1), lm_state, biasing_state)

    def _history(self, context: Tensor, lm_state: Tensor | None, biasing_state: Tensor | None) -> History:
        projected = self.joiner.project_predictor(self.predictor.step(context))
        parts = []
        if lm_state is not None and self.lm is not None:
            parts.append(self.lm_scale * self.lm.log_probs(lm_state).float())
        if biasing_state is not None and self.biasing is not None:
            parts.append(self.biasing.scores(biasing_state, self.vocab_size))
        if not parts:
            return History(context, projected)
        added = sum(parts[1:], parts[0])
        added[:, self.predictor.blank] = 0.0
        return History(context, projected, added, lm_state, biasing_state)

    def _start_context(self) -> Tensor:
        """(context_size,): nothing, then blank as the start symbol."""
        context = torch.full((self.predictor.context_size,), -1, dtype=torch.int64, device=self.device)
        context[-1] = self.predictor.blank
        return context

    def _ask_vocab_size(self) -> int:
        projected = self.joiner.project_predictor(self.predictor.step(self._start_context().unsqueeze(0)))
        return self.joiner(torch.zeros_like(projected), projected, project_input=False).shape[-1]

    def _check_vocabulary(self) -> None:
        if self.lm is not None and self.lm.vocab_size != self.vocab_size:
            raise ValueError(
                f"the language model's vocabulary has {self.lm.vocab_size} tokens, the model's {self.vocab_size}; both must be the tokenizer's"
            )
        if self.biasing is None:
            return
        if max(self.biasing.tokens) >= self.vocab_size:
            raise ValueError(f"a biasing phrase has token {max(self.biasing.tokens)}, allowed are 0..{self.vocab_size - 1} without blank")
        if self.predictor.blank in self.biasing.tokens:
            raise ValueError(f"a biasing phrase has token {self.predictor.blank}, which is blank")


def log_probs(logits: Tensor, blank: int, blank_penalty: float, temperature: float = 1.0) -> Tensor:
    """(..., V) float32 log-probabilities of logits, the penalty taken off blank's and then all divided by the temperature."""
    logits = logits.float()
    if blank_penalty:
        logits = logits.clone()
        logits[..., blank] -= blank_penalty
    return (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)
