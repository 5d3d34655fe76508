"""Searches over a transducer with a stateless predictor: greedy, and the modified beam search.

Both advance all utterances (and all hypotheses) together, frame by frame: one call of the joint network per step, and nothing waits for
the device before the end. Utterances do not influence each other; they are taken longest first, and one whose frames are used up leaves
the batch. What does that, and what is computed after a token, is in `k2ssl.decode.transducer_history`.

Letters beside those of `k2ssl.batch`: B hypotheses in a beam, V vocabulary size.

Put the networks into evaluation mode before searching. Upstream: greedy_search_batch and modified_beam_search(_lm_shallow_fusion).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from k2ssl.decode.biasing import ContextGraph
from k2ssl.decode.hypotheses import Hypothesis
from k2ssl.decode.lm import TokenLm
from k2ssl.decode.prefix_hash import hash_on
from k2ssl.decode.transducer_history import Fusion, History, HistoryScorer, JoinerLike, PredictorLike

NEG_INF = float("-inf")

_T = TypeVar("_T")


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
        One hypothesis per utterance; its score is the log-probability of the path taken. A frame that has emitted its share is left
        without a blank, which is then no part of the path.

    Raises:
        ValueError: shapes, dtypes or lengths that do not fit, `max_symbols_per_frame` below 1.
    """
    _check_encoder_out(encoder_out, encoder_out_lens)
    if max_symbols_per_frame < 1:
        raise ValueError(f"greedy_search: max_symbols_per_frame is {max_symbols_per_frame}, at least 1 is needed")
    frames, order, running = _longest_first(joiner, encoder_out, encoder_out_lens)
    batch, blank = frames.shape[0], predictor.blank
    scorer = HistoryScorer(predictor, joiner, frames.device, Fusion())
    history = scorer.start(batch)
    score = torch.zeros(batch, device=frames.device)
    emitted, frame_of = [], []
    for t, n in enumerate(running):
        history = history[:n]
        going_on = torch.ones(n, dtype=torch.bool, device=frames.device)
        for _ in range(max_symbols_per_frame):
            log_prob, token = scorer.log_probs(frames[:n, t], history, 1, blank_penalty, 1.0).squeeze(1).max(-1)
            score[:n] += log_prob.where(going_on, 0.0)
            going_on = going_on & (token != blank)
            emitted.append(torch.where(going_on, token, blank))
            frame_of.append(t)
            history = scorer.advance(history, token, going_on)
            if scorer.knows_that_none(going_on):
                break
    rows = _pad(emitted, batch, blank).tolist()
    found = [_hypothesis(row, value, blank, frame_of) for row, value in zip(rows, score.tolist(), strict=True)]
    return _as_given(found, order)


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
    lm: TokenLm | None = None,
    lm_scale: float = 0.0,
    biasing: ContextGraph | None = None,
    lm_final: bool = False,
) -> list[list[Hypothesis]]:
    """Beam search with at most one symbol a frame.

    Each frame keeps the `beam` best continuations and then adds up the probabilities of those with equal tokens. What remains at an
    utterance's end is ranked by score / (number of tokens + context_size); upstream counts the start symbols in the length.

    Fusion adds to the log-probability of every token that is not blank `lm_scale` times its log-probability in the language model, and
    what the biasing list gives it, *before* the best continuations are chosen (upstream chooses by the transducer alone and adds
    afterwards). As both depend on the tokens only, the score of a hypothesis is

        log P(tokens | audio) + lm_scale * log P_lm(tokens) + score * (tokens in biasing phrases)

    with the alignments that the search kept in the first term. With fusion the ranking divides this sum.

    Args:
        predictor, joiner: the networks.
        encoder_out: (N, T, C).
        encoder_out_lens: (N,) int64 CPU frame counts.
        beam: hypotheses kept per utterance, at least 1.
        temperature: divides the logits, after the blank penalty; > 0.
        blank_penalty: subtracted from blank's logit; larger values mean fewer deletions.
        num_hypotheses: how many to return per utterance, 1..beam.
        lm: a language model over the same tokens.
        lm_scale: its weight, >= 0; with 0 the model is not asked.
        biasing: phrases that score higher.
        lm_final: whether P_lm has the probability that the sentence ends; upstream leaves it out.

    Returns:
        Per utterance its best hypotheses, best first; fewer than asked for where fewer differ. Their frames are those of the best
        alignment at each merge. Where the networks give nan, so are the scores.

    Raises:
        ValueError: shapes, dtypes, lengths or settings that do not fit; an `lm` or `biasing` with another vocabulary.
    """
    _check_encoder_out(encoder_out, encoder_out_lens)
    _check_beam(beam, temperature, num_hypotheses)
    fusion = _fusion(lm, lm_scale, lm_final, biasing)
    frames, order, running = _longest_first(joiner, encoder_out, encoder_out_lens)
    scorer = HistoryScorer(predictor, joiner, frames.device, fusion)
    beams = _start_beams(scorer, frames.shape[0], beam)
    steps, finished = [], []
    for t, n in enumerate(running):
        if n < len(beams.score):
            finished.append(_finish(beams.rows(slice(n, None)), scorer))
            beams = beams.rows(slice(n))
        scores = scorer.log_probs(frames[:n, t], beams.history, beam, blank_penalty, temperature)
        beams, step = _extend(beams, scores, scorer)
        steps.append(step)
    finished.append(_finish(beams, scorer))
    return _as_given(_collect(finished[::-1], steps, predictor, num_hypotheses), order)


