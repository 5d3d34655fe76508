"""Forced alignment: the most probable path of a CTC head that spells a given transcript.

All utterances at once, on the device of the log-probabilities; the search is exact, and padding changes nothing.

Letters beside those of `k2ssl.batch`: U tokens of the longest transcript, V vocabulary size.

Source: Graves et al. 2006, "Connectionist temporal classification", with the maximum in place of the sum. The paths are those of
torchaudio.functional.forced_align, which takes one utterance at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NEG_INF = float("-inf")


@dataclass(frozen=True)
class Alignment:
    """Where each token of a transcript is.

    Attributes:
        tokens: the transcript.
        begins: first frame of each token.
        ends: the frame after its last one. Frames between a token's end and the next one's begin are blank.
        confidences: mean probability of each token over its frames, 0..1.
        score: log-probability of the path, in nats.
    """

    tokens: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    confidences: tuple[float, ...]
    score: float


@torch.no_grad()
def align(log_probs: Tensor, lens: Tensor, tokens: Tensor, token_lens: Tensor, blank: int = 0) -> list[Alignment | None]:
    """The most probable alignment of each utterance with its transcript.

    Args:
        log_probs: (N, T, V) log-probabilities.
        lens: (N,) int64 CPU, frames of each utterance.
        tokens: (N, U) int64 CPU without blank; anything at padding.
        token_lens: (N,) int64 CPU; a transcript may be empty.
        blank: blank's id.

    Returns:
        One alignment per utterance; None where there is no path: too few frames (one for each token and one between equal neighbours), or
        a probability of zero on all of them.

    Raises:
        ValueError: shapes, dtypes or lengths that do not fit; a token that is blank or outside the vocabulary; log-probabilities of nan.
    """
    _check(log_probs, lens, tokens, token_lens, blank)
    inside = torch.arange(tokens.shape[1]) < token_lens.unsqueeze(1)
    tokens = tokens.where(inside, blank)
    scores, path, along = best_path(log_probs, lens, tokens, token_lens, blank)
    if wrong := [row for row, score in enumerate(scores) if math.isnan(score)]:
        raise ValueError(f"align: log-probabilities of utterance {wrong[0]} are nan, numbers are needed")
    return [
        _alignment(tuple(tokens[n, : token_lens[n]].tolist()), scores[n], path[n, : lens[n]], along[n, : lens[n]]) for n in range(len(lens))
    ]


@torch.no_grad()
def token_begins(log_probs: Tensor, lens: Tensor, transcripts: Sequence[Sequence[int]], blank: int) -> list[tuple[int, ...]]:
    """The frame where each token begins in the most probable alignment of (N, T, V), for transcripts that searches have found.

    A transcript without a path has no frames: ().
    """
    token_lens = torch.tensor([len(tokens) for tokens in transcripts], dtype=torch.int64)
    tokens = torch.full((len(transcripts), max(map(len, transcripts), default=0)), blank, dtype=torch.int64)
    for row, transcript in enumerate(transcripts):
        tokens[row, : len(transcript)] = torch.tensor(transcript, dtype=torch.int64)
    scores, path, _ = best_path(log_probs, lens, tokens, token_lens, blank)
    begins = path >= 0
    begins[:, 1:] &= path[:, 1:] != path[:, :-1]
    return [tuple(row.nonzero().squeeze(1).tolist()) if score > NEG_INF else () for row, score in zip(begins, scores, strict=True)]


def best_path(log_probs: Tensor, lens: Tensor, tokens: Tensor, token_lens: Tensor, blank: int) -> tuple[list[float], Tensor, Tensor]:
    """What `align` is made of; (N, U) tokens with blank at padding.

    Returns:
        Log-probability of each path, -inf where there is none; the paths (N, T) int64 CPU: the token's place in the transcript, -1 for
        blank and for padding; (N, T) float64 CPU log-probabilities along them.
    """
    device = log_probs.device
    batch, num_frames, _ = log_probs.shape
    spelled = torch.full((batch, 2 * tokens.shape[1] + 1), blank, device=device)
    spelled[:, 1::2] = tokens.to(device)
    # a token follows another one directly, without a blank between them, unless it is the same again
    skips = spelled != blank
    skips[:, 2:] &= spelled[:, 2:] != spelled[:, :-2]
    frame_lens, last = lens.to(device, non_blocking=True), 2 * token_lens.to(device, non_blocking=True).unsqueeze(1)
    # in float64, so that sums over minutes of frames keep small differences
    alpha = torch.full(spelled.shape, NEG_INF, dtype=torch.float64, device=device)
    moves = torch.zeros(batch, num_frames, spelled.shape[1], dtype=torch.int8, device=device)
    for t in range(num_frames):
        emitted = log_probs[:, t].double().gather(1, spelled)
        if t == 0:
            alpha[:, :2] = emitted[:, :2].where(frame_lens.unsqueeze(1) > 0, NEG_INF)
            continue
        before = torch.stack([alpha, _shifted(alpha, 1), _shifted(alpha, 2).where(skips, NEG_INF)])
        best, moves[:, t] = before.max(0)
        alpha = torch.where((t < frame_lens).unsqueeze(1), best + emitted, alpha)
    alpha[:, 0] = alpha[:, 0].where(frame_lens > 0, 0.0)  # no frames spell nothing
    ends = torch.cat([last, (last - 1).clamp(min=0)], dim=1)
    score, choice = alpha.gather(1, ends).max(1)
    states = _follow_back(moves.cpu(), ends.gather(1, choice.unsqueeze(1)).squeeze(1).cpu(), lens)
    symbols = spelled.cpu().gather(1, states.clamp(min=0))
    along = log_probs.gather(2, symbols.to(device).unsqueeze(2)).squeeze(2).double().cpu()
    return score.tolist(), torch.where(states % 2 == 1, states.div(2, rounding_mode="floor"), -1), along


def _follow_back(moves: Tensor, state: Tensor, lens: Tensor) -> Tensor:
    """(N, T) the states that lead to the last ones (N,); -2 at padding."""
    states = torch.full(moves.shape[:2], -2, dtype=torch.int64)
    for t in range(moves.shape[1] - 1, -1, -1):
        inside = t < lens
        states[:, t] = state.where(inside, -2)
        state = state - moves[:, t].gather(1, state.unsqueeze(1)).squeeze(1).where(inside, 0)
    return states


def _shifted(alpha: Tensor, places: int) -> Tensor:
    """(N, S) moved up by some states."""
    return torch.nn.functional.pad(alpha, (places, 0), value=NEG_INF)[:, : alpha.shape[1]]


def _alignment(tokens: tuple[int, ...], score: float, path: Tensor, log_probs: Tensor) -> Alignment | None:
    """From (T,) places in the transcript and log-probabilities of one utterance."""
    if score == NEG_INF:
        return None
    places = torch.arange(len(tokens))
    spoken = path[path >= 0]
    begins, ends = torch.searchsorted(spoken, places), torch.searchsorted(spoken, places, right=True)
    frames = (path >= 0).nonzero().squeeze(1)
    sums = torch.zeros(len(tokens), dtype=torch.float64).index_add_(0, spoken, log_probs[frames].exp())
    return Alignment(
        tokens, tuple(frames[begins].tolist()), tuple((frames[ends - 1] + 1).tolist()), tuple((sums / (ends - begins)).tolist()), score
    )


def _check(log_probs: Tensor, lens: Tensor, tokens: Tensor, token_lens: Tensor, blank: int) -> None:
    if log_probs.dim() != 3:
        raise ValueError(f"align: log_probs has shape {tuple(log_probs.shape)}, (N, T, V) is needed")
    batch, num_frames, vocab_size = log_probs.shape
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.shape[0] != batch or tokens.device.type != "cpu":
        raise ValueError(f"align: tokens must be int64 of shape ({batch}, U) on the CPU, got {tokens.dtype} {tuple(tokens.shape)}")
    if not 0 <= blank < vocab_size:
        raise ValueError(f"align: blank is {blank}, allowed are 0..{vocab_size - 1}")
    for name, value, most in (("lens", lens, num_frames), ("token_lens", token_lens, tokens.shape[1])):
        if value.dtype != torch.int64 or value.shape != (batch,) or value.device.type != "cpu":
            raise ValueError(f"align: {name} must be int64 of shape ({batch},) on the CPU, got {value.dtype} {tuple(value.shape)}")
        for row, length in enumerate(value.tolist()):
            if not 0 <= length <= most:
                raise ValueError(f"align: {name} of utterance {row} is {length}, allowed are 0..{most}")
    inside = torch.arange(tokens.shape[1]) < token_lens.unsqueeze(1)
    wrong = inside & ((tokens == blank) | (tokens < 0) | (tokens >= vocab_size))
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"align: token {column} of utterance {row} is {int(tokens[row, column])}, allowed are 0..{vocab_size - 1} except {blank} (blank)"
        )
