"""Which symbols each frame keeps in the pruned transducer loss, and the gathering of those symbols.

The joint network is too large to evaluate at every (symbol, frame) node. The occupancies of the simple loss tell where alignments
pass; a window of `prune_range` consecutive symbol positions per frame, placed over most of that mass, is all that the joint network sees.

Source: arXiv 2206.13236. Upstream: k2.get_rnnt_prune_ranges, k2.do_rnnt_pruning.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from k2ssl.losses.transducer_lattice import check_boundary


def prune_ranges(px_grad: Tensor, py_grad: Tensor, boundary: Tensor, prune_range: int) -> Tensor:
    """The window of symbol positions that every frame keeps.

    Each frame's window first goes where most alignments spend the frame inside it. Starts are then lowered as far as needed to make them
    non-decreasing, rising by less than the window's width a frame, 0 on the first frame, and covering an utterance's last symbol on its
    last frame, so that an alignment exists inside the windows. (It does not where an utterance has more than `prune_range - 1`
    symbols a frame: the pruned loss is then +inf.)

    Args:
        px_grad, py_grad: (N, S, T+1) and (N, S+1, T) occupancies of `simple_loss`.
        boundary: (N, 4) int64 CPU: 0, 0, number of symbols, number of frames.
        prune_range: width R of the window, at least 2; narrowed to S + 1 where that is less.

    Returns:
        (N, T, min(R, S+1)) int64 symbol positions on the device of `px_grad`; consecutive along the last axis.

    Raises:
        ValueError: a shape, dtype or device that does not fit, a boundary that does not begin at 0, `prune_range` below 2.
    """
    _check_occupancies(px_grad, py_grad)
    if prune_range < 2:
        raise ValueError(f"prune_ranges: prune_range is {prune_range}, at least 2 is needed: a window of 1 could never move on")
    num_symbols, num_frames = px_grad.shape[1], py_grad.shape[2]
    check_boundary(boundary, px_grad.shape[0], num_symbols, num_frames)
    if bool(boundary[:, :2].any()):
        raise ValueError(f"prune_ranges: boundary must begin at symbol 0 and frame 0, got rows {boundary[:, :2].tolist()}")
    width = min(prune_range, num_symbols + 1)
    with torch.no_grad():
        starts = _best_starts(px_grad, py_grad, width)
        ends = boundary[:, 2:].to(px_grad.device, non_blocking=True)
        starts = _cover_the_end(starts, ends, width)
        starts = _limit_steps(starts, width)
        return starts.unsqueeze(2) + torch.arange(width, device=starts.device)


def prune(am: Tensor, lm: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """What the joint network needs of encoder and predictor output.

    Args:
        am: (N, T, C) encoder output, projected.
        lm: (N, S+1, C) predictor output, projected.
        ranges: (N, T, R) of `prune_ranges`; not checked against S, which would wait for the device.

    Returns:
        am (N, T, R, C), a view repeated along R, and lm (N, T, R, C).

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if am.dim() != 3 or lm.dim() != 3 or am.shape[0] != lm.shape[0] or am.shape[2] != lm.shape[2]:
        raise ValueError(f"prune: am {tuple(am.shape)} and lm {tuple(lm.shape)} must be (N, T, C) and (N, S+1, C)")
    check_ranges(ranges, am.shape[0], am.shape[1], lm.shape[1])
    batch, num_positions, channels = lm.shape
    rows = ranges + num_positions * torch.arange(batch, device=ranges.device).view(-1, 1, 1)
    lm_pruned = lm.reshape(-1, channels).index_select(0, rows.flatten())
    return am.unsqueeze(2).expand(-1, -1, ranges.shape[2], -1), lm_pruned.view(*ranges.shape, channels)


def check_ranges(ranges: Tensor, batch: int, num_frames: int, num_positions: int) -> None:
    """Refuse ranges of the wrong dtype or shape; their values stay unseen.

    Raises:
        ValueError: as said.
    """
    fits = ranges.dim() == 3 and ranges.shape[:2] == (batch, num_frames) and 1 <= ranges.shape[2] <= num_positions
    if ranges.dtype != torch.int64 or not fits:
        raise ValueError(
            f"ranges must be int64 of shape ({batch}, {num_frames}, 1..{num_positions}), got {ranges.dtype} {tuple(ranges.shape)}"
        )


def check_windows(ranges: Tensor, num_positions: int) -> None:
    """Refuse ranges, where they are on the CPU, that are not windows of neighbouring symbol positions moving forwards.

    Raises:
        ValueError: as said, with utterance and frame.
    """
    if ranges.device.type != "cpu":
        return  # looking at the values would wait for the device
    starts = ranges[:, :, 0]
    wrong = (
        (ranges - starts.unsqueeze(2) != torch.arange(ranges.shape[2])).any(2) | (starts < 0) | (starts > num_positions - ranges.shape[2])
    )
    wrong[:, 1:] |= starts.diff(dim=1) < 0
    if bool(wrong.any()):
        row, frame = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"ranges of utterance {row} hold {ranges[row, frame].tolist()} at frame {frame}; allowed are neighbouring positions in "
            f"0..{num_positions - 1}, none below those of the frame before"
        )


def _check_occupancies(px_grad: Tensor, py_grad: Tensor) -> None:
    batch, num_symbols, width = px_grad.shape if px_grad.dim() == 3 else (-1, -1, -1)
    if width < 2 or py_grad.shape != (batch, num_symbols + 1, width - 1):
        raise ValueError(
            f"prune_ranges: px_grad {tuple(px_grad.shape)} and py_grad {tuple(py_grad.shape)} must be (N, S, T+1) and (N, S+1, T)"
        )


def _best_starts(px_grad: Tensor, py_grad: Tensor, width: int) -> Tensor:
    """(N, T) start of the window that holds most alignments; the first of several equal ones.

    An alignment spends frame t inside a window if its blank of that frame lies there, unless it came in over the lower edge by
    emitting the symbol below the window in the same frame.
    """
    blanks_inside = py_grad.unfold(1, width, 1).sum(3)  # (N, S+2-R, T)
    entering = F.pad(px_grad[:, : blanks_inside.shape[1] - 1, :-1], (0, 0, 1, 0))
    return (blanks_inside - entering).argmax(1)


def _cover_the_end(starts: Tensor, ends: Tensor, width: int) -> Tensor:
    """From an utterance's last frame on, the window that ends with its last symbol."""
    last_start = (ends[:, :1] - width + 1).clamp_(min=0)
    before_last_frame = torch.arange(starts.shape[1], device=starts.device) < ends[:, 1:] - 1
    return torch.where(before_last_frame, starts, last_start)


def _limit_steps(starts: Tensor, width: int) -> Tensor:
    """The highest starts not above the given ones that never fall, rise by less than `width` a frame, and are 0 at first."""
    starts = _running_min_from_right(starts)
    # rises below `width` are falls after subtracting a slope of width - 1: the mirror image of the first condition
    slope = (width - 1) * torch.arange(starts.shape[1], device=starts.device)
    return slope - _running_min_from_right(slope - starts).clamp_(min=0)


def _running_min_from_right(values: Tensor) -> Tensor:
    return values.flip(1).cummin(1).values.flip(1)
