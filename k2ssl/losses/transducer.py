"""Transducer losses: simple (additive, optionally smoothed), pruned and full.

A training step calls `simple_loss` on cheap per-symbol projections of encoder and predictor, `prune_ranges` on the occupancies that come
with it, `prune` to gather what the joint network needs, and `pruned_loss` on the joint network's output. `full_loss` is the unpruned
loss. Losses are per utterance, (N,); callers sum. Everything is computed in float32 (float64 for float64 inputs) whatever the autocast.

Letters beside those of `k2ssl.batch`: S symbols of the longest transcript, V vocabulary size, R width of the pruning window.

What cannot be seen without waiting for the device is not checked: `boundary` is a CPU tensor and always checked, `symbols` and
`ranges` are checked where they are on the CPU.

Source: arXiv 2206.13236. Upstream: k2.rnnt_loss_smoothed, k2.rnnt_loss_pruned, k2.rnnt_loss, rnnt_type "regular".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from k2ssl.first_derivative import first_derivative_only
from k2ssl.losses.transducer_lattice import NEG_INF, check_boundary, lattice_loss, window_loss
from k2ssl.losses.transducer_pruning import check_ranges, check_windows


@dataclass(frozen=True)
class SimpleLoss:
    """The simple loss and what pruning needs of it.

    Attributes:
        loss: (N,) negative log-likelihood in nats, differentiable.
        px_grad: (N, S, T+1) posterior probability that symbol s+1 is emitted at node (s, t); detached.
        py_grad: (N, S+1, T) posterior probability that blank is emitted at node (s, t); detached.
    """

    loss: Tensor
    px_grad: Tensor
    py_grad: Tensor


def simple_loss(
    am: Tensor,
    lm: Tensor,
    symbols: Tensor,
    boundary: Tensor,
    blank: int = 0,
    lm_scale: float = 0.0,
    am_scale: float = 0.0,
) -> SimpleLoss:
    """Loss of the joint network logits[s, t] = am[t] + lm[s], normalised over the vocabulary without ever being formed.

    With scales, the log-probabilities become (1 - lm_scale - am_scale) * joint + lm_scale * (lm alone) + am_scale * (am times the
    average distribution of lm). That average runs over the whole batch, padding included, as upstream: with `am_scale` not 0 an
    utterance's loss depends on its batch.

    The sum over the vocabulary is of products of exponentials. In float32 these vanish where `am` and `lm` prefer classes that each holds
    for less likely than its own by 87 nats together (float64: 700): there the normaliser is too small, as with k2, and gradients are
    wrong. `pruned_loss` and `full_loss` have no such limit.

    Args:
        am: (N, T, V) encoder output projected to the vocabulary.
        lm: (N, S+1, V) predictor output projected to the vocabulary; row s has seen s symbols.
        symbols: (N, S) int64, anything at padding.
        boundary: (N, 4) int64 CPU: begin symbol, begin frame, number of symbols, number of frames (`make_boundary`).
        blank: blank's id.
        lm_scale, am_scale: smoothing, each in 0..1 and together at most 1.

    Raises:
        ValueError: shapes, dtypes, devices or scales that do not fit; a symbol that is blank or outside the vocabulary.
    """
    if am.dim() != 3 or lm.dim() != 3 or am.shape[0] != lm.shape[0] or am.shape[2] != lm.shape[2]:
        raise ValueError(f"simple_loss: am {tuple(am.shape)} and lm {tuple(lm.shape)} must be (N, T, V) and (N, S+1, V)")
    if not (0 <= lm_scale <= 1 and 0 <= am_scale <= 1 and lm_scale + am_scale <= 1):
        raise ValueError(f"simple_loss: lm_scale {lm_scale} and am_scale {am_scale} must be in 0..1 and sum to at most 1")
    check_boundary(boundary, am.shape[0], lm.shape[1] - 1, am.shape[1])
    _check_symbols(symbols, boundary, lm.shape[1] - 1, blank, am)
    with torch.autocast(am.device.type, enabled=False):
        am, lm = _at_least_float32(am), _at_least_float32(lm)
        boundary = boundary.to(am.device, non_blocking=True)
        targets = _next_symbols(symbols, boundary, blank)
        px, py = _smoothed_log_probs(am, lm, targets, blank, lm_scale, am_scale)
        return SimpleLoss(*lattice_loss(_close_last_frame(px[:, :-1], boundary), py, boundary))


def pruned_loss(logits: Tensor, symbols: Tensor, ranges: Tensor, boundary: Tensor, blank: int = 0) -> Tensor:
    """Loss over the alignments that stay inside the windows.

    Args:
        logits: (N, T, R, V) unnormalised output of the joint network.
        symbols: (N, S) int64, anything at padding.
        ranges: (N, T, R) of `prune_ranges`.
        boundary: (N, 4) int64 CPU: begin symbol, begin frame, number of symbols, number of frames.
        blank: blank's id.

    Returns:
        (N,) negative log-likelihoods in nats; +inf with zero gradient where no alignment fits in the windows.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a symbol that is blank or outside the vocabulary; ranges that are no
            windows or move back.
    """
    if logits.dim() != 4 or symbols.dim() != 2:
        raise ValueError(f"pruned_loss: logits {tuple(logits.shape)} and symbols {tuple(symbols.shape)} must be (N, T, R, V) and (N, S)")
    batch, num_frames = logits.shape[:2]
    num_positions = symbols.shape[1] + 1
    check_ranges(ranges, batch, num_frames, num_positions)
    check_boundary(boundary, batch, num_positions - 1, num_frames)
    _check_symbols(symbols, boundary, num_positions - 1, blank, logits)
    if ranges.shape != logits.shape[:3]:
        raise ValueError(f"pruned_loss: logits {tuple(logits.shape)} and ranges {tuple(ranges.shape)} must be (N, T, R, V) and (N, T, R)")
    check_windows(ranges, num_positions)
    with torch.autocast(logits.device.type, enabled=False):
        boundary = boundary.to(logits.device, non_blocking=True)
        targets = _next_symbols(symbols, boundary, blank)
        in_window = targets.unsqueeze(1).expand(-1, num_frames, -1).gather(2, ranges)
        px, py = _TargetLogProbs.apply(logits, in_window, blank)
        return window_loss(px, py, ranges, boundary, num_positions - 1)


def full_loss(logits: Tensor, symbols: Tensor, boundary: Tensor, blank: int = 0) -> Tensor:
    """Loss over all alignments; memory grows with N * T * (S+1) * V.

    Args:
        logits: (N, T, S+1, V) unnormalised output of the joint network.
        symbols, boundary, blank: as for `pruned_loss`.

    Returns:
        (N,) negative log-likelihoods in nats.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a symbol that is blank or outside the vocabulary.
    """
    if logits.dim() != 4:
        raise ValueError(f"full_loss: logits has shape {tuple(logits.shape)}, (N, T, S+1, V) is needed")
    batch, num_frames, num_positions, _ = logits.shape
    check_boundary(boundary, batch, num_positions - 1, num_frames)
    _check_symbols(symbols, boundary, num_positions - 1, blank, logits)
    with torch.autocast(logits.device.type, enabled=False):
        boundary = boundary.to(logits.device, non_blocking=True)
        targets = _next_symbols(symbols, boundary, blank).unsqueeze(1).expand(-1, num_frames, -1)
        px, py = _TargetLogProbs.apply(logits, targets, blank)
        px = _close_last_frame(px[:, :, :-1].transpose(1, 2), boundary)
        return lattice_loss(px, py.transpose(1, 2), boundary)[0]


def _close_last_frame(px: Tensor, boundary: Tensor) -> Tensor:
    """(N, S, T) -> (N, S, T+1) with -inf once all frames of an utterance are consumed: its last arc is a blank."""
    consumed = torch.arange(px.shape[2] + 1, device=px.device) >= boundary[:, 3].view(-1, 1, 1)
    return F.pad(px, (0, 1), value=NEG_INF).masked_fill(consumed, NEG_INF)


def _smoothed_log_probs(am: Tensor, lm: Tensor, targets: Tensor, blank: int, lm_scale: float, am_scale: float) -> tuple[Tensor, Tensor]:
    """(N, S+1, T) log-probabilities of each position's target and of blank."""
    tiny = torch.finfo(am.dtype).tiny  # keeps the logarithms finite where exp underflows
    am_max, lm_max = am.amax(2, keepdim=True), lm.amax(2, keepdim=True)
    am_exp, lm_exp = (am - am_max).exp(), (lm - lm_max).exp()
    joint_norm = (lm_exp @ am_exp.mT + tiny).log() + lm_max + am_max.mT
    am_target = am.mT.gather(1, targets.unsqueeze(2).expand(-1, -1, am.shape[1]))  # (N, S+1, T)
    lm_target = lm.gather(2, targets.unsqueeze(2))  # (N, S+1, 1)
    am_blank, lm_blank = am[:, :, blank].unsqueeze(1), lm[:, :, blank].unsqueeze(2)
    joint_scale = 1.0 - lm_scale - am_scale
    px = joint_scale * (am_target + lm_target - joint_norm)
    py = joint_scale * (am_blank + lm_blank - joint_norm)
    if lm_scale:
        lm_norm = lm_exp.sum(2, keepdim=True).log() + lm_max
        px = px + lm_scale * (lm_target - lm_norm)
        py = py + lm_scale * (lm_blank - lm_norm)
    if am_scale:
        average = lm.softmax(2).mean((0, 1)) + tiny  # (V,)
        am_norm = (am_exp @ average).log().unsqueeze(1) + am_max.mT  # (N, 1, T)
        px = px + am_scale * (am_target + average.log()[targets].unsqueeze(2) - am_norm)
        py = py + am_scale * (am_blank + average[blank].log() - am_norm)
    return px, py


