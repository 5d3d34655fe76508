"""Samples of a cut: read from any sample on, at one rate, one channel, into memory that the caller owns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import soundfile
import torch
from lhotse.cut import Cut, MonoCut
from lhotse.cut.data import DataCut
from lhotse.utils import compute_num_samples
from torch import Tensor

# Formats whose length is known to the sample and in which libsndfile seeks cheaply; everything else is read by lhotse.
_SEEKABLE = (".flac", ".wav")
# libsndfile 1.2 of a file named .mp3 in which there is no MPEG audio, such as a text; of one with any other name it says the second
_SAID_OF_TEXT = "File does not exist or is not a regular file (possibly a pipe?)."
_SAID_OF_OTHERS = "Format not recognised."
_EPS = 1e-5  # added to the variance, as the published models do


class AudioError(ValueError):
    """The audio of one cut cannot be read.

    Attributes:
        cut_id: whose.
        reason: one line.
    """

    def __init__(self, cut_id: str, reason: str) -> None:
        super().__init__(f"cut {cut_id}: {reason}")
        self.cut_id = cut_id
        self.reason = reason


def num_samples(cut: Cut, sample_rate: int) -> int:
    """Samples of the whole cut at `sample_rate`."""
    return compute_num_samples(cut.duration, sample_rate)


def read_samples(cut: Cut, start: int, out: np.ndarray) -> None:
    """Fill `out` with the samples of a cut from `start` on.

    Args:
        cut: of one channel, at its own sampling rate.
        start: first sample, counted from the start of the cut.
        out: (S,) float32, contiguous; as many samples as it has room for are read.

    Raises:
        AudioError: the file is missing, damaged, shorter than the manifest says, of another rate, or holds values that are not finite.
    """
    try:
        if _is_plain_file(cut):
            _read_file(cut, start, out)
        else:
            _read_any(cut, start, out)
    except AudioError:
        raise
    except Exception as error:  # libsndfile, ffmpeg, the file system and lhotse each have their own
        raise AudioError(cut.id, _absent(cut) or why_unreadable(error)) from error


def read_utterance(cut: Cut, normalize: bool) -> np.ndarray:
    """All samples of a cut, (S,) float32; with `normalize` at zero mean and unit variance (of 1e-5 + variance)."""
    out = np.empty(num_samples(cut, cut.sampling_rate), dtype=np.float32)
    read_samples(cut, 0, out)
    return normalized(out) if normalize else out


def normalized(audio: np.ndarray) -> np.ndarray:
    """(S,) at zero mean and unit variance. Upstream: do_normalize."""
    mean = audio.mean(dtype=np.float64)
    centred = audio - np.float32(mean)
    variance = np.square(centred, dtype=np.float32).mean(dtype=np.float64)
    centred *= np.float32(1.0 / np.sqrt(variance + _EPS))
    return centred


def read_padded(cuts: Iterable[Cut], normalize: bool = False) -> tuple[Tensor, Tensor, list[Cut], list[AudioError]]:
    """Whole cuts, zero-padded at the end.

    Returns:
        (N, S) float32; (N,) int64 sample counts; the N cuts that could be read; and why the others could not.
    """
    read: list[tuple[Cut, np.ndarray]] = []
    failures: list[AudioError] = []
    for cut in cuts:
        try:
            read.append((cut, read_utterance(cut, normalize)))
        except AudioError as error:
            failures.append(error)
    lens = [len(samples) for _, samples in read]
    audio = torch.zeros(len(read), max(lens, default=0))
    for row, (_, samples) in zip(audio, read, strict=True):
        row[: len(samples)] = torch.from_numpy(samples)
    return audio, torch.tensor(lens, dtype=torch.int64), [cut for cut, _ in read], failures


def _is_plain_file(cut: Cut) -> bool:
    """Whether the cut is a stretch of one mono file, without resampling or any other change."""
    if not isinstance(cut, MonoCut) or cut.recording is None:
        return False
    recording = cut.recording
    if recording.transforms or len(recording.sources) != 1 or recording.has_video:
        return False
    source = recording.sources[0]
    return source.type == "file" and len(source.channels) == 1 and source.source.endswith(_SEEKABLE)


def _read_file(cut: MonoCut, start: int, out: np.ndarray) -> None:
    path, rate = cut.recording.sources[0].source, cut.sampling_rate
    with soundfile.SoundFile(path) as file:
        if file.samplerate != rate or file.channels != 1:
            raise AudioError(cut.id, f"{path} has {file.channels} channels at {file.samplerate} Hz, the manifest says 1 at {rate}")
        first = start + compute_num_samples(cut.start, rate) if cut.start else start
        if first + len(out) == file.frames + 1 and first > start:
            first -= 1  # the cut starts and ends on half a sample, and both were rounded up
        if first + len(out) > file.frames:
            raise AudioError(cut.id, f"{path} ends at sample {file.frames}, samples {first} to {first + len(out)} are asked for")
        if first:
            file.seek(first)
        read = len(file.read(dtype="float32", out=out))
        if read != len(out):
            raise AudioError(cut.id, f"{path} is damaged: {read} of {len(out)} samples from {first} on could be read")
        if file.subtype in ("FLOAT", "DOUBLE"):
            _check_finite(cut.id, out)


def _read_any(cut: Cut, start: int, out: np.ndarray) -> None:
    rate, wanted = cut.sampling_rate, len(out)
    if start or wanted != num_samples(cut, rate):
        cut = cut.truncate(offset=start / rate, duration=wanted / rate, preserve_id=True)
    with _one_thread():
        samples = cut.load_audio()
    # lhotse gives what the duration rounds to; resampling may round the other way
    if samples is None or samples.shape[0] != 1 or abs(samples.shape[1] - wanted) > 1:
        shape = None if samples is None else samples.shape
        raise AudioError(cut.id, f"gives {shape} channels and samples, (1, {wanted}) are asked for")
    out[: samples.shape[1]] = samples[0, :wanted]
    out[samples.shape[1] :] = 0.0
    _check_finite(cut.id, out)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in a loader's worker: resampling (other rates, other speeds) sums in another order with more threads, and the last bits differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_finite(cut_id: str, samples: np.ndarray) -> None:
    if not np.isfinite(samples).all():
        raise AudioError(cut_id, "holds samples that are not finite numbers")


def why_unreadable(error: Exception, path: str | None = None) -> str:
    """One line of what a library said about a file; of lhotse's list of all that it tried, the first, which is libsndfile's.

    Where `path` is given the line does not name it, and the file is looked at: libsndfile says little of one that is absent or empty.
    """
    if path is not None and (plain := _why_not_opened(path)):
        return plain
    lines = str(error).strip().splitlines()
    tried = next((line for line in lines if line.startswith("Exception #0 ")), "").rpartition(">: ")[2]
    said = tried or f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    said = said.replace(_SAID_OF_TEXT, _SAID_OF_OTHERS)
    return said if path is None else said.rpartition(f"Error opening {path!r}: ")[2]


def _absent(cut: Cut) -> str:
    """Which file of the cut's recording has nothing to read, and why; empty if there is none. libsndfile says "System error" of it."""
    sources = cut.recording.sources if isinstance(cut, DataCut) and cut.recording is not None else ()
    wrong = ((source.source, _why_not_opened(source.source)) for source in sources if source.type == "file")
    return next((f"Error opening {path!r}: {why}" for path, why in wrong if why), "")


def _why_not_opened(path: str) -> str:
    """What is wrong with a file that has not a single byte to give, else nothing."""
    try:
        with open(path, "rb") as file:
            return "" if file.read(1) else "empty file (0 bytes)"
    except OSError as error:
        return error.strerror or str(error)
