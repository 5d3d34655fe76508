"""Where k-means starts: greedy k-means++ and a few of Lloyd's iterations on a sample, the best of several restarts by held-out frames."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from k2ssl import distributed
from k2ssl.labelling.frame_stream import generator
from k2ssl.labelling.nearest import Centres, full_precision, sums_by_label

_SAME = 2.0**-20  # squared distances below this share of |x|^2 + |c|^2 are rounding errors of float32: the frames are equal


@dataclass(frozen=True)
class Start:
    """Centres to begin with.

    Attributes:
        centroids: (K, D) float64.
        counts: (K,) float64 sample frames behind each centre.
        inertia: mean squared distance of the held-out frames.
    """

    centroids: Tensor
    counts: Tensor
    inertia: float


def best_start(
    sample: Tensor,
    held_out: Tensor,
    num_clusters: int,
    num_restarts: int,
    lloyd_iterations: int,
    seed: int,
    done: Callable[[int, float], None],
) -> Start:
    """The best of `num_restarts`, which the ranks share; every rank gets the same bits.

    Args:
        sample: (R, D) float32 frames to start from, the same on every rank.
        held_out: (V, D) float32 frames to score with.
        num_clusters, num_restarts, lloyd_iterations, seed: see `KMeansConfig`.
        done: called after each of this rank's restarts with how many are done on all ranks (an estimate) and the best inertia so far.

    Raises:
        ValueError: the sample has fewer distinct frames than clusters.
    """
    best: Start | None = None
    scores = torch.zeros(num_restarts, dtype=torch.float64, device=sample.device)
    with distributed.failing_together():
        for restart in range(distributed.rank(), num_restarts, distributed.world_size()):
            start = _one_start(sample, held_out, num_clusters, lloyd_iterations, generator(seed, 1, restart))
            scores[restart] = start.inertia
            if best is None or start.inertia < best.inertia:
                best = start
            done(min(num_restarts, restart - distributed.rank() + distributed.world_size()), best.inertia)
    values = distributed.all_reduce_sum(scores).tolist()
    winner = values.index(min(values))
    if best is None:  # a rank without a restart of its own
        best = Start(sample.new_zeros(num_clusters, sample.shape[1]).double(), sample.new_zeros(num_clusters).double(), 0.0)
    source = winner % distributed.world_size()
    return Start(distributed.broadcast(best.centroids, source), distributed.broadcast(best.counts, source), values[winner])


def _one_start(sample: Tensor, held_out: Tensor, num_clusters: int, lloyd_iterations: int, draw: torch.Generator) -> Start:
    centroids = sample[plus_plus(sample, num_clusters, draw)].double()
    counts = centroids.new_zeros(num_clusters)
    for _ in range(max(1, lloyd_iterations)):
        sums, counts = sums_by_label(sample, Centres(centroids).nearest(sample), num_clusters)
        if lloyd_iterations:
            centroids = torch.where(counts.unsqueeze(1) > 0, sums / counts.clamp(min=1).unsqueeze(1), centroids)
    centres = Centres(centroids)
    return Start(centroids, counts, centres.squared_distances(held_out, centres.nearest(held_out)).double().mean().item())


def plus_plus(sample: Tensor, num_clusters: int, draw: torch.Generator) -> Tensor:
    """(R, D) float32 to (num_clusters,) int64 rows by greedy k-means++ (Arthur & Vassilvitskii, 2007, and its section 5).

    Every further centre is the best of 2 + ln K candidates, as in scikit-learn, each drawn with a probability proportional to the squared
    distance to the nearest centre so far; the best lowers the sum of those distances most.

    Raises:
        ValueError: the sample has fewer distinct frames than clusters.
    """
    num_candidates = 2 + int(math.log(num_clusters))
    moved = sample - sample.double().mean(0).float()
    squares = moved.square().sum(1)
    chosen = [int(torch.randint(len(sample), (1,), generator=draw))]
    closest = _squared_distances(moved, squares, torch.tensor(chosen, device=sample.device)).squeeze(1)
    while len(chosen) < num_clusters:
        sums = closest.cpu().double().cumsum(0)  # a running sum on CUDA need not give the same bits twice
        if sums[-1] <= 0:
            raise ValueError(
                f"KMeansConfig: num_clusters is {num_clusters}, but the sample of {len(sample)} frames holds only {len(chosen)} distinct ones"
            )
        drawn = torch.rand(num_candidates, generator=draw, dtype=torch.float64) * sums[-1]
        candidates = torch.searchsorted(sums, drawn, right=True).clamp(max=len(sample) - 1).to(sample.device)
        remaining = torch.minimum(_squared_distances(moved, squares, candidates), closest.unsqueeze(1))
        best = int(remaining.sum(0).argmin())
        chosen.append(int(candidates[best]))
        closest = remaining[:, best].contiguous()
    return torch.tensor(chosen, device=sample.device)


def draw_far_frames(sample: Tensor, centres: Centres, number: int, draw: torch.Generator) -> Tensor:
    """(number, D) distinct frames of the sample, drawn with probabilities proportional to the squared distance to the nearest centre."""
    distances = centres.squared_distances(sample, centres.nearest(sample)).cpu().double()
    races = torch.empty(len(sample), dtype=torch.float64).exponential_(generator=draw)  # the smallest E / weight wins with its share
    return sample[(races / distances.clamp(min=torch.finfo(torch.float64).tiny)).argsort(stable=True)[:number].to(sample.device)]


def _squared_distances(moved: Tensor, squares: Tensor, rows: Tensor) -> Tensor:
    """(R, len(rows)) squared distances to frames of the sample itself, exactly 0 to equal frames."""
    with full_precision(moved.device):
        sizes = squares.unsqueeze(1) + squares[rows]
        distances = sizes - 2 * (moved @ moved[rows].T)
    return torch.where(distances <= _SAME * sizes, 0.0, distances)
