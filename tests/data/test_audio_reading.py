"""Samples read straight from files equal those that lhotse reads; what cannot be read is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lhotse import Recording
from lhotse.audio import AudioSource
from lhotse.cut import Cut, MonoCut

from k2ssl.data import audio
from k2ssl.data.audio import AudioError, num_samples, read_padded, read_samples, read_utterance

RATE = 16000


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recording]:
    """By format: 30,011 samples of noise."""
    folder = tmp_path_factory.mktemp("audio")
    samples = np.random.default_rng(0).integers(-3000, 3000, 30011).astype(np.int16)
    for name in ("a.flac", "a.wav"):
        soundfile.write(folder / name, samples, RATE)
    return {name: Recording.from_file(folder / name) for name in ("a.flac", "a.wav")}


def stretch(recording: Recording, start: float, duration: float) -> Cut:
    return MonoCut(id="stretch", start=start, duration=duration, channel=0, recording=recording)


@given(
    name=st.sampled_from(["a.flac", "a.wav"]),
    first=st.integers(0, 20000),
    length=st.integers(2, 10011),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_both_ways_of_reading_give_the_same_samples(
    recordings: dict[str, Recording], name: str, first: int, length: int, data: st.DataObject
) -> None:
    cut = stretch(recordings[name], first / RATE, length / RATE)
    assert num_samples(cut, RATE) == length
    start = data.draw(st.integers(0, length - 1))
    wanted = data.draw(st.integers(1, length - start))
    direct, general = np.empty(wanted, np.float32), np.empty(wanted, np.float32)
    assert audio._is_plain_file(cut)
    audio._read_file(cut, start, direct)
    audio._read_any(cut, start, general)
    assert np.array_equal(direct, general)
    whole, _ = soundfile.read(recordings[name].sources[0].source, dtype="float32")
    assert np.array_equal(direct, whole[first + start :][:wanted])


def test_both_ways_of_reading_agree_on_real_speech(real_speech: Path) -> None:
    paths = sorted((real_speech / "unlabelled").glob("*.flac"))[::25]
    assert len(paths) > 5
    for i, path in enumerate(paths):
        cut = Recording.from_file(path).to_cut()
        start, wanted = 320 * 7 * i, 32000 + i
        direct, general = np.empty(wanted, np.float32), np.empty(wanted, np.float32)
        audio._read_file(cut, start, direct)
        audio._read_any(cut, start, general)
        assert np.array_equal(direct, general) and direct.std() > 1e-4


def test_what_is_not_a_plain_file_is_read_by_lhotse(recordings: dict[str, Recording]) -> None:
    recording = recordings["a.flac"]
    content = Path(recording.sources[0].source).read_bytes()
    in_memory = Recording("m", [AudioSource("memory", [0], content)], RATE, recording.num_samples, recording.duration)
    cut = stretch(in_memory, 0.5, 0.25)
    assert not audio._is_plain_file(cut)
    assert np.array_equal(read_utterance(cut, normalize=False), read_utterance(stretch(recording, 0.5, 0.25), normalize=False))
    mixed = stretch(recording, 0.0, 0.5).append(stretch(recording, 1.0, 0.5))
    read = np.empty(4000, np.float32)
    read_samples(mixed, 6000, read)
    assert np.array_equal(read[:2000], read_utterance(stretch(recording, 0.375, 0.125), normalize=False))
    assert np.array_equal(read[2000:], read_utterance(stretch(recording, 1.0, 0.125), normalize=False))


@given(rate=st.sampled_from([8000, 11025, 44100, 48000]), length=st.integers(1, 20001), data=st.data())
@settings(max_examples=60, deadline=None)
def test_other_rates_are_resampled_in_place(tmp_path_factory: pytest.TempPathFactory, rate: int, length: int, data: st.DataObject) -> None:
    """A slow sine: a stretch of it, read after resampling, is the sine at those points in time.

    Stretches start on the grid of labels at 100 Hz, as crops do; elsewhere the file has no sample at that time.
    """
    path = tmp_path_factory.getbasetemp() / f"sine-{rate}-{length}.wav"
    soundfile.write(path, np.sin(2 * np.pi * 440 * np.arange(length) / rate) * 0.5, rate, subtype="PCM_16")
    cut = Recording.from_file(path).to_cut().resample(RATE)
    total = num_samples(cut, RATE)
    assert abs(total - length * RATE / rate) <= 0.5
    assume(total)
    start = 160 * data.draw(st.integers(0, max(0, total // 160 - 1)))
    out = np.full(data.draw(st.integers(min(160, total - start), total - start)), np.nan, np.float32)
    read_samples(cut, start, out)
    expected = np.sin(2 * np.pi * 440 * (start + np.arange(len(out))) / RATE) * 0.5
    inner = slice(200, -200)  # the filter sees nothing beyond the stretch that is read
    half_a_sample = 0.5 * np.pi * 440 / rate if rate == 11025 else 0.0  # only of this rate the grid is not a whole number of samples
    assert np.abs(out - expected)[inner].max(initial=0.0) < 2e-3 + half_a_sample
    assert np.abs(out).max() < 1.0
    assert read_utterance(cut, normalize=False).shape == (total,)
    path.unlink()


def test_normalising_is_a_layer_norm_of_the_utterance(recordings: dict[str, Recording]) -> None:
    cut = stretch(recordings["a.flac"], 0.1, 1.5)
    raw = torch.from_numpy(read_utterance(cut, normalize=False)) + 0.05
    ours = torch.from_numpy(audio.normalized(raw.numpy()))
    theirs = F.layer_norm(raw.double(), raw.shape)
    assert (ours - theirs).abs().max() < 3e-6 * theirs.abs().max()
    assert torch.equal(
        torch.from_numpy(read_utterance(cut, normalize=True)), torch.from_numpy(audio.normalized(read_utterance(cut, False)))
    )


def test_silence_stays_silent_when_normalised() -> None:
    assert np.array_equal(audio.normalized(np.zeros(1000, np.float32)), np.zeros(1000, np.float32))


def damaged(recording: Recording, folder: Path, what: str) -> tuple[Recording, str]:
    """A recording whose file is not what the manifest says, and what the message must hold."""
    source = Path(recording.sources[0].source)
    target = folder / f"{what}{source.suffix}"
    samples, _ = soundfile.read(source, dtype="int16")
    said = "is damaged" if source.suffix == ".flac" else "ends at sample"
    if what == "missing":
        said = "Error opening"
    elif what == "garbage":
        target.write_bytes(b"this is no audio" * 100)
        said = "Error opening"
    elif what == "empty":
        target.write_bytes(b"")
        said = "Error"
    elif what == "cut-off":
        target.write_bytes(source.read_bytes()[:20000])
        said = "damaged|Error|ends at"
    elif what == "shorter":
        soundfile.write(target, samples[:-100], RATE)
        said = "ends at sample 29911"
    elif what == "other rate":
        soundfile.write(target, samples, 8000)
        said = "1 channels at 8000 Hz, the manifest says 1 at 16000"
    elif what == "stereo":
        soundfile.write(target, np.stack([samples, samples], 1), RATE)
        said = "2 channels at 16000 Hz"
    changed = Recording(recording.id, [AudioSource("file", [0], str(target))], RATE, recording.num_samples, recording.duration)
    return changed, said


@pytest.mark.parametrize("name", ["a.flac", "a.wav"])
@pytest.mark.parametrize("what", ["missing", "garbage", "empty", "cut-off", "shorter", "other rate", "stereo"])
def test_a_file_that_is_not_what_the_manifest_says_is_named(recordings: dict[str, Recording], tmp_path: Path, name: str, what: str) -> None:
    recording, said = damaged(recordings[name], tmp_path, what)
    bad = recording.to_cut().with_id("the bad one")
    with pytest.raises(AudioError, match=said) as caught:
        read_utterance(bad, normalize=False)
    assert caught.value.cut_id == "the bad one" and "\n" not in caught.value.reason
    good = stretch(recordings[name], 0.0, 1.0)
    samples, lens, read, failures = read_padded([good, bad, good])
    assert samples.shape == (2, RATE) and lens.tolist() == [RATE, RATE] and [cut.id for cut in read] == ["stretch", "stretch"]
    assert [failure.cut_id for failure in failures] == ["the bad one"]


@pytest.mark.parametrize("name", ["a.flac", "a.wav", "a.mp3"])
def test_a_file_that_is_not_there_or_empty_is_called_that(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    cut = Recording("a", [AudioSource("file", [0], str(path))], RATE, RATE, 1.0).to_cut()
    for why in ("No such file or directory", r"empty file \(0 bytes\)"):
        with pytest.raises(AudioError, match=rf"cut a-0: Error opening '{path}': {why}$"):
            read_utterance(cut.with_id("a-0"), normalize=False)
        path.touch()


def test_samples_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    samples = np.zeros(8000, np.float32)
    samples[77] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match="not finite"):
        read_utterance(Recording.from_file(tmp_path / "nan.wav").to_cut(), normalize=False)


def test_padding_is_zero_and_nothing_read_gives_an_empty_batch(recordings: dict[str, Recording]) -> None:
    samples, lens, _, _ = read_padded([stretch(recordings["a.wav"], 0.0, 0.5), stretch(recordings["a.wav"], 0.0, 1.0)])
    assert samples.shape == (2, RATE) and lens.tolist() == [RATE // 2, RATE] and lens.dtype == torch.int64
    assert torch.equal(samples[0, RATE // 2 :], torch.zeros(RATE // 2))
    samples, lens, read, failures = read_padded([])
    assert samples.shape == (0, 0) and lens.tolist() == [] and not read and not failures


def test_a_part_that_begins_and_ends_on_half_a_sample_is_read(tmp_path: Path) -> None:
    samples = np.random.default_rng(2).integers(-3000, 3000, 22050).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", samples, 22050)
    cut = stretch(Recording.from_file(tmp_path / "a.wav"), 0.01, 0.99)  # samples 220.5 to 22050
    read = read_utterance(cut, normalize=False)
    assert np.array_equal(read, samples[220:].astype(np.float32) / 32768)
