"""Connectionist temporal classification, summed over the utterances that have enough frames for their targets.

An alignment needs a frame for every target and one more, for a blank, between equal neighbours. An utterance with fewer frames has
probability zero; it is left out and counted, and its gradient is zero.

Letters beside those of `k2ssl.batch`: U targets of the longest transcript, V vocabulary size.

Source: Graves et al. 2006, "Connectionist temporal classification". Upstream: torch.nn.functional.ctc_loss, reduction "sum".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class CtcSums:
    """Sums over a batch, all on the device.

    Attributes:
        loss: negative log-likelihood of the utterances used, in nats, with gradient; 0 if none is used.
        num_used, num_excluded: scalar int64 numbers of utterances; together N.
        excluded: (N,) bool, True where the frames are too few.
    """

    loss: Tensor
    num_used: Tensor
    num_excluded: Tensor
    excluded: Tensor


def ctc_sums(
    log_probs: Tensor,
    lens: Tensor,
    targets: Tensor,
    target_lens: Tensor,
    blank: int = 0,
    deterministic: bool = False,
) -> CtcSums:
    """Loss of a batch, in float32 (float64 for float64 input) whatever the autocast, by PyTorch's own kernels and never by CuDNN's.

    What cannot be seen without waiting for the device is not checked: lengths are CPU tensors and always checked, targets are checked
    where they are on the CPU. A loss that is infinite although the frames suffice (log-probabilities of -inf) stays infinite.

    Args:
        log_probs: (N, T, V) output of a log-softmax; the gradient is right behind one only, as always with PyTorch's loss.
        lens: (N,) int64 CPU, frames of each utterance.
        targets: (N, U) int64 where `log_probs` are, without blank; anything at padding.
        target_lens: (N,) int64 CPU.
        blank: blank's id.
        deterministic: the same gradients bit by bit in every run. On a GPU the kernels add in an order of their own, so the loss is
            computed on the CPU then, for which every step waits. CPU losses are deterministic in any case.

    Raises:
        ValueError: shapes, dtypes, devices or lengths that do not fit; a target that is blank or outside the vocabulary.
    """
    _check(log_probs, lens, targets, target_lens, blank)
    device = log_probs.device
    with torch.autocast(device.type, enabled=False):
        log_probs = log_probs if log_probs.dtype == torch.float64 else log_probs.float()
        excluded = lens.to(device, non_blocking=True) < frames_needed(targets, target_lens)
        if log_probs.requires_grad:
            log_probs = log_probs.view_as(log_probs)  # the hook is for this use alone
            log_probs.register_hook(lambda grad: grad.masked_fill(excluded.view(-1, 1, 1), 0.0))  # NaN there
        if deterministic:
            log_probs, targets = log_probs.cpu(), targets.cpu()
        # targets as (N, U) int64 are a form that PyTorch never hands to CuDNN
        losses = F.ctc_loss(log_probs.transpose(0, 1), targets, lens, target_lens, blank=blank, reduction="none").to(device)
        num_excluded = excluded.sum()
        return CtcSums(losses.masked_fill(excluded, 0.0).sum(), len(lens) - num_excluded, num_excluded, excluded)


def frames_needed(targets: Tensor, target_lens: Tensor) -> Tensor:
    """(N,) int64 least number of frames for the targets (N, U), where these are: one each, and one between equal neighbours."""
    target_lens = target_lens.to(targets.device, non_blocking=True)
    inside = torch.arange(targets.shape[1], device=targets.device) < target_lens.unsqueeze(1)
    repeats = (targets[:, 1:] == targets[:, :-1]) & inside[:, 1:]
    return target_lens + repeats.sum(1)


def _check(log_probs: Tensor, lens: Tensor, targets: Tensor, target_lens: Tensor, blank: int) -> None:
    if log_probs.dim() != 3:
        raise ValueError(f"ctc_sums: log_probs has shape {tuple(log_probs.shape)}, (N, T, V) is needed")
    batch, num_frames, vocab_size = log_probs.shape
    if 0 in log_probs.shape:
        raise ValueError(f"ctc_sums: log_probs has shape {tuple(log_probs.shape)}, at least one utterance and one frame are needed")
    if targets.dim() != 2 or targets.shape[0] != batch or targets.dtype != torch.int64 or targets.device != log_probs.device:
        raise ValueError(
            f"ctc_sums: targets must be int64 of shape ({batch}, U) on {log_probs.device}, got {targets.dtype} {tuple(targets.shape)} on "
            f"{targets.device}"
        )
    for name, values, most in (("lens", lens, num_frames), ("target_lens", target_lens, targets.shape[1])):
        if values.dtype != torch.int64 or values.shape != (batch,) or values.device.type != "cpu":
            raise ValueError(
                f"ctc_sums: {name} must be int64 of shape ({batch},) on the CPU, got {values.dtype} {tuple(values.shape)} on {values.device}"
            )
        for row, length in enumerate(values.tolist()):
            if not 0 <= length <= most:
                raise ValueError(f"ctc_sums: {name} of utterance {row} is {length}, allowed are 0..{most}")
    if not 0 <= blank < vocab_size:
        raise ValueError(f"ctc_sums: blank is {blank}, allowed are 0..{vocab_size - 1}")
    if targets.device.type != "cpu":
        return  # looking at the values would wait for the device
    inside = torch.arange(targets.shape[1]) < target_lens.unsqueeze(1)
    wrong = inside & ((targets < 0) | (targets >= vocab_size) | (targets == blank))
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"ctc_sums: targets of utterance {row} hold {int(targets[row, column])} at position {column}; allowed are "
            f"0..{vocab_size - 1} without blank, which is {blank}"
        )
