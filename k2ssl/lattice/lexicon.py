"""Words and how tokens spell them; needs nothing but the standard library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_NAMED = 5  # examples in a message


@dataclass(frozen=True)
class Lexicon:
    """The words that may be recognised.

    Attributes:
        words: every word once; the id of a word is its place + 1, as 0 means "no word" in a graph.
        spellings: per spelling the id of its word and the ids of its tokens, in the order of `words`; none ends with the delimiter.
        delimiter: id of the token between words; None where tokens hold the mark of a word themselves.
    """

    words: tuple[str, ...]
    spellings: tuple[tuple[int, tuple[int, ...]], ...]
    delimiter: int | None = None

    def ids(self) -> dict[str, int]:
        """The id of every word."""
        return {word: number for number, word in enumerate(self.words, start=1)}

    def text(self, ids: Sequence[int]) -> str:
        """Words of ids, separated by spaces."""
        return " ".join(self.words[number - 1] for number in ids)

    def disambiguation(self) -> list[int]:
        """Per spelling the number of the mark that tells it from others, 0 for none.

        Spellings that several words share, or that begin a longer one, are marked 1, 2, ... so that the graph can be determinized.
        """
        beginnings = {tokens[:end] for _, tokens in self.spellings for end in range(1, len(tokens))}
        shared = Counter(tokens for _, tokens in self.spellings)
        seen: Counter[tuple[int, ...]] = Counter()
        marks = []
        for _, tokens in self.spellings:
            if shared[tokens] > 1 or tokens in beginnings:
                seen[tokens] += 1
            marks.append(seen[tokens])
        return marks


def lexicon_from_spellings(
    spellings: Mapping[str, Sequence[Sequence[str]]], symbols: Sequence[str], delimiter: str = "", source: str = "lexicon"
) -> Lexicon:
    """A lexicon of words and the symbols that spell them.

    Args:
        spellings: per word one or several sequences of symbols.
        symbols: the text of every token id; the first is blank, with which nothing is spelled.
        delimiter: the symbol between words; a spelling may end with it or not. "" where symbols hold the mark of a word.
        source: where the words came from, for messages.

    Raises:
        ValueError: no word; an empty spelling; symbols that are no tokens, counted and named.
    """
    ids = {symbol: number for number, symbol in enumerate(symbols) if number > 0}
    if delimiter and delimiter not in ids:
        raise ValueError(f"{source}: the delimiter is {delimiter!r}, which is none of the {len(symbols)} tokens")
    if not spellings:
        raise ValueError(f"{source}: there is no word, at least one is needed")
    wrong: dict[str, str] = {}
    found: dict[tuple[int, tuple[int, ...]], None] = {}  # in the order of the words, each once
    for number, (word, ways) in enumerate(spellings.items(), start=1):
        for way in ways:
            spelled = tuple(way[:-1] if delimiter and tuple(way[-1:]) == (delimiter,) else way)
            if not spelled:
                raise ValueError(f"{source}: {word!r} has an empty spelling")
            wrong.update((symbol, word) for symbol in spelled if symbol not in ids and symbol not in wrong)
            found[number, tuple(ids.get(symbol, 0) for symbol in spelled)] = None
    if wrong:
        named = ", ".join(f"{symbol!r} in {word!r}" for symbol, word in list(wrong.items())[:_NAMED])
        raise ValueError(f"{source}: {len(wrong)} symbols of its spellings are none of the {len(symbols)} tokens: {named}")
    return Lexicon(tuple(spellings), tuple(found), ids[delimiter] if delimiter else None)


def read_lexicon(path: str | Path, symbols: Sequence[str], delimiter: str = "") -> Lexicon:
    """The words of a text file, one a line: followed by the symbols that spell it, or alone, spelled by its characters then.

    A word may have several lines, one for each spelling; empty lines are passed over.

    Raises:
        ValueError: no text in UTF-8, or as `lexicon_from_spellings`; names the file.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text in UTF-8: {error}") from error
    spellings: dict[str, list[Sequence[str]]] = {}
    for line in lines:
        if line.strip():
            word, *spelled = line.split()
            spellings.setdefault(word, []).append(spelled or list(word))
    return lexicon_from_spellings(spellings, symbols, delimiter, str(path))
