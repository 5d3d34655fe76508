"""Back-off n-gram models as ARPA files: read, checked line by line, and written.

The format: a list of how many n-grams of each order there are, and then a section per order with lines
`log10 of the probability, the words, log10 of the back-off weight`. Source: the manual page ngram-format(5) of SRILM.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

START, END, UNKNOWN = "<s>", "</s>", "<unk>"

_COUNT = re.compile(rb"ngram\s+(\d+)\s*=\s*(\d+)$")
_LINES_AT_ONCE = 100_000


@dataclass(frozen=True)
class NgramTable:
    """The n-grams of one order, G of them.

    Attributes:
        words: (G, order) int32, each a place in `Arpa.words`.
        log_prob: (G,) float64, log10 of the probability of the last word after the others; -99 stands for 0.
        backoff: (G,) float64, log10 of the weight that lower orders get after these words; 0 where the file says nothing.
    """

    words: NDArray[np.int32]
    log_prob: NDArray[np.float64]
    backoff: NDArray[np.float64]


@dataclass(frozen=True)
class Arpa:
    """A back-off model: P(w | h) is the entry of `h w` if there is one, else the back-off weight of h (1 without entry) times P(w | h without
    its first word).

    Attributes:
        words: in the order of the 1-grams. `<s>` stands before a sentence, `</s>` ends it, `<unk>` is any word that is not listed.
        orders: n-grams of one word, of two, and so on.
    """

    words: tuple[str, ...]
    orders: tuple[NgramTable, ...]

    def text(self, order: int, row: int) -> str:
        """The words of an n-gram, for messages."""
        return " ".join(self.words[word] for word in self.orders[order - 1].words[row])


def read_arpa(path: str | Path) -> Arpa:
    """Read an ARPA file, compressed with gzip or not; what stands before its `\\data\\` line is skipped.

    Raises:
        ValueError: not such a file, cut off, or with a line that cannot be: names the line.
        OSError: there is no such file.
    """
    with open_text(path) as file:
        return _Reader(str(path), file).read()


@contextmanager
def open_text(path: str | Path) -> Iterator[BinaryIO]:
    """The bytes of a file, which may be compressed with gzip.

    Raises:
        ValueError: the compressed file is damaged; raised while it is read, too.
        OSError: there is no such file.
    """
    with open(path, "rb") as file:
        if file.peek(2)[:2] != b"\x1f\x8b":
            yield file
            return
        try:
            with gzip.open(file) as packed:
                yield cast(BinaryIO, packed)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: the compressed file is damaged or cut off: {error}") from error


def write_arpa(file: BinaryIO, model: Arpa, compress: bool = False) -> None:
    """Write an ARPA file to an open binary file, compressed with gzip if asked for; the same model gives the same bytes.

    Raises:
        OSError: the disk is full.
    """
    if compress:
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=6, mtime=0) as packed:
            _write(cast(BinaryIO, packed), model)
    else:
        _write(file, model)


class _Reader:
    """Goes through a file once. Words are kept as bytes: only ASCII white space separates them, others belong to words."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        self.path, self.file, self.line = path, file, 0
        self.ids: dict[bytes, int] = {}

    def read(self) -> Arpa:
        counts, line = self.counts()
        orders = []
        for order, count in enumerate(counts, start=1):
            if line != b"\\%d-grams:" % order:
                self.refuse(f"\\{order}-grams: is needed here, it is {_quoted(line)}")
            table, line = self.section(order, count, order == len(counts))
            orders.append(table)
        if line != b"\\end\\":
            self.refuse(f"\\end\\ is needed here, it is {_quoted(line)}")
        try:
            words = tuple(word.decode() for word in self.ids)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: words must be UTF-8: {error}") from error
        return Arpa(words, tuple(orders))

    def lines(self) -> Iterator[bytes]:
        """Lines that are not empty, without white space around."""
        for line in self.file:
            self.line += 1
            if line := line.strip():
                yield line

    def counts(self) -> tuple[list[int], bytes]:
        """How many n-grams of each order are promised, and the line after these."""
        if not any(line == b"\\data\\" for line in self.lines()):
            raise ValueError(f"{self.path}: holds no line \\data\\, it is no ARPA file")
        counts: list[int] = []
        for line in self.lines():
            match = _COUNT.match(line)
            if match is None:
                if not counts:
                    self.refuse(f"'ngram 1=...' is needed here, it is {_quoted(line)}")
                return counts, line
            order, count = int(match[1]), int(match[2])
            if order != len(counts) + 1:
                self.refuse(f"the count of {len(counts) + 1}-grams is needed here, it is {_quoted(line)}")
            counts.append(count)
        self.refuse("the file ends before its first n-gram")

    def section(self, order: int, count: int, last: bool) -> tuple[NgramTable, bytes]:
        """The n-grams of an order, and the line after them."""
        words, log_probs, backoffs = array("i"), array("d"), array("d")
        for line in self.lines():
            if line.startswith(b"\\"):
                if len(log_probs) != count:
                    self.refuse(f"{count:,} {order}-grams were promised, {len(log_probs):,} are there")
                table = np.array(words, dtype=np.int32).reshape(-1, order)
                return NgramTable(table, np.array(log_probs, dtype=np.float64), np.array(backoffs, dtype=np.float64)), line
            parts = line.split()
            if len(parts) != order + 1 and (len(parts) != order + 2 or last):
                self.refuse(f"a {order}-gram is a number, {order} words{'' if last else ' and perhaps a number'}; this is {_quoted(line)}")
            log_probs.append(self.number(parts[0], "log-probability", most=0.0))
            backoffs.append(self.number(parts[order + 1], "back-off weight") if len(parts) == order + 2 else 0.0)
            words.extend(self.known(parts[1 : order + 1]) if order > 1 else [self.new(parts[1])])
        self.refuse(f"the file ends among its {order}-grams, before \\end\\")

    def number(self, text: bytes, what: str, most: float = math.inf) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value > most:
            self.refuse(f"the {what} is {_quoted(text)}, a number{' <= 0' if most == 0 else ''} is needed")
        return value

    def new(self, word: bytes) -> int:
        if word in self.ids:
            self.refuse(f"the 1-gram {_quoted(word)} is listed twice")
        return self.ids.setdefault(word, len(self.ids))

    def known(self, words: list[bytes]) -> list[int]:
        try:
            return [self.ids[word] for word in words]
        except KeyError as error:
            self.refuse(f"the word {_quoted(error.args[0])} is not among the 1-grams")

    def refuse(self, message: str) -> NoReturn:
        raise ValueError(f"{self.path}, line {self.line:,}: {message}")


