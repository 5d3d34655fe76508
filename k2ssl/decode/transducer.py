"""Searches over a transducer with a stateless predictor: greedy, and the modified beam search.

Both advance all utterances (and all hypotheses) together, frame by frame: one call of predictor and joint network per step, and nothing
waits for the device before the end. Utterances do not influence each other; a shorter one is frozen after its last frame.

Letters beside those of `k2ssl.batch`: B hypotheses in a beam, V vocabulary size.

Put the networks into evaluation mode before searching. Upstream: greedy_search_batch and modified_beam_search.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from k2ssl.decode.hypotheses import Hypothesis

NEG_INF = float("-inf")


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


@torch.no_grad()
def greedy_search(
    predictor: PredictorLike,
    joiner: JoinerLike,
    encoder_out: Tensor,
    encoder_out_lens: Tensor,
    max_symbols_per_frame: int = 1,
    blank_penalty: float = 0.0,
) -> list[Hypothesis]:
    """At each frame take the most probable symbol, again until that is blank or the frame has emitted its share.

    Args:
        predictor, joiner: the networks.
        encoder_out: (N, T, C).
        encoder_out_lens: (N,) int64 CPU frame counts.
        max_symbols_per_frame: a frame's share, at least 1.
        blank_penalty: subtracted from blank's logit; larger values mean fewer deletions.

    Returns:
        One hypothesis per utterance; its score is the log-probability of the path taken.

    Raises:
        ValueError: shapes, dtypes or lengths that do not fit, `max_symbols_per_frame` below 1.
    """
    _check_encoder_out(encoder_out, encoder_out_lens)
    if max_symbols_per_frame < 1:
        raise ValueError(f"greedy_search: max_symbols_per_frame is {max_symbols_per_frame}, at least 1 is needed")
    batch, num_frames, _ = encoder_out.shape
    blank = predictor.blank
    frames = joiner.project_encoder(encoder_out)
    lens = encoder_out_lens.to(frames.device, non_blocking=True)
    context = _start_context(predictor, frames.device).repeat(batch, 1)
    projected = joiner.project_predictor(predictor.step(context))
    score = torch.zeros(batch, device=frames.device)
    emitted = []
    for t in range(num_frames):
        going_on = t < lens
        for _ in range(max_symbols_per_frame):
            logits = joiner(frames[:, t], projected, project_input=False)
            log_prob, token = _log_probs(logits, blank, blank_penalty).max(-1)
            score = torch.where(going_on, score + log_prob, score)
            going_on = going_on & (token != blank)
            emitted.append(torch.where(going_on, token, blank))
            context = torch.where(going_on.unsqueeze(1), _append(context, token), context)
            projected = joiner.project_predictor(predictor.step(context))
    if not emitted:
        return [Hypothesis((), 0.0) for _ in range(batch)]
    tokens = torch.stack(emitted, dim=1).tolist()
    return [_hypothesis(row, value, blank, max_symbols_per_frame) for row, value in zip(tokens, score.tolist(), strict=True)]


@torch.no_grad()
def modified_beam_search(
    predictor: PredictorLike,
    joiner: JoinerLike,
    encoder_out: Tensor,
    encoder_out_lens: Tensor,
    beam: int = 4,
    temperature: float = 1.0,
    blank_penalty: float = 0.0,
    num_hypotheses: int = 1,
) -> list[list[Hypothesis]]:
    """Beam search with at most one symbol a frame.

    Each frame keeps the `beam` best continuations and then adds up the probabilities of those with equal tokens. What remains at an
    utterance's end is ranked by score / (number of tokens + context_size); upstream counts the start symbols in the length.

    Args:
        predictor, joiner: the networks.
        encoder_out: (N, T, C).
        encoder_out_lens: (N,) int64 CPU frame counts.
        beam: hypotheses kept per utterance, at least 1.
        temperature: divides the logits, after the blank penalty; > 0.
        blank_penalty: subtracted from blank's logit; larger values mean fewer deletions.
        num_hypotheses: how many to return per utterance, 1..beam.

    Returns:
        Per utterance its best hypotheses, best first; fewer than asked for where fewer differ. Their frames are those of the best
        alignment at each merge.

    Raises:
        ValueError: shapes, dtypes, lengths or settings that do not fit.
    """
    _check_encoder_out(encoder_out, encoder_out_lens)
    _check_beam(beam, temperature, num_hypotheses)
    batch, num_frames, _ = encoder_out.shape
    frames = joiner.project_encoder(encoder_out)
    lens = encoder_out_lens.to(frames.device, non_blocking=True)
    beams = _start_beams(predictor, batch, beam, frames.device)
    steps = []
    for t in range(num_frames):
        projected = joiner.project_predictor(predictor.step(beams.context.flatten(0, 1))).unflatten(0, (batch, beam))
        logits = joiner(frames[:, t].unsqueeze(1), projected, project_input=False)
        log_probs = _log_probs(logits, predictor.blank, blank_penalty, temperature)
        extended, step = _extend(beams, log_probs, predictor.blank)
        beams, step = _freeze(beams, extended, step, t < lens, predictor.blank)
        steps.append(step)
    return _collect(beams, steps, predictor, num_hypotheses)


@dataclass(frozen=True)
class _Beams:
    """B hypotheses of each utterance; a score of -inf marks an unused place.

    Attributes:
        context: (N, B, context_size) last symbols.
        score: (N, B) log-probability.
        length: (N, B) number of tokens.
        prefix: (N, B) hash of all tokens.
    """

    context: Tensor
    score: Tensor
    length: Tensor
    prefix: Tensor


@dataclass(frozen=True)
class _Step:
    """Where each hypothesis came from: (N, B) place in the previous beam, and (N, B) token, blank if none was added."""

    parent: Tensor
    token: Tensor


def _start_beams(predictor: PredictorLike, batch: int, beam: int, device: torch.device) -> _Beams:
    score = torch.full((batch, beam), NEG_INF, device=device)
    score[:, 0] = 0.0
    zeros = torch.zeros(batch, beam, dtype=torch.int64, device=device)
    return _Beams(_start_context(predictor, device).repeat(batch, beam, 1), score, zeros, zeros)


def _extend(beams: _Beams, log_probs: Tensor, blank: int) -> tuple[_Beams, _Step]:
    """The best continuations by one frame, equal ones merged; log_probs (N, B, V)."""
    beam, vocab_size = log_probs.shape[1:]
    score, index = (beams.score.unsqueeze(2) + log_probs).flatten(1).topk(beam, dim=1)
    parent, token = index.div(vocab_size, rounding_mode="floor"), index % vocab_size
    is_token = token != blank
    context = beams.context.gather(1, parent.unsqueeze(2).expand_as(beams.context))
    prefix = beams.prefix.gather(1, parent)
    extended = _Beams(
        context=torch.where(is_token.unsqueeze(2), _append(context, token), context),
        score=score,
        length=beams.length.gather(1, parent) + is_token,
        prefix=torch.where(is_token, _hash_on(prefix, token), prefix),
    )
    return _merge(extended), _Step(parent, token)


def _merge(beams: _Beams) -> _Beams:
    """Give the first of several hypotheses with equal tokens the sum of their probabilities and free the places of the others."""
    same = beams.prefix.unsqueeze(2) == beams.prefix.unsqueeze(1)
    same &= beams.length.unsqueeze(2) == beams.length.unsqueeze(1)
    total = beams.score.unsqueeze(1).where(same, NEG_INF).logsumexp(2)
    repeats = same.tril(diagonal=-1).any(2)
    return _Beams(beams.context, total.masked_fill(repeats, NEG_INF), beams.length, beams.prefix)


def _freeze(before: _Beams, after: _Beams, step: _Step, running: Tensor, blank: int) -> tuple[_Beams, _Step]:
    """Keep utterances whose frames are used up as they are; running (N,) is True for the others."""
    chosen = []
    for field in fields(_Beams):
        old, new = getattr(before, field.name), getattr(after, field.name)
        chosen.append(torch.where(running.view(-1, *[1] * (new.dim() - 1)), new, old))
    unchanged = torch.arange(step.parent.shape[1], device=running.device)
    running = running.unsqueeze(1)
    return _Beams(*chosen), _Step(torch.where(running, step.parent, unchanged), torch.where(running, step.token, blank))


def _collect(beams: _Beams, steps: list[_Step], predictor: PredictorLike, num_hypotheses: int) -> list[list[Hypothesis]]:
    """Rank what is left and follow it back to the start."""
    ranking = beams.score / (beams.length + predictor.context_size)
    place = ranking.sort(dim=1, descending=True, stable=True).indices[:, :num_hypotheses].cpu()
    scores = beams.score.cpu().gather(1, place)
    tokens = torch.full((*place.shape, len(steps)), predictor.blank, dtype=torch.int64)
    if steps:
        parents, added = torch.stack([step.parent for step in steps]).cpu(), torch.stack([step.token for step in steps]).cpu()
        for t in range(len(steps) - 1, -1, -1):
            tokens[:, :, t] = added[t].gather(1, place)
            place = parents[t].gather(1, place)
    return [
        [_hypothesis(row, score, predictor.blank) for row, score in zip(rows, row_scores, strict=True) if score > NEG_INF]
        for rows, row_scores in zip(tokens.tolist(), scores.tolist(), strict=True)
    ]


def _hypothesis(symbols: list[int], score: float, blank: int, symbols_per_frame: int = 1) -> Hypothesis:
    """From what was emitted at every step, blanks included."""
    kept = [(step // symbols_per_frame, symbol) for step, symbol in enumerate(symbols) if symbol != blank]
    return Hypothesis(tokens=tuple(symbol for _, symbol in kept), score=score, frames=tuple(frame for frame, _ in kept))


def _log_probs(logits: Tensor, blank: int, blank_penalty: float, temperature: float = 1.0) -> Tensor:
    """(..., V) float32 log-probabilities."""
    logits = logits.float()
    if blank_penalty:
        logits = logits.clone()
        logits[..., blank] -= blank_penalty
    return (logits / temperature).log_softmax(-1)


def _start_context(predictor: PredictorLike, device: torch.device) -> Tensor:
    """(context_size,): nothing, then blank as the start symbol."""
    context = torch.full((predictor.context_size,), -1, dtype=torch.int64, device=device)
    context[-1] = predictor.blank
    return context


def _append(context: Tensor, token: Tensor) -> Tensor:
    """(..., context_size) and (...,) -> (..., context_size), the oldest symbol dropped."""
    return torch.cat([context[..., 1:], token.unsqueeze(-1)], dim=-1)


def _hash_on(prefix: Tensor, token: Tensor) -> Tensor:
    """Hash of a prefix with one more token; 64 bits, wrapping around.

    Among a beam's few prefixes of equal length two different ones collide with a probability of about 2^-64 per pair. The odd
    multiplier is that of splitmix64; shifting lets high bits reach the low ones.
    """
    mixed = (prefix ^ (token + 1)) * -0x40A7B892E31B1A47
    return mixed ^ (mixed >> 31)


def _check_encoder_out(encoder_out: Tensor, encoder_out_lens: Tensor) -> None:
    if encoder_out.dim() != 3:
        raise ValueError(f"encoder_out has shape {tuple(encoder_out.shape)}, (N, T, C) is needed")
    batch, num_frames, _ = encoder_out.shape
    lens = encoder_out_lens
    if lens.dtype != torch.int64 or lens.shape != (batch,) or lens.device.type != "cpu":
        raise ValueError(
            f"encoder_out_lens must be int64 of shape ({batch},) on the CPU, got {lens.dtype} {tuple(lens.shape)} on {lens.device}"
        )
    for row, length in enumerate(lens.tolist()):
        if not 0 <= length <= num_frames:
            raise ValueError(f"encoder_out_lens of utterance {row} is {length}, allowed are 0..{num_frames}")


def _check_beam(beam: int, temperature: float, num_hypotheses: int) -> None:
    if beam < 1:
        raise ValueError(f"modified_beam_search: beam is {beam}, at least 1 is needed")
    if not 1 <= num_hypotheses <= beam:
        raise ValueError(f"modified_beam_search: num_hypotheses is {num_hypotheses}, allowed are 1..{beam} (beam)")
    if not temperature > 0:
        raise ValueError(f"modified_beam_search: temperature is {temperature}, a number > 0 is needed")
