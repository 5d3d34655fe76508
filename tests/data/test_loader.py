"""Loaders give the same batches whoever reads them and whenever they were interrupted; every rank gets its share."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording
from lhotse.cut import Cut, MonoCut

from k2ssl.batch import AudioBatch, PretrainBatch
from k2ssl.data.audio import AudioError
from k2ssl.data.batch_loader import BatchLoader, SamplingConfig
from k2ssl.data.labels import LabelShardWriter, LabelStore, Lineage, merge_shards
from k2ssl.data.loader import Corpora, audio_loader, pretrain_loader

RATE = 16000
NUM_CUTS = 83


def write_manifest(folder: Path, num_cuts: int = NUM_CUTS, prefix: str = "cut", seed: int = 0) -> Path:
    """A lazy manifest of stretches, of 0.3 to 9 s, of one file of noise."""
    draw = np.random.default_rng(seed)
    path = folder / "noise.flac"
    if not path.exists():
        soundfile.write(path, draw.integers(-9000, 9000, 12 * RATE).astype(np.int16), RATE)
    recording = Recording.from_file(path)
    cuts = [
        MonoCut(f"{prefix}{i}", start=i / 100, duration=int(draw.integers(5000, 144000)) / RATE, channel=0, recording=recording)
        for i in range(num_cuts)
    ]
    manifest = folder / f"{prefix}.jsonl"
    CutSet.from_cuts(cuts).to_file(manifest)
    return manifest


def write_store(folder: Path, manifest: Path) -> LabelStore:
    """The j-th label of a cut is j."""
    with LabelShardWriter(folder, 0, 1, 1000, 50.0, Lineage.unknown(), sampling_rate=RATE) as writer:
        for cut in CutSet.from_jsonl_lazy(manifest):
            writer.write(cut.id, np.arange((cut.num_samples - 80) // 320))
    return merge_shards(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cut.jsonl and its labels in labels/."""
    folder = tmp_path_factory.mktemp("corpus")
    write_store(folder / "labels", write_manifest(folder))
    return folder


def manifest(corpus: Path) -> CutSet:
    return CutSet.from_jsonl_lazy(corpus / "cut.jsonl")


def pretrain(corpus: Path, **options: Any) -> BatchLoader[PretrainBatch]:
    options = {"max_duration": 20.0, "num_buckets": 3, "max_seconds": 5.0, **options}
    return pretrain_loader(manifest(corpus), [LabelStore.open(corpus / "labels")], **options)


