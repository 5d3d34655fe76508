"""Loaders give the same batches whoever reads them; every rank gets its share, and every cut its place."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.cut import MonoCut
from lhotse.testing.dummies import dummy_features
from lhotse.utils import fastcopy

from k2ssl.batch import AudioBatch, PretrainBatch
from k2ssl.data.audio import AudioError
from k2ssl.data.batch_loader import BatchLoader, SamplingConfig
from k2ssl.data.loader import Corpora, asr_loader, audio_loader, pretrain_loader

if TYPE_CHECKING:
    from tests.data.conftest import SmallCorpus

RATE = 16000
NUM_CUTS = 83


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_get_equally_many_batches_of_different_utterances(corpus: SmallCorpus, world_size: int) -> None:
    ranks = [list(corpus.loader(rank=rank, world_size=world_size, seed=1)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    ids = [cut_id for batches in ranks for batch in batches for cut_id in batch.ids]
    assert len(ids) == len(set(ids))
    usable = {cut.id for cut in corpus.cuts() if cut.duration >= 2.0}
    dropped = usable - set(ids)
    assert set(ids) <= usable and (len(dropped) <= 6 * (world_size - 1)), "at most an incomplete round is lost"
    for step in zip(*ranks, strict=True):  # in step, ranks have crops of similar length: the same bucket
        lengths = [batch.audio.shape[1] for batch in step]
        assert min(lengths) >= 2.0 * RATE * 0.98
    assert world_size == 1 or any(len({batch.audio.shape[0] for batch in step}) == 1 for step in zip(*ranks, strict=True))


def test_batches_do_not_depend_on_the_number_of_workers_and_leave_global_generators_alone(corpus: SmallCorpus) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    batches = [list(corpus.loader(num_workers=workers)) for workers in (0, 1, 2)]
    assert corpus.equal(batches[0], batches[1]) and corpus.equal(batches[0], batches[2])
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


def test_epochs_and_seeds_crop_the_same_utterance_differently(corpus: SmallCorpus) -> None:
    """Every utterance at a new place with (almost) every epoch and seed; of crops at the same place there are only chance ones."""
    places: dict[str, list[int]] = {}
    for options in ({}, {"epoch": 1}, {"seed": 1}):
        for batch in corpus.loader(max_seconds=2.0, **options):
            for cut_id, start in zip(batch.ids, batch.labels[0][:, 0].tolist(), strict=True):
                places.setdefault(cut_id, []).append(start)
    long = [starts for starts in places.values() if len(starts) == 3 and max(starts) > 50]
    assert len(long) > 30 and sum(len(set(starts)) < 3 for starts in long) < 4


def test_every_epoch_and_every_seed_has_its_own_order(corpus: SmallCorpus) -> None:
    orders = [[batch.ids for batch in corpus.loader(**options)] for options in ({}, {"epoch": 1}, {"seed": 1}, {"shuffle": False})]
    for i, order in enumerate(orders):
        assert all(set(order).isdisjoint(other) for other in orders[:i]), "not even a batch in common"


def test_every_epoch_and_every_seed_draws_its_own_buckets(corpus: SmallCorpus) -> None:
    def lengths(**options: int) -> list[int]:
        return [max(round(cut.duration) for cut in request.cuts) for request in corpus.loader(max_seconds=20.0, **options).requests()]

    orders = [lengths(seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert min(map(len, orders)) > 10
    for i, order in enumerate(orders):
        for other in orders[:i]:
            assert sum(one == two for one, two in zip(order, other, strict=False)) < 0.7 * len(order)


@pytest.mark.parametrize(("num_cuts", "world_size"), [(3, 2), (5, 2), (9, 2), (60, 4)])
def test_what_the_last_round_drops_is_something_else_in_every_epoch(num_cuts: int, world_size: int) -> None:
    recording = Recording("all", [], RATE, 10 * RATE, 10.0)
    lengths = np.random.default_rng(num_cuts).uniform(1, 10, num_cuts).round(3)
    cuts = CutSet.from_cuts(
        MonoCut(f"c{i}", 0.0, length, 0, [SupervisionSegment(f"c{i}", "all", 0.0, length, text="a")], recording=recording)
        for i, length in enumerate(lengths.tolist())
    )
    seen: set[str] = set()
    for epoch in range(20):
        for rank in range(world_size):
            loader = asr_loader(cuts, max_duration=12.0, epoch=epoch, rank=rank, world_size=world_size)
            seen |= {cut.id for request in loader.requests() for cut in request.cuts}
    assert len(seen) == num_cuts


def test_the_batch_limit_counts_what_is_left_after_cropping(corpus: SmallCorpus) -> None:
    batches = list(corpus.loader(max_duration=20.0, max_seconds=2.0, num_buckets=1))
    assert sorted({batch.audio.shape[0] for batch in batches})[-1] == 10
    quadratic = list(corpus.loader(max_duration=20.0, max_seconds=2.0, num_buckets=1, quadratic_duration=2.0))
    assert max(batch.audio.shape[0] for batch in quadratic) == 5, "2 s count as 2 + 4 / 2 s"


@pytest.mark.parametrize(("workers", "world_size", "shuffle"), [(0, 1, False), (0, 3, True), (2, 3, False), (0, 40, True)])
def test_labelling_sees_every_cut_exactly_once_and_whole(corpus: SmallCorpus, workers: int, world_size: int, shuffle: bool) -> None:
    seen: dict[str, int] = {}
    for rank in range(world_size):
        options = {"max_duration": 30.0, "num_workers": workers, "rank": rank, "world_size": world_size, "shuffle": shuffle}
        for batch in audio_loader(corpus.cuts(), **options):
            assert isinstance(batch, AudioBatch) and not set(batch.ids) & set(seen)
            seen |= dict(zip(batch.ids, batch.audio_lens.tolist(), strict=True))
            assert batch.audio.numel() <= 30 * RATE, "no batch is longer than allowed, padding included"
            padding = [row[samples:] for row, samples in zip(batch.audio, batch.audio_lens.tolist(), strict=True)]
            assert not any(each.any() for each in padding) and int(batch.audio_lens.max()) == batch.audio.shape[1]
    assert seen == {cut.id: cut.num_samples for cut in corpus.cuts()}


def test_a_cut_longer_than_a_batch_goes_alone(corpus: SmallCorpus, recwarn: pytest.WarningsRecorder) -> None:
    batches = list(audio_loader(corpus.cuts(), max_duration=8.0))
    assert sum(len(batch.ids) for batch in batches) == NUM_CUTS
    assert all(len(batch.ids) == 1 for batch in batches if batch.audio.numel() > 8 * RATE)
    assert any(len(batch.ids) > 1 for batch in batches)
    assert not [str(warning.message) for warning in recwarn if "max_duration" in str(warning.message)]


def with_bad_cuts(corpus: SmallCorpus) -> CutSet:
    cuts = list(corpus.cuts())[:12]
    broken = cuts[3].with_id("broken")
    broken.recording = Recording.from_dict(
        {**cuts[3].recording.to_dict(), "sources": [{"type": "file", "channels": [0], "source": "/no.wav"}]}
    )
    empty = MonoCut("empty", start=0.0, duration=1e-6, channel=0, recording=cuts[0].recording)
    return CutSet.from_cuts([*cuts[:5], broken, *cuts[5:], empty])


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_and_empty_audio_is_skipped_and_listed(corpus: SmallCorpus, workers: int) -> None:
    listed: list[tuple[str, str]] = []
    seen = []
    for rank in range(2):
        options = {"rank": rank, "world_size": 2, "num_workers": workers, "shuffle": bool(workers)}
        for batch in audio_loader(with_bad_cuts(corpus), max_duration=9.0, on_error=lambda *what: listed.append(what), **options):
            seen += batch.ids
    assert len(seen) == 12 and sorted(cut_id for cut_id, _ in listed) == ["broken", "empty"]
    assert "/no.wav" in dict(listed)["broken"] and "sample" in dict(listed)["empty"]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_audio_stops_a_run_that_nobody_watches(corpus: SmallCorpus, workers: int) -> None:
    with pytest.raises(AudioError, match=r"cut broken: .*/no\.wav"):
        list(audio_loader(with_bad_cuts(corpus), max_duration=9.0, num_workers=workers))


@st.composite
def kinds_of_files(draw: st.DrawFn) -> tuple[int, int, int]:
    """Sampling rate, channels and samples of a file: at most a second, odd and even counts, down to a single sample."""
    rate = draw(st.sampled_from([8000, 16000, 44100]))
    return rate, draw(st.integers(1, 3)), draw(st.one_of(st.integers(1, 60), st.integers(60, rate)))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sounds")


def file_of(folder: Path, kind: tuple[int, int, int]) -> Recording:
    """A file whose channels hold a constant each: 0.25, 0.5, 0.75."""
    rate, channels, samples = kind
    path = folder / f"{rate}-{channels}-{samples}.wav"
    if not path.exists():
        soundfile.write(path, np.tile(np.arange(1, channels + 1) / 4, (samples, 1)), rate)
    return Recording.from_file(path)


@given(kinds=st.lists(kinds_of_files(), min_size=1, max_size=7), workers=st.sampled_from([0, 0, 2]))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_other_rates_and_several_channels_are_adapted_and_said_once(
    sounds: Path, kinds: list[tuple[int, int, int]], workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    cuts = CutSet.from_cuts(file_of(sounds, kind).to_cut().with_id(f"c{i}") for i, kind in enumerate(kinds))
    length = {f"c{i}": samples * RATE / rate for i, (rate, _, samples) in enumerate(kinds)}
    refused: list[tuple[str, str]] = []
    loader = audio_loader(cuts, max_duration=2.5, num_workers=workers, on_error=lambda *what: refused.append(what))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        batches = [batch for _ in range(2) for batch in loader]
    empty = [name for name, samples in length.items() if samples < 0.5]
    assert sorted(refused) == sorted(2 * [(name, "without a sample") for name in empty])
    assert sorted(name for batch in batches for name in batch.ids) == sorted(2 * [name for name in length if name not in empty])
    for batch in batches:
        for name, row, samples in zip(batch.ids, batch.audio, batch.audio_lens.tolist(), strict=True):
            assert abs(samples - length[name]) <= 0.5 and not row[samples:].any()
            assert (row[:samples][200:-200] - 0.25).abs().sum() <= 5e-3 * samples, "the first channel"
    said = [record.getMessage() for record in caplog.records]
    used = [(i, rate, channels) for i, (rate, channels, _) in enumerate(kinds) if f"c{i}" not in empty]
    for other in (8000, 44100):
        at = [f"cut c{i} is at {other} Hz; such cuts are resampled to 16000 Hz while they are read" for i, rate, _ in used if rate == other]
        assert [message for message in said if f"at {other} Hz" in message] == at[:1]
    of_several = [f"cut c{i} has {channels} channels; of such cuts the first channel is used" for i, _, channels in used if channels > 1]
    assert [message for message in said if "channels" in message] == of_several[:1]
    assert len(said) == len({rate for _, rate, _ in used} - {RATE}) + bool(of_several)


def test_short_utterances_are_left_out_and_counted(corpus: SmallCorpus, caplog: pytest.LogCaptureFixture) -> None:
    loader = corpus.loader(min_seconds=3.0)
    with caplog.at_level(logging.INFO):
        ids = {cut_id for batch in loader for cut_id in batch.ids}
    durations = {cut.id: cut.duration for cut in corpus.cuts()}
    assert ids == {name for name, seconds in durations.items() if seconds >= 3.0}
    assert loader.excluded == {"shorter than 3 s": NUM_CUTS - len(ids)}
    assert f"{NUM_CUTS - len(ids)} shorter than 3 s" in caplog.text


def test_an_epoch_without_a_batch_for_every_rank_is_refused(corpus: SmallCorpus) -> None:
    with pytest.raises(ValueError, match=f"no batch for every rank; cuts left out: {NUM_CUTS} shorter than 100 s"):
        list(corpus.loader(min_seconds=100.0))
    with pytest.raises(ValueError, match="in the last batches, fewer than the 99 ranks"):
        list(corpus.loader(world_size=99))
    assert list(audio_loader([], max_duration=10.0)) == []


@pytest.mark.parametrize("repeat", [True, False])
def test_corpora_are_mixed_by_weight_and_resume_exactly(corpus: SmallCorpus, tmp_path: Path, repeat: bool) -> None:
    small = [cut.with_id(f"small-{cut.id}") for cut in corpus.cuts() if cut.duration >= 2.0][:9]
    large = [cut for cut in corpus.cuts() if cut.duration >= 2.0]
    store = corpus.label(tmp_path / "all", small + large)
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
    assert corpus.equal(batches, before + list(resumed))
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
    "prefetch is 0": lambda: audio_loader([], max_duration=1.0, prefetch=0),
}


@pytest.mark.parametrize("message", BAD)
def test_settings_that_cannot_work_are_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_asking_what_batches_are_made_of_does_not_change_what_an_iteration_counts(corpus: SmallCorpus) -> None:
    plain, asked = corpus.loader(min_seconds=3.0), corpus.loader(min_seconds=3.0)
    list(plain)
    for number, _ in enumerate(asked):
        if number == 1:
            assert list(asked.requests())
    assert plain.excluded == asked.excluded and sum(plain.excluded.values()) > 0


def test_cuts_of_features_alone_are_left_out_and_named(corpus: SmallCorpus) -> None:
    told: list[tuple[str, str]] = []
    cuts = list(corpus.cuts())[:3]
    cuts[1] = fastcopy(cuts[1], recording=None, features=dummy_features(1, 0.0, cuts[1].end))
    read = [one for batch in audio_loader(cuts, max_duration=20.0, on_error=lambda *what: told.append(what)) for one in batch.ids]
    assert set(read) == {cuts[0].id, cuts[2].id} and set(told) == {(cuts[1].id, "without a recording")}
