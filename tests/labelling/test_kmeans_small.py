"""A corpus that fits into memory: read once, against scikit-learn, through interruptions, on two ranks, and where memory ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from sklearn.cluster import KMeans as Reference
from torch import Tensor

from k2ssl import distributed
from k2ssl.labelling.features import MfccFeatures
from k2ssl.labelling.frame_stream import FrameSource
from k2ssl.labelling.kmeans import KMeans, KMeansConfig, Progress, fit_kmeans
from tests.ranks import spawn

CONFIG = KMeansConfig(num_clusters=12, num_restarts=3, lloyd_iterations=2, checkpoint_every=1)
TIGHT = replace(
    CONFIG, batch_frames=500, reservoir_frames=400, held_out_frames=100, max_batches=60
)  # more than two mini-batches are not held


def _mixture(num_frames: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(30, 10, generator=draw)
    return means[torch.randint(30, (num_frames,), generator=draw)] + torch.randn(num_frames, 10, generator=draw)


class _Source(FrameSource):
    """The same frames in another order every epoch, dealt to the ranks; remembers which epochs were asked for."""

    def __init__(self, frames: Tensor, piece: int = 333) -> None:
        self.frames, self.piece, self.epochs = frames, piece, list[int]()

    def start(self, epoch: int, place: int) -> Iterator[tuple[int, Tensor]]:
        self.epochs.append(epoch)
        order = torch.randperm(len(self.frames), generator=torch.Generator().manual_seed(epoch))
        own = self.frames[order[distributed.rank() :: distributed.world_size()]]
        for number, part in list(enumerate(own.split(self.piece)))[place:]:
            yield number + 1, part


class _StopError(Exception):
    pass


def _stop_at(stage: str, batches: int) -> Callable[[Progress], None]:
    def tell(progress: Progress) -> None:
        if (progress.stage, progress.batches) == (stage, batches):
            raise _StopError

    return tell


def _mfcc(folder: Path, seconds: float) -> Tensor:
    function, parts, left = MfccFeatures(), [], seconds
    for path in sorted((folder / "an4").rglob("*.flac")):
        audio = torch.from_numpy(soundfile.read(path, dtype="float32")[0]).unsqueeze(0)
        parts.append(function(audio, torch.tensor([audio.shape[1]]))[0][0])
        left -= audio.shape[1] / 16000
        if left < 0:
            return torch.cat(parts)
    pytest.skip("no AN4 here")


def _excess(ours: KMeans, frames: Tensor) -> float:
    """Share by which the inertia is above that of scikit-learn's best of ten."""
    theirs = Reference(ours.num_clusters, n_init=10, random_state=0).fit(frames.double().numpy())
    return ours.inertia(frames) / (theirs.inertia_ / len(frames)) - 1


@pytest.mark.parametrize("num_clusters", [10, 100])
def test_half_a_minute_of_speech_is_read_once_and_fitted_as_well_as_by_scikit_learn(
    num_clusters: int, real_speech: Path, agreement
) -> None:  # type: ignore[no-untyped-def]
    frames, seen = _mfcc(real_speech, 23.0), list[Progress]()
    source = _Source(frames)
    model = fit_kmeans(source, KMeansConfig(num_clusters=num_clusters), progress=seen.append, one_part=True)
    assert source.epochs == [0] and seen[-1].batches < 100
    assert seen[-1].inertia == model.inertia(frames) and seen[-2].stage == "passes"
    agreement.note("k-means inertia above scikit-learn's KMeans (share), 23 s of speech", _excess(model, frames), 0.02)


def test_a_few_thousand_frames_are_fitted_as_well_as_by_scikit_learn(agreement) -> None:  # type: ignore[no-untyped-def]
    frames, seen = _mixture(6000), list[Progress]()
    model = fit_kmeans(_Source(frames), replace(CONFIG, num_clusters=40), progress=seen.append, one_part=True)
    inertias = [now.inertia for now in seen if now.stage == "passes" and now.batches]
    assert inertias == sorted(inertias, reverse=True) and len(inertias) < 100  # type: ignore[type-var]
    agreement.note("k-means inertia above scikit-learn's KMeans (share), mixture in memory", _excess(model, frames), 0.02)


@pytest.mark.parametrize("stops", [(1,), (2, 5)])
def test_interrupted_passes_go_on_from_memory_with_the_same_bits(tmp_path: Path, stops: tuple[int, ...]) -> None:
    frames, path = _mixture(3210), tmp_path / "fit.pt"
    whole = fit_kmeans(_Source(frames), CONFIG, one_part=True).centroids
    for stop in stops:
        with pytest.raises(_StopError):
            fit_kmeans(_Source(frames), CONFIG, checkpoint=path, progress=_stop_at("passes", stop), one_part=True)
    source = _Source(frames)
    for _ in range(2):  # a finished fit, too, is not repeated
        assert torch.equal(fit_kmeans(source, CONFIG, checkpoint=path, one_part=True).centroids, whole)
    assert source.epochs == []


