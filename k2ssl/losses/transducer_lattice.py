"""The transducer lattice: total log-likelihood over all alignments, and how often the alignments use each arc.

A node (s, t) means that s symbols have been emitted and t frames consumed. From there `px[s, t]` is the log-probability of the next
symbol, which leads to (s + 1, t), and `py[s, t]` that of blank, which leads to (s, t + 1). With p = 0 at the node where an utterance
begins,

    p[s, t] = logaddexp(p[s-1, t] + px[s-1, t],  p[s, t-1] + py[s, t-1])

and the loss is -p at the node where it ends. The derivative of p[end] by an arc's log-probability is the posterior probability that an
alignment uses the arc (its *occupancy*), so the backward pass is a second recursion and needs no autograd graph.

`forward_backward` and `window_forward_backward` hold both recursions behind one signature each, for all nodes and for windows of nodes;
`transducer_backend` tells who computes them.

Source: arXiv 1211.3711 (lattice), arXiv 2206.13236 (occupancies). Upstream: k2.mutual_information_recursion, "regular" lattice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from k2ssl.first_derivative import first_derivative_only
from k2ssl.losses.transducer_backend import announced_backend, recursion
from k2ssl.losses.transducer_diagonals import NEG_INF, Diagonals, ends_of, grid_view, window_nodes


def make_boundary(symbol_lens: Tensor, frame_lens: Tensor) -> Tensor:
    """(N, 4) boundary of utterances that begin at symbol 0 and frame 0, from two (N,) int64 CPU tensors."""
    zeros = torch.zeros_like(symbol_lens)
    return torch.stack([zeros, zeros, symbol_lens, frame_lens], dim=1)


def check_boundary(boundary: Tensor, batch: int, num_symbols: int, num_frames: int) -> None:
    """Refuse a boundary that is not a CPU int64 (N, 4) tensor (checking one elsewhere would wait for the device) or leaves the lattice.

    Raises:
        ValueError: as said, with the utterance's position.
    """
    if boundary.dtype != torch.int64 or boundary.shape != (batch, 4) or boundary.device.type != "cpu":
        raise ValueError(
            f"boundary must be an int64 CPU tensor of shape ({batch}, 4), got {boundary.dtype} {tuple(boundary.shape)} on {boundary.device}"
        )
    for row, (begin_symbol, begin_frame, end_symbol, end_frame) in enumerate(boundary.tolist()):
        if not (0 <= begin_symbol <= end_symbol <= num_symbols and 0 <= begin_frame < end_frame <= num_frames):
            raise ValueError(
                f"boundary of utterance {row} is {[begin_symbol, begin_frame, end_symbol, end_frame]}; allowed are "
                f"0 <= begin symbol <= end symbol <= {num_symbols} and 0 <= begin frame < end frame <= {num_frames}"
            )


def lattice_loss(px: Tensor, py: Tensor, boundary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Negative log-likelihood per utterance, differentiable in `px` and `py`, with the occupancies that are its gradients.

    Args:
        px: (N, S, T+1) log-probabilities of symbols, float32 or float64. Callers put -inf where all of an utterance's
            frames are consumed (column of its end frame), so that no symbol follows the last blank.
        py: (N, S+1, T) log-probabilities of blank.
        boundary: (N, 4) int64 on the same device: begin symbol, begin frame, end symbol, end frame.

    Returns:
        loss (N,), +inf where no alignment is possible (its gradient is then zero);
        px_grad (N, S, T+1) and py_grad (N, S+1, T): occupancies in 0..1, detached, zero outside an utterance's boundary. Each row of
        `px_grad` inside it sums to 1 over frames, each column of `py_grad` to 1 over symbols.
    """
    loss, px_grad, py_grad = _LatticeLoss.apply(px, py, boundary, None, px.shape[1])
    return loss, px_grad, py_grad


def window_loss(px: Tensor, py: Tensor, ranges: Tensor, boundary: Tensor, num_symbols: int) -> Tensor:
    """Negative log-likelihood over the alignments that stay inside windows, differentiable in `px` and `py`.

    Args:
        px, py: (N, T, R) log-probabilities of the next symbol and of blank at symbol positions `ranges`. A symbol stays in its frame, so
            that of a window's last position leads nowhere; a blank leads to the next frame, if its window still has the position.
        ranges: (N, T, R) int64, consecutive along R, never falling along T.
        boundary: (N, 4) int64 on the same device: begin symbol, begin frame, end symbol, end frame.
        num_symbols: S, the most that `ranges` may hold.

    Returns:
        (N,), +inf where no alignment fits (its gradient is then zero).
    """
    return _LatticeLoss.apply(px, py, boundary, ranges, num_symbols)[0]


