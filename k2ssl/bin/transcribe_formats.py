"""Transcripts as text, JSON, subtitles (SubRip) or word times (NIST's CTM)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from k2ssl.decode.results import Word

Format = Literal["text", "json", "srt", "ctm"]

_MOST_CHARACTERS, _MOST_SECONDS, _PAUSE = 84, 7.0, 1.0  # of a subtitle: two lines, the time a reader is given, silence that ends one


@dataclass(frozen=True)
class Transcript:
    """What is said in a recording of so many seconds."""

    audio: str
    seconds: float
    words: tuple[Word, ...]

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)


def formatted(transcript: Transcript, form: Format) -> str:
    """A transcript with the line break at its end; "" where the format has nothing to say of silence."""
    if form == "text":
        return f"{transcript.text}\n"
    if form == "json":
        words = [[word.text, word.begin, word.end] for word in transcript.words]
        content = {"audio": transcript.audio, "duration": round(transcript.seconds, 3), "text": transcript.text, "words": words}
        return json.dumps(content, ensure_ascii=False) + "\n"
    if form == "ctm":
        name = name_of(transcript.audio)
        return "".join(f"{name} 1 {word.begin:.3f} {word.end - word.begin:.3f} {word.text}\n" for word in transcript.words)
    return "".join(
        f"{number}\n{_clock(caption[0].begin)} --> {_clock(caption[-1].end)}\n{' '.join(word.text for word in caption)}\n\n"
        for number, caption in enumerate(captions(transcript.words), start=1)
    )


def name_of(audio: str) -> str:
    """What a CTM file calls a file of audio."""
    return "_".join(Path(audio).stem.split()) or "-"


def captions(words: Sequence[Word]) -> Iterator[list[Word]]:
    """The words in groups that fit a subtitle: of at most 84 characters and 7 s, and ending where there is a pause of 1 s."""
    caption: list[Word] = []
    for word in words:
        characters = sum(len(other.text) + 1 for other in caption) + len(word.text)
        if caption and (
            characters > _MOST_CHARACTERS or word.end - caption[0].begin > _MOST_SECONDS or word.begin - caption[-1].end >= _PAUSE
        ):
            yield caption
            caption = []
        caption.append(word)
    if caption:
        yield caption


def _clock(seconds: float) -> str:
    """HH:MM:SS,mmm"""
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d},{rest % 1000:03d}"
