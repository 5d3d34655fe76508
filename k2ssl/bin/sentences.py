"""Text for language models: sentences of text files and of the transcripts of cuts, as words or as the tokens of a tokenizer."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from k2ssl.bin.train_tokenizer import transcripts
from k2ssl.data.tokenizer import NormalizationConfig, Tokenizer


@dataclass
class Sentences:
    """The sentences of files one after the other, read each time they are iterated over; empty ones are left out.

    Attributes:
        text: files with a sentence a line, UTF-8, compressed if the name ends in .gz.
        cuts: manifests, whose transcripts are taken.
        normalization: done to sentences whose words are taken.
        tokenizer: cuts them into tokens, by its own normalisation; None: words.
        unknown: characters that the tokenizer does not have, counted in the last pass.
    """

    text: tuple[str, ...]
    cuts: tuple[str, ...]
    normalization: NormalizationConfig = field(default_factory=NormalizationConfig)
    tokenizer: Tokenizer | None = None
    unknown: int = 0

    def __iter__(self) -> Iterator[list[str]]:
        """Raises ValueError where a file is damaged or a sentence holds a word that marks its ends; names file and line, or cut."""
        self.unknown = 0
        for path in self.text:
            for number, line in enumerate(_lines(path), start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line  # a mark of the encoding
                if sentence := self._cut_up(line, f"{path}, line {number:,}"):
                    yield sentence
        for path in self.cuts:
            for name, text in transcripts(path, self._normalization):
                if sentence := self._cut_up(text, f"{path}, cut {name!r}"):
                    yield sentence

    @property
    def _normalization(self) -> NormalizationConfig:
        return self.normalization if self.tokenizer is None else self.tokenizer.normalization

    def _cut_up(self, line: str | bytes, place: str) -> list[str]:
        try:
            text = line if isinstance(line, str) else line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: text must be UTF-8: {error}") from error
        if self.tokenizer is not None:
            if not self.tokenizer.normalization(text):
                return []
            self.unknown += len(self.tokenizer.outside(text))
            return [self.tokenizer.symbols[token] for token in self.tokenizer.encode(text, "mark")]
        # in capitals too it is the word that stands for all that are unknown, see `NgramLm`
        words = ["<unk>" if word == "<UNK>" else word for word in self.normalization(text).split()]
        for mark in ("<s>", "</s>"):
            if mark in words:
                raise ValueError(f"{place}: holds the word {mark}, which marks a sentence's end and is put there by itself; remove it")
        return words


def _lines(path: str) -> Iterator[bytes]:
    try:
        with gzip.open(path) if Path(path).suffix == ".gz" else open(path, "rb") as file:
            yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: the compressed file is damaged or cut off: {error}") from error
