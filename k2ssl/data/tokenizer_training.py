"""Learning the vocabulary of a tokenizer from transcripts."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from k2ssl.data.tokenizer import (
    BLANK_SYMBOL,
    SPACE_IN_LETTERS,
    SPACE_IN_PIECES,
    UNK_SYMBOL,
    Kind,
    LetterTokenizer,
    NormalizationConfig,
    PieceTokenizer,
    Tokenizer,
    shortened,
)

_NUM_PIECES = 500
_MOST_BYTES = 2**30  # of a transcript; SentencePiece takes no larger limit


@dataclass(frozen=True)
class TokenizerConfig:
    """How a tokenizer is trained.

    Attributes:
        kind: bpe or unigram pieces, or letters.
        vocab_size: number of symbols, blank and the unknown one included; none: 500 pieces. Letters are what the text holds, or all that
            normalization.allowed names, and take no size.
        character_coverage: share of the text's characters that pieces are made of, for scripts of thousands of characters; the rarest
            are left out, and unknown.
        normalization: of the text.
    """

    kind: Kind = "bpe"
    vocab_size: int | None = None
    character_coverage: float = 1.0
    normalization: NormalizationConfig = field(default_factory=NormalizationConfig)

    def __post_init__(self) -> None:
        if self.kind not in ("bpe", "unigram", "letters"):
            raise ValueError(f"TokenizerConfig: kind is {self.kind!r}, allowed are bpe, unigram, letters")
        if not 0.9 <= self.character_coverage <= 1:
            raise ValueError(f"TokenizerConfig: character_coverage is {self.character_coverage}, allowed is a share from 0.9 to 1")
        if self.kind == "letters" and (self.vocab_size is not None or self.character_coverage != 1):
            raise ValueError("TokenizerConfig: kind is 'letters', which takes neither vocab_size nor character_coverage")
        if self.vocab_size is not None and self.vocab_size < 4:
            raise ValueError(f"TokenizerConfig: vocab_size is {self.vocab_size}, at least 4 is needed")
        if self.delimiter in self.normalization.allowed:
            raise ValueError(f"TokenizerConfig: normalization.allowed holds {self.delimiter!r}, which stands for the space in {self.kind}")

    @property
    def delimiter(self) -> str:
        """What stands for the space, and may be in no transcript."""
        return SPACE_IN_LETTERS if self.kind == "letters" else SPACE_IN_PIECES


def train_tokenizer(texts: Iterable[tuple[str, str]], config: TokenizerConfig) -> Tokenizer:
    """Learn a vocabulary; the same texts in the same order give the same tokenizer.

    Args:
        texts: utterance ids, for messages, and transcripts, which are normalised here.
        config: what kind.

    Raises:
        ValueError: no text; a transcript that is empty or holds what is not allowed, named by its utterance; a vocabulary size that
            the text does not allow.
    """
    lines = list(_checked_lines(texts, config))
    if not lines:
        raise ValueError("train_tokenizer: no transcripts, at least one is needed")
    if config.kind == "letters":
        letters = {character for line in lines for character in line} | set(config.normalization.allowed)
        return LetterTokenizer("".join(sorted(letters - {" "})), config.normalization)
    return PieceTokenizer(config.kind, _train_pieces(lines, config), config.normalization)


def _checked_lines(texts: Iterable[tuple[str, str]], config: TokenizerConfig) -> Iterator[str]:
    """Normalised texts."""
    normalization = config.normalization
    for name, text in texts:
        line = normalization(text)
        if not line:
            raise ValueError(f"utterance {name!r}: the transcript {shortened(text)} is empty")
        refused = set(line) & {config.delimiter}
        if config.kind != "letters":  # SentencePiece would leave these out without a word, and the last one the whole line
            refused |= {symbol for symbol in (BLANK_SYMBOL, UNK_SYMBOL, "\0", "\u2585") if symbol in line}
        refused |= {character for character in line if "\ud800" <= character <= "\udfff"}  # no text in Unicode
        if normalization.allowed:
            refused |= set(line) - set(normalization.allowed) - {" "}
        if refused:
            named = ", ".join(map(repr, sorted(refused)[:10]))
            allowed = repr(normalization.allowed) if normalization.allowed else f"all but {config.delimiter!r}"
            raise ValueError(f"utterance {name!r}: the transcript {shortened(line)} holds {named}; allowed are {allowed}")
        yield line


def _train_pieces(lines: list[str], config: TokenizerConfig) -> Tensor:
    """(bytes,) uint8, the serialised SentencePiece model."""
    import sentencepiece

    serialised = io.BytesIO()
    vocab_size = config.vocab_size or _NUM_PIECES
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=serialised,
            model_type=config.kind,
            vocab_size=vocab_size,
            character_coverage=config.character_coverage,
            required_chars=config.normalization.allowed,
            normalization_rule_name="identity",
            max_sentence_length=_MOST_BYTES,  # longer transcripts would be dropped
            # as padding, blank is a symbol that no text can spell
            pad_id=Tokenizer.blank,
            pad_piece=BLANK_SYMBOL,
            unk_id=Tokenizer.unk,
            unk_piece=UNK_SYMBOL,
            bos_id=-1,
            eos_id=-1,
            num_threads=1,  # is part of the model, and the sums of unigram depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or str(error)
        raise ValueError(f"TokenizerConfig: vocab_size is {vocab_size}, which SentencePiece cannot make of this text: {reason}") from error
    return torch.frombuffer(bytearray(serialised.getvalue()), dtype=torch.uint8)
