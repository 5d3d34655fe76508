"""Drawing the sample and streaming the updates through interruptions: the same bits, and nothing computed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from k2ssl.labelling import kmeans_sample
from k2ssl.labelling.frame_stream import FrameSource
from k2ssl.labelling.kmeans import KMeansConfig, Progress, fit_kmeans

SMALL = KMeansConfig(
    num_clusters=12, batch_frames=500, max_batches=40, reservoir_frames=1000, held_out_frames=300, num_restarts=3, lloyd_iterations=3
)


def _mixture(num_frames: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return 3 * torch.randn(30, 10, generator=draw)[torch.randint(30, (num_frames,), generator=draw)] + torch.randn(
        num_frames, 10, generator=draw
    )


def _streamed(frames: Tensor) -> Callable[[int], Iterator[Tensor]]:
    """In another order every epoch."""

    def batches(epoch: int) -> Iterator[Tensor]:
        yield from frames[torch.randperm(len(frames), generator=torch.Generator().manual_seed(epoch))].split(333)

    return batches


class _StopError(Exception):
    pass


def _stop_at(batches: int) -> Callable[[Progress], None]:
    def tell(progress: Progress) -> None:
        if progress.stage == "updates" and progress.batches == batches:
            raise _StopError

    return tell


class _Source(FrameSource):
    """Goes to a place without reading what lies before it; remembers what it read, and stops where it is told to."""

    def __init__(self, frames: Tensor, stop: tuple[int, int] | None = None) -> None:
        self.frames, self.stop, self.read = frames, stop, list[tuple[int, int]]()

    def start(self, epoch: int, place: int) -> Iterator[tuple[int, Tensor]]:
        for number, part in list(enumerate(_streamed(self.frames)(epoch)))[place:]:
            if (epoch, number) == self.stop:
                raise _StopError
            self.read.append((epoch, number))
            yield number + 1, part


@pytest.mark.parametrize("stops", [(1,), (4, 4), (2, 5, 8)])
def test_an_interrupted_sampling_goes_on_where_it_was_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...]
) -> None:
    frames, config, path = _mixture(3210), replace(SMALL, reservoir_frames=400, held_out_frames=100), tmp_path / "fit.pt"
    whole = fit_kmeans(_Source(frames), config, checkpoint=tmp_path / "whole.pt").centroids
    monkeypatch.setattr(kmeans_sample, "_SAVE_EVERY", 0.0)
    read: list[tuple[int, int]] = []
    for stop in stops:
        source = _Source(frames, (0, stop))
        with pytest.raises(_StopError):
            fit_kmeans(source, config, checkpoint=path)
        read += source.read
    assert [file.name for file in tmp_path.glob("fit*")] == ["fit.pt.sampling-00000"]
    seen: list[Progress] = []
    source = _Source(frames)
    assert torch.equal(fit_kmeans(source, config, checkpoint=path, progress=seen.append).centroids, whole)
    read += source.read
    assert [place for place in read if place[0] == 0] == [(0, number) for number in range(10)]  # each piece once
    before = stops[-1] * 333
    assert [(now.frames, now.resumed) for now in seen if now.stage == "sample"][:2] == [(before, before), (before + 333, before)]
    assert sorted(file.name for file in tmp_path.glob("fit*")) == ["fit.pt", "fit.pt.sample"]


def test_a_sample_that_is_complete_is_not_drawn_again(tmp_path: Path) -> None:
    frames, path = _mixture(3000), tmp_path / "fit.pt"

    def stop(progress: Progress) -> None:
        if progress.stage == "restarts":
            raise _StopError

    with pytest.raises(_StopError):
        fit_kmeans(_Source(frames), SMALL, checkpoint=path, progress=stop)
    with pytest.raises(ValueError, match=r"fit.pt.sampling-00000: holds the progress of another run: config.seed is 9, there 0"):
        fit_kmeans(_Source(frames), replace(SMALL, seed=9), checkpoint=path)
    source = _Source(frames)
    resumed = fit_kmeans(source, SMALL, checkpoint=path).centroids
    assert torch.equal(resumed, fit_kmeans(_streamed(frames), SMALL).centroids)
    assert source.read[0][0] == 1


def test_updates_go_on_without_computing_what_was_computed(tmp_path: Path) -> None:
    frames, path, config = _mixture(3210), tmp_path / "fit.pt", replace(SMALL, checkpoint_every=1)
    whole = fit_kmeans(_streamed(frames), config).centroids
    with pytest.raises(_StopError):
        fit_kmeans(_Source(frames), config, checkpoint=path, progress=_stop_at(5))
    source = _Source(frames)
    assert torch.equal(fit_kmeans(source, config, checkpoint=path).centroids, whole)
    assert source.read[0] == (1, 7)  # five mini-batches of 500 frames end in the eighth piece of 333
