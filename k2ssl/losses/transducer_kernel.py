"""The transducer recursions as Triton kernels.

One program per utterance and direction walks over the anti-diagonals with its lanes in registers: p from the beginning to every node
(alpha) and from every node to the end (beta), both at the same time. A second kernel makes occupancies of them, all arcs at once:
exp(alpha[from] + arc + beta[to] - p). Everything is float64, which makes the rounding of that sum harmless.

Storage is (2, N, D, W): symbols, then blanks.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from k2ssl.losses.transducer_diagonals import NEG_INF, Diagonals

_ARCS_PER_PROGRAM = 1024


def new_arcs(batch: int, num_diagonals: int, num_lanes: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Storage and its `emit` and `wait` views, -inf everywhere."""
    storage = torch.full((2, batch, num_diagonals, num_lanes), NEG_INF, dtype=torch.float64, device=device)
    return storage, storage[0], storage[1]


def sweep(diagonals: Diagonals) -> Tensor:
    """(N,) log-likelihoods in float64; leaves occupancies where the log-probabilities were."""
    emit, wait = diagonals.emit, diagonals.wait
    batch, num_diagonals, num_lanes = emit.shape
    scores = torch.empty_like(diagonals.storage)  # alpha, then beta; only nodes from an utterance's begin to its end are written
    block = triton.next_power_of_2(num_lanes)
    begin, end = diagonals.begin.contiguous(), diagonals.end.contiguous()
    with torch.cuda.device(emit.device) if emit.device.type == "cuda" else nullcontext():
        _walk[(batch, 2)](emit, wait, scores, begin, end, num_diagonals, num_lanes, BLOCK=block, num_warps=min(max(block // 32, 1), 16))
        log_likelihood = scores[0][torch.arange(batch, device=emit.device), end[:, 0], end[:, 1]]
        total = log_likelihood.masked_fill(log_likelihood == NEG_INF, float("inf"))  # no share of an impossible utterance is above 0
        programs = triton.cdiv(num_diagonals * num_lanes, _ARCS_PER_PROGRAM)
        _occupancies[(batch, programs)](emit, wait, scores, total, begin, end, num_diagonals, num_lanes, BLOCK=_ARCS_PER_PROGRAM)
    return log_likelihood


@triton.jit
def _log_add(a, b):  # type: ignore[no-untyped-def]
    """log(exp(a) + exp(b)) that keeps nan, and -inf of two -inf."""
    distance = tl.where(a == b, 0.0, tl.abs(a - b))
    return tl.where(a > b, a, b) + tl.log(1.0 + tl.exp(-distance))


@triton.jit
def _walk(emit, wait, scores, begin, end, num_diagonals, num_lanes, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (n, 0) writes alpha of utterance n, program (n, 1) beta.

    Going back, lanes and arcs are the same with left and right exchanged: a node gets what the next node in its own lane has over the
    blank, and what the next node in the following lane has over the symbol.
    """
    row, backward = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, first_lane = tl.load(begin + 2 * row), tl.load(begin + 2 * row + 1)
    last, last_lane = tl.load(end + 2 * row), tl.load(end + 2 * row + 1)
    lanes = tl.arange(0, BLOCK)
    exists = lanes < num_lanes
    left = tl.where(lanes == 0, num_lanes - 1, lanes - 1)
    right = tl.where(lanes == num_lanes - 1, 0, lanes + 1)
    neighbour = tl.where(exists, tl.where(backward == 1, right, left), lanes).to(tl.int32)
    emit_lane = tl.where(backward == 1, lanes, left)  # whose symbol arc joins a lane and its neighbour

    base = row * num_diagonals * num_lanes
    out = scores + backward * tl.num_programs(0).to(tl.int64) * num_diagonals * num_lanes + base + lanes
    emit += base + emit_lane
    wait += base + lanes
    node = tl.where(backward == 1, last, first)
    arc = tl.where(backward == 1, last - 1, first)  # arcs between two anti-diagonals are stored with the earlier one
    step = tl.where(backward == 1, -1, 1)

    p = tl.where(lanes == tl.where(backward == 1, last_lane, first_lane), 0.0, float("-inf")).to(tl.float64)
    stay = tl.load(wait + arc * num_lanes, mask=exists & (first < last), other=float("-inf"))
    move = tl.load(emit + arc * num_lanes, mask=exists & (first < last), other=float("-inf"))
    remaining = last - first
    while remaining > 0:
        tl.store(out + node * num_lanes, p, mask=exists)
        node += step
        arc += step
        remaining -= 1
        more = exists & (remaining > 0)  # the next arcs are under way while this anti-diagonal is computed
        next_stay = tl.load(wait + arc * num_lanes, mask=more, other=float("-inf"))
        next_move = tl.load(emit + arc * num_lanes, mask=more, other=float("-inf"))
        p = _log_add(p + stay, tl.gather(p, neighbour, 0) + move)
        stay, move = next_stay, next_move
    tl.store(out + node * num_lanes, p, mask=exists)


@triton.jit
def _occupancies(emit, wait, scores, total, begin, end, num_diagonals, num_lanes, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (n, i) replaces block i of utterance n's arcs by their occupancies."""
    row, size = tl.program_id(0).to(tl.int64), num_diagonals * num_lanes
    first, last, p = tl.load(begin + 2 * row), tl.load(end + 2 * row), tl.load(total + row)
    arcs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = arcs < size
    diagonal, lane = arcs // num_lanes, arcs % num_lanes
    inside = exists & (diagonal >= first) & (diagonal < last)
    here = row * size + arcs
    next_lane = tl.where(lane == num_lanes - 1, 0, lane + 1)
    alpha = tl.load(scores + here, mask=inside, other=0.0) - p
    beta = scores + tl.num_programs(0).to(tl.int64) * size + row * size + (diagonal + 1) * num_lanes
    stayed = alpha + tl.load(wait + here, mask=inside, other=0.0) + tl.load(beta + lane, mask=inside, other=0.0)
    moved = alpha + tl.load(emit + here, mask=inside, other=0.0) + tl.load(beta + next_lane, mask=inside, other=0.0)
    tl.store(wait + here, tl.where(inside, tl.exp(stayed), 0.0), mask=exists)
    tl.store(emit + here, tl.where(inside, tl.exp(moved), 0.0), mask=exists)