def test_progress_of_a_release_that_had_mini_batches_only_goes_on_from_memory(tmp_path: Path) -> None:
    frames, path = _mixture(3210), tmp_path / "fit.pt"
    with pytest.raises(_StopError):
        fit_kmeans(_Source(frames), CONFIG, checkpoint=path, progress=_stop_at("updates", 7))
    kept = tmp_path / "fit.pt.sample"
    content = torch.load(kept, weights_only=True)
    del content["whole"]
    torch.save(content, kept)
    source, seen = _Source(frames), list[Progress]()
    model = fit_kmeans(source, CONFIG, checkpoint=path, progress=seen.append, one_part=True)
    assert source.epochs == [] and 7 < seen[-1].batches < 100
    assert model.inertia(frames) == pytest.approx(fit_kmeans(_Source(frames), CONFIG, one_part=True).inertia(frames), rel=0.02)


@pytest.mark.parametrize("num_frames", [501, 1000])
def test_what_fits_into_two_mini_batches_is_held_though_the_sample_is_smaller(num_frames: int) -> None:
    source, seen = _Source(_mixture(num_frames)), list[Progress]()
    fit_kmeans(source, TIGHT, progress=seen.append, one_part=True)
    assert source.epochs == [0] and any(now.stage == "passes" for now in seen)


@pytest.mark.parametrize("changes", [{}, {"sample_batches": 2}])
def test_a_larger_corpus_is_streamed_with_the_bits_of_one_whose_parts_differ(changes: dict[str, int], tmp_path: Path) -> None:
    frames, config = _mixture(1001), replace(TIGHT, **changes)  # type: ignore[arg-type]
    source = _Source(frames)
    ours = fit_kmeans(source, config, checkpoint=tmp_path / "ours.pt", one_part=True)
    assert torch.equal(ours.centroids, fit_kmeans(_Source(frames), config, checkpoint=tmp_path / "theirs.pt").centroids)
    assert max(source.epochs) > 1
    ours_kept, theirs_kept = (torch.load(tmp_path / f"{name}.pt.sample", weights_only=True)["frames"] for name in ("ours", "theirs"))
    assert torch.equal(ours_kept, theirs_kept) and len(ours_kept) == 400


def test_a_sample_that_ended_before_the_corpus_is_not_taken_for_it(tmp_path: Path) -> None:
    frames, config, path = _mixture(700), replace(TIGHT, sample_batches=1, reservoir_frames=2000), tmp_path / "fit.pt"
    source = _Source(frames)
    fit_kmeans(source, config, checkpoint=path, one_part=True)  # 666 frames were seen
    assert max(source.epochs) > 1
    content = torch.load(tmp_path / "fit.pt.sample", weights_only=True)
    assert content.pop("whole") is False
    torch.save(content, tmp_path / "fit.pt.sample")
    again = _Source(frames)
    fit_kmeans(again, replace(config, max_batches=70, max_no_improvement=200), checkpoint=path, one_part=True)
    assert again.epochs


def test_clusters_without_a_frame_are_moved_to_frames_far_away(tmp_path: Path) -> None:
    frames, path = _mixture(600), tmp_path / "fit.pt"
    with pytest.raises(_StopError):
        fit_kmeans(_Source(frames), CONFIG, checkpoint=path, progress=_stop_at("passes", 1), one_part=True)
    content = torch.load(path, weights_only=True)
    content["centroids"][3:6] = 1e3  # where no frame is
    torch.save(content, path)
    seen: list[Progress] = []
    model = fit_kmeans(_Source(frames), CONFIG, checkpoint=path, progress=seen.append, one_part=True)
    assert seen[-1].reassigned == 3 and torch.bincount(model.assign(frames), minlength=12).min() > 0


def test_as_many_clusters_as_frames_are_the_frames() -> None:
    frames = _mixture(12)
    assert fit_kmeans(_Source(frames), CONFIG, one_part=True).inertia(frames) < 1e-9


MANY = replace(CONFIG, num_clusters=40)  # then all starts lead to about the same inertia


def _fit_and_go_on(folder: Path) -> None:
    rank = distributed.rank()
    source, path = _Source(_mixture(2001)), folder / "fit.pt"
    whole = fit_kmeans(source, MANY, one_part=True).centroids
    with pytest.raises(_StopError):
        fit_kmeans(_Source(_mixture(2001)), MANY, checkpoint=path, progress=_stop_at("passes", 2), one_part=True)
    distributed.barrier()
    resumed = fit_kmeans(_Source(_mixture(2001)), MANY, checkpoint=path, one_part=True).centroids
    torch.save({"whole": whole, "resumed": resumed, "epochs": source.epochs}, folder / f"{rank}.pt")


def test_two_ranks_share_the_passes_and_end_with_the_same_centres(tmp_path: Path) -> None:
    spawn(2, _fit_and_go_on, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["epochs"] == second["epochs"] == [0]
    for name in ("whole", "resumed"):
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], first["whole"])
    frames = _mixture(2001)
    alone = fit_kmeans(_Source(frames), MANY, one_part=True)
    assert KMeans(first["whole"]).inertia(frames) == pytest.approx(alone.inertia(frames), rel=0.02)
