"""Prefix beam search over the output of a CTC head, alone or with a language model over the same tokens.

A hypothesis is a token sequence, and its probability the sum over all its alignments whose beginnings stay in the beam. All utterances and all
hypotheses advance together, frame by frame; on a GPU nothing waits for the device before the end.

Letters beside those of `k2ssl.batch`: B hypotheses in a beam, V vocabulary size, K tokens that a frame may add, H hypotheses returned.

Source: Hannun et al. 2014, arXiv 1408.2873, with the language model at every token instead of every word. Upstream: ctc_prefix_beam_search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from k2ssl.decode.alignment import token_begins
from k2ssl.decode.ctc import check_log_probs
from k2ssl.decode.hypotheses import Hypothesis
from k2ssl.decode.lm import TokenLm, waiting_is_free
from k2ssl.decode.prefix_hash import hash_on

NEG_INF = float("-inf")


@torch.no_grad()
def prefix_beam_search(
    log_probs: Tensor,
    lens: Tensor,
    blank: int = 0,
    beam: int = 10,
    num_hypotheses: int = 1,
    lm: TokenLm | None = None,
    lm_scale: float = 0.0,
    token_score: float = 0.0,
    lm_final: bool = True,
) -> list[list[Hypothesis]]:
    """The token sequences with the highest score: log-probability + lm_scale * that of the language model + token_score * length.

    The language model's part is counted at every token, and with `lm_final` at the end that of the end. Utterances do not influence each other:
    hypotheses are the same in any batch, scores up to the rounding of sums.

    Args:
        log_probs: (N, T, V) log-probabilities.
        lens: (N,) int64 CPU, frames of each utterance.
        blank: blank's id.
        beam: hypotheses kept per utterance, at least 1.
        num_hypotheses: how many to return per utterance, 1..beam.
        lm: over the same V tokens; not asked if lm_scale is 0.
        lm_scale: weight of its logarithms, >= 0.
        token_score: added for each token; positive values make for longer hypotheses.
        lm_final: count the probability that the sentence ends.

    Returns:
        Per utterance its best hypotheses, best first; fewer than asked for where fewer are possible. A hypothesis' score is the one above,
        its frames those where each token begins in its most probable alignment. Where log-probabilities are nan, so are the scores.

    Raises:
        ValueError: shapes, dtypes, lengths or settings that do not fit, or a language model of another vocabulary.
    """
    check_log_probs("prefix_beam_search", log_probs, lens, blank)
    _check_settings(log_probs.shape[2], beam, num_hypotheses, lm, lm_scale, token_score)
    batch, num_frames = log_probs.shape[:2]
    device = log_probs.device
    running = torch.arange(num_frames, device=device) < lens.to(device, non_blocking=True).unsqueeze(1)
    fusion = None if lm is None or lm_scale == 0 else _Fusion(lm, lm_scale, batch, beam, device)
    allowed = _allowed_tokens(log_probs, blank, None if fusion else 2 * beam)
    beams = _start_beams(batch, beam, blank, device)
    unchanged = torch.arange(beam, device=device)
    steps: list[_Step] = []
    for t in range(num_frames):
        here = running[:, t].unsqueeze(1)
        # past its end an utterance is a sure blank, which changes no probability
        frame = log_probs[:, t].double().where(here, NEG_INF)
        blank_log_prob = frame[:, blank].unsqueeze(1).where(here, 0.0)
        grown = _grow(beams, frame, allowed[:, t], fusion, token_score)
        stay = _stay(beams, frame, blank_log_prob)
        ranks = torch.cat([stay.total + beams.bonus, (grown.probability + grown.bonus).flatten(1)], dim=1)
        place = torch.where(here, ranks.topk(beam, dim=1).indices, unchanged)
        beams, step = _choose(place, stay, grown, allowed[:, t], blank)
        if fusion is not None:
            fusion.follow(step, blank)
        steps.append(step)
    scores = beams.total + beams.bonus
    if fusion is not None and lm_final:
        scores = scores + fusion.final()
    return _collect(scores, steps, log_probs, lens, blank, num_hypotheses)


@dataclass(frozen=True)
class _Beams:
    """B different prefixes of each utterance, each tensor (N, B); probabilities of -inf mark an unused place.

    Attributes:
        in_blank, in_token: float64 log-probability of the alignments that end in blank, and of those that end in the last token.
        bonus: float64, what language model and length add to the rank.
        last: last token; blank if there is none.
        prefix, parent: hashes of all tokens, and of all but the last.
    """

    in_blank: Tensor
    in_token: Tensor
    bonus: Tensor
    last: Tensor
    prefix: Tensor
    parent: Tensor

    @property
    def total(self) -> Tensor:
        return torch.logaddexp(self.in_blank, self.in_token)


@dataclass(frozen=True)
class _Grown:
    """Prefixes with one more token: (N, B, K) float64 log-probability and bonus; both -inf where the beam has that prefix already."""

    probability: Tensor
    bonus: Tensor


@dataclass(frozen=True)
class _Step:
    """Where each hypothesis came from: (N, B) place in the previous beam, and (N, B) token, blank if none was added."""

    parent: Tensor
    token: Tensor


class _Fusion:
    """A language model that follows the beams.

    Attributes:
        log_probs: (N, B, V), of the next token.
    """

    def __init__(self, lm: TokenLm, scale: float, batch: int, beam: int, device: torch.device) -> None:
        self.lm, self.scale = lm, scale
        self.skip_unchanged = waiting_is_free(device)
        self.state = lm.start(batch * beam, device)
        self.log_probs = lm.log_probs(self.state).unflatten(0, (batch, beam))

    def follow(self, step: _Step, blank: int) -> None:
        """After a frame. On a CPU the model is asked about those hypotheses only that have grown, on a GPU about all."""
        batch, beam = step.parent.shape
        rows = (step.parent + beam * torch.arange(batch, device=step.parent.device).unsqueeze(1)).flatten()
        token = step.token.flatten()
        self.state, log_probs = self.state[rows], self.log_probs.flatten(0, 1)[rows]
        grown = token != blank
        if not self.skip_unchanged:
            other = 1 if blank == 0 else 0  # the model never sees blank
            state = self.lm.advance(self.state, token.where(grown, other))
            self.state = torch.where(grown.view(-1, *[1] * (state.dim() - 1)), state, self.state)
            log_probs = torch.where(grown.unsqueeze(1), self.lm.log_probs(state), log_probs)
        elif len(at := grown.nonzero().squeeze(1)):
            state = self.lm.advance(self.state[at], token[at])
            self.state[at] = state
            log_probs[at] = self.lm.log_probs(state)
        self.log_probs = log_probs.unflatten(0, (batch, beam))

    def of(self, tokens: Tensor) -> Tensor:
        """(N, K) tokens -> (N, B, K) float64, weighted."""
        return self.scale * self.log_probs.gather(2, tokens.unsqueeze(1).expand(-1, self.log_probs.shape[1], -1)).double()

    def final(self) -> Tensor:
        """(N, B) float64, weighted."""
        return self.scale * self.lm.final(self.state).double().view(self.log_probs.shape[:2])


def _allowed_tokens(log_probs: Tensor, blank: int, most: int | None) -> Tensor:
    """(N, T, K) the tokens that each frame may add: the `most` most probable ones, or all but blank if None.

    Twice the beam is enough when no language model changes the order: of the 2B most probable tokens at most B - 1 lead from a prefix to
    another one in the beam, and one repeats its last token; the B others all rank above every token that is left out.
    """
    batch, num_frames, vocab_size = log_probs.shape
    if most is None or most >= vocab_size - 1:
        ids = torch.arange(vocab_size - 1, device=log_probs.device)
        return (ids + (ids >= blank)).expand(batch, num_frames, -1)
    tokens = log_probs.clone()
    tokens[:, :, blank] = NEG_INF
    return tokens.topk(most, dim=2).indices


def _start_beams(batch: int, beam: int, blank: int, device: torch.device) -> _Beams:
    none = torch.full((batch, beam), NEG_INF, dtype=torch.float64, device=device)
    in_blank = none.clone()
    in_blank[:, 0] = 0.0
    ids = torch.zeros(batch, beam, dtype=torch.int64, device=device)
    # an empty prefix is nobody's child: its parent is a hash that no prefix has
    return _Beams(in_blank, none, torch.zeros_like(none), ids + blank, ids, ids - 1)


def _children(beams: _Beams) -> Tensor:
    """(N, B, B) bool: the second prefix is the first one and one more token."""
    used = beams.total > NEG_INF
    return (beams.prefix.unsqueeze(2) == beams.parent.unsqueeze(1)) & used.unsqueeze(2) & used.unsqueeze(1)


def _stay(beams: _Beams, frame: Tensor, blank_log_prob: Tensor) -> _Beams:
    """The prefixes of the beam one frame later; a prefix also takes what its parent in the beam, one token shorter, sends to it."""
    repeats = beams.last.unsqueeze(2) == beams.last.unsqueeze(1)
    sent = torch.where(repeats, beams.in_blank.unsqueeze(2), beams.total.unsqueeze(2))
    received = sent.masked_fill(~_children(beams), NEG_INF).amax(1)  # at most one is the parent
    in_token = torch.logaddexp(beams.in_token, received) + frame.gather(1, beams.last)
    return _Beams(beams.total + blank_log_prob, in_token, beams.bonus, beams.last, beams.prefix, beams.parent)


def _grow(beams: _Beams, frame: Tensor, tokens: Tensor, fusion: _Fusion | None, token_score: float) -> _Grown:
    """The prefixes of the beam with one more token, of (N, K)."""
    is_last = tokens.unsqueeze(1) == beams.last.unsqueeze(2)  # (N, B, K)
    before = torch.where(is_last, beams.in_blank.unsqueeze(2), beams.total.unsqueeze(2))
    # whole numbers, so exact: pairs of a prefix and a token that one of the children stands for
    present = torch.bmm(_children(beams).float(), is_last.float()) > 0
    probability = (before + frame.gather(1, tokens).unsqueeze(1)).masked_fill(present, NEG_INF)
    bonus = beams.bonus.unsqueeze(2) + token_score
    if fusion is not None:
        bonus = bonus + fusion.of(tokens)
    return _Grown(probability, bonus.expand_as(probability))


def _choose(place: Tensor, stay: _Beams, grown: _Grown, tokens: Tensor, blank: int) -> tuple[_Beams, _Step]:
    """The candidates at (N, B) places: B that stay, then B * K that have grown."""
    beam, num_tokens = place.shape[1], tokens.shape[1]
    is_grown = place >= beam
    at = (place - beam).clamp(min=0)
    parent = torch.where(is_grown, at.div(num_tokens, rounding_mode="floor"), place.clamp(max=beam - 1))
    token = tokens.gather(1, at % num_tokens)
    kept = _Beams(*(getattr(stay, field.name).gather(1, parent) for field in fields(_Beams)))
    chosen = _Beams(
        in_blank=kept.in_blank.masked_fill(is_grown, NEG_INF),
        in_token=torch.where(is_grown, grown.probability.flatten(1).gather(1, at), kept.in_token),
        bonus=torch.where(is_grown, grown.bonus.flatten(1).gather(1, at), kept.bonus),
        last=torch.where(is_grown, token, kept.last),
        prefix=torch.where(is_grown, hash_on(kept.prefix, token), kept.prefix),
        parent=torch.where(is_grown, kept.prefix, kept.parent),
    )
    return chosen, _Step(parent, torch.where(is_grown, token, blank))


def _collect(scores: Tensor, steps: list[_Step], log_probs: Tensor, lens: Tensor, blank: int, num: int) -> list[list[Hypothesis]]:
    """Rank the (N, B) hypotheses that are left, follow the best back to the start and align them."""
    scores, place = scores.cpu().sort(dim=1, descending=True, stable=True)
    scores, place = scores[:, :num], place[:, :num]
    symbols = torch.full((*place.shape, len(steps)), blank, dtype=torch.int64)
    if steps:
        parents, added = torch.stack([step.parent for step in steps]).cpu(), torch.stack([step.token for step in steps]).cpu()
        for t in range(len(steps) - 1, -1, -1):
            symbols[:, :, t] = added[t].gather(1, place)
            place = parents[t].gather(1, place)
    found = [[tuple(row[row != blank].tolist()) for row in rows] for rows in symbols]
    begins = [token_begins(log_probs, lens, [rows[h] for rows in found], blank) for h in range(scores.shape[1])]
    return [
        [Hypothesis(found[n][h], score, begins[h][n]) for h, score in enumerate(row) if score != NEG_INF]
        for n, row in enumerate(scores.tolist())
    ]


def _check_settings(vocab_size: int, beam: int, num_hypotheses: int, lm: TokenLm | None, lm_scale: float, token_score: float) -> None:
    if vocab_size < 2:
        raise ValueError(f"prefix_beam_search: {vocab_size} classes, at least blank and one token are needed")
    if beam < 1:
        raise ValueError(f"prefix_beam_search: beam is {beam}, at least 1 is needed")
    if not 1 <= num_hypotheses <= beam:
        raise ValueError(f"prefix_beam_search: num_hypotheses is {num_hypotheses}, allowed are 1..{beam} (beam)")
    if not (math.isfinite(lm_scale) and lm_scale >= 0):
        raise ValueError(f"prefix_beam_search: lm_scale is {lm_scale}, a finite number >= 0 is needed")
    if not math.isfinite(token_score):
        raise ValueError(f"prefix_beam_search: token_score is {token_score}, a finite number is needed")
    if lm_scale > 0 and lm is None:
        raise ValueError(f"prefix_beam_search: lm_scale is {lm_scale}, but there is no language model")
    if lm is not None and lm.vocab_size != vocab_size:
        raise ValueError(f"prefix_beam_search: the language model has {lm.vocab_size} tokens, the log-probabilities have {vocab_size}")
