"""From audio files to cuts by reading their headers; what cannot be read becomes a reason.

Recordings, resampling and trimming are lhotse's. Its functions for whole corpora are not called, because they end at the first unreadable file and
keep every recording in memory; the manifests are the same.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from lhotse import MonoCut, Recording, SupervisionSegment
from lhotse.audio.backend import audio_backend
from lhotse.utils import add_durations

from k2ssl.data.audio import why_unreadable
from k2ssl.data.cut_summary import SummaryCounter
from k2ssl.data.cuts import cut_line

_UNKNOWN_LENGTH = 1 << 62  # libsndfile gives 2^63 - 1 where the header holds no length (FLAC from a pipe)
_BLOCK = 1 << 18  # samples per channel that are decoded at a time


@dataclass(frozen=True)
class AudioItem:
    """An audio file to become a cut.

    Fields:
        id: of the cut and the recording; with segments, `_0`, `_1`, ... are appended.
        path: of the audio file.
        text: transcript; None if there is none, "" if it is empty. Only white space around it is removed.
        text_path: file with the transcript, read instead of `text`.
        segments_path: JSON file with `voice_activity: [[start, end], ...]` in seconds, and perhaps `speaker`; each segment becomes a cut.
    """

    id: str
    path: str
    text: str | None = None
    speaker: str | None = None
    text_path: str | None = None
    segments_path: str | None = None


@dataclass(frozen=True)
class Unreadable:
    """A file that gives no cut, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class ScanSettings:
    """How files become cuts.

    Fields:
        min_duration, max_duration: in seconds; cuts outside are left out and counted. None is no limit.
        sampling_rate: in Hz; audio at another rate is resampled by lhotse when it is loaded.
        channel: the channel taken of files with several; files with one channel give that one.
        language: written into every supervision.
        verify: decode every file to its end instead of reading only its header.
    """

    min_duration: float = 0.0
    max_duration: float | None = None
    sampling_rate: int = 16000
    channel: int = 0
    language: str | None = None
    verify: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.min_duration < math.inf:
            raise ValueError(f"min_duration is {self.min_duration} s, it must be 0 or more")
        if self.max_duration is not None and not self.max_duration >= max(self.min_duration, 1e-6):
            raise ValueError(
                f"max_duration is {self.max_duration} s, it must be more than 0 and at least min_duration ({self.min_duration} s)"
            )
        if self.sampling_rate <= 0:
            raise ValueError(f"sampling_rate is {self.sampling_rate} Hz, it must be positive")
        if self.channel < 0:
            raise ValueError(f"channel is {self.channel}, channels are counted from 0")