def _quoted(text: bytes) -> str:
    shown = text.decode(errors="replace")
    return repr(shown if len(shown) <= 60 else f"{shown[:57]}...")


def _write(file: BinaryIO, model: Arpa) -> None:
    file.write(b"\\data\\\n")
    for order, table in enumerate(model.orders, start=1):
        file.write(f"ngram {order}={len(table.log_prob)}\n".encode())
    for order, table in enumerate(model.orders, start=1):
        file.write(f"\n\\{order}-grams:\n".encode())
        last = order == len(model.orders)
        for start in range(0, len(table.log_prob), _LINES_AT_ONCE):
            part = slice(start, start + _LINES_AT_ONCE)
            rows = zip(table.words[part].tolist(), table.log_prob[part].tolist(), table.backoff[part].tolist(), strict=True)
            lines = (_line(model.words, *row, last) for row in rows)
            file.write("".join(lines).encode())
    file.write(b"\n\\end\\\n")


def _line(words: tuple[str, ...], ngram: list[int], log_prob: float, backoff: float, last: bool) -> str:
    text = " ".join([words[word] for word in ngram])
    no_context = last or (words[ngram[-1]] == END and not backoff)  # nothing follows
    return f"{log_prob:.8g}\t{text}\n" if no_context else f"{log_prob:.8g}\t{text}\t{backoff:.8g}\n"
