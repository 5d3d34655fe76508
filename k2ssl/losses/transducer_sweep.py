"""The transducer recursions in plain PyTorch: two or three small operations per anti-diagonal, for all utterances at once.

Storage is (D, 2, W + 1, N). Row 0 holds symbols, in slot w the arc *into* lane w and so in slot w + 1 that *out of* it; row 1 holds
blanks. Slots 0 and W of row 0 are the same arc, into lane 0 out of the last lane. With utterances innermost a shift by one lane is a
shift in memory, and every operation runs over contiguous numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2ssl.losses.transducer_diagonals import NEG_INF, Diagonals


def new_arcs(batch: int, num_diagonals: int, num_lanes: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Storage and its `emit` and `wait` views, -inf everywhere."""
    storage = torch.full((num_diagonals, 2, num_lanes + 1, batch), NEG_INF, dtype=torch.float64, device=device)
    return storage, storage[:, 0, 1:].permute(2, 0, 1), storage[:, 1, :-1].permute(2, 0, 1)


def sweep(diagonals: Diagonals) -> Tensor:
    """(N,) log-likelihoods in float64; leaves occupancies where the log-probabilities were."""
    alpha = _forward(diagonals)
    return _occupancies(diagonals, alpha)


def _forward(diagonals: Diagonals) -> Tensor:
    """p of every node, as (D, W + 1, N): slot 0 repeats the last lane (-inf where not cyclic), slot w + 1 is lane w."""
    arcs = diagonals.storage
    num_diagonals, _, num_slots, batch = arcs.shape
    if diagonals.cyclic:
        arcs[:, 0, 0] = arcs[:, 0, -1]
    alpha = arcs.new_full((num_diagonals, num_slots, batch), NEG_INF)
    alpha[_at(diagonals.begin, 1)] = 0.0
    sources, into, lanes = _sources(alpha).unbind(0), arcs[:, :, :-1].unbind(0), alpha[:, 1:].unbind(0)
    first, last = alpha[:, 0].unbind(0), alpha[:, -1].unbind(0)
    arriving = torch.empty_like(sources[0])
    moved, stayed = arriving.unbind(0)
    for d in range(num_diagonals - 1):
        if diagonals.cyclic:
            first[d].copy_(last[d])
        torch.add(sources[d], into[d], out=arriving)
        torch.logaddexp(moved, stayed, out=moved)
        torch.maximum(lanes[d + 1], moved, out=lanes[d + 1])  # keeps the 0 of an utterance that begins here
    return alpha


def _occupancies(diagonals: Diagonals, alpha: Tensor) -> Tensor:
    """Turns arcs into occupancies, using up `alpha`.

    The share of a node's probability that came in over an arc is exp(p[from] + arc - p[to]) <= 1, known for all arcs at once; walking
    back from the end, a node passes its own occupancy on in these shares. Nothing here can overflow.
    """
    arcs = diagonals.storage
    log_likelihood = alpha[_at(diagonals.end, 1)]
    shares = arcs[:-1, :, :-1]
    shares += _sources(alpha)[:-1]
    shares -= alpha.masked_fill_(alpha == NEG_INF, float("inf"))[1:, 1:].unsqueeze(1)  # nothing comes to a node that is not reached
    shares.exp_()
    arcs[-1] = 0.0
    arcs[:, 0, -1] = arcs[:, 0, 0] if diagonals.cyclic else 0.0

    node = alpha.zero_()  # slot w is lane w, the last slot repeats lane 0 (0 where not cyclic)
    node[_at(diagonals.end, 0)] = 1.0
    if diagonals.cyclic:
        node[:, -1] = node[:, 0]
    move, stay = arcs[:, 0, 1:].unbind(0), arcs[:, 1, :-1].unbind(0)
    lanes, next_lanes = node[:, :-1].unbind(0), node[:, 1:].unbind(0)
    first, last = node[:, 0].unbind(0), node[:, -1].unbind(0)
    for d in range(len(move) - 2, -1, -1):
        lanes[d].addcmul_(stay[d], lanes[d + 1]).addcmul_(move[d], next_lanes[d + 1])
        if diagonals.cyclic:
            last[d].copy_(first[d])
    arcs[:-1, 0, 1:] *= node[1:, 1:]
    arcs[:-1, 1, :-1] *= node[1:, :-1]
    return log_likelihood


def _sources(alpha: Tensor) -> Tensor:
    """(D, W + 1, N) -> (D, 2, W, N) view: where the symbol into a lane comes from, and where the blank."""
    num_diagonals, num_slots, batch = alpha.shape
    return alpha.as_strided((num_diagonals, 2, num_slots - 1, batch), (num_slots * batch, batch, batch, 1))


def _at(nodes: Tensor, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index of (N, 2) nodes into (D, slots, N), where lane w is slot w + shift."""
    return nodes[:, 0], nodes[:, 1] + shift, torch.arange(len(nodes), device=nodes.device)
