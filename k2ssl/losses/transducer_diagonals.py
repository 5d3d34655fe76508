"""Where the arcs of a transducer lattice lie in memory, so that a recursion walks over whole anti-diagonals.

All nodes (s, t) on one anti-diagonal d = s + t depend only on the one before. Both layouts give each of its nodes a *lane*: a blank stays
in its lane, a symbol moves on by one, from the last lane to the first. The full lattice has a lane per symbol position; a lattice of
windows, of which no two nodes on an anti-diagonal are R symbols apart, has lane s mod R, so that its cost does not grow with the
transcript.

Letters beside those of `transducer`: D = S + T + 1 anti-diagonals, W lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEG_INF = float("-inf")


@dataclass(frozen=True)
class Diagonals:
    """Arcs out of the node in lane w of anti-diagonal d: before a sweep their log-probabilities, after it their occupancies.

    Attributes:
        storage: what the two views below share; its layout is the backend's own.
        emit, wait: (N, D, W) float64 views, arcs of symbols and of blanks.
        begin, end: (N, 2) int64, anti-diagonal and lane of the nodes where an utterance begins and ends.
        cyclic: whether symbols pass from the last lane to the first.
    """

    storage: Tensor
    emit: Tensor
    wait: Tensor
    begin: Tensor
    end: Tensor
    cyclic: bool


def grid_view(arcs: Tensor, num_columns: int) -> Tensor:
    """(N, D, W) arcs -> (N, W, num_columns) view: entry (n, s, t) is arcs[n, s + t, s]."""
    batch, _, num_lanes = arcs.shape
    sample, diagonal, lane = arcs.stride()
    return arcs.as_strided((batch, num_lanes, num_columns), (sample, diagonal + lane, diagonal), arcs.storage_offset())


@dataclass(frozen=True)
class WindowNodes:
    """Where the nodes of windows lie, and which of their arcs exist.

    Attributes:
        rows, diagonals, lanes: index (N, T, R) into (N, D, W = R) arcs, broadcast.
        emits, waits: (N, T, R) bool, whether the node has a symbol arc and a blank arc.
    """

    rows: Tensor
    diagonals: Tensor
    lanes: Tensor
    emits: Tensor
    waits: Tensor

    @property
    def index(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows, self.diagonals, self.lanes


def window_nodes(ranges: Tensor, boundary: Tensor) -> WindowNodes:
    """Nodes of (N, T, R) windows of consecutive symbols that never fall; `boundary` (N, 4) on their device.

    A node has arcs while it is inside the boundary, where those of padding have no say even if they are nan. The symbol of a window's last
    position would lead into the lane of its first, which later frames may still use, so it is left out. A blank may lead to a node below
    the next window: such a node shares its place with no node of a window, and has no arcs.
    """
    batch, num_frames, width = ranges.shape
    begin_symbol, begin_frame, end_symbol, end_frame = (column.view(-1, 1, 1) for column in boundary.unbind(1))
    frame = torch.arange(num_frames, device=ranges.device).view(1, -1, 1)
    inside = (ranges >= begin_symbol) & (ranges <= end_symbol) & (frame >= begin_frame) & (frame < end_frame)
    leaves = torch.arange(width, device=ranges.device) == width - 1
    rows = torch.arange(batch, device=ranges.device).view(-1, 1, 1)
    return WindowNodes(rows, ranges + frame, ranges % width, inside & ~leaves, inside)


def ends_of(boundary: Tensor, num_lanes: int) -> tuple[Tensor, Tensor]:
    """(N, 2) anti-diagonal and lane of each utterance's first and of its last node."""
    begin, end = (torch.stack([node.sum(1), node[:, 0] % num_lanes], dim=1) for node in (boundary[:, :2], boundary[:, 2:]))
    return begin, end
