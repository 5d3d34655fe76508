"""Small lexicons and n-gram models, and everything that they allow, counted out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path as File

import torch
from torch import Tensor

from k2ssl.lattice.arpa import Arpa, read_arpa
from k2ssl.lattice.lexicon import Lexicon, lexicon_from_spellings

SYMBOLS = ("<blank>", "|", "a", "b", "c")
# a word that begins another, one with two spellings, one with a doubled letter
SPELLINGS = {"A": ["a"], "AB": ["ab"], "BEE": ["b", "cb"], "CC": ["cc"]}


def lexicon(delimiter: str) -> Lexicon:
    return lexicon_from_spellings({word: [list(way) for way in ways] for word, ways in SPELLINGS.items()}, SYMBOLS, delimiter)


def ngram_model(folder: File, order: int, seed: int) -> Arpa:
    """Random scores; a listed n-gram has more than its back-off gives, by more than what the back-off behind it could save."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    words = [*SPELLINGS, "</s>"]
    tables: list[dict[tuple[str, ...], tuple[float, float]]] = [{(word,): (draw(-3.0, -2.0), draw(-0.3, -0.05)) for word in words}]
    tables[0]["<s>",] = (-99.0, draw(-0.3, -0.05))

    def score(ngram: tuple[str, ...]) -> float:
        table = tables[len(ngram) - 1] if len(ngram) <= len(tables) else {}
        if ngram in table:
            return table[ngram][0]
        shorter = tables[len(ngram) - 2].get(ngram[:-1], (0.0, 0.0))
        return shorter[1] + score(ngram[1:])

    for _ in range(order - 1):
        histories = [ngram for ngram in tables[-1] if ngram[-1] != "</s>"]
        longer = [(*history, word) for history in histories for word in words if draw(0, 1) < 0.4]
        tables.append({ngram: (score(ngram) + draw(0.35, 0.8), draw(-0.3, -0.05)) for ngram in longer})
    lines = ["\\data\\", *(f"ngram {size}={len(table)}" for size, table in enumerate(tables, start=1))]
    for size, table in enumerate(tables, start=1):
        lines += ["", f"\\{size}-grams:"]
        for ngram, (log_prob, backoff) in table.items():
            lines.append(f"{log_prob}\t{' '.join(ngram)}" + (f"\t{backoff}" if size < order and ngram[-1] != "</s>" else ""))
    path = folder / f"{order}-{seed}.arpa"
    path.write_text("\n".join([*lines, "", "\\end\\", ""]))
    return read_arpa(path)


def collapsed(labels: tuple[int, ...]) -> tuple[int, ...]:
    """Of the frames of CTC."""
    return tuple(label for label, _ in itertools.groupby(labels) if label)


def sentences(tokens: tuple[int, ...], delimiter: str) -> Iterator[tuple[str, ...]]:
    """The sentences that tokens spell."""
    text = "".join(SYMBOLS[token] for token in tokens)
    if delimiter:
        parts = [part for part in text.split(delimiter) if part]
        yield from itertools.product(*([word for word, ways in SPELLINGS.items() if part in ways] for part in parts))
        return
    if not text:
        yield ()
    for word, ways in SPELLINGS.items():
        for way in ways:
            if text.startswith(way):
                yield from ((word, *rest) for rest in sentences(tokens[len(way) :], delimiter))


def ctc_sentences(log_probs: Tensor, delimiter: str, lm: Callable[[tuple[str, ...]], float]) -> list[tuple[tuple[str, ...], float]]:
    """Every sentence with the score of its best path, best first, of all sequences of labels that (T, V) log-probabilities can have."""
    found: dict[tuple[str, ...], float] = {}
    spelled: dict[tuple[int, ...], list[tuple[str, ...]]] = {}
    rows = log_probs.double().tolist()
    for labels in itertools.product(range(len(SYMBOLS)), repeat=len(rows)):
        tokens = collapsed(labels)
        if tokens not in spelled:
            spelled[tokens] = list(sentences(tokens, delimiter))
        if spelled[tokens]:
            score = sum(row[label] for row, label in zip(rows, labels))
            for sentence in spelled[tokens]:
                found[sentence] = max(found.get(sentence, -math.inf), score)
    scored = [(sentence, score + lm(sentence)) for sentence, score in found.items()]
    return sorted(scored, key=lambda pair: -pair[1])


def random_log_probs(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator)).log_softmax(-1)
