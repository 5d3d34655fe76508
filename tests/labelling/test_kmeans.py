"""Fitting: against scikit-learn, the same bits again, interruption, dead clusters, refusals, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from k2ssl.labelling.features import MfccFeatures
from k2ssl.labelling.kmeans import KMeans, KMeansConfig, Progress, fit_kmeans

SMALL = KMeansConfig(
    num_clusters=12, batch_frames=500, max_batches=40, reservoir_frames=1000, held_out_frames=300, num_restarts=3, lloyd_iterations=3
)


def _changed(**changes: Any) -> KMeansConfig:
    return KMeansConfig(**{**vars(SMALL), **changes})


def _mixture(num_frames: int, num_groups: int = 30, dim: int = 10, seed: int = 0) -> Tensor:
    """Groups of unequal size and width, some of them overlapping."""
    draw = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(num_groups, dim, generator=draw)
    widths = 0.2 + 1.8 * torch.rand(num_groups, 1, generator=draw)
    group = torch.multinomial(torch.rand(num_groups, generator=draw) ** 2, num_frames, replacement=True, generator=draw)
    return means[group] + widths[group] * torch.randn(num_frames, dim, generator=draw)


def _streamed(frames: Tensor, piece: int = 333) -> Callable[[int], Iterator[Tensor]]:
    """In another order every epoch."""

    def batches(epoch: int) -> Iterator[Tensor]:
        yield from frames[torch.randperm(len(frames), generator=torch.Generator().manual_seed(epoch))].split(piece)

    return batches


def _inertia_of_sklearn(frames: Tensor, num_clusters: int, batch: int, restarts: int) -> float:
    """Mean squared distance with the settings of the published HuBERT recipe; distances by float64 differences."""
    other = MiniBatchKMeans(
        num_clusters, batch_size=batch, max_no_improvement=100, n_init=restarts, tol=0.0, reassignment_ratio=0.0, random_state=0
    )
    centres = torch.from_numpy(other.fit(frames.numpy()).cluster_centers_).double()
    return torch.cdist(frames.double(), centres, compute_mode="donot_use_mm_for_euclid_dist").min(1).values.square().mean().item()


def _mfcc_of(folder: Path) -> Tensor:
    function, parts = MfccFeatures(), []
    for path in sorted(folder.rglob("*.flac"))[:12]:
        audio = torch.from_numpy(soundfile.read(path, dtype="float32")[0]).unsqueeze(0)
        parts.append(function(audio, torch.tensor([audio.shape[1]]))[0][0])
    return torch.cat(parts)


@pytest.mark.parametrize(("clusters", "groups"), [(20, 40), (50, 30)])
def test_the_inertia_is_that_of_scikit_learn_or_less(clusters: int, groups: int, agreement) -> None:  # type: ignore[no-untyped-def]
    frames = _mixture(20000, groups)
    config = KMeansConfig(num_clusters=clusters, batch_frames=2000, num_restarts=5)
    ours = fit_kmeans(_streamed(frames), config).inertia(frames)
    theirs = _inertia_of_sklearn(frames, clusters, 2000, 5)
    agreement.note("k-means inertia above scikit-learn's (share), mixtures", ours / theirs - 1, 0.02)


def test_the_inertia_on_mfcc_of_speech_is_that_of_scikit_learn_or_less(real_speech: Path, agreement) -> None:  # type: ignore[no-untyped-def]
    frames = _mfcc_of(real_speech / "LibriSpeech")
    assert len(frames) > 10000
    ours = fit_kmeans(_streamed(frames, 1500), KMeansConfig(batch_frames=2000, num_restarts=5)).inertia(frames)
    theirs = _inertia_of_sklearn(frames, 100, 2000, 5)
    agreement.note("k-means inertia above scikit-learn's (share), MFCC of speech", ours / theirs - 1, 0.02)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    frames = _mixture(3000)
    first, again, other = (fit_kmeans(_streamed(frames), _changed(seed=seed)).centroids for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class _StopError(Exception):
    pass


def _stop_at(batches: int) -> Callable[[Progress], None]:
    def tell(progress: Progress) -> None:
        if progress.stage == "updates" and progress.batches == batches:
            raise _StopError

    return tell


@pytest.mark.filterwarnings("ignore:fit_kmeans. held-out frames")  # so much re-seeding is bad for centres and good for this test
@pytest.mark.parametrize("stops", [(1,), (13,), (7, 7, 30)])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path: Path, stops: tuple[int, ...]) -> None:
    frames, config = _mixture(3210), _changed(checkpoint_every=5, reassign_ratio=0.9)
    seen: list[Progress] = []
    fit_kmeans(_streamed(frames), config, checkpoint=tmp_path / "whole.pt", progress=seen.append)
    assert seen[-1].reassigned > 0
    path = tmp_path / "fit.pt"
    for stop in stops:
        with pytest.raises(_StopError):
            fit_kmeans(_streamed(frames), config, checkpoint=path, progress=_stop_at(stop))
    again: list[Progress] = []
    fit_kmeans(_streamed(frames), config, checkpoint=path, progress=again.append)
    resumed, expected = (torch.load(file, weights_only=True) for file in (path, tmp_path / "whole.pt"))
    for name, value in expected.items():
        assert torch.equal(resumed[name], value) if isinstance(value, Tensor) else resumed[name] == value, name
    assert not any(progress.stage in ("sample", "restarts") for progress in again[1:])
    assert again[-1] == seen[-1]


def test_a_finished_run_is_not_repeated_and_can_be_prolonged(tmp_path: Path) -> None:
    frames, path = _mixture(3000), tmp_path / "fit.pt"
    first = fit_kmeans(_streamed(frames), SMALL, checkpoint=path)

    def never(epoch: int) -> Iterator[Tensor]:
        raise AssertionError("features were asked for")

    assert torch.equal(fit_kmeans(never, SMALL, checkpoint=path).centroids, first.centroids)
    longer = _changed(max_batches=55)
    prolonged = fit_kmeans(_streamed(frames), longer, checkpoint=path)
    assert torch.equal(prolonged.centroids, fit_kmeans(_streamed(frames), longer).centroids)


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path: Path) -> None:
    frames, path = _mixture(2000), tmp_path / "fit.pt"
    fit_kmeans(_streamed(frames), _changed(max_batches=1), checkpoint=path, description={"features": "mfcc"})
    with pytest.raises(ValueError, match=r"config.seed is 9, there 0"):
        fit_kmeans(_streamed(frames), _changed(seed=9), checkpoint=path, description={"features": "mfcc"})
    with pytest.raises(ValueError, match=r"description.features is 'layer 6', there 'mfcc'"):
        fit_kmeans(_streamed(frames), SMALL, checkpoint=path, description={"features": "layer 6"})
    with pytest.raises(ValueError, match="stream"):
        fit_kmeans(_streamed(frames), _changed(max_batches=1), checkpoint=path, description={"features": "mfcc"}, stream={"cuts": "b"})
    with pytest.raises(ValueError, match=r"epoch 1 of rank 0 has 1 batches|epoch 1 of rank 0 ends where 167 frames were taken before"):
        fit_kmeans(_streamed(frames[:100]), SMALL, checkpoint=path, description={"features": "mfcc"})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"fit\.pt: a k2ssl-kmeans-progress file is needed, this one is cut off"):
        fit_kmeans(_streamed(frames), SMALL, checkpoint=path)


def test_a_mini_batch_moves_centres_to_the_mean_of_all_they_have_seen(tmp_path: Path) -> None:
    frames, path = _mixture(2000), tmp_path / "fit.pt"
    fit_kmeans(_streamed(frames), _changed(max_batches=1), checkpoint=path)
    before = torch.load(path, weights_only=True)
    after = fit_kmeans(_streamed(frames), _changed(max_batches=2), checkpoint=path)
    batch = torch.cat(list(_streamed(frames)(1)))[500:1000].double().numpy()
    centres, counts = before["centroids"].numpy(), before["counts"].numpy()
    nearest = ((batch[:, None] - centres) ** 2).sum(-1).argmin(1)
    for frame, cluster in zip(batch, nearest, strict=True):  # one by one, as Sculley's algorithm 1
        counts[cluster] += 1
        centres[cluster] += (frame - centres[cluster]) / counts[cluster]
    np.testing.assert_allclose(after.centroids.numpy(), centres, rtol=1e-5, atol=1e-5)


def _with_vanishing_groups(epoch: int) -> Iterator[Tensor]:
    """A third of epoch 0, which the sample is drawn from, is far away from everything that comes later."""
    gone, frames = _mixture(1500, num_groups=6, seed=1) + 100.0, _mixture(3000, num_groups=12)
    yield from _streamed(torch.cat([frames, gone]) if epoch == 0 else frames)(epoch)


@pytest.mark.filterwarnings("ignore:fit_kmeans. held-out frames")  # some of which are of the vanished groups
def test_dead_clusters_are_moved_to_where_frames_are(tmp_path: Path) -> None:
    frames, models = _mixture(3000, num_groups=12), []
    for every in (10, 0):
        path = tmp_path / f"{every}.pt"
        config = _changed(max_batches=200, max_no_improvement=200, reassign_every=every)
        fit_kmeans(_with_vanishing_groups, config, checkpoint=path)
        models.append(KMeans(torch.load(path, weights_only=True)["centroids"]))
    unused = [int((torch.bincount(model.assign(frames), minlength=12) == 0).sum()) for model in models]
    assert unused == [0, 3]
    assert models[0].inertia(frames) < 0.98 * models[1].inertia(frames)


@pytest.mark.filterwarnings("ignore:fit_kmeans. held-out frames")
def test_a_re_seeded_cluster_counts_anew(tmp_path: Path) -> None:
    states = []
    for number in (10, 11):
        fit_kmeans(_with_vanishing_groups, _changed(max_batches=number), checkpoint=tmp_path / "fit.pt")
        states.append(torch.load(tmp_path / "fit.pt", weights_only=True))
    dead = states[0]["recent"] == 0
    assert dead.sum() == 3 == states[1]["reassigned"]
    assert (states[0]["counts"][dead] > 0).all()
    assert torch.equal(states[1]["counts"][dead], states[1]["recent"][dead])  # of the one mini-batch since


def test_features_in_a_bad_order_never_end_worse_than_the_start(tmp_path: Path) -> None:
    frames = _mixture(9000, 40)
    frames = frames[frames[:, 0].argsort()]  # as if speaker after speaker came
    config, seen = _changed(max_batches=14, reservoir_frames=4000), list[Progress]()
    with pytest.warns(UserWarning, match="Are the features shuffled"):
        model = fit_kmeans(lambda epoch: iter(frames.split(500)), config, "cpu", tmp_path / "fit.pt", seen.append)
    start = [progress.inertia for progress in seen if progress.stage == "restarts"][-1]
    assert seen[-1].inertia == start
    assert model.inertia(frames) == pytest.approx(start, rel=0.1)
    with pytest.warns(UserWarning, match="Are the features shuffled"):
        assert torch.equal(fit_kmeans(lambda epoch: iter(()), config, checkpoint=tmp_path / "fit.pt").centroids, model.centroids)


def test_fitting_ends_when_the_smoothed_inertia_no_longer_falls() -> None:
    seen: list[Progress] = []
    fit_kmeans(_streamed(_mixture(3000)), _changed(max_batches=5000, max_no_improvement=10, smoothing_batches=5), progress=seen.append)
    inertias = [progress.inertia for progress in seen if progress.stage == "updates" and progress.batches]
    lowest = int(np.argmin(np.array(inertias, dtype=float)))
    assert len(inertias) == lowest + 1 + 10 < 5000


def test_progress_counts_frames_hours_batches_and_restarts() -> None:
    seen: list[Progress] = []
    fit_kmeans(_streamed(_mixture(1800)), _changed(max_batches=4), progress=seen.append, frame_rate=50.0)
    assert [progress.frames for progress in seen if progress.stage == "sample"] == [333, 666, 999, 1332, 1665, 1800]
    assert [progress.restarts_done for progress in seen if progress.stage == "restarts"] == [1, 2, 3]
    last = seen[-1]
    assert (last.stage, last.batches, last.frames, last.epoch, last.max_batches, last.num_restarts) == ("done", 4, 2000, 2, 4, 3)
    assert last.hours == pytest.approx(2000 / 50 / 3600)
    assert all(progress.hours == pytest.approx(progress.frames / 50 / 3600) for progress in seen)


def test_sampling_can_end_before_the_epoch_does() -> None:
    taken: list[int] = []

    def batches(epoch: int) -> Iterator[Tensor]:
        for part in _streamed(_mixture(3000))(epoch):
            taken.append(epoch)
            yield part

    fit_kmeans(batches, _changed(sample_batches=2, max_batches=1))
    assert taken.count(0) == 4  # pieces of 333 until 2 * 500 frames were seen
    taken.clear()
    fit_kmeans(batches, _changed(sample_batches=0, max_batches=1))
    assert taken.count(0) == 10  # all of them


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("epoch", [0, 1])
def test_features_that_are_not_finite_are_refused_by_place(value: float, epoch: int) -> None:
    frames = _mixture(2000)

    def batches(now: int) -> Iterator[Tensor]:
        for number, part in enumerate(frames.split(400)):
            part = part.clone()
            if (now, number) == (epoch, 2):
                part[17, 4] = value
            yield part

    with pytest.raises(ValueError, match=rf"epoch {epoch}, batch 2: frame 17 has the value {value} in dimension 4"):
        fit_kmeans(batches, SMALL)


def test_features_of_a_wrong_kind_are_refused() -> None:
    for wrong, message in ((torch.zeros(5, 3), r"\(5, 3\)"), (torch.zeros(5), r"\(5,\)"), (torch.zeros(5, 10).long(), "int64")):
        with pytest.raises(ValueError, match=rf"epoch 0, batch 1: .*{message}"):
            fit_kmeans(lambda epoch, wrong=wrong: iter([_mixture(100), wrong]), SMALL)  # type: ignore[misc]


def test_more_clusters_than_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="num_clusters is 12, but the features hold only 11 frames"):
        fit_kmeans(_streamed(_mixture(11)), SMALL)
    with pytest.raises(ValueError, match=r"num_clusters is 12, but the sample of .* frames holds only 7 distinct ones"):
        fit_kmeans(_streamed(_mixture(7).repeat(100, 1) + 50.0), SMALL)
    with pytest.raises(ValueError, match="epoch 0 holds no frame"):
        fit_kmeans(lambda epoch: iter([]), SMALL)
    assert fit_kmeans(_streamed(_mixture(12)), SMALL).inertia(_mixture(12)) < 1e-9  # as many as frames: each is a centre


def test_an_epoch_without_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="epoch 2 holds no frame for rank 0"):
        fit_kmeans(lambda epoch: iter([_mixture(600)] if epoch < 2 else []), SMALL)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_clusters", 0),
        ("batch_frames", 0),
        ("num_restarts", 0),
        ("seed", -1),
        ("sample_batches", -1),
        ("batch_frames", 10**12),
        ("num_clusters", 10**7),
        ("reassign_ratio", 1.0),
    ],
)
def test_bad_settings_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        KMeansConfig(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reservoir_frames is 99, at least num_clusters 100"):
        KMeansConfig(reservoir_frames=99)


def test_a_full_disk_leaves_the_last_checkpoint_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames, path, config = _mixture(3000), tmp_path / "fit.pt", _changed(checkpoint_every=10)
    with pytest.raises(_StopError):
        fit_kmeans(_streamed(frames), config, checkpoint=path, progress=_stop_at(20))
    before = path.read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            fit_kmeans(_streamed(frames), config, checkpoint=path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fit.pt", "fit.pt.sample"]
    assert torch.equal(fit_kmeans(_streamed(frames), config, checkpoint=path).centroids, fit_kmeans(_streamed(frames), config).centroids)


_MEASURE = r"""
import re, sys, torch
from pathlib import Path
from k2ssl.labelling.kmeans import KMeansConfig, fit_kmeans
torch.set_num_threads(1)
def batches(epoch):
    for number in range(int(sys.argv[1])):
        yield torch.randn(5000, 39, generator=torch.Generator().manual_seed(number))
config = KMeansConfig(num_clusters=20, reservoir_frames=4000, held_out_frames=1000, num_restarts=1, max_batches=int(sys.argv[1]) // 2)
fit_kmeans(batches, config)
print(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])  # ru_maxrss would start from the parent's peak
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_memory_does_not_grow_with_the_corpus() -> None:
    def peak(pieces: int) -> float:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        environment["MALLOC_MMAP_THRESHOLD_"] = "131072"  # glibc raises it as it goes and then keeps what is freed: up to 12 MiB by chance
        run = subprocess.run([sys.executable, "-c", _MEASURE, str(pieces)], env=environment, capture_output=True, text=True, check=True)
        return int(run.stdout) / 1024  # MiB

    small, large = peak(10), peak(150)  # 8 MB and 117 MB of frames
    assert large < small + 12
