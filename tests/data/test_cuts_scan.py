"""Audio files of every kind become cuts that load as promised, or a reason."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lhotse import Recording
from lhotse.audio.backend import audio_backend
from lhotse.cut import Cut
from lhotse.cut.set import deserialize_cut

from k2ssl.data.audio_scan import AudioItem, ScanReport, ScanSettings, Unreadable, scan


def noise(samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, size=(samples, channels)).astype(np.float32)


def scan_one(item: AudioItem, **options: object) -> tuple[list[Cut], ScanReport]:
    lines, report = scan([item], ScanSettings(**options))  # type: ignore[arg-type]
    return [deserialize_cut(json.loads(line)) for line in lines], report


def reason(item: AudioItem, **options: object) -> str:
    cuts, report = scan_one(item, **options)
    assert not cuts
    assert report.counter.cuts == 0
    assert [entry.path for entry in report.unreadable] == [item.path]
    return report.unreadable[0].reason


@given(
    samples=st.integers(1, 9001),
    rate=st.sampled_from([8000, 16000, 22050, 44100, 48000]),
    channels=st.integers(1, 2),
    suffix=st.sampled_from(["wav", "flac"]),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_length_rate_and_number_of_channels_loads_as_promised(
    tmp_path: Path, samples: int, rate: int, channels: int, suffix: str
) -> None:
    path = tmp_path / f"x.{suffix}"
    audio = noise(samples, channels)
    soundfile.write(path, audio, rate, subtype="PCM_24")
    expected = int(samples * 16000 / rate + 0.5)
    if expected == 0:
        assert f"has {samples} samples at {rate} Hz, none at 16000 Hz" in reason(AudioItem("x", str(path)), channel=channels - 1)
        return
    (cut,), report = scan_one(AudioItem("x", str(path)), channel=channels - 1)
    assert (cut.num_samples, cut.sampling_rate, cut.duration) == (expected, 16000, expected / 16000)
    loaded = cut.load_audio()
    assert loaded.shape == (1, expected)
    wanted = torch.from_numpy(audio[:, channels - 1].copy())
    wanted = torchaudio.functional.resample(wanted, rate, 16000) if rate != 16000 else wanted
    common = min(expected, len(wanted))  # torchaudio rounds up, lhotse to the nearest number of samples
    assert abs(expected - len(wanted)) <= 1
    np.testing.assert_allclose(loaded[0, :common], wanted[:common].numpy(), atol=1e-5)
    assert (report.rates, report.channels) == ({str(rate): 1}, {str(channels): 1})


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
def test_every_promised_format_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, noise(16001), 16000)
    (cut,), _ = scan_one(AudioItem("x", str(path)), verify=True)
    assert cut.num_samples == 16001
    assert cut.load_audio().shape == (1, 16001)


def test_opus_is_read(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.opus", noise(48001), 48000, format="OGG", subtype="OPUS")
    (cut,), _ = scan_one(AudioItem("x", str(tmp_path / "x.opus")))
    assert cut.load_audio().shape == (1, 16000)


def test_the_wanted_channel_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    audio = np.stack([np.full(100, 0.25), np.full(100, -0.5)], axis=1)
    soundfile.write(tmp_path / "x.wav", audio, 16000)
    for channel, value in ((0, 0.25), (1, -0.5)):
        (cut,), _ = scan_one(AudioItem("x", str(tmp_path / "x.wav")), channel=channel)
        assert (cut.load_audio() == value).all()
        assert cut.supervisions[0].channel == cut.channel == channel
    assert reason(AudioItem("x", str(tmp_path / "x.wav")), channel=2) == "has 2 channels, number 2 (from 0) was asked for"


def test_a_file_with_one_channel_gives_it_whatever_channel_is_wanted(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", noise(100), 16000)
    (cut,), _ = scan_one(AudioItem("x", str(tmp_path / "x.wav")), channel=1)
    assert cut.channel == 0


@pytest.mark.parametrize(("text", "stored"), [(None, None), ("", ""), ("  \n", ""), (" Hello  World \n", "Hello  World")])
def test_text_is_stripped_and_nothing_else(tmp_path: Path, text: str | None, stored: str | None) -> None:
    soundfile.write(tmp_path / "x.wav", noise(100), 16000)
    (cut,), report = scan_one(AudioItem("x", str(tmp_path / "x.wav"), text=text, speaker="me"), language="Welsh")
    (supervision,) = cut.supervisions
    assert (supervision.text, supervision.speaker, supervision.language) == (stored, "me", "Welsh")
    assert (supervision.start, supervision.duration) == (0.0, cut.duration)
    assert report.counter.empty_text == (stored == "")
    if text is not None:
        (tmp_path / "x.txt").write_text("\ufeff" + text, encoding="utf-8")
        (beside,), _ = scan_one(AudioItem("x", str(tmp_path / "x.wav"), text_path=str(tmp_path / "x.txt"), speaker="me"), language="Welsh")
        assert beside == cut


NO_AUDIO = b"this is not audio, whatever its name says" * 10


def test_what_is_no_audio_gets_a_reason_in_words(tmp_path: Path) -> None:
    for name, content in (("empty.wav", b""), ("text.flac", NO_AUDIO), ("text.mp3", NO_AUDIO)):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.wav").mkdir()
    soundfile.write(tmp_path / "none.wav", noise(0), 16000)
    wanted = {
        "empty.wav": "empty file (0 bytes)",
        "text.flac": "Format not recognised",
        "text.mp3": "Format not recognised.",
        "absent.wav": "No such file or directory",
        "folder.wav": "Is a directory",
        "none.wav": "has no samples",
    }
    found = {name: reason(AudioItem("x", str(tmp_path / name))) for name in wanted}
    assert {name: wanted[name] in found[name] for name in wanted} == dict.fromkeys(wanted, True), found


def test_bad_files_between_good_ones_do_not_stop_the_rest(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", noise(100), 16000)
    good, bad = str(tmp_path / "x.wav"), str(tmp_path / "absent.wav")
    lines, report = scan([AudioItem("a", good), AudioItem("b", bad), Unreadable("c", "why"), AudioItem("d", good)], ScanSettings())
    assert [json.loads(line)["id"] for line in lines] == ["a", "d"]
    assert [entry.path for entry in report.unreadable] == [bad, "c"]
    assert (report.files, report.counter.cuts) == (4, 2)


def test_a_path_that_is_not_utf8_is_listed(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.wav")
    soundfile.write(tmp_path / "x.wav", noise(100), 16000)
    os.rename(tmp_path / "x.wav", path)
    assert "not UTF-8" in reason(AudioItem("x", path))


@pytest.mark.parametrize(
    ("suffix", "message"),
    [("flac", r"cannot be decoded to its end: .*lost sync.*"), ("mp3", r"its header promises 64000 samples, \d{5} can be decoded")],
)
def test_damage_inside_a_file_is_found_when_it_is_decoded(tmp_path: Path, suffix: str, message: str) -> None:
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, noise(64000), 16000)
    content = path.read_bytes()
    item = AudioItem("x", str(path))
    assert scan_one(item, verify=True)[1].counter.cuts == 1
    path.write_bytes(content[: len(content) // 2])
    assert scan_one(item)[1].counter.cuts == 1, "its header is whole"
    assert re.fullmatch(message, reason(item, verify=True))


def test_a_cut_off_wav_file_gives_what_it_holds(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", noise(64000), 16000)
    (tmp_path / "x.wav").write_bytes((tmp_path / "x.wav").read_bytes()[: 44 + 2 * 1001])
    (cut,), _ = scan_one(AudioItem("x", str(tmp_path / "x.wav")), verify=True)
    assert cut.load_audio().shape == (1, 1001)


def test_samples_that_are_not_numbers_are_found_when_decoded(tmp_path: Path) -> None:
    audio = noise(1000)
    audio[500] = np.nan
    soundfile.write(tmp_path / "x.wav", audio, 16000, subtype="FLOAT")
    assert "not finite" in reason(AudioItem("x", str(tmp_path / "x.wav")), verify=True)


def test_a_header_without_length_is_refused_for_lhotse_cannot_load_it(tmp_path: Path) -> None:
    path = tmp_path / "x.flac"
    soundfile.write(path, noise(12345), 16000)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the 36 bits of the number of samples in STREAMINFO; 0 is "not known"
    content[22:26] = bytes(4)
    path.write_bytes(content)
    assert soundfile.info(path).frames > 1 << 62
    assert "does not tell its length" in reason(AudioItem("x", str(path)))
    with audio_backend("LibsndfileBackend"), pytest.raises(ValueError, match="too big"):  # when this fails, such files can be taken
        Recording.from_file(path).load_audio()


def test_durations_outside_the_limits_are_left_out_and_counted(tmp_path: Path) -> None:
    items = []
    for seconds in (1, 2, 3, 4):
        soundfile.write(tmp_path / f"{seconds}.wav", noise(seconds * 16000), 16000)
        items.append(AudioItem(f"{seconds}", str(tmp_path / f"{seconds}.wav")))
    lines, report = scan(items, ScanSettings(min_duration=2.0, max_duration=3.0))
    assert [json.loads(line)["id"] for line in lines] == ["2", "3"], "both limits are included"
    assert (report.too_short, report.too_short_seconds, report.too_long, report.too_long_seconds) == (1, 1.0, 1, 4.0)
    assert not report.unreadable


def segmented(folder: Path, content: object, samples: int = 160000, rate: int = 16000) -> AudioItem:
    soundfile.write(folder / "x.flac", noise(samples), rate)
    (folder / "x.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return AudioItem("x", str(folder / "x.flac"), segments_path=str(folder / "x.json"))


@pytest.mark.parametrize("rate", [16000, 8000, 44100])
def test_segments_become_cuts_that_load_their_part(tmp_path: Path, rate: int) -> None:
    item = segmented(tmp_path, {"speaker": 17, "voice_activity": [[0.5, 1.25], [2.0, 9.0]]}, 10 * rate, rate)
    cuts, report = scan_one(item)
    assert [(cut.id, cut.start, cut.duration) for cut in cuts] == [("x_0", 0.5, 0.75), ("x_1", 2.0, 7.0)]
    assert [cut.supervisions[0].speaker for cut in cuts] == ["17", "17"]
    assert all(
        cut.supervisions[0].start == 0 and cut.supervisions[0].duration == cut.duration and len(cut.supervisions) == 1 for cut in cuts
    )
    whole = torch.from_numpy(soundfile.read(item.path, dtype="float32")[0])
    whole = torchaudio.functional.resample(whole, rate, 16000) if rate != 16000 else whole
    for cut in cuts:
        loaded = cut.load_audio()
        start = round(cut.start * 16000)
        assert loaded.shape == (1, round(cut.duration * 16000))
        inner = slice(200, -200)  # the resampling filter sees other neighbours at the edges
        np.testing.assert_allclose(loaded[0, inner], whole[start : start + loaded.shape[1]][inner].numpy(), atol=1e-5)
    assert report.files == 1


def test_long_segments_are_kept_and_overlong_ones_end_with_the_audio(tmp_path: Path) -> None:
    cuts, report = scan_one(segmented(tmp_path, {"voice_activity": [[1.0, 100.0], [5.0, 5.0], [6.0, 5.0], [10.0, 11.0], [-1, 2]]}))
    assert [(cut.id, cut.start, cut.end) for cut in cuts] == [("x_0", 1.0, 10.0)]
    assert [entry.reason.split(",")[0] for entry in report.unreadable] == [f"segment {i}" for i in (1, 2, 3, 4)]


@given(
    segments=st.lists(
        st.tuples(st.floats(-1, 2.5) | st.sampled_from([0, 2, 1.99999, 1e-9]), st.floats() | st.floats(0, 2.1))
        | st.tuples(st.floats(0, 2e-4), st.floats(0, 2e-4)),
        min_size=1,
    ),
    rate=st.sampled_from([8000, 16000, 44100]),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_segment_breaks_the_scan_and_every_cut_lies_in_the_audio(tmp_path: Path, segments: list[tuple[float, float]], rate: int) -> None:
    cuts, report = scan_one(segmented(tmp_path, {"voice_activity": segments}, 2 * rate + 1, rate))
    assert len(cuts) + sum(entry.reason.startswith("segment ") for entry in report.unreadable) == len(segments)
    for cut in cuts:
        assert cut.num_samples > 0
        assert 0 <= cut.start < cut.end <= cut.recording.duration + 1e-9
        assert len(cut.supervisions) == 1
    for cut in cuts[:1]:
        assert cut.load_audio().shape == (1, cut.num_samples)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
def test_no_damage_of_a_header_breaks_the_scan(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, noise(5000, 2), 16000)
    whole = path.read_bytes()
    chance = np.random.default_rng(1)
    for _ in range(60):
        content = bytearray(whole)
        for place in chance.integers(0, 60, size=chance.integers(1, 5)):
            content[place] = chance.integers(0, 256)
        path.write_bytes(content[: chance.integers(0, len(content) + 1)] if chance.random() < 0.3 else content)
        lines, report = scan([AudioItem("x", str(path))], ScanSettings(verify=bool(chance.random() < 0.5)))
        assert len(lines) + len(report.unreadable) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"voice_activity": []}, "x.json names no segment with speech"),
        ({"voice_activity": [[20, 30]]}, "x.json names no segment with speech"),
        ({}, "x.json has no key 'voice_activity'"),
        ("nonsense", "x.json does not hold voice_activity as"),
        ([], "x.json does not hold voice_activity as"),
        ({"voice_activity": [[1, 2, 3]]}, "x.json does not hold voice_activity as"),
        ({"voice_activity": [["a", "b"]]}, "x.json does not hold voice_activity as"),
        ({"voice_activity": [[None, 1]]}, "x.json does not hold voice_activity as"),
        ({"voice_activity": 3}, "x.json does not hold voice_activity as"),
    ],
)
def test_bad_segment_files_get_a_reason(tmp_path: Path, content: object, message: str) -> None:
    _, report = scan_one(segmented(tmp_path, content))
    assert message in report.unreadable[-1].reason


def test_an_absent_segment_file_gets_a_reason(tmp_path: Path) -> None:
    item = segmented(tmp_path, {})
    (tmp_path / "x.json").unlink()
    assert reason(item) == "there is no x.json beside it"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_duration": -1.0}, "min_duration is -1.0 s"),
        ({"min_duration": float("nan")}, "min_duration is nan s"),
        ({"max_duration": 0.0}, "max_duration is 0.0 s"),
        ({"min_duration": 3.0, "max_duration": 2.0}, r"max_duration is 2.0 s, .* at least min_duration \(3.0 s\)"),
        ({"sampling_rate": 0}, "sampling_rate is 0 Hz"),
        ({"channel": -1}, "channel is -1"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScanSettings(**options)  # type: ignore[arg-type]
