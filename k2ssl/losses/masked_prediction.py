"""Cross-entropy of frame labels, summed, with the counts that monitoring needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class FrameSums:
    """Detached sums over a group of frames: cross-entropy in nats, correct predictions, frames."""

    loss: Tensor
    correct: Tensor
    count: Tensor


@dataclass(frozen=True)
class PredictionSums:
    """Sums over frames, all on the device.

    Attributes:
        loss: weighted cross-entropy, with gradient.
        masked, unmasked: unweighted sums over hidden and over visible frames of non-zero weight.
        predicted: (K,) how often each class was the most likely one of a hidden frame.
    """

    loss: Tensor
    masked: FrameSums
    unmasked: FrameSums
    predicted: Tensor


def prediction_sums(logits: Tensor, targets: Tensor, weights: Tensor, masked: Tensor) -> PredictionSums:
    """Sums over M frames.

    Args:
        logits: (M, K), any float type; the loss is computed in float32 at least.
        targets: (M,) int64 in [0, K).
        weights: (M,) float; frames of weight 0 count nowhere.
        masked: (M,) bool, True at frames that were hidden from the encoder.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    per_frame = F.cross_entropy(logits, targets, reduction="none")
    loss = (per_frame * weights).sum()
    with torch.no_grad():
        best = logits.argmax(dim=-1)
        hit = best == targets
        hidden, visible = ((weights != 0) & group for group in (masked, ~masked))
        predicted = torch.zeros(logits.shape[-1], dtype=torch.int64, device=logits.device).index_add_(0, best, hidden.long())
        return PredictionSums(loss, _sums(per_frame, hit, hidden), _sums(per_frame, hit, visible), predicted)


def _sums(per_frame: Tensor, hit: Tensor, group: Tensor) -> FrameSums:
    return FrameSums(torch.where(group, per_frame, 0.0).sum(), (hit & group).sum(), group.sum())