class _LatticeLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, px: Tensor, py: Tensor, boundary: Tensor, ranges: Tensor | None, num_symbols: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        if ranges is None:
            log_likelihood, px_grad, py_grad = forward_backward(px, py, boundary)
        else:
            log_likelihood, px_grad, py_grad = window_forward_backward(px, py, ranges, boundary, num_symbols)
        ctx.save_for_backward(px_grad, py_grad)
        ctx.mark_non_differentiable(px_grad, py_grad)
        return -log_likelihood, px_grad, py_grad

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, loss_grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        px_grad, py_grad = ctx.saved_tensors
        scale = -loss_grad.view(-1, 1, 1)
        return scale * px_grad, scale * py_grad, None, None, None


def forward_backward(px: Tensor, py: Tensor, boundary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both recursions over all nodes, without autograd; arguments as for `lattice_loss`.

    The recursions accumulate in float64: they are bound by the number of steps and not by arithmetic, and in float32 the rounding of a
    log-likelihood of several thousand nats would already show in the occupancies.

    Returns:
        log_likelihood (N,), px_grad (N, S, T+1), py_grad (N, S+1, T), in the dtype of `px`.
    """
    backend = announced_backend(px.device)
    if backend == "k2":
        from k2ssl.lattice import transducer as k2_lattice

        return k2_lattice.forward_backward(px, py, boundary)
    new_arcs, sweep = recursion(backend)
    (batch, num_symbols, _), num_frames = px.shape, py.shape[2]
    storage, emit, wait = new_arcs(batch, num_symbols + num_frames + 1, num_symbols + 1, px.device)
    px_arcs, py_arcs = grid_view(emit, num_frames + 1)[:, :num_symbols], grid_view(wait, num_frames)
    px_arcs.copy_(px)
    py_arcs.copy_(py)
    begin, end = ends_of(boundary, num_symbols + 1)
    log_likelihood = sweep(Diagonals(storage, emit, wait, begin, end, cyclic=False))
    return log_likelihood.to(px.dtype), torch.empty_like(px).copy_(px_arcs), torch.empty_like(py).copy_(py_arcs)


def window_forward_backward(px: Tensor, py: Tensor, ranges: Tensor, boundary: Tensor, num_symbols: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both recursions over the nodes of windows, without autograd; arguments as for `window_loss`.

    Returns:
        log_likelihood (N,), px_grad (N, T, R), py_grad (N, T, R), in the dtype of `px`.
    """
    nodes = window_nodes(ranges, boundary)
    px, py = px.masked_fill(~nodes.emits, NEG_INF), py.masked_fill(~nodes.waits, NEG_INF)
    backend = announced_backend(px.device)
    if backend == "k2":
        return _windows_on_grid(px, py, ranges, boundary, num_symbols)
    new_arcs, sweep = recursion(backend)
    batch, num_frames, width = ranges.shape
    storage, emit, wait = new_arcs(batch, num_symbols + num_frames + 1, width, px.device)
    emit[nodes.index], wait[nodes.index] = px.double(), py.double()
    begin, end = ends_of(boundary, width)
    log_likelihood = sweep(Diagonals(storage, emit, wait, begin, end, cyclic=True))
    return log_likelihood.to(px.dtype), emit[nodes.index].to(px.dtype), wait[nodes.index].to(px.dtype)


def _windows_on_grid(px: Tensor, py: Tensor, ranges: Tensor, boundary: Tensor, num_symbols: int) -> tuple[Tensor, Tensor, Tensor]:
    """`window_forward_backward` by way of the whole lattice."""
    outside = px.new_full((*px.shape[:2], num_symbols + 1), NEG_INF)
    px_grid = outside.scatter(2, ranges, px)[:, :, :-1].transpose(1, 2)
    py_grid = outside.scatter(2, ranges, py).transpose(1, 2)
    log_likelihood, px_grad, py_grad = forward_backward(F.pad(px_grid, (0, 1), value=NEG_INF), py_grid, boundary)
    px_grad = F.pad(px_grad[:, :, :-1], (0, 0, 0, 1))  # nothing follows the last symbol
    return log_likelihood, px_grad.transpose(1, 2).gather(2, ranges), py_grad.transpose(1, 2).gather(2, ranges)