@dataclass(frozen=True)
class _Beams:
    """B hypotheses of each utterance; a score of -inf marks an unused place.

    Attributes:
        score: (N, B) log-probability.
        length: (N, B) number of tokens.
        prefix: (N, B) hash of all tokens.
        history: of all N x B.
    """

    score: Tensor
    length: Tensor
    prefix: Tensor
    history: History

    def rows(self, rows: slice) -> _Beams:
        """Some of the utterances."""
        beam = self.score.shape[1]
        start, stop = (None if end is None else end * beam for end in (rows.start, rows.stop))
        return _Beams(self.score[rows], self.length[rows], self.prefix[rows], self.history[start:stop])


@dataclass(frozen=True)
class _Step:
    """Where each hypothesis came from: (N, B) place in the previous beam, and (N, B) token, blank if none was added."""

    parent: Tensor
    token: Tensor


def _start_beams(scorer: HistoryScorer, batch: int, beam: int) -> _Beams:
    score = torch.full((batch, beam), NEG_INF, device=scorer.device)
    score[:, 0] = 0.0
    zeros = torch.zeros(batch, beam, dtype=torch.int64, device=scorer.device)
    return _Beams(score, zeros, zeros, scorer.start(batch * beam))


def _extend(beams: _Beams, log_probs: Tensor, scorer: HistoryScorer) -> tuple[_Beams, _Step]:
    """The best continuations by one frame, equal ones merged; log_probs (N, B, V)."""
    batch, beam, vocab_size = log_probs.shape
    score, index = (beams.score.unsqueeze(2) + log_probs).flatten(1).topk(beam, dim=1)
    parent, token = index.div(vocab_size, rounding_mode="floor"), index % vocab_size
    is_token = token != scorer.predictor.blank
    prefix = beams.prefix.gather(1, parent)
    prefix = torch.where(is_token, hash_on(prefix, token), prefix)
    length = beams.length.gather(1, parent) + is_token
    score = _merge(score, length, prefix)
    first = torch.arange(0, batch * beam, beam, device=score.device).unsqueeze(1)
    needed = is_token & (score > NEG_INF)
    history = scorer.advance(beams.history[(first + parent).flatten()], token.flatten(), needed.flatten())
    return _Beams(score, length, prefix, history), _Step(parent, token)


def _merge(score: Tensor, length: Tensor, prefix: Tensor) -> Tensor:
    """Scores (N, B), where the first of several hypotheses with equal tokens has the sum of their probabilities and the others' places
    are unused."""
    same = (prefix.unsqueeze(2) == prefix.unsqueeze(1)) & (length.unsqueeze(2) == length.unsqueeze(1))
    total = score.unsqueeze(1).where(same, NEG_INF).logsumexp(2)
    return total.masked_fill(same.tril(diagonal=-1).any(2), NEG_INF)


