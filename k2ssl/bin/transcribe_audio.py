"""Audio files of any length: read as one channel at one rate, cut into windows that overlap, and what was heard in these put together."""

from __future__ import annotations

import io
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from k2ssl.bin.decode_methods import Recognizer
from k2ssl.bin.decode_model import TrainedModel
from k2ssl.decode.hypotheses import Hypothesis

_log = logging.getLogger(__name__)

STDIN = "-"


class AudioReader:
    """Reads whole files; what it changes is said once.

    Args:
        sample_rate: Hz, of the samples wanted.
        normalize: bring every recording to zero mean and unit variance.
    """

    def __init__(self, sample_rate: int, normalize: bool) -> None:
        self.sample_rate = sample_rate
        self.normalize = normalize
        self._said: set[str] = set()

    def read(self, path: str) -> Tensor:
        """(S,) float32 samples of a file, or of standard input for "-".

        Raises:
            ValueError: there is no such file, it is no audio that can be read, it is empty, or holds values that are not finite; names it.
        """
        from lhotse.augmentation import Resample

        samples, rate = _read(path)
        if not samples.size:
            raise ValueError(f"{path}: holds no audio")
        if not np.isfinite(samples).all():
            raise ValueError(f"{path}: holds samples that are not finite numbers")
        if len(samples) > 1:
            self._say_once("channels", f"{path} has {len(samples)} channels; of such files the mean of all channels is taken")
            samples = samples.mean(axis=0, keepdims=True)
        if rate != self.sample_rate:
            self._say_once(f"{rate} Hz", f"{path} is at {rate} Hz; such files are resampled to {self.sample_rate} Hz")
            samples = Resample(rate, self.sample_rate)(samples)
        if self.normalize:
            from k2ssl.data.audio import normalized  # brings lhotse, slow to import

            return torch.from_numpy(normalized(samples[0]))
        return torch.from_numpy(samples[0])

    def _say_once(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            _log.warning(message)


def _read(path: str) -> tuple[np.ndarray, int]:
    """(channels, samples) float32, and the rate."""
    from lhotse.audio.backend import read_audio

    if path != STDIN and not Path(path).is_file():
        raise ValueError(f"{path}: {'this is a folder, not a file' if Path(path).is_dir() else 'there is no such file'}")
    try:
        samples, rate = read_audio(io.BytesIO(sys.stdin.buffer.read()) if path == STDIN else path)
    except Exception as error:  # every library behind lhotse has its own
        from k2ssl.data.audio import why_unreadable

        raise ValueError(
            f"{'standard input' if path == STDIN else path}: is no audio that can be read ({why_unreadable(error)})"
        ) from error
    return np.atleast_2d(np.asarray(samples, dtype=np.float32)), int(rate)


@dataclass(frozen=True)
class Window:
    """A stretch of a recording, in samples; `begin_frame` is the number, in the recording, of its first frame."""

    begin: int
    end: int
    begin_frame: int


def windows(num_samples: int, window: int, overlap: int, samples_per_frame: int) -> list[Window]:
    """Stretches of `window` samples that overlap by `overlap`, rounded so that their frames are frames of the whole recording.

    A recording that is no longer than a window is one; the last may be shorter, but is longer than the overlap.
    """
    step = max(1, (window - overlap) // samples_per_frame) * samples_per_frame
    begins = range(0, max(1, num_samples - window + step), step)
    return [Window(begin, min(begin + window, num_samples), begin // samples_per_frame) for begin in begins]


def check_windows(trained: TrainedModel, window_seconds: float, overlap_seconds: float) -> None:
    """
    Raises:
        ValueError: windows too short for the model: without a frame, or with less than a frame that the window before does not have.
    """
    window, overlap = round(window_seconds * trained.sample_rate), round(overlap_seconds * trained.sample_rate)
    if not trained.has_frame(window) or window - overlap < round(trained.seconds_per_frame * trained.sample_rate):
        raise ValueError(
            f"window_seconds is {window_seconds} and overlap_seconds {overlap_seconds}; a window must give a frame, and be longer than the "
            f"overlap by one frame ({trained.seconds_per_frame:g} s)"
        )


def recognize(audio: Tensor, recognizer: Recognizer, window_seconds: float, overlap_seconds: float, batch: int) -> Hypothesis:
    """What is said in a recording; frames count from its beginning.

    Args:
        audio: (S,) samples.
        recognizer: gives the frames of its tokens.
        window_seconds, overlap_seconds: longer recordings are cut into such windows.
        batch: windows that are recognised at a time.

    Raises:
        ValueError: the model gives no numbers, as one that has diverged.
    """
    trained = recognizer.trained
    per_frame = round(trained.seconds_per_frame * trained.sample_rate)
    window, overlap = round(window_seconds * trained.sample_rate), round(overlap_seconds * trained.sample_rate)
    parts = windows(len(audio), window, overlap, per_frame)
    heard = [found for chosen in _chunks(parts, batch) for found in _recognize(audio, chosen, recognizer)]
    if math.isnan(sum(found.score for found in heard)):
        raise ValueError("the model gives nan for this audio, not log-probabilities; has its training diverged?")
    tokenizer = trained.tokenizer  # pieces hold the mark of a word themselves
    delimiter = tokenizer.symbols.index(tokenizer.delimiter) if tokenizer.kind == "letters" else None
    whole = joined(parts, heard, per_frame, delimiter, tokenizer.word_numbers)
    if whole.words is None and any(found.words for found in heard):
        _log.warning("the lexicon spells its words so that tokens do not tell where one begins: the text is what the tokens spell")
    return whole


def joined(
    parts: Sequence[Window],
    heard: Sequence[Hypothesis],
    samples_per_frame: int,
    delimiter: int | None = None,
    word_numbers: Callable[[Sequence[int]], list[int]] | None = None,
) -> Hypothesis:
    """The hypotheses of neighbouring windows as one: of each overlap the earlier window has the tokens up to a seam, the later one the others.

    The seam is laid where both are silent longest, so that no word is cut in two, but in the middle half of the overlap, since a window
    hears worse at its ends. The score is the sum of all windows.

    Args:
        parts, heard: the windows and what each of them gives.
        samples_per_frame: of the frames of `heard`.
        delimiter: the token between words, if there is one. A window need not hear it at its ends, so that one is put at a seam unless a
            window has a word go on there and none has it end.
        word_numbers: as of a tokenizer; with it, words of a lexicon are taken whole, from the window whose side of the seam they begin on, or
            from the later one if they begin after all words of the earlier one, which may not have written what its end cut off. Where the
            tokens of any window do not tell which of its words each is part of, there are no words, and tokens spell the text.
    """
    rows = None if word_numbers is None else _rows_of_words(parts, heard, word_numbers)
    in_words = rows is not None
    tokens = [_tokens(part, found) for part, found in zip(parts, heard, strict=True)]
    rows = [[_Unit((token,), token[1], token[1]) for token in row] for row in tokens] if rows is None else rows
    seams = [0.0]
    for number in range(len(parts) - 1):
        begin, end = parts[number + 1].begin_frame, parts[number].end // samples_per_frame
        quarter = (end - begin) / 4
        busy = [frame for unit in rows[number] + rows[number + 1] for frame in range(unit.begin, unit.end + 1)]
        seams.append(_seam(busy, begin + quarter, end - quarter))
    seams.append(float("inf"))
    kept: list[tuple[int, int]] = []
    words: list[str] = []
    last = -1  # frame of what is kept
    for number, row in enumerate(rows):
        units = [
            unit for unit in row if (seams[number] <= unit.begin or (in_words and unit.begin > last)) and unit.begin < seams[number + 1]
        ]
        last = units[-1].end if units else last
        own = [(token, max(frame, kept[-1][1] if kept else 0)) for unit in units for token, frame in unit.tokens]
        may_lack = kept and own and delimiter not in (kept[-1][0], own[0][0])
        if delimiter is not None and may_lack and (in_words or _ends_word(tokens[number - 1], tokens[number], seams[number], delimiter)):
            kept.append((delimiter, own[0][1]))
        kept += own
        words += [unit.word for unit in units if unit.word is not None]
    score = sum(found.score for found in heard)
    return Hypothesis(tuple(token for token, _ in kept), score, tuple(frame for _, frame in kept), tuple(words) if in_words else None)


@dataclass(frozen=True)
class _Unit:
    """What a seam does not cut: tokens with their frames; if they are a word's, that word, and delimiters behind it, which lie after `end`."""

    tokens: tuple[tuple[int, int], ...]
    begin: int
    end: int
    word: str | None = None


def _tokens(part: Window, found: Hypothesis) -> list[tuple[int, int]]:
    return [(token, part.begin_frame + frame) for token, frame in zip(found.tokens, found.frames, strict=True)]


def _rows_of_words(
    parts: Sequence[Window], heard: Sequence[Hypothesis], word_numbers: Callable[[Sequence[int]], list[int]]
) -> list[list[_Unit]] | None:
    """The words of each window; None where there are none but what tokens spell."""
    rows = []
    for part, found in zip(parts, heard, strict=True):
        words = found.words if found.words is not None or found.tokens else ()  # silence has no words in any search
        numbers = word_numbers(found.tokens)
        if words is None or len(words) != max(numbers, default=-1) + 1:
            return None
        of_word: list[list[tuple[int, int]]] = [[] for _ in words]
        ends, now = [0] * len(words), -1
        for number, token in zip(numbers, _tokens(part, found), strict=True):
            now = max(now, number)
            if now >= 0:  # a delimiter before all words says nothing
                of_word[now].append(token)
            if number >= 0:
                ends[number] = token[1]
        rows.append([_Unit(tuple(row), row[0][1], end, word) for row, end, word in zip(of_word, ends, words, strict=True)])
    return rows


def _ends_word(earlier: Sequence[tuple[int, int]], later: Sequence[tuple[int, int]], seam: float, delimiter: int) -> bool:
    """Whether neither window has a word go on at the seam, by what is not taken of it next to the seam, or one has it end there."""
    dropped = [token for token, time in earlier if time >= seam][:1] + [token for token, time in later if time < seam][-1:]
    return delimiter in dropped or not dropped


def _seam(times: Sequence[int], begin: float, end: float) -> float:
    """The middle of the longest stretch of begin..end without a token; of several, of the one that is nearest to the middle."""
    edges = [begin, *sorted(time for time in times if begin < time < end), end]
    gaps = [(right - left, -abs(left + right - begin - end), (left + right) / 2) for left, right in pairwise(edges)]
    return max(gaps)[2]


def _recognize(audio: Tensor, parts: Sequence[Window], recognizer: Recognizer) -> Iterator[Hypothesis]:
    lens = torch.tensor([part.end - part.begin for part in parts])
    rows = torch.zeros(len(parts), int(lens.max()))
    for row, part in zip(rows, parts, strict=True):
        row[: part.end - part.begin] = audio[part.begin : part.end]
    for found in recognizer.hypotheses(rows, lens):
        yield found[0]


def _chunks(parts: Sequence[Window], size: int) -> Iterator[Sequence[Window]]:
    return (parts[begin : begin + size] for begin in range(0, len(parts), size))