def equal(ours: list[PretrainBatch], theirs: list[PretrainBatch]) -> bool:
    return [batch.ids for batch in ours] == [batch.ids for batch in theirs] and all(
        torch.equal(our.audio, their.audio) and all(map(torch.equal, our.labels, their.labels))
        for our, their in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("workers_before", [0, 2])
@pytest.mark.parametrize("workers_after", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_interrupted_epoch_goes_on_with_the_very_same_batches(
    corpus: Path, workers_before: int, workers_after: int, world_size: int
) -> None:
    for rank in range(world_size):
        share = {"rank": rank, "world_size": world_size, "seed": 5, "epoch": 3}
        straight = list(pretrain(corpus, **share))
        interrupted = pretrain(corpus, num_workers=workers_before, **share)
        batches = iter(interrupted)
        before = [next(batches) for _ in range(4)]
        state = interrupted.state_dict()
        del batches
        resumed = pretrain(corpus, num_workers=workers_after, **share)
        resumed.load_state_dict(state)
        assert len(straight) > 6 and equal(straight, before + list(resumed))


def test_a_new_process_goes_on_with_the_very_same_batches(corpus: Path) -> None:
    """Another process has another hash seed and no generator state of ours."""
    program = """
import hashlib, json, sys
from k2ssl.data.labels import LabelStore
from k2ssl.data.loader import pretrain_loader
from lhotse import CutSet
folder, state = sys.argv[1], json.loads(sys.argv[2])
loader = pretrain_loader(CutSet.from_jsonl_lazy(folder + "/cut.jsonl"), [LabelStore.open(folder + "/labels")], max_duration=20.0,
                         num_buckets=3, max_seconds=5.0, seed=5, epoch=3)
loader.load_state_dict(state)
for batch in loader:
    print(hashlib.sha256(batch.audio.numpy().tobytes() + batch.labels[0].numpy().tobytes()).hexdigest())
"""
    loader = pretrain(corpus, seed=5, epoch=3)
    hashes, state = [], ""
    for i, batch in enumerate(loader):
        hashes.append(hashlib.sha256(batch.audio.numpy().tobytes() + batch.labels[0].numpy().tobytes()).hexdigest())
        if i == 2:
            state = json.dumps(loader.state_dict())
    command = [sys.executable, "-c", program, str(corpus), state]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert len(hashes) > 6 and result.stdout.split() == hashes[3:]


def test_a_state_saved_after_the_last_batch_leaves_nothing_and_the_next_epoch_is_whole(corpus: Path) -> None:
    loader = pretrain(corpus)
    first = list(loader)
    resumed = pretrain(corpus)
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == []
    for each in (loader, resumed):
        each.set_epoch(1)
    second = list(resumed)
    assert equal(list(loader), second) and not equal(first, second)
    assert equal(list(pretrain(corpus, epoch=1)), second)


def test_iterating_again_without_a_new_state_starts_the_epoch_again(corpus: Path) -> None:
    loader = pretrain(corpus)
    batches = iter(loader)
    first = next(batches)
    assert loader.state_dict()["batches"] == 1
    assert equal([next(iter(loader))], [first])


def test_a_state_of_other_settings_or_of_another_cut_set_is_refused(corpus: Path, tmp_path: Path) -> None:
    loader = pretrain(corpus)
    list(loader)
    state = loader.state_dict()
    for name, options in {"seed": {"seed": 1}, "world_size": {"world_size": 2}, "sampling.max_duration": {"max_duration": 30.0}}.items():
        with pytest.raises(ValueError, match=f"loader state: {name} was"):
            pretrain(corpus, **options).load_state_dict(state)
    other = tmp_path / "other"
    other.mkdir()
    write_store(other / "labels", write_manifest(other, seed=1))
    resumed = pretrain(other)
    resumed.load_state_dict({**state, "batches": 3})
    with pytest.raises(ValueError, match="are not those consumed before; it is another cut set"):
        list(resumed)
    resumed.load_state_dict({**state, "batches": 1000})
    with pytest.raises(ValueError, match="1000 batches were consumed, this cut set gives"):
        list(resumed)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_get_equally_many_batches_of_different_utterances(corpus: Path, world_size: int) -> None:
    ranks = [list(pretrain(corpus, rank=rank, world_size=world_size, seed=1)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    ids = [cut_id for batches in ranks for batch in batches for cut_id in batch.ids]
    assert len(ids) == len(set(ids))
    usable = {cut.id for cut in manifest(corpus) if cut.duration >= 2.0}
    dropped = usable - set(ids)
    assert set(ids) <= usable and (len(dropped) <= 6 * (world_size - 1)), "at most an incomplete round is lost"
    for step in zip(*ranks, strict=True):  # in step, ranks have crops of similar length: the same bucket
        lengths = [batch.audio.shape[1] for batch in step]
        assert min(lengths) >= 2.0 * RATE * 0.98
    assert world_size == 1 or any(len({batch.audio.shape[0] for batch in step}) == 1 for step in zip(*ranks, strict=True))


def test_batches_do_not_depend_on_the_number_of_workers_and_leave_global_generators_alone(corpus: Path) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    batches = [list(pretrain(corpus, num_workers=workers)) for workers in (0, 1, 2)]
    assert equal(batches[0], batches[1]) and equal(batches[0], batches[2])
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


def test_epochs_and_ranks_crop_the_same_utterance_differently(corpus: Path) -> None:
    """Every utterance at a new place in (almost) every epoch; of crops at the same place in an utterance there are only chance ones."""
    places: dict[str, list[int]] = {}
    for epoch in range(3):
        for batch in pretrain(corpus, epoch=epoch, max_seconds=2.0):
            for cut_id, start in zip(batch.ids, batch.labels[0][:, 0].tolist(), strict=True):
                places.setdefault(cut_id, []).append(start)
    long = [starts for starts in places.values() if len(starts) == 3 and max(starts) > 50]
    assert len(long) > 30 and sum(len(set(starts)) < 3 for starts in long) < 4


def test_every_epoch_and_every_seed_has_its_own_order(corpus: Path) -> None:
    orders = [[batch.ids for batch in pretrain(corpus, **options)] for options in ({}, {"epoch": 1}, {"seed": 1}, {"shuffle": False})]
    for i, order in enumerate(orders):
        assert all(set(order).isdisjoint(other) for other in orders[:i]), "not even a batch in common"


def test_the_batch_limit_counts_what_is_left_after_cropping(corpus: Path) -> None:
    batches = list(pretrain(corpus, max_duration=20.0, max_seconds=2.0, num_buckets=1))
    assert sorted({batch.audio.shape[0] for batch in batches})[-1] == 10
    quadratic = list(pretrain(corpus, max_duration=20.0, max_seconds=2.0, num_buckets=1, quadratic_duration=2.0))
    assert max(batch.audio.shape[0] for batch in quadratic) == 5, "2 s count as 2 + 4 / 2 s"


@pytest.mark.parametrize(("workers", "world_size", "shuffle"), [(0, 1, False), (0, 3, True), (2, 3, False), (0, 40, True)])
def test_labelling_sees_every_cut_exactly_once_and_whole(corpus: Path, workers: int, world_size: int, shuffle: bool) -> None:
    seen: dict[str, int] = {}
    for rank in range(world_size):
        options = {"max_duration": 30.0, "num_workers": workers, "rank": rank, "world_size": world_size, "shuffle": shuffle}
        for batch in audio_loader(manifest(corpus), **options):
            assert isinstance(batch, AudioBatch) and not set(batch.ids) & set(seen)
            seen |= dict(zip(batch.ids, batch.audio_lens.tolist(), strict=True))
            assert batch.audio.numel() <= 30 * RATE, "no batch is longer than allowed, padding included"
            padding = [row[samples:] for row, samples in zip(batch.audio, batch.audio_lens.tolist(), strict=True)]
            assert not any(each.any() for each in padding) and int(batch.audio_lens.max()) == batch.audio.shape[1]
    assert seen == {cut.id: cut.num_samples for cut in manifest(corpus)}


def test_a_cut_longer_than_a_batch_goes_alone(corpus: Path, recwarn: pytest.WarningsRecorder) -> None:
    batches = list(audio_loader(manifest(corpus), max_duration=8.0))
    assert sum(len(batch.ids) for batch in batches) == NUM_CUTS
    assert all(len(batch.ids) == 1 for batch in batches if batch.audio.numel() > 8 * RATE)
    assert any(len(batch.ids) > 1 for batch in batches)
    assert not [str(warning.message) for warning in recwarn if "max_duration" in str(warning.message)]


def with_bad_cuts(corpus: Path) -> CutSet:
    cuts = list(manifest(corpus))[:12]
    broken = cuts[3].with_id("broken")
    broken.recording = Recording.from_dict(
        {**cuts[3].recording.to_dict(), "sources": [{"type": "file", "channels": [0], "source": "/no.wav"}]}
    )
    empty = MonoCut("empty", start=0.0, duration=1e-6, channel=0, recording=cuts[0].recording)
    return CutSet.from_cuts([*cuts[:5], broken, *cuts[5:], empty])


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_and_empty_audio_is_skipped_and_listed(corpus: Path, workers: int) -> None:
    listed: list[tuple[str, str]] = []
    seen = []
    for rank in range(2):
        options = {"rank": rank, "world_size": 2, "num_workers": workers, "shuffle": bool(workers)}
        for batch in audio_loader(with_bad_cuts(corpus), max_duration=9.0, on_error=lambda *what: listed.append(what), **options):
            seen += batch.ids
    assert len(seen) == 12 and sorted(cut_id for cut_id, _ in listed) == ["broken", "empty"]
    assert "/no.wav" in dict(listed)["broken"] and "sample" in dict(listed)["empty"]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_audio_stops_a_run_that_nobody_watches(corpus: Path, workers: int) -> None:
    with pytest.raises(AudioError, match=r"cut broken: .*/no\.wav"):
        list(audio_loader(with_bad_cuts(corpus), max_duration=9.0, num_workers=workers))


def files(folder: Path, kinds: list[tuple[int, int]]) -> Iterator[Cut]:
    """A cut of 3 s for each (sampling rate, channels); channels hold a constant each: 0.25, 0.5, ..."""
    for i, (rate, channels) in enumerate(kinds):
        path = folder / f"{i}.wav"
        soundfile.write(path, np.tile(np.arange(1, channels + 1) / 4, (3 * rate, 1)), rate)
        yield Recording.from_file(path).to_cut().with_id(f"c{i}")


@pytest.mark.parametrize("workers", [0, 2])
def test_other_rates_and_several_channels_are_adapted_and_said_once(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    kinds = [(16000, 1), (8000, 1), (8000, 1), (44100, 1), (16000, 2), (16000, 2), (8000, 3), (44100, 1)]
    cuts = CutSet.from_cuts(files(tmp_path, kinds))
    loader = audio_loader(cuts, max_duration=7.0, num_workers=workers)
    with caplog.at_level(logging.WARNING):
        batches = [batch for _ in range(2) for batch in loader]
    ids = [cut_id for batch in batches for cut_id in batch.ids]
    assert sorted(ids) == sorted(2 * [f"c{i}" for i in range(len(kinds))])
    for batch in batches:
        assert batch.audio_lens.tolist() == [48000] * len(batch.ids)
        assert (batch.audio[:, 1000:-1000] - 0.25).abs().max() < 1e-2, "the first channel"
    said = [record.getMessage() for record in caplog.records]
    assert sum("8000 Hz" in message for message in said) == sum("44100 Hz" in message for message in said) == 1
    assert sum("channels" in message for message in said) == 1 and len(said) == 3
    assert "c1 is at 8000 Hz" in "".join(said) and "c4 has 2 channels" in "".join(said)


def test_short_utterances_are_left_out_and_counted(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader = pretrain(corpus, min_seconds=3.0)
    with caplog.at_level(logging.INFO):
        ids = {cut_id for batch in loader for cut_id in batch.ids}
    durations = {cut.id: cut.duration for cut in manifest(corpus)}
    assert ids == {name for name, seconds in durations.items() if seconds >= 3.0}
    assert loader.excluded == {"shorter than 3 s": NUM_CUTS - len(ids)}
    assert f"{NUM_CUTS - len(ids)} shorter than 3 s" in caplog.text


def test_an_epoch_without_a_batch_for_every_rank_is_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match=f"no batch for every rank; cuts left out: {NUM_CUTS} shorter than 100 s"):
        list(pretrain(corpus, min_seconds=100.0))
    with pytest.raises(ValueError, match="in the last batches, fewer than the 99 ranks"):
        list(pretrain(corpus, world_size=99))
    assert list(audio_loader([], max_duration=10.0)) == []


@pytest.mark.parametrize("repeat", [True, False])
def test_corpora_are_mixed_by_weight_and_resume_exactly(corpus: Path, tmp_path: Path, repeat: bool) -> None:
    small = [cut.with_id(f"small-{cut.id}") for cut in manifest(corpus) if cut.duration >= 2.0][:9]
    large = [cut for cut in manifest(corpus) if cut.duration >= 2.0]
    with LabelShardWriter(tmp_path / "all", 0, 1, 1000, 50.0, Lineage.unknown(), sampling_rate=RATE) as writer:
        for cut in small + large:
            writer.write(cut.id, np.arange((cut.num_samples - 80) // 320))
    store = merge_shards(tmp_path / "all")
    mixture = Corpora((small, large), weights=(1.0, 2.0), repeat=repeat)

    def loader(**options: Any) -> BatchLoader[PretrainBatch]:
        return pretrain_loader(mixture, [store], max_duration=15.0, num_buckets=2, max_seconds=2.0, seed=3, **options)

    batches = list(loader())
    ids = [cut_id for batch in batches for cut_id in batch.ids]
    of_small = sum(cut_id.startswith("small-") for cut_id in ids)
    assert set(ids) == {cut.id for cut in small + large}
    if repeat:
        assert 0.2 < of_small / len(ids) < 0.47, "a third is expected"
        crops = [
            (cut_id, start)
            for batch in batches
            for cut_id, start in zip(batch.ids, batch.labels[0][:, 0].tolist(), strict=True)
            if cut_id.startswith("small-")
        ]
        assert len(set(crops)) > 0.8 * len(crops), "an utterance that comes again is cropped elsewhere"
    else:
        assert len(ids) == len(small) + len(large)
    interrupted, resumed = loader(), loader(num_workers=2)
    running = iter(interrupted)
    before = [next(running) for _ in range(3)]
    resumed.load_state_dict(interrupted.state_dict())
    assert equal(batches, before + list(resumed))
    other = pretrain_loader(Corpora((small, large), (1.0, 1.0), repeat), [store], max_duration=15.0, num_buckets=2, max_seconds=2.0, seed=3)
    with pytest.raises(ValueError, match="loader state: weights was"):
        other.load_state_dict(interrupted.state_dict())


def test_the_share_of_a_corpus_is_its_weight_until_all_have_been_read() -> None:
    few, many = ([MonoCut(f"{name}{i}", 0.0, 1.0, 0) for i in range(num)] for name, num in (("few", 10), ("many", 2000)))
    drawn = [cut.id for cut in Corpora((few, many), weights=(1.0, 3.0)).cuts(seed=0, epoch=0)]
    assert set(drawn) == {cut.id for cut in few + many}
    assert abs(sum(name.startswith("few") for name in drawn) / len(drawn) - 0.25) < 0.03
    assert drawn[:50] != [cut.id for cut in Corpora((few, many), weights=(1.0, 3.0)).cuts(seed=0, epoch=1)][:50]


BAD: dict[str, Callable[[], object]] = {
    "sets is empty": lambda: Corpora(()),
    "weights has 1 entries, 2 are needed": lambda: Corpora(([], []), (1.0,)),
    "finite numbers > 0 are needed": lambda: Corpora(([], []), (1.0, 0.0)),
    "max_duration is 0": lambda: SamplingConfig(0.0),
    "quadratic_duration is -1": lambda: SamplingConfig(10.0, -1.0),
    "num_buckets is 0": lambda: SamplingConfig(10.0, num_buckets=0),
    "rank is 2 and world_size 2": lambda: audio_loader([], max_duration=1.0, rank=2, world_size=2),
    "num_workers is -1": lambda: audio_loader([], max_duration=1.0, num_workers=-1),
}


@pytest.mark.parametrize("message", BAD)
def test_settings_that_cannot_work_are_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD[message]()