class _TargetLogProbs(torch.autograd.Function):
    """Log-probabilities of one target per row and of blank.

    The gradient is written out because autograd would hold three tensors as large as the logits (of log-sum-exp and of both gathers),
    and the logits of the joint network are the largest tensor of a training step. For the same reason both directions go through them
    piece by piece: besides the gradient itself nothing of their size is ever made.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, blank: int) -> tuple[Tensor, Tensor]:
        pieces = logits.reshape(-1, logits.shape[-1]).split(_rows_at_once(logits))
        norm = torch.cat([_at_least_float32(piece).logsumexp(-1) for piece in pieces]).view(targets.shape)
        ctx.save_for_backward(logits, targets, norm)
        ctx.blank = blank
        target_logits = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return target_logits - norm, logits[..., blank] - norm

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, target_grad: Tensor, blank_grad: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, norm = ctx.saved_tensors
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        flat = [tensor.reshape(-1, logits.shape[-1]) for tensor in (grad, logits)]
        flat += [tensor.reshape(-1, 1) for tensor in (targets, norm, target_grad, blank_grad)]
        pieces = (tensor.split(_rows_at_once(logits)) for tensor in flat)
        for out, piece, target, piece_norm, by_target, by_blank in zip(*pieces, strict=True):
            piece_grad = (piece - piece_norm).exp_().mul_(-(by_target + by_blank))
            piece_grad.scatter_add_(1, target, by_target)
            piece_grad[:, ctx.blank] += by_blank.squeeze(1)
            out.copy_(piece_grad)
        return grad, None, None


def _rows_at_once(logits: Tensor) -> int:
    """Rows of logits for one step: enough to keep a device busy, few enough for a processor's cache."""
    numbers = 2**19 if logits.device.type == "cpu" else 2**25
    return max(numbers // logits.shape[-1], 1)


def _next_symbols(symbols: Tensor, boundary: Tensor, blank: int) -> Tensor:
    """(N, S+1) symbol that each position may emit; blank, which is in every vocabulary, where there is none."""
    extended = F.pad(symbols, (0, 1), value=blank)
    position = torch.arange(extended.shape[1], device=symbols.device)
    return extended.where(position < boundary[:, 2:3], blank)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_symbols(symbols: Tensor, boundary: Tensor, num_symbols: int, blank: int, outputs: Tensor) -> None:
    """`outputs` (..., V) are what the loss is taken of."""
    batch, vocab_size = boundary.shape[0], outputs.shape[-1]
    if symbols.dtype != torch.int64 or symbols.shape != (batch, num_symbols):
        raise ValueError(f"symbols must be int64 of shape ({batch}, {num_symbols}), got {symbols.dtype} {tuple(symbols.shape)}")
    if symbols.device != outputs.device:
        raise ValueError(f"symbols are on {symbols.device}, they must be where the outputs are: on {outputs.device}")
    if not 0 <= blank < vocab_size:
        raise ValueError(f"blank is {blank}, allowed are 0..{vocab_size - 1}")
    if symbols.device.type != "cpu":
        return  # looking at the values would wait for the device
    inside = torch.arange(num_symbols) < boundary[:, 2:3]
    wrong = inside & ((symbols < 0) | (symbols >= vocab_size) | (symbols == blank))
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"symbols of utterance {row} hold {int(symbols[row, column])} at position {column}; allowed are 0..{vocab_size - 1} without "
            f"blank, which is {blank}"
        )
