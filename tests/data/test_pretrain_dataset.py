"""A crop's labels are those of exactly its audio, whatever the lengths, the label rates and the grid.

The audio of these tests is a ramp: the value of a sample says where it stands in its file. The labels are a ramp too: the j-th label is j.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lhotse import Recording
from lhotse.cut import Cut, MonoCut
from lhotse.utils import fastcopy

from k2ssl.batch import PretrainBatch
from k2ssl.data.audio import read_utterance
from k2ssl.data.audio_dataset import Request
from k2ssl.data.intake import Intake
from k2ssl.data.labels import LabelShardWriter, LabelStore, Lineage, merge_shards
from k2ssl.data.pretrain_dataset import PretrainDataset
from k2ssl.models.frontend import LogMelConfig
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.prediction_head import HeadConfig

RATE = 16000
LENGTH = 30 * RATE


@dataclass(frozen=True)
class Contract:
    frame_rate: float


class Ramp:
    """A label store whose j-th label is j, modulo the number of classes; `count(samples)` labels for an utterance."""

    identity = "ramp"

    def __init__(self, frame_rate: float, counts: dict[str, int], num_classes: int = 1 << 30) -> None:
        self.contract: Any = Contract(frame_rate)
        self.counts = counts
        self.num_classes = num_classes

    def __contains__(self, cut_id: object) -> bool:
        return cut_id in self.counts

    def labels(self, cut_id: str) -> np.ndarray:
        return np.arange(self.counts[cut_id]) % self.num_classes


# How many labels a labelling program leaves for an utterance of n samples: frames of the waveform frontend, windows of 25 ms that fit, windows
# that are centred, whole shifts; or up to three frames too few.
COUNTS: dict[float, list[Callable[[int], int]]] = {
    50.0: [lambda n: (n - 400) // 320 + 1, lambda n: round(n / 320), lambda n: n // 320, lambda n: (n - 400) // 320 - 1],
    100.0: [lambda n: (n - 400) // 160 + 1, lambda n: round(n / 160), lambda n: n // 160, lambda n: 2 * ((n - 400) // 320 - 1)],
    25.0: [lambda n: ((n - 400) // 320 + 2) // 2, lambda n: n // 640, lambda n: n // 640 - 1],
}


@pytest.fixture(scope="module")
def ramp(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """30 s in which sample i is i modulo 65536, as 16 bit integers."""
    path = tmp_path_factory.mktemp("ramp") / "ramp.wav"
    soundfile.write(path, (np.arange(LENGTH) % 65536 - 32768).astype(np.int16), RATE)
    return Recording.from_file(path)


def stretch(recording: Recording, name: str, first: int, samples: int) -> MonoCut:
    return MonoCut(id=name, start=first / RATE, duration=samples / RATE, channel=0, recording=recording)


def batch_of(dataset: PretrainDataset, cuts: Sequence[Cut], epoch: int = 0) -> PretrainBatch:
    loaded = dataset[Request(epoch, tuple(cuts))]
    assert loaded.batch is not None and not loaded.failures
    return loaded.batch


def position(sample: torch.Tensor) -> int:
    """Where in the file the sample stands, modulo 65536."""
    return round(sample.item() * 32768) + 32768


@st.composite
def utterances(draw: st.DrawFn) -> list[tuple[int, int]]:
    """(first sample, samples) of one to four utterances, of odd lengths and long and short ones."""
    return [
        (draw(st.integers(0, 40000)), draw(st.one_of(st.integers(1500, 60000), st.integers(240000, 330000))))
        for _ in range(draw(st.integers(1, 4)))
    ]


@given(
    stretches=utterances(),
    rates=st.sampled_from([(50.0,), (100.0,), (50.0, 100.0), (25.0, 100.0)]),
    epoch=st.integers(0, 9),
    data=st.data(),
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_labels_are_those_of_the_cropped_samples(
    ramp: Recording, stretches: list[tuple[int, int]], rates: tuple[float, ...], epoch: int, data: st.DataObject
) -> None:
    cuts = [stretch(ramp, f"cut{i}", first, samples) for i, (first, samples) in enumerate(stretches)]
    stores = []
    for rate in rates:
        count = data.draw(st.sampled_from(COUNTS[rate]))
        stores.append(Ramp(rate, {cut.id: count(samples) for cut, (_, samples) in zip(cuts, stretches, strict=True)}))
    dataset = PretrainDataset(stores, seed=data.draw(st.integers(0, 3)))
    batch = batch_of(dataset, cuts, epoch)

    shortest = min(samples for _, samples in stretches)
    assert batch.audio_lens is None and batch.audio.dtype == torch.float32 and batch.ids == tuple(cut.id for cut in cuts)
    assert batch.audio.shape[1] <= min(250000, shortest)
    assert batch.audio.shape[1] >= min(250000, shortest - 3 * 640), "almost all of the shortest utterance is used"
    check_labels(batch, stretches, rates)


def check_labels(batch: PretrainBatch, stretches: list[tuple[int, int]], rates: tuple[float, ...]) -> None:
    """Each row is a stretch of the ramp, and its labels are those of the ramp from there on."""
    for row, (first, _) in enumerate(stretches):
        assert torch.equal(torch.diff(batch.audio[row] * 32768) % 65536, torch.ones(batch.audio.shape[1] - 1))
        for rate, labels in zip(rates, batch.labels, strict=True):
            assert labels.dtype == torch.int64
            start = int(labels[row, 0]) * round(RATE / rate)  # where the labels say that the crop starts
            assert (first + start) % 65536 == position(batch.audio[row, 0]), "the audio starts at another sample than the labels"
            assert torch.equal(labels[row], labels[row, 0] + torch.arange(labels.shape[1]))


@given(stretches=utterances(), rates=st.sampled_from([(50.0,), (25.0, 100.0)]), step=st.sampled_from([0.04, 0.5, 1.003, 5.0, 15.625]))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rounded_crops_have_the_labels_of_their_samples(
    ramp: Recording, stretches: list[tuple[int, int]], rates: tuple[float, ...], step: float
) -> None:
    cuts = [stretch(ramp, f"cut{i}", first, samples) for i, (first, samples) in enumerate(stretches)]
    stores = [Ramp(rate, {cut.id: COUNTS[rate][1](cut.num_samples) for cut in cuts}) for rate in rates]
    batch, longer = batch_of(PretrainDataset(stores, crop_step=step), cuts), batch_of(PretrainDataset(stores), cuts)
    length, longest, samples = batch.audio.shape[1], longer.audio.shape[1], round(step * RATE)
    check_labels(batch, stretches, rates)
    assert 0 <= longest - length < samples
    if length != longest:
        assert (250000 - length) % samples == 0 and length >= samples
    for ours, theirs, rate in zip(batch.labels, longer.labels, rates, strict=True):
        lost = theirs.shape[1] - ours.shape[1]
        assert 0 <= lost <= (longest - length) / (RATE / rate) + 1, "as many labels are lost as audio"


@pytest.mark.parametrize("step", [0.25, 0.5, 1.0, 1.003, 2.0, 15.625])
def test_there_are_few_lengths_of_rounded_crops(step: float) -> None:
    draw, dataset = np.random.default_rng(1), PretrainDataset([Ramp(50.0, {})], crop_step=step)
    shortest = [int(draw.integers(2 * RATE, 20 * RATE)) for _ in range(4000)]
    lengths = [dataset.crop_length(samples) for samples in shortest]
    short = {length for length, samples in zip(lengths, shortest, strict=True) if samples < 2 * step * RATE}
    assert 0 < len(set(lengths) - short) <= math.ceil(15.625 / step) or step > 10
    assert all(length == samples for length, samples in zip(lengths, shortest, strict=True) if samples < step * RATE)
    assert all(0 <= min(250000, samples) - length < step * RATE for length, samples in zip(lengths, shortest, strict=True))
    plain = PretrainDataset([Ramp(50.0, {})])
    assert [plain.crop_length(samples) for samples in shortest] == [min(250000, samples) for samples in shortest]
    assert len({plain.crop_length(samples) for samples in shortest}) > 2000, "the test can tell"


@pytest.mark.parametrize("step", [-1.0, 15.7, float("nan"), float("inf"), 0.01, 1e-9])
def test_steps_that_cannot_be_are_refused(step: float) -> None:
    with pytest.raises(ValueError, match=rf"crop_step is {step}, allowed are 0 and 0\.02 \(one label\) to 15\.625 \(max_seconds\)"):
        PretrainDataset([Ramp(50.0, {})], crop_step=step)


def model_for(rates: tuple[float, ...], logmel: bool) -> HubertModel:
    tiny = HubertConfig.tiny()
    heads = HeadConfig(num_classes=(16,) * len(rates))
    return HubertModel(HubertConfig(LogMelConfig() if logmel else tiny.frontend, tiny.encoder, head=heads, label_rate=rates))


MODELS = {(rates, logmel): model_for(rates, logmel) for rates in [(50.0,), (100.0,), (25.0,), (50.0, 100.0)] for logmel in (False, True)}


@given(stretches=utterances(), which=st.sampled_from(list(MODELS)), max_seconds=st.sampled_from([15.625, 7.003]), data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_batch_is_one_that_the_model_accepts(
    ramp: Recording, stretches: list[tuple[int, int]], which: tuple[tuple[float, ...], bool], max_seconds: float, data: st.DataObject
) -> None:
    cuts = [stretch(ramp, f"cut{i}", first, samples) for i, (first, samples) in enumerate(stretches)]
    stores = []
    for rate in which[0]:
        counts = {cut.id: data.draw(st.sampled_from(COUNTS[rate]))(samples) for cut, (_, samples) in zip(cuts, stretches, strict=True)}
        stores.append(Ramp(rate, counts, num_classes=16))
    dataset = PretrainDataset(stores, max_seconds=max_seconds, crop_step=data.draw(st.sampled_from([0.0, 0.1, 1.0, 7.0])))
    batch = batch_of(dataset, cuts, data.draw(st.integers(0, 5)))
    MODELS[which].check_batch(batch)


def test_full_crops_have_the_published_size_and_a_label_for_each_frame(ramp: Recording) -> None:
    cuts = [stretch(ramp, "a", 0, 20 * RATE), stretch(ramp, "b", 100, 17 * RATE + 1)]
    batch = batch_of(PretrainDataset([Ramp(50.0, {"a": 999, "b": 849})]), cuts)
    assert batch.audio.shape == (2, 250000) and batch.labels[0].shape == (2, 781)
    assert MODELS[(50.0,), False].frontend.num_frames(250000) == 781


def test_the_shortest_utterance_is_used_to_its_last_frame(ramp: Recording) -> None:
    for samples in range(48000, 48330, 11):
        frames = (samples - 400) // 320 + 1
        batch = batch_of(PretrainDataset([Ramp(50.0, {"a": frames})]), [stretch(ramp, "a", 5, samples)])
        assert batch.labels[0].tolist() == [list(range(frames))]
        assert MODELS[(50.0,), False].frontend.num_frames(batch.audio.shape[1]) == frames


def test_crops_depend_on_seed_epoch_and_id_and_on_nothing_else(ramp: Recording) -> None:
    cuts = [stretch(ramp, f"cut{i}", 0, 25 * RATE) for i in range(20)]
    counts = {cut.id: 1249 for cut in cuts}

    def starts(seed: int, epoch: int, order: Sequence[Cut] = cuts) -> dict[str, int]:
        batch = batch_of(PretrainDataset([Ramp(50.0, counts)], max_seconds=2.0, seed=seed), order, epoch)
        return dict(zip(batch.ids, batch.labels[0][:, 0].tolist(), strict=True))

    assert starts(0, 0) == starts(0, 0, cuts[::-1]) == {**starts(0, 0, cuts[:7]), **starts(0, 0, cuts[7:])}
    for other in (starts(1, 0), starts(0, 1)):
        assert sum(ours == theirs for ours, theirs in zip(starts(0, 0).values(), other.values(), strict=True)) <= 2
    assert len(set(starts(0, 0).values())) > 15
    again = [fastcopy(cut, custom={"repetition": 1}) for cut in cuts]
    assert sum(ours == theirs for ours, theirs in zip(starts(0, 0).values(), starts(0, 0, again).values(), strict=True)) <= 2


def test_every_position_on_the_grid_is_drawn_equally_often(ramp: Recording) -> None:
    dataset = PretrainDataset([Ramp(100.0, {"a": 200})], max_seconds=1.9)
    cut = stretch(ramp, "a", 0, 2 * RATE)
    seen = Counter(dataset.crop_start(cut, 2 * RATE, dataset.max_samples, epoch) for epoch in range(2200))
    assert sorted(seen) == list(range(0, 1601, 160))
    assert min(seen.values()) > 140 and max(seen.values()) < 265, "200 each are expected"


def test_normalisation_is_of_the_whole_utterance_before_the_crop(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0.1, np.linspace(0.01, 0.2, 10 * RATE)).clip(-1, 1)
    soundfile.write(tmp_path / "noise.wav", noise, RATE, subtype="PCM_16")
    cut = Recording.from_file(tmp_path / "noise.wav").to_cut().with_id("a")
    counts = {"a": 499}
    plain = batch_of(PretrainDataset([Ramp(50.0, counts)], max_seconds=3.0), [cut])
    ours = batch_of(PretrainDataset([Ramp(50.0, counts)], max_seconds=3.0, normalize=True), [cut])
    start = int(ours.labels[0][0, 0]) * 320
    whole = torch.from_numpy(read_utterance(cut, normalize=False))
    assert torch.equal(plain.audio[0], whole[start : start + 48000]) and torch.equal(plain.labels[0], ours.labels[0])
    expected = F.layer_norm(whole.double(), whole.shape)[start : start + 48000]
    assert (ours.audio[0] - expected).abs().max() < 1e-5


@given(
    rate=st.sampled_from([8000, 44100]),
    channels=st.integers(1, 2),
    milliseconds=st.integers(60, 9000),
    odd=st.integers(0, 7),
    epoch=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_crops_of_resampled_audio_start_where_their_labels_do(
    tmp_path_factory: pytest.TempPathFactory, rate: int, channels: int, milliseconds: int, odd: int, epoch: int
) -> None:
    """A tone that rises slowly: the crop is what the formula gives at the times that the labels name."""

    def chirp(time: np.ndarray) -> np.ndarray:
        return 0.5 * np.sin(2 * np.pi * (200 + 20 * time) * time)

    samples = rate * milliseconds // 1000 + odd
    path = tmp_path_factory.getbasetemp() / "chirp.wav"
    first = chirp(np.arange(samples) / rate)
    soundfile.write(path, np.stack([first, np.zeros(samples)][:channels], axis=1), rate, subtype="PCM_16")
    (cut,) = Intake(RATE)([Recording.from_file(path).to_cut().with_id("a")])
    frames = (round(samples * RATE / rate) - 400) // 320 + 1
    batch = batch_of(PretrainDataset([Ramp(50.0, {"a": frames})], max_seconds=2.0), [cut], epoch)
    assert batch.labels[0].shape[1] >= min(100, frames) - 1 and batch.audio.shape[1] <= 32000
    time = int(batch.labels[0][0, 0]) * 320 + np.arange(batch.audio.shape[1])
    inner = slice(200, -200)
    assert np.abs(batch.audio[0].numpy() - chirp(time / RATE))[inner].max(initial=0.0) < 3e-3
    if len(time) > 1000:
        assert np.abs(batch.audio[0].numpy() - chirp((time + 1) / RATE))[inner].max() > 2e-2, "the test can tell one sample"


def test_labels_come_from_a_label_store(ramp: Recording, tmp_path: Path) -> None:
    cuts = [stretch(ramp, f"cut{i}", 1000 * i, 4 * RATE + i) for i in range(3)]
    with LabelShardWriter(tmp_path / "train", 0, 1, 500, 50.0, Lineage.unknown(), sampling_rate=RATE) as writer:
        for i, cut in enumerate(cuts):
            writer.write(cut.id, np.arange(199) + 100 * i)
    merge_shards(tmp_path / "train")
    batch = batch_of(PretrainDataset([LabelStore.open(tmp_path / "train")], max_seconds=2.0), cuts)
    for i in range(3):
        start = (int(batch.labels[0][i, 0]) - 100 * i) * 320
        assert position(batch.audio[i, 0]) == 1000 * i + start
    with pytest.raises(ValueError, match="nobody"):
        PretrainDataset([LabelStore.open(tmp_path / "train")])[Request(0, (stretch(ramp, "nobody", 0, 4 * RATE),))]


def test_audio_that_cannot_be_read_is_left_out_and_named(ramp: Recording) -> None:
    gone = fastcopy(ramp, sources=[fastcopy(ramp.sources[0], source="/nowhere/gone.wav")])
    cuts = [stretch(ramp, "a", 0, 50000), stretch(gone, "b", 0, 50000), stretch(ramp, "c", 7, 60000)]
    counts = {"a": 155, "b": 155, "c": 187}
    dataset = PretrainDataset([Ramp(50.0, counts), Ramp(100.0, {name: 2 * count for name, count in counts.items()})])
    loaded = dataset[Request(0, tuple(cuts))]
    assert loaded.batch is not None and loaded.batch.ids == ("a", "c")
    whole = batch_of(dataset, [cuts[0], cuts[2]])
    assert torch.equal(loaded.batch.audio, whole.audio)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(loaded.batch.labels, whole.labels, strict=True))
    assert [cut_id for cut_id, _ in loaded.failures] == ["b"] and "gone.wav" in loaded.failures[0][1]
    assert dataset[Request(0, (cuts[1],))].batch is None


@pytest.mark.parametrize("count", [1, 100, 151, 162, 300])
def test_labels_that_are_not_of_this_audio_are_refused(ramp: Recording, count: int) -> None:
    dataset = PretrainDataset([Ramp(50.0, {"a": count})])
    with pytest.raises(ValueError, match=rf"cut a: {count} labels of label set 0 at 50 Hz are .* s, the audio is 3.125 s"):
        dataset[Request(0, (stretch(ramp, "a", 0, 50000),))]


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="stores is empty"):
        PretrainDataset([])
    with pytest.raises(ValueError, match=r"label set 1: 49 labels/s at 16000 Hz are 326.531 samples per label"):
        PretrainDataset([Ramp(50.0, {}), Ramp(49.0, {})])
    with pytest.raises(ValueError, match=r"max_seconds is 0\.01"):
        PretrainDataset([Ramp(50.0, {})], max_seconds=0.01)
