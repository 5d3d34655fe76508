"""Transcripts to token ids and back: pieces of words by SentencePiece, or letters; and the text normalisation that belongs to them.

Blank is 0 and the unknown symbol 1 in every tokenizer. A tokenizer is stored as plain values with the normalisation it was trained with, in
a file of its own or inside a checkpoint; its hash tells whether two of them give the same ids.

Source of the pieces: arXiv 1508.07909 (bpe), arXiv 1804.10959 (unigram). Upstream: train_bpe_model.py, prepare_char.py.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from k2ssl.atomic_file import save_atomically
from k2ssl.structure import from_dict, to_dict

FORMAT = "k2ssl-tokenizer"
VERSION = 1

SPACE_IN_PIECES = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's own mark
SPACE_IN_LETTERS = "|"
BLANK_SYMBOL, UNK_SYMBOL = "<blk>", "<unk>"
_CASES: dict[str, Callable[[str], str]] = {"none": str, "upper": str.upper, "lower": str.lower}

Kind = Literal["bpe", "unigram", "letters"]
Unknown = Literal["refuse", "mark"]


@dataclass(frozen=True)
class NormalizationConfig:
    """What is done to a transcript before it is cut into tokens; Unicode is composed (NFC) and white space squeezed in any case.

    Attributes:
        case: none leaves it, upper and lower change it.
        allowed: the characters that a transcript may hold beside the space, as one string, in the case that results; none allows all.
        others: what becomes of characters that are not allowed. space puts a space in their place. refuse leaves them, outside of every
            vocabulary: training on them is refused, and encoding them is refused or gives the unknown symbol, as the caller asks.
    """

    case: Literal["none", "upper", "lower"] = "none"
    allowed: str = ""
    others: Literal["refuse", "space"] = "refuse"

    def __post_init__(self) -> None:
        if self.case not in _CASES or self.others not in ("refuse", "space"):
            raise ValueError(
                f"NormalizationConfig: case is {self.case!r}, allowed are none, upper, lower; others is {self.others!r}, allowed are "
                "refuse, space"
            )
        if self.others == "space" and not self.allowed:
            raise ValueError("NormalizationConfig: others is 'space', which takes a list of characters in allowed; it is empty")
        for character in self.allowed:
            if self.allowed.count(character) > 1:
                raise ValueError(f"NormalizationConfig: allowed holds {character!r} twice, once is needed")
            changed = " ".join(unicodedata.normalize("NFC", _CASES[self.case](character)).split())
            if changed != character:
                raise ValueError(
                    f"NormalizationConfig: allowed holds {character!r}, which no transcript holds after normalisation (case is {self.case!r})"
                )

    def __call__(self, text: str) -> str:
        """The normalised text: words separated by single spaces, none at the ends; empty if nothing is left."""
        text = unicodedata.normalize("NFC", _CASES[self.case](text))
        if self.others == "space":
            text = "".join(character if character in self.allowed else " " for character in text)
        return " ".join(text.split())


class Tokenizer(ABC):
    """What all tokenizers share. Symbols outside the vocabulary are refused by name or become `unk`, as the caller asks.

    Args:
        symbols: the text of every id.
        alphabet: the characters that texts may be made of, without the space.
        delimiter: stands for a space in `symbols`.
        normalization: done to every text first.

    Attributes:
        kind: "bpe", "unigram" or "letters".
        blank, unk: ids, 0 and 1; no text holds `blank`.
    """

    blank = 0
    unk = 1

    def __init__(self, kind: Kind, symbols: Sequence[str], alphabet: Iterable[str], delimiter: str, normalization: NormalizationConfig):
        self.kind = kind
        self.symbols = tuple(symbols)
        self.alphabet = frozenset(alphabet)
        self.delimiter = delimiter
        self.normalization = normalization

    @property
    def vocab_size(self) -> int:
        """Number of ids, blank and the unknown symbol included."""
        return len(self.symbols)

    @property
    def sha256(self) -> str:
        """Two tokenizers with the same hash give the same ids and the same texts."""
        model = self._model()
        header = [FORMAT, VERSION, self.kind, to_dict(self.normalization), "" if isinstance(model, Tensor) else model]
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        digest.update(model.numpy().tobytes() if isinstance(model, Tensor) else b"")
        return digest.hexdigest()

    def outside(self, text: str) -> str:
        """The characters of a text, normalised, that no symbol has; each as often as it occurs, in order."""
        return "".join(c for c in self.normalization(text) if c != " " and c not in self.alphabet)

    def encode(self, text: str, unknown: Unknown = "refuse") -> list[int]:
        """Token ids of a transcript, which is normalised first.

        Args:
            text: at least one character must be left of it.
            unknown: what to do with characters that no symbol has: "refuse", or "mark" them with `unk` (of several in a row, pieces make
                one). `outside` counts them.

        Raises:
            ValueError: an empty transcript, or characters that are refused.
        """
        if unknown not in ("refuse", "mark"):
            raise ValueError(f"encode: unknown is {unknown!r}, allowed are 'refuse', 'mark'")
        normalized = self.normalization(text)
        if not normalized:
            raise ValueError(f"the transcript {shortened(text)} is empty" + (" after normalisation" if text.strip() else ""))
        if unknown == "refuse" and (outside := self.outside(text)):
            named = ", ".join(repr(character) for character in sorted(set(outside))[:10])
            raise ValueError(f"the transcript {shortened(normalized)} holds {named}, which the {self.kind} vocabulary does not have")
        return self._encode(normalized)

    def encode_batch(self, texts: Sequence[str], ids: Sequence[str], unknown: Unknown = "refuse") -> tuple[Tensor, Tensor]:
        """Targets of a batch: (N, U) int64 with blank at padding, and (N,) int64 lengths, both on the CPU.

        Args:
            texts: N >= 1 transcripts.
            ids: their utterances, for messages.
            unknown: as for `encode`.

        Raises:
            ValueError: as `encode`; names the utterance.
        """
        rows = []
        for name, text in zip(ids, texts, strict=True):
            try:
                rows.append(torch.tensor(self.encode(text, unknown)))
            except ValueError as error:
                raise ValueError(f"utterance {name!r}: {error}") from error
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.blank), torch.tensor([len(row) for row in rows])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, words separated by single spaces; the inverse of `encode` for normalised texts without unknown symbols.

        Raises:
            ValueError: an id that is blank or outside the vocabulary.
        """
        return " ".join("".join(self._spelled(ids)).split())

    def word_numbers(self, ids: Iterable[int]) -> list[int]:
        """For each token id the number of the word of `decode(ids)` that it is part of, from 0 on; -1 for one of nothing but a delimiter.

        A piece that spans words, which `k2ssl.bin.train_tokenizer` makes none of, counts to the first of them.

        Raises:
            ValueError: an id that is blank or outside the vocabulary.
        """
        numbers, begun, inside = [], 0, False  # words begun so far; whether the last one goes on
        for text in self._spelled(ids):
            joins = inside and text[0] != " "
            words = len(text.split())
            numbers.append(begun - joins if words else -1)
            begun += words - joins
            inside = text[-1] != " "
        return numbers

    def _spelled(self, ids: Iterable[int]) -> list[str]:
        symbols = []
        for token in ids:
            if not self.blank < token < self.vocab_size:
                raise ValueError(f"decode: token id {token}, allowed are 1..{self.vocab_size - 1}")
            symbols.append(self.symbols[token].replace(self.delimiter, " "))
        return symbols

    def to_dict(self) -> dict[str, Any]:
        """Plain values and at most one uint8 tensor: what `tokenizer_from_dict` reads, and what a checkpoint may hold."""
        plain = {"format": FORMAT, "version": VERSION, "kind": self.kind, "normalization": to_dict(self.normalization)}
        return {**plain, "model": self._model(), "sha256": self.sha256}

    def save(self, path: str | Path) -> None:
        """Write `to_dict` to a file, which appears under its name only when it is whole.

        Raises:
            OSError: the folder does not exist or cannot be written to.
        """
        save_atomically(path, self.to_dict())

    @abstractmethod
    def _encode(self, normalized: str) -> list[int]:
        """Ids of a text that is not empty; characters outside the alphabet become `unk`."""

    @abstractmethod
    def _model(self) -> Tensor | str:
        """What, beside kind and normalisation, makes this tokenizer."""