@dataclass
class ScanReport:
    """What came of some files; reports of parts can be stored and added up."""

    files: int = 0
    counter: SummaryCounter = field(default_factory=SummaryCounter)
    too_short: int = 0  # cuts
    too_short_seconds: float = 0.0
    too_long: int = 0
    too_long_seconds: float = 0.0
    rates: Counter[str] = field(default_factory=Counter)  # sampling rate in Hz -> files
    channels: Counter[str] = field(default_factory=Counter)  # channels -> files
    unreadable: list[Unreadable] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            **{name: getattr(self, name) for name in _SUMS},
            "counter": self.counter.to_dict(),
            "rates": dict(self.rates),
            "channels": dict(self.channels),
            "unreadable": [[entry.path, entry.reason] for entry in self.unreadable],
        }

    def merge(self, stored: dict[str, Any]) -> None:
        """Add what `to_dict` gave, except the list of unreadable files, which may be long."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + stored[name])
        self.counter.merge(stored["counter"])
        self.rates.update(stored["rates"])
        self.channels.update(stored["channels"])


_SUMS = ("files", "too_short", "too_short_seconds", "too_long", "too_long_seconds")


def scan(items: Iterable[AudioItem | Unreadable], settings: ScanSettings) -> tuple[list[bytes], ScanReport]:
    """Read the headers of some files: lines for a manifest of cuts, and what is to be said about the files."""
    report = ScanReport()
    lines = []
    with audio_backend("LibsndfileBackend"):  # the one that lhotse tries first; the others would only make slow, long refusals
        for item in items:
            report.files += 1
            if isinstance(item, Unreadable):
                report.unreadable.append(item)
                continue
            try:
                lines += [cut_line(cut) for cut in _cuts_of(item, settings, report)]
            except ValueError as error:  # ours
                report.unreadable.append(Unreadable(item.path, str(error)))
            except (OSError, soundfile.SoundFileError) as error:
                report.unreadable.append(Unreadable(item.path, why_unreadable(error, item.path)))
    return lines, report


def _cuts_of(item: AudioItem, settings: ScanSettings, report: ScanReport) -> list[MonoCut]:
    """The cuts of one file, counted in `report`; ValueError, OSError or SoundFileError if it cannot be used."""
    if not item.path.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in item.path):
        raise ValueError("its path is not UTF-8, which a manifest must be")
    original = _open_recording(item, settings.verify)
    if original.num_channels > 1 and settings.channel >= original.num_channels:
        raise ValueError(f"has {original.num_channels} channels, number {settings.channel} (from 0) was asked for")
    recording = original.resample(settings.sampling_rate)
    if recording.num_samples == 0:
        raise ValueError(f"has {original.num_samples} samples at {original.sampling_rate} Hz, none at {settings.sampling_rate} Hz")
    channel = 0 if recording.num_channels == 1 else settings.channel
    cut = MonoCut(id=item.id, start=0.0, duration=recording.duration, channel=channel, recording=recording)
    cuts = _segments_of(item, cut, settings, report) if item.segments_path else [_with_supervision(item, cut, settings)]
    report.rates[str(original.sampling_rate)] += 1
    report.channels[str(original.num_channels)] += 1
    return [cut for cut in cuts if _is_kept(cut, settings, report)]


def _open_recording(item: AudioItem, verify: bool) -> Recording:
    recording = Recording.from_file(item.path, recording_id=item.id)
    if recording.num_samples >= _UNKNOWN_LENGTH:
        raise ValueError("its header does not tell its length, without which it cannot be loaded; encode it again")
    if verify and (decoded := _count_samples(item.path)) != recording.num_samples:
        raise ValueError(f"its header promises {recording.num_samples} samples, {decoded} can be decoded")
    if recording.num_samples <= 0:
        raise ValueError("has no samples")
    return recording


def _count_samples(path: str) -> int:
    """Decode a file to its end."""
    count = 0
    with soundfile.SoundFile(path) as file:
        try:
            while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
                if not np.isfinite(block).all():
                    raise ValueError(f"has samples that are not finite numbers after sample {count}")
                count += len(block)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"cannot be decoded to its end: {error.error_string}") from error
    return count


def _with_supervision(item: AudioItem, cut: MonoCut, settings: ScanSettings) -> MonoCut:
    text = item.text if item.text_path is None else _read_text(item.text_path)
    cut.supervisions = [
        SupervisionSegment(
            id=item.id,
            recording_id=item.id,
            start=0.0,
            duration=cut.duration,
            channel=cut.channel,
            text=None if text is None else text.strip(),
            language=settings.language,
            speaker=item.speaker,
        )
    ]
    return cut


def _segments_of(item: AudioItem, cut: MonoCut, settings: ScanSettings, report: ScanReport) -> list[MonoCut]:
    """A cut for each segment with speech; segments beyond the end of the audio are cut off there, those that hold none are listed."""
    speaker, segments = _read_segments(Path(str(item.segments_path)))
    supervisions = []
    for number, (start, end) in enumerate(segments):
        last = min(end, cut.duration)
        duration = add_durations(last, -start, sampling_rate=cut.sampling_rate) if 0 <= start < last else 0.0  # whole samples, perhaps none
        if duration <= 0:
            reason = f"segment {number}, {start} s to {end} s, holds nothing of the {cut.duration:.3f} s of audio"
            report.unreadable.append(Unreadable(item.path, reason))
            continue
        supervisions.append(
            SupervisionSegment(
                id=f"{item.id}_{number}",
                recording_id=item.id,
                start=start,
                duration=duration,
                channel=cut.channel,
                language=settings.language,
                speaker=item.speaker if speaker is None else speaker,
            )
        )
    if not supervisions:
        raise ValueError(f"{Path(str(item.segments_path)).name} names no segment with speech")
    cut.supervisions = supervisions
    return list(cut.trim_to_supervisions(keep_overlapping=False))


def _read_segments(path: Path) -> tuple[str | None, list[tuple[float, float]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        segments = [(float(start), float(end)) for start, end in content["voice_activity"]]
        speaker = content.get("speaker")
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path.name} beside it") from error
    except KeyError as error:
        raise ValueError(f"{path.name} has no key {error}") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path.name} does not hold voice_activity as [[start, end], ...] in seconds ({error})") from error
    return None if speaker is None else str(speaker), segments


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"its transcript {Path(path).name} is not UTF-8") from error


def _is_kept(cut: MonoCut, settings: ScanSettings, report: ScanReport) -> bool:
    if cut.duration < settings.min_duration:
        report.too_short += 1
        report.too_short_seconds += cut.duration
        return False
    if settings.max_duration is not None and cut.duration > settings.max_duration:
        report.too_long += 1
        report.too_long_seconds += cut.duration
        return False
    report.counter.add(cut)
    return True
