"""Fitting by two real processes over gloo."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from k2ssl import distributed
from k2ssl.labelling.frame_stream import Reservoir
from k2ssl.labelling.kmeans import KMeans, KMeansConfig, Progress, fit_kmeans
from tests.ranks import spawn

CONFIG = KMeansConfig(
    num_clusters=12,
    batch_frames=501,  # odd: the ranks' shares differ
    max_batches=30,
    reservoir_frames=1000,
    held_out_frames=300,
    num_restarts=3,
    lloyd_iterations=3,
    reassign_ratio=0.7,
    checkpoint_every=10,
)
MANY = replace(CONFIG, num_clusters=40, reassign_ratio=0.01)


def _frames() -> Tensor:
    draw = torch.Generator().manual_seed(5)
    means = 3 * torch.randn(30, 10, generator=draw)
    return means[torch.randint(30, (4000,), generator=draw)] + torch.randn(4000, 10, generator=draw)


def _share(epoch: int) -> Iterator[Tensor]:
    """Two thirds of the frames for rank 0 and one third for rank 1, in pieces of different sizes; all of them for one rank alone."""
    rank, ranks = distributed.rank(), distributed.world_size()
    frames = _frames()
    own = frames if ranks == 1 else frames[torch.arange(4000) % 3 != 2] if rank == 0 else frames[torch.arange(4000) % 3 == 2]
    yield from own[torch.randperm(len(own), generator=torch.Generator().manual_seed(epoch))].split(100 + 50 * rank)


class _StopError(Exception):
    pass


def _stop(progress: Progress) -> None:
    if progress.stage == "updates" and progress.batches == 17:
        raise _StopError


def _work(folder: Path) -> None:
    rank = distributed.rank()
    warnings.filterwarnings("ignore", message="fit_kmeans: held-out frames")  # so much re-seeding is bad for centres, good for this test
    once = fit_kmeans(_share, CONFIG, checkpoint=folder / "whole.pt").centroids
    again = fit_kmeans(_share, CONFIG, checkpoint=folder / "again.pt").centroids
    with pytest.raises(_StopError):
        fit_kmeans(_share, CONFIG, checkpoint=folder / "fit.pt", progress=_stop)
    distributed.barrier()
    resumed = fit_kmeans(_share, CONFIG, checkpoint=folder / "fit.pt").centroids
    one_restart = fit_kmeans(_share, replace(CONFIG, num_restarts=1)).centroids
    many = fit_kmeans(_share, MANY).centroids
    reservoir = Reservoir(90, (1,))
    reservoir.show(torch.arange(200.0 * rank, 200.0 * rank + 200 - 180 * rank).unsqueeze(1))  # 200 frames here, 20 there
    results = {"once": once, "again": again, "resumed": resumed, "one_restart": one_restart, "many": many}
    torch.save({**results, "sample": reservoir.gather(torch.device("cpu"))}, folder / f"{rank}.pt")
    _refuse_together()


def _refuse_together() -> None:
    rank = distributed.rank()

    def broken(epoch: int) -> Iterator[Tensor]:
        for part in _share(epoch):
            yield part * torch.nan if epoch == bad_epoch and rank == 1 else part

    for bad_epoch in (0, 1):
        message = (RuntimeError, "rank 1 failed") if rank == 0 else (ValueError, f"epoch {bad_epoch}, batch 0: frame 0 has the value nan")
        with pytest.raises(message[0], match=message[1]):
            fit_kmeans(broken, CONFIG)
    with pytest.raises(RuntimeError if rank == 0 else ValueError, match="rank 1"):
        fit_kmeans(lambda epoch: _share(epoch) if rank == 0 else iter([]), CONFIG)
    few = replace(CONFIG, num_restarts=1)  # rank 1 has no restart, and must not wait for ever
    with pytest.raises(ValueError if rank == 0 else RuntimeError, match="distinct ones" if rank == 0 else "rank 0 failed"):
        fit_kmeans(lambda epoch: iter([torch.ones(500, 3)]), few)


def test_two_ranks_fit_the_same_centres_and_fail_together(tmp_path: Path) -> None:
    spawn(2, _work, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    whole, again, resumed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "again", "fit"))
    assert whole["batches"] == 30
    assert whole["reassigned"] > 0
    for name in ("centroids", "counts", "smoothed", "positions"):
        for other in (again, resumed):
            assert torch.equal(torch.as_tensor(whole[name]), torch.as_tensor(other[name])), name
    assert not torch.equal(first["once"], first["one_restart"])

    sample = sorted(first["sample"].flatten().tolist())
    assert len(set(sample)) == len(sample) == 90
    assert 2 <= sum(value >= 200 for value in sample) <= 16  # 90 * 20 / 220 = 8.2 expected of rank 1

    frames = _frames()
    alone = fit_kmeans(_share, MANY)
    assert KMeans(first["many"]).inertia(frames) == pytest.approx(alone.inertia(frames), rel=0.02)
    with pytest.raises(ValueError, match="ranks is 1, there 2"):
        fit_kmeans(_share, CONFIG, checkpoint=tmp_path / "fit.pt")
