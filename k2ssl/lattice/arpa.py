"""Back-off n-gram models as ARPA files hold them; needs nothing but the standard library.

Format: the SRI language modelling toolkit's `ngram-format`. Logarithms are decimal in the file, natural here.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

START, END = "<s>", "</s>"
UNKNOWN = ("<unk>", "<UNK>")

Ngram = tuple[str, ...]

_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Arpa:
    """An n-gram model.

    Attributes:
        path: where it came from, for messages.
        order: the longest n-gram's number of words.
        log_probs: log P(last word | the words before), nats, of every n-gram that is listed.
        backoffs: log of the weight that a history passes on to its shorter one, nats, where it is not 0.
    """

    path: str
    order: int
    log_probs: Mapping[Ngram, float]
    backoffs: Mapping[Ngram, float]

    @property
    def words(self) -> list[str]:
        """All words that are listed, those that begin and end a sentence and the unknown word left out."""
        return [ngram[0] for ngram in self.log_probs if len(ngram) == 1 and ngram[0] not in (START, END, *UNKNOWN)]

    def log_prob(self, sentence: Sequence[str]) -> float:
        """log P(sentence and its end), nats; -inf with a word that is not listed."""
        words = (START, *sentence, END)
        return sum(self._word_log_prob(words[max(0, end - self.order) : end]) for end in range(2, len(words) + 1))

    def _word_log_prob(self, ngram: Ngram) -> float:
        backoff = 0.0
        while ngram not in self.log_probs:
            if len(ngram) == 1:
                return -math.inf
            backoff += self.backoffs.get(ngram[:-1], 0.0)
            ngram = ngram[1:]
        return backoff + self.log_probs[ngram]


def read_arpa(path: str | Path) -> Arpa:
    """The model of an ARPA file, compressed with gzip or not; what stands before its `\\data\\` line is passed over.

    Raises:
        ValueError: no such file, or it is damaged; names the line.
    """
    reader = _Reader(str(path))
    with _opened(str(path)) as file:
        try:
            return reader.read(io.TextIOWrapper(file, encoding="utf-8"))
        except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}, behind line {reader.number:,}: cannot be read: {error}") from error


def _opened(path: str) -> BinaryIO:
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    with open(path, "rb") as file:
        compressed = file.read(len(_GZIP)) == _GZIP
    return cast(BinaryIO, gzip.open(path, "rb")) if compressed else open(path, "rb")


class _Reader:
    """Goes through the lines and knows where it is."""

    def __init__(self, path: str) -> None:
        self.path, self.number = path, 0
        self.log_probs: dict[Ngram, float] = {}
        self.backoffs: dict[Ngram, float] = {}

    def read(self, file: io.TextIOWrapper) -> Arpa:
        lines = self.stripped(file)
        if not any(line == "\\data\\" for line in lines):
            raise ValueError(f"{self.path}: no ARPA file, it has no line \\data\\")
        counts, line = self.read_counts(lines)
        for order, count in enumerate(counts, start=1):
            if line != f"\\{order}-grams:":
                raise self.error(f"\\{order}-grams: is needed here, not {line!r}")
            line = self.read_ngrams(lines, order, count, order == len(counts))
        if line != "\\end\\":
            raise self.error(f"\\end\\ is needed here, not {line!r}")
        return Arpa(self.path, len(counts), self.log_probs, self.backoffs)

    def read_counts(self, lines: Iterator[str]) -> tuple[list[int], str]:
        """How many n-grams of each order are to come, and the line behind."""
        counts: list[int] = []
        for line in lines:
            if not line.startswith("ngram"):
                break
            order, _, count = line[len("ngram") :].partition("#")[0].partition("=")
            if order.strip() != str(len(counts) + 1) or not count.strip().isdigit():
                raise self.error(f"'ngram {len(counts) + 1}=COUNT' is needed here, not {line!r}")
            counts.append(int(count))
        else:
            line = ""
        if not counts:
            raise self.error("no 'ngram 1=COUNT' behind \\data\\")
        return counts, line

    def read_ngrams(self, lines: Iterator[str], order: int, count: int, last: bool) -> str:
        """The n-grams of one order; returns the line behind."""
        read = 0
        for line in lines:
            if line.startswith("\\") and (line == "\\end\\" or line.endswith("-grams:")):
                break
            log_prob, *words = line.split()
            if len(words) not in ((order,) if last else (order, order + 1)):
                raise self.error(f"a number, {order} words{'' if last else ' and perhaps a number'} are needed, not {line!r}")
            ngram = tuple(words[:order])
            if ngram in self.log_probs:
                raise self.error(f"{' '.join(ngram)!r} is listed twice")
            self.log_probs[ngram] = self.value(log_prob, most=0.0)
            if len(words) > order and (backoff := self.value(words[order])):
                self.backoffs[ngram] = backoff
            read += 1
        else:
            raise self.error(f"the file ends among its {order}-grams")
        if read != count:
            raise self.error(f"there are {read:,} {order}-grams, {count:,} were announced")
        return line

    def value(self, text: str, most: float = math.inf) -> float:
        """A decimal logarithm as a natural one."""
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number <= most):
            raise self.error(f"{text!r} is where a logarithm{' <= 0' if most == 0 else ''} is needed")
        return number * math.log(10)

    def stripped(self, file: io.TextIOWrapper) -> Iterator[str]:
        """Lines that are not empty."""
        for self.number, line in enumerate(file, start=1):
            if line := line.strip():
                yield line

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.path}, line {self.number:,}: {message}")
