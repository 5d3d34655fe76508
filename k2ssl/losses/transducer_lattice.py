"""The transducer lattice: total log-likelihood over all alignments, and how often the alignments use each arc.

A node (s, t) means that s symbols have been emitted and t frames consumed. From there `px[s, t]` is the log-probability of the next
symbol, which leads to (s + 1, t), and `py[s, t]` that of blank, which leads to (s, t + 1). With p = 0 at the node where an utterance
begins,

    p[s, t] = logaddexp(p[s-1, t] + px[s-1, t],  p[s, t-1] + py[s, t-1])

and the loss is -p at the node where it ends. The derivative of p[end] by an arc's log-probability is the posterior probability that an
alignment uses the arc (its *occupancy*), so the backward pass is a second recursion and needs no autograd graph.

`forward_backward` holds both recursions behind one signature: whoever computes them faster replaces that function alone.

Source: arXiv 1211.3711 (lattice), arXiv 2206.13236 (occupancies). Upstream: k2.mutual_information_recursion, "regular" lattice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

NEG_INF = float("-inf")


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
    loss, px_grad, py_grad = _LatticeLoss.apply(px, py, boundary)
    return loss, px_grad, py_grad


class _LatticeLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, px: Tensor, py: Tensor, boundary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_likelihood, px_grad, py_grad = forward_backward(px, py, boundary)
        ctx.save_for_backward(px_grad, py_grad)
        ctx.mark_non_differentiable(px_grad, py_grad)
        return -log_likelihood, px_grad, py_grad

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None]:
        px_grad, py_grad = ctx.saved_tensors
        scale = -loss_grad.view(-1, 1, 1)
        return scale * px_grad, scale * py_grad, None


def forward_backward(px: Tensor, py: Tensor, boundary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both recursions, without autograd; arguments as for `lattice_loss`.

    All nodes on one anti-diagonal (s + t = d) depend only on the one before, so the work is S + T steps of (N, S+1) vectors. The
    recursions accumulate in float64: they are bound by the number of steps and not by arithmetic, and in float32 the rounding of a
    log-likelihood of several thousand nats would already show in the occupancies.

    Returns:
        log_likelihood (N,), px_grad (N, S, T+1), py_grad (N, S+1, T), in the dtype of `px`.
    """
    num_symbols, num_frames = px.shape[1], py.shape[2]
    emit = _to_diagonals(F.pad(px, (0, 0, 0, 1), value=NEG_INF))
    wait = _to_diagonals(F.pad(py, (0, 1), value=NEG_INF))
    alpha = _forward(emit, wait, boundary)
    rows = torch.arange(px.shape[0], device=px.device)
    end = (boundary[:, 2] + boundary[:, 3], rows, boundary[:, 2])
    px_grad, py_grad = _occupancies(alpha, emit, wait, end)
    px_grad = _from_diagonals(px_grad.to(px.dtype), num_frames + 1)[:, :num_symbols]
    py_grad = _from_diagonals(py_grad.to(py.dtype), num_frames + 1)[:, :, :num_frames]
    return alpha[end].to(px.dtype), px_grad.contiguous(), py_grad.contiguous()


def _forward(emit: Tensor, wait: Tensor, boundary: Tensor) -> Tensor:
    """p of every node, as float64 (D, N, S+1) diagonals; -inf where no alignment passes."""
    alpha = torch.full(emit.shape, NEG_INF, dtype=torch.float64, device=emit.device)
    rows = torch.arange(emit.shape[1], device=emit.device)
    begin = (boundary[:, 0] + boundary[:, 1], rows, boundary[:, 0])
    alpha[begin] = 0.0
    for d in range(alpha.shape[0] - 1):
        arriving = alpha[d] + wait[d]
        arriving[:, 1:] = torch.logaddexp(arriving[:, 1:], alpha[d, :, :-1] + emit[d, :, :-1])
        torch.maximum(alpha[d + 1], arriving, out=alpha[d + 1])  # keeps the 0 of an utterance that begins here
    return alpha


def _occupancies(alpha: Tensor, emit: Tensor, wait: Tensor, end: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Occupancies of symbol and blank arcs, as (D, N, S+1) diagonals.

    The share of a node's probability that came in over an arc is exp(p[from] + arc - p[to]) <= 1, known for all arcs at once; walking
    back from the end, a node passes its own occupancy on in these shares. Nothing here can overflow.
    """
    unreached = alpha[1:] == NEG_INF
    blank_share = (alpha[:-1] + wait[:-1] - alpha[1:]).exp_().masked_fill_(unreached, 0.0)
    symbol_share = (alpha[:-1, :, :-1] + emit[:-1, :, :-1] - alpha[1:, :, 1:]).exp_().masked_fill_(unreached[:, :, 1:], 0.0)
    node = torch.zeros_like(alpha)
    node[end] = 1.0
    for d in range(alpha.shape[0] - 2, -1, -1):
        node[d].addcmul_(blank_share[d], node[d + 1])
        node[d, :, :-1].addcmul_(symbol_share[d], node[d + 1, :, 1:])
    px_grad, py_grad = torch.zeros_like(alpha), torch.zeros_like(alpha)
    torch.mul(symbol_share, node[1:, :, 1:], out=px_grad[:-1, :, :-1])
    torch.mul(blank_share, node[1:], out=py_grad[:-1])
    return px_grad, py_grad


def _to_diagonals(lattice: Tensor) -> Tensor:
    """(N, S+1, T+1) -> (S+T+1, N, S+1): entry (d, n, s) is lattice[n, s, d - s], or -inf where that lies outside.

    Rows padded by their own number and read with a stride one shorter come out shifted by one more place each.
    """
    num_rows, width = lattice.shape[1:]
    num_diagonals = num_rows + width - 1
    flat = F.pad(lattice, (0, num_rows), value=NEG_INF).flatten(1)
    return flat[:, : num_rows * num_diagonals].unflatten(1, (num_rows, num_diagonals)).permute(2, 0, 1).contiguous()


def _from_diagonals(diagonals: Tensor, width: int) -> Tensor:
    """The inverse of `_to_diagonals`: (S+T+1, N, S+1) -> (N, S+1, width = T+1)."""
    num_diagonals, _, num_rows = diagonals.shape
    flat = F.pad(diagonals.permute(1, 2, 0).flatten(1), (0, num_rows))
    return flat.unflatten(1, (num_rows, num_diagonals + 1))[:, :, :width]
