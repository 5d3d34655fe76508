"""Utterances read at other speeds: what is heard, in which batches, and that nothing but seed, epoch and id decides."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.cut import MonoCut

from k2ssl.batch import AsrBatch
from k2ssl.data.batch_loader import BatchLoader
from k2ssl.data.loader import asr_loader
from k2ssl.data.mixture import Corpora, repetition
from k2ssl.data.speed import ChangedSpeed, at_speed, check_speeds, mean_length

RATE = 16000
PITCH = 400.0
SPEEDS = (0.9, 1.0, 1.1)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    path = tmp_path_factory.mktemp("speed") / "tone.wav"
    time = np.arange(10 * RATE) / RATE
    noise = np.random.default_rng(0).normal(0.0, 0.01, len(time))
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * PITCH * time) + noise, RATE)
    return Recording.from_file(path)


def utterance(recording: Recording, name: str, seconds: float) -> MonoCut:
    cut = MonoCut(name, start=0.5, duration=seconds, channel=0, recording=recording)
    cut.supervisions = [
        SupervisionSegment(f"{name}-{i}", recording.id, seconds * i / 2, seconds / 2, text=t) for i, t in enumerate(("SHE", "SELLS"))
    ]
    return cut


def corpus(recording: Recording, num: int = 40) -> CutSet:
    return CutSet.from_cuts(utterance(recording, f"u{i}", 1 + i % 7) for i in range(num))


def loader(recording: Recording, **options: Any) -> BatchLoader[AsrBatch]:
    return asr_loader(corpus(recording), **{"max_duration": 12.0, "num_buckets": 2, "seed": 3, "speeds": SPEEDS, **options})


def heard(batches: list[AsrBatch]) -> dict[str, int]:
    """Samples of every utterance."""
    lens = [[b.audio.shape[1]] * len(b.ids) if b.audio_lens is None else b.audio_lens.tolist() for b in batches]
    return {name: length for batch, row in zip(batches, lens, strict=True) for name, length in zip(batch.ids, row, strict=True)}


def test_an_utterance_is_shorter_and_higher_by_its_factor_and_keeps_name_and_text(recording: Recording) -> None:
    (batch,) = asr_loader([utterance(recording, "a", 4.0)], max_duration=10.0, speeds=(1.25,))
    assert (batch.ids, batch.texts, batch.audio.shape) == (("a",), ("SHE SELLS",), (1, round(4.0 * RATE / 1.25)))
    spectrum = np.abs(np.fft.rfft(batch.audio[0].numpy() * np.hanning(batch.audio.shape[1])))
    assert spectrum.argmax() * RATE / batch.audio.shape[1] == pytest.approx(1.25 * PITCH, abs=0.5)
    theirs = utterance(recording, "a", 4.0).perturb_speed(1.25).load_audio()
    assert theirs is not None and np.array_equal(batch.audio.numpy(), theirs)


def test_every_speed_is_as_likely_and_each_epoch_draws_anew(recording: Recording) -> None:
    cuts = [utterance(recording, f"u{i}", 9.9) for i in range(1500)]
    durations = [
        [cut.duration for cut in ChangedSpeed((cuts,), speeds=SPEEDS).cuts(seed, epoch)] for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    first, epoch, seed, again = durations
    assert first == again
    counts = Counter(round(9.9 / duration, 3) for duration in first)
    assert set(counts) == set(SPEEDS) and all(abs(count - 500) < 4 * (1500 * 2 / 9) ** 0.5 for count in counts.values())
    for other in (epoch, seed):  # independent draws agree in a third of the cases
        assert sum(a == b for a, b in zip(first, other, strict=True)) == pytest.approx(500, abs=4 * (1500 * 2 / 9) ** 0.5)


def test_the_appearances_of_a_cut_in_one_epoch_have_speeds_of_their_own(recording: Recording) -> None:
    few, many = ([utterance(recording, f"{name}{i}", 9.9) for i in range(num)] for name, num in (("few", 5), ("many", 60)))
    drawn = list(ChangedSpeed((few, many), (1.0, 1.0), speeds=SPEEDS).cuts(0, 0))
    assert max(map(repetition, drawn)) > 3
    by_cut = {cut.id: {other.duration for other in drawn if other.id == cut.id} for cut in drawn if cut.id.startswith("few")}
    assert max(map(len, by_cut.values())) > 1


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (3, 1)])
def test_speeds_depend_neither_on_the_number_of_ranks_nor_on_workers(recording: Recording, world_size: int, workers: int) -> None:
    alone = heard(list(loader(recording, drop_incomplete=False)))
    options: dict[str, Any] = {"world_size": world_size, "num_workers": workers, "drop_incomplete": False}
    together = [heard(list(loader(recording, rank=rank, **options))) for rank in range(world_size)]
    assert sum(map(len, together)) == len(alone) == 40
    assert {name: length for of_rank in together for name, length in of_rank.items()} == alone
    plain = heard(list(loader(recording, drop_incomplete=False, speeds=())))
    assert {round(plain[name] / length, 2) for name, length in alone.items()} == set(SPEEDS)


def test_an_interrupted_epoch_goes_on_with_the_same_speeds(recording: Recording) -> None:
    straight, interrupted, resumed = loader(recording), loader(recording, num_workers=2), loader(recording)
    for each in (straight, interrupted):
        each.set_epoch(2)
    batches = iter(interrupted)
    before = [next(batches) for _ in range(3)]
    resumed.load_state_dict(interrupted.state_dict())
    again, expected = before + list(resumed), list(straight)
    assert [batch.ids for batch in again] == [batch.ids for batch in expected]
    assert all(torch.equal(ours.audio, theirs.audio) for ours, theirs in zip(again, expected, strict=True))


def test_speeds_are_the_same_bits_with_any_number_of_threads(recording: Recording) -> None:
    threads, heard = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            heard.append([batch.audio for batch in loader(recording)])
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*heard, strict=True))


def test_batches_hold_as_much_audio_as_is_allowed_of_what_is_heard(recording: Recording) -> None:
    batches = list(loader(recording, speeds=(0.5,), max_duration=30.0))
    assert max(batch.audio.numel() for batch in batches) <= 30 * RATE
    plain = list(loader(recording, speeds=(), max_duration=30.0))
    assert len(batches) >= 1.6 * len(plain), "half the speed is twice the audio"


def test_utterances_are_left_out_by_the_length_they_are_heard_with(recording: Recording) -> None:
    slow = loader(recording, speeds=(0.5,), max_seconds=10.0, drop_incomplete=False)
    assert len(heard(list(slow))) == 40 - 10 and slow.excluded == {"longer than 10 s": 10}  # of 6 and 7 s


def test_a_state_is_of_a_loader_with_the_same_speeds(recording: Recording) -> None:
    state = loader(recording).state_dict()
    for speeds in ((), (0.9, 1.1)):
        with pytest.raises(ValueError, match=r"loader state: speeds was .* when it was saved"):
            loader(recording, speeds=speeds).load_state_dict(state)
    plain = loader(recording, speeds=()).state_dict()
    with pytest.raises(ValueError, match="loader state: speeds was None"):
        loader(recording).load_state_dict(plain)
    del plain["speeds"]  # as of before there were any
    loader(recording, speeds=()).load_state_dict(plain)


@pytest.mark.parametrize("speed", [0.49, 2.01, 0.955, 0.0, -1.0, float("nan"), float("inf")])
def test_speeds_that_cannot_be_are_refused(speed: float) -> None:
    with pytest.raises(ValueError, match=r"ChangedSpeed: speeds holds .*, allowed are 0.5 to 2.0 in steps of 0.01"):
        ChangedSpeed(((),), speeds=(1.0, speed))
    check_speeds("Settings", [0.5, 0.97, 1.07, 2.0])


def test_a_rate_that_a_speed_does_not_divide_is_refused_by_the_cuts_name(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "odd.wav", np.zeros(22050), 22050)
    recording = Recording.from_file(tmp_path / "odd.wav")
    cut = MonoCut("odd", 0.0, 1.0, 0, recording=recording)
    with pytest.raises(ValueError, match=r"cut odd is at 22050 Hz, of which a speed of 0.95 makes 20947.5 Hz"):
        at_speed(cut, 0.95)
    assert at_speed(cut, 0.98).num_samples == 22500


def test_an_epoch_is_longer_by_the_mean_of_the_inverse_speeds(recording: Recording) -> None:
    cuts = [utterance(recording, f"u{i}", 9.0) for i in range(900)]
    seconds = sum(cut.duration for cut in ChangedSpeed((cuts,), speeds=(0.5, 1.0)).cuts(0, 0))
    assert mean_length((0.5, 1.0)) == 1.5 and mean_length(()) == 1.0
    assert seconds / sum(cut.duration for cut in Corpora((cuts,)).cuts(0, 0)) == pytest.approx(1.5, abs=4 * 0.5 / 30)