@dataclass(frozen=True)
class _Finished:
    """(N, B) scores with what the end adds, and number of tokens, of utterances whose frames are used up."""

    score: Tensor
    length: Tensor


def _finish(beams: _Beams, scorer: HistoryScorer) -> _Finished:
    final = scorer.final(beams.history)
    return _Finished(beams.score if final is None else beams.score + final.view_as(beams.score), beams.length)


def _collect(finished: list[_Finished], steps: list[_Step], predictor: PredictorLike, num_hypotheses: int) -> list[list[Hypothesis]]:
    """Rank what is left and follow it back to the start."""
    score = torch.cat([part.score for part in finished])
    ranking = score / (torch.cat([part.length for part in finished]) + predictor.context_size)
    place = ranking.sort(dim=1, descending=True, stable=True).indices[:, :num_hypotheses].cpu()
    scores = score.cpu().gather(1, place)
    tokens = torch.full((*place.shape, len(steps)), predictor.blank, dtype=torch.int64)
    sizes = [len(step.token) for step in steps]
    if steps:
        parents = torch.cat([step.parent for step in steps]).cpu().split(sizes)
        added = torch.cat([step.token for step in steps]).cpu().split(sizes)
        for t in range(len(steps) - 1, -1, -1):
            still = place[: sizes[t]]
            tokens[: sizes[t], :, t] = added[t].gather(1, still)
            still.copy_(parents[t].gather(1, still))
    return [
        [_hypothesis(row, score, predictor.blank, range(len(row))) for row, score in zip(rows, row_scores, strict=True) if score != NEG_INF]
        for rows, row_scores in zip(tokens.tolist(), scores.tolist(), strict=True)
    ]


def _longest_first(joiner: JoinerLike, encoder_out: Tensor, lens: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """Projected frames (N, T, D) of the utterances sorted by length, their given places, and how many have each of the frames."""
    ordered, order = lens.sort(descending=True, stable=True)
    running = (ordered.unsqueeze(0) > torch.arange(max(lens.tolist(), default=0)).unsqueeze(1)).sum(1)
    frames = joiner.project_encoder(encoder_out[order.to(encoder_out.device, non_blocking=True)])
    return frames, order.tolist(), running.tolist()


def _as_given(found: list[_T], order: list[int]) -> list[_T]:
    """Undo the sorting."""
    return [value for _, value in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]


def _pad(steps: list[Tensor], batch: int, blank: int) -> Tensor:
    """What the first utterances emitted at each step, (n,) -> (N, steps) on the CPU, blank for the others; one transfer."""
    padded = torch.full((len(steps), batch), blank, dtype=torch.int64)
    if steps:
        for row, step in zip(padded, torch.cat(steps).cpu().split([len(step) for step in steps]), strict=True):
            row[: len(step)] = step
    return padded.mT


def _hypothesis(symbols: list[int], score: float, blank: int, frame_of: Sequence[int]) -> Hypothesis:
    """From what was emitted at every step, blanks included, and the frame of each step."""
    kept = [(frame, symbol) for frame, symbol in zip(frame_of, symbols, strict=True) if symbol != blank]
    return Hypothesis(tokens=tuple(symbol for _, symbol in kept), score=score, frames=tuple(frame for frame, _ in kept))


def _fusion(lm: TokenLm | None, lm_scale: float, lm_final: bool, biasing: ContextGraph | None) -> Fusion:
    if not (math.isfinite(lm_scale) and lm_scale >= 0):
        raise ValueError(f"modified_beam_search: lm_scale is {lm_scale}, allowed is a finite number >= 0")
    if lm_scale > 0 and lm is None:
        raise ValueError(f"modified_beam_search: lm_scale is {lm_scale}, but there is no language model")
    return Fusion(lm if lm_scale > 0 else None, lm_scale, lm_final, biasing)


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