class PieceTokenizer(Tokenizer):
    """Pieces of words.

    Args:
        kind: "bpe" or "unigram".
        model: (bytes,) uint8, the SentencePiece model as it serialises itself.
        normalization: done to every text first; SentencePiece's own is to be switched off in the model.

    Raises:
        ValueError: not such a model, or one whose first symbols are not blank and the unknown one.
    """

    def __init__(self, kind: Literal["bpe", "unigram"], model: Tensor, normalization: NormalizationConfig) -> None:
        import sentencepiece

        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model.numpy().tobytes())
        except RuntimeError as error:
            raise ValueError(f"PieceTokenizer: the model is none that SentencePiece can read: {error}") from error
        symbols = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
        if symbols[:2] != [BLANK_SYMBOL, UNK_SYMBOL] or not processor.is_control(0):
            raise ValueError(f"PieceTokenizer: the first symbols are {symbols[:2]}, {BLANK_SYMBOL} and {UNK_SYMBOL} are needed")
        alphabet = {symbol for symbol in symbols if len(symbol) == 1} - {SPACE_IN_PIECES}
        super().__init__(kind, symbols, alphabet, SPACE_IN_PIECES, normalization)
        self._processor = processor
        self._proto = model.clone()

    def _encode(self, normalized: str) -> list[int]:
        # taken for a space otherwise
        return self._processor.encode(normalized.replace(SPACE_IN_PIECES, "\N{REPLACEMENT CHARACTER}"))

    def _model(self) -> Tensor:
        return self._proto


