"""Nearest centres against float64, the model file, initialisation against scikit-learn, the sample, and the stream."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import kmeans_plusplus
from torch import Tensor

from k2ssl.labelling import nearest
from k2ssl.labelling.frame_stream import FrameStream, Replayed, Reservoir, generator
from k2ssl.labelling.kmeans_init import draw_far_frames, plus_plus
from k2ssl.labelling.kmeans_model import KMeans
from k2ssl.labelling.nearest import Centres, sums_by_label


def _brute_force(x: Tensor, centroids: Tensor) -> Tensor:
    """In float64 by differences; of equals the lowest, as numpy's argmin promises."""
    distances = ((x.double().unsqueeze(1) - centroids.double()) ** 2).sum(2)
    return torch.from_numpy(distances.numpy().argmin(1))


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_clusters=st.integers(1, 40),
    dim=st.integers(1, 50),
    offset=st.sampled_from([0.0, 10.0, 1e4]),
    spread=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_labels_are_those_of_float64(seed: int, num_clusters: int, dim: int, offset: float, spread: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    centroids = offset + spread * torch.randn(num_clusters, dim, generator=draw)
    x = offset + spread * torch.randn(200, dim, generator=draw)
    between = centroids[torch.randint(num_clusters, (2, 100), generator=draw)].mean(0)  # as near to one centre as to another, or nearly
    x = torch.cat([x, between, centroids])
    assert torch.equal(KMeans(centroids).assign(x), _brute_force(x, centroids))


def test_float32_products_alone_would_get_some_of_these_labels_wrong() -> None:
    centroids = 1e4 + torch.randn(40, 39)
    x = 1e4 + torch.randn(5000, 39)
    plain = (centroids.square().sum(1) / 2 - x @ centroids.T).argmin(1)
    expected = _brute_force(x, centroids)
    assert (plain != expected).float().mean() > 0.05
    assert torch.equal(KMeans(centroids).assign(x), expected)
    assert (Centres(centroids).nearest(x) != expected).float().mean() < 1e-3  # moved to their mean they are nearly right
    centroids = torch.randn(40, 39)
    near = centroids[:2].mean(0) * 3 + 1e-6 * torch.randn(5000, 39)
    near -= ((near - centroids[:2].mean(0)) @ (centroids[0] - centroids[1]) / (centroids[0] - centroids[1]).square().sum()).unsqueeze(1) * (
        centroids[0] - centroids[1]
    )
    assert not torch.equal(Centres(centroids[:2]).nearest(near), _brute_force(near, centroids[:2]))
    assert torch.equal(Centres(centroids[:2]).nearest(near, exact=True), _brute_force(near, centroids[:2]))


def test_of_equal_centres_the_lowest_is_taken() -> None:
    centroids = torch.randn(5, 7).repeat(4, 1)
    x = torch.randn(300, 7)
    labels = KMeans(centroids).assign(x)
    assert labels.max() < 5
    assert torch.equal(labels, _brute_force(x, centroids))
    assert KMeans(torch.tensor([[1.0], [-1.0]])).assign(torch.zeros(3, 1)).tolist() == [0, 0, 0]
    assert KMeans(torch.tensor([[-1.0], [1.0]])).assign(torch.zeros(3, 1)).tolist() == [0, 0, 0]


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    centroids, x = torch.randn(10, 6), torch.randn(101, 6)
    model = KMeans(centroids)
    labels, inertia = model.assign(x), model.inertia(x)
    monkeypatch.setattr(nearest, "_CHUNK_VALUES", 70)
    assert torch.equal(model.assign(x), labels)
    assert model.inertia(x) == pytest.approx(inertia, rel=1e-6)
    assert model.assign(x[:0]).tolist() == []


def test_inertia_is_the_mean_squared_distance() -> None:
    centroids, x = 1000 + torch.randn(10, 6), 1000 + torch.randn(500, 6)
    expected = ((x.double().unsqueeze(1) - centroids.double()) ** 2).sum(2).min(1).values.mean().item()
    assert KMeans(centroids).inertia(x) == pytest.approx(expected, rel=1e-6)


def test_sums_by_label_are_those_of_a_loop() -> None:
    x, labels = torch.randn(200, 5), torch.randint(6, (200,))
    sums, counts = sums_by_label(x, labels, 8)
    for cluster in range(8):
        torch.testing.assert_close(sums[cluster], x[labels == cluster].double().sum(0))
        assert counts[cluster] == (labels == cluster).sum()


def test_a_saved_model_comes_back_whole(tmp_path: Path) -> None:
    model = KMeans(torch.randn(10, 6), {"features": "mfcc", "sample_rate": 16000, "lifter": 22.0, "checkpoint": None})
    model.save(tmp_path / "km.pt")
    again = KMeans.load(tmp_path / "km.pt")
    assert torch.equal(again.centroids, model.centroids)
    assert again.description == model.description
    assert again.sha256 == model.sha256
    assert len(model.sha256) == 64
    assert KMeans(model.centroids + 1e-6, model.description).sha256 != model.sha256
    assert KMeans(model.centroids, {"features": "layer 6"}).sha256 != model.sha256
    assert [file.name for file in tmp_path.iterdir()] == ["km.pt"]


def test_a_file_that_is_no_whole_model_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "km.pt"
    with pytest.raises(ValueError, match=r"km\.pt: a k2ssl-kmeans file is needed, there is no such file$"):
        KMeans.load(path)
    KMeans(torch.randn(10, 6)).save(path)
    content = torch.load(path, weights_only=True)
    for change, message in (
        ({"centroids": content["centroids"] + 1}, "it was altered"),
        ({"format": "other"}, "format is 'other', 'k2ssl-kmeans' is needed"),
        ({"version": 2}, "version is 2"),
    ):
        torch.save({**content, **change}, path)
        with pytest.raises(ValueError, match=message):
            KMeans.load(path)
    del content["description"]
    torch.save(content, path)
    with pytest.raises(ValueError, match="lacks description"):
        KMeans.load(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"needed, this one is cut off, damaged, or holds more than plain values and tensors$"):
        KMeans.load(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "this one is empty"),
        (b"hello\nworld", "this one is text: 'hello'"),
        (b"\x1f\x8b\x08\x00rest", "this one is compressed by gzip"),
        (b"RIFF\xff\x00\x00\x00WAVE", "this one begins with the bytes 52 49 46 46 ff 00 00 00"),
    ],
)
def test_what_is_no_file_of_ours_is_told_in_one_short_line(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "km.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as refused:
        KMeans.load(path)
    assert str(refused.value) == f"{path}: a k2ssl-kmeans file is needed, {found}"
    for stored, what in (({"weight": 1, "bias": 2}, "a table of weight, bias"), (torch.zeros(2), "a Tensor")):
        torch.save(stored, path)
        with pytest.raises(ValueError, match=f"km.pt: a k2ssl-kmeans file is needed, it holds {what}$"):
            KMeans.load(path)
    with pytest.raises(ValueError, match="this is a folder"):
        KMeans.load(tmp_path)


def test_a_full_disk_leaves_the_older_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, older = tmp_path / "km.pt", KMeans(torch.randn(10, 6))
    older.save(path)

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        KMeans(torch.randn(10, 6)).save(path)
    assert KMeans.load(path).sha256 == older.sha256
    assert [file.name for file in tmp_path.iterdir()] == ["km.pt"]


def test_bad_features_and_centres_are_refused_by_name() -> None:
    model = KMeans(torch.randn(4, 6))
    x = torch.randn(9, 6)
    x[5, 2] = torch.nan
    with pytest.raises(ValueError, match="frame 5 has the value nan in dimension 2"):
        model.assign(x)
    with pytest.raises(ValueError, match=r"features have shape \(9, 5\), \(frames, 6\)"):
        model.assign(x[:, :5])
    with pytest.raises(ValueError, match="inertia of no frames"):
        model.inertia(x[:0])
    with pytest.raises(ValueError, match=r"centroids \[5\] are not finite"):
        KMeans(x)
    with pytest.raises(ValueError, match=r"centroids \[1\] are not finite in float32"):
        KMeans(torch.tensor([[1e30], [1e300]], dtype=torch.float64))
    with pytest.raises(ValueError, match="frame 0 has the value inf in dimension 0"):
        KMeans(torch.zeros(2, 1)).inertia(torch.tensor([[1e39]], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"centroids have shape \(0, 3\)"):
        KMeans(torch.zeros(0, 3))


def test_greedy_plus_plus_starts_as_low_as_that_of_scikit_learn() -> None:
    frames = torch.randn(40, 8)[torch.randint(40, (4000,))] * 4 + torch.randn(4000, 8)

    def potential(centres: Tensor) -> float:
        return torch.cdist(frames.double(), centres.double()).min(1).values.square().sum().item()

    ours = [potential(frames[plus_plus(frames, 30, generator(seed))]) for seed in range(12)]
    theirs = [potential(torch.from_numpy(kmeans_plusplus(frames.numpy(), 30, random_state=seed)[0])) for seed in range(12)]
    assert sum(ours) / sum(theirs) == pytest.approx(1, abs=0.05)


def test_plus_plus_finds_every_far_group_and_never_a_frame_twice() -> None:
    means = 100 + 30 * torch.randn(20, 8)
    group = torch.randint(20, (2000,))
    chosen = plus_plus(means[group] + 0.1 * torch.randn(2000, 8), 20, generator(0))
    assert sorted(group[chosen].tolist()) == list(range(20))
    few = torch.randn(30, 8).repeat(5, 1) + 500.0
    assert len(few[plus_plus(few, 30, generator(0))].unique(dim=0)) == 30


def test_frames_for_dead_clusters_are_drawn_by_their_distance() -> None:
    sample = torch.cat([torch.zeros(50, 1), torch.ones(40, 1), 2 * torch.ones(10, 1)])
    drawn = [draw_far_frames(sample, Centres(torch.zeros(1, 1)), 1, generator(seed)).item() for seed in range(600)]
    assert drawn.count(0.0) == 0
    assert drawn.count(2.0) / 600 == pytest.approx(0.5, abs=0.08)  # 10 * 4 against 40 * 1
    assert draw_far_frames(sample, Centres(torch.zeros(1, 1)), 50, generator(0)).sum() == 60  # distinct frames


def test_the_reservoir_is_a_uniform_sample_without_replacement() -> None:
    times = torch.zeros(300)
    for seed in range(400):
        reservoir = Reservoir(30, (seed,))
        for part in torch.arange(300.0).unsqueeze(1).split(7):
            reservoir.show(part)
        sample = reservoir.gather(torch.device("cpu")).flatten().long()
        assert len(sample.unique()) == 30 == len(sample)
        assert reservoir.num_shown == 300
        times[sample] += 1
    chi_square = ((times - 40) ** 2 / (40 * 0.9)).sum().item()  # about 299 with a standard deviation of 24
    assert 200 < chi_square < 400
    assert times[:150].sum() / times.sum() == pytest.approx(0.5, abs=0.03)


def test_a_small_stream_is_sampled_whole_in_random_order() -> None:
    reservoir = Reservoir(30, (0,))
    reservoir.show(torch.arange(20.0).unsqueeze(1))
    sample = reservoir.gather(torch.device("cpu")).flatten()
    assert sorted(sample.tolist()) == list(range(20)) != sample.tolist()


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    takes=st.lists(st.integers(1, 25), min_size=1, max_size=8),
    at=st.integers(0, 7),
)
def test_a_stream_gives_every_frame_once_and_goes_on_from_any_position(lengths: list[int], takes: list[int], at: int) -> None:
    def batches(epoch: int) -> Iterator[Tensor]:
        start = 1000 * epoch
        for length in lengths:
            yield torch.arange(start, start + length).unsqueeze(1)
            start += length

    if not sum(lengths):
        with pytest.raises(ValueError, match="epoch 3 holds no frame"):
            FrameStream(Replayed(batches), 3).take(1)
        return
    stream, taken, rest_from = FrameStream(Replayed(batches), 3), [], None
    for number, size in enumerate(takes):
        if number == at:
            rest_from, stream = len(taken), FrameStream(Replayed(batches), *stream.position)
        taken += stream.take(size).flatten().tolist()
    endless = [1000 * epoch + index for epoch in range(3, 3 + sum(takes) // sum(lengths) + 1) for index in range(sum(lengths))]
    assert taken == endless[: sum(takes)], rest_from
