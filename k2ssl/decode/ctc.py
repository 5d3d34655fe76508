"""Searches over the output of a CTC head.

Letters beside those of `k2ssl.batch`: V vocabulary size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2ssl.decode.hypotheses import Hypothesis


@torch.no_grad()
def greedy_search(log_probs: Tensor, lens: Tensor, blank: int = 0) -> list[Hypothesis]:
    """Take the most probable symbol of each frame, make one of equal neighbours, leave out blanks.

    All utterances at once; nothing waits for the device before the end, and padding changes nothing.

    Args:
        log_probs: (N, T, V) log-probabilities.
        lens: (N,) int64 CPU, frames of each utterance.
        blank: blank's id.

    Returns:
        One hypothesis per utterance: its score is the log-probability of the path taken, a token's frame the first one that emits it.

    Raises:
        ValueError: shapes, dtypes or lengths that do not fit.
    """
    check_log_probs("greedy_search", log_probs, lens, blank)
    num_frames = log_probs.shape[1]
    best, token = log_probs.max(dim=2)
    inside = torch.arange(num_frames, device=best.device) < lens.to(best.device, non_blocking=True).unsqueeze(1)
    # in float64, so that the number of padded frames, which decides the order of summation, does not show
    scores = best.double().where(inside, 0.0).sum(1)
    begins = inside & (token != blank)
    begins[:, 1:] &= token[:, 1:] != token[:, :-1]
    # one transfer brings tokens and frames
    rows = token.where(begins, -1).cpu()
    return [_hypothesis(row, score) for row, score in zip(rows, scores.tolist(), strict=True)]


def _hypothesis(row: Tensor, score: float) -> Hypothesis:
    """From (T,) the token that begins at each frame, -1 if none does."""
    frames = (row >= 0).nonzero().squeeze(1)
    return Hypothesis(tuple(row[frames].tolist()), score, tuple(frames.tolist()))


def check_log_probs(search: str, log_probs: Tensor, lens: Tensor, blank: int) -> None:
    """ValueError, which names the search, unless (N, T, V) log-probabilities, (N,) int64 CPU lengths and blank's id fit together."""
    if log_probs.dim() != 3:
        raise ValueError(f"{search}: log_probs has shape {tuple(log_probs.shape)}, (N, T, V) is needed")
    batch, num_frames, vocab_size = log_probs.shape
    if lens.dtype != torch.int64 or lens.shape != (batch,) or lens.device.type != "cpu":
        raise ValueError(
            f"{search}: lens must be int64 of shape ({batch},) on the CPU, got {lens.dtype} {tuple(lens.shape)} on {lens.device}"
        )
    for row, length in enumerate(lens.tolist()):
        if not 0 <= length <= num_frames:
            raise ValueError(f"{search}: lens of utterance {row} is {length}, allowed are 0..{num_frames}")
    if not 0 <= blank < vocab_size:
        raise ValueError(f"{search}: blank is {blank}, allowed are 0..{vocab_size - 1}")