class LetterTokenizer(Tokenizer):
    """Letters, with "|" between words.

    Args:
        letters: at least one; they get the ids from 3 on.
        normalization: done to every text first.

    Raises:
        ValueError: no letters, one twice, or one that is a space or "|".
    """

    def __init__(self, letters: str, normalization: NormalizationConfig) -> None:
        wrong = [c for c in letters if c.isspace() or c == SPACE_IN_LETTERS or letters.count(c) > 1]
        if wrong or not letters:
            raise ValueError(
                f"LetterTokenizer: letters are {letters!r}; different ones are needed, none of them a space or {SPACE_IN_LETTERS!r}"
            )
        super().__init__("letters", (BLANK_SYMBOL, UNK_SYMBOL, SPACE_IN_LETTERS, *letters), letters, SPACE_IN_LETTERS, normalization)
        self._ids = {" ": 2, **{letter: i for i, letter in enumerate(letters, start=3)}}

    def _encode(self, normalized: str) -> list[int]:
        return [self._ids.get(character, self.unk) for character in normalized]

    def _model(self) -> str:
        return "".join(self.symbols[3:])


def tokenizer_from_dict(content: Mapping[str, Any], source: str = "tokenizer") -> Tokenizer:
    """The inverse of `Tokenizer.to_dict`.

    Args:
        content: plain values and a tensor.
        source: where they are from, for messages.

    Raises:
        ValueError: not a tokenizer, of a later version, or altered.
    """
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        found = f"format {content.get('format')!r}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(f"{source}: a {FORMAT} is needed, this is {found}")
    if content.get("version") != VERSION:
        raise ValueError(f"{source}: version is {content.get('version')!r}, this release reads version {VERSION}")
    if missing := [key for key in ("kind", "normalization", "model", "sha256") if key not in content]:
        raise ValueError(f"{source}: lacks {', '.join(missing)}")
    kind, model = content["kind"], content["model"]
    normalization = from_dict(NormalizationConfig, content["normalization"], f"{source}: normalization")
    tokenizer: Tokenizer
    if kind == "letters" and isinstance(model, str):
        tokenizer = LetterTokenizer(model, normalization)
    elif kind in ("bpe", "unigram") and isinstance(model, Tensor) and model.dtype == torch.uint8:
        tokenizer = PieceTokenizer(kind, model, normalization)
    else:
        raise ValueError(f"{source}: kind is {kind!r} with a model of type {type(model).__name__}, allowed are bpe, unigram, letters")
    if tokenizer.sha256 != content["sha256"]:
        raise ValueError(f"{source}: has sha256 {tokenizer.sha256}, but says {content['sha256']}: it was altered")
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read what `Tokenizer.save` wrote.

    Raises:
        ValueError: the file cannot be read or is not a tokenizer; see `tokenizer_from_dict`.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises depends on the file's first bytes
        raise ValueError(f"{path}: a {FORMAT} file is needed, this one cannot be read as one") from error
    return tokenizer_from_dict(content, str(path))


def shortened(text: str) -> str:
    """A transcript as messages quote it."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
