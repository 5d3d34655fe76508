"""From the frames of CTC to hypotheses, by a graph that is built once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k2ssl.lattice.arpa import Arpa
from k2ssl.lattice.graphs import compile_hlg, grammar_graph
from k2ssl.lattice.lexicon import Lexicon
from k2ssl.lattice.paths import Path, n_best, one_best
from k2ssl.lattice.rescoring import rescored, rescored_lattice
from k2ssl.lattice.search import Lattice, Pruning, ctc_lattice, scaled
from k2ssl.lattice.topologies import ctc_topology


@dataclass(frozen=True)
class Words:
    """What a search over words needs.

    Attributes:
        lexicon: the words.
        arpa: n-gram model over them, part of the graph.
        larger: another one, whose scores take the place of the first one's behind the search; None: none.
        drop_words: leave out n-grams with words that the lexicon lacks, instead of refusing them.
    """

    lexicon: Lexicon
    arpa: Arpa
    larger: Arpa | None = None
    drop_words: bool = False


class CtcDecoder:
    """A graph, and how it is searched.

    Args:
        num_tokens: classes of the acoustic model, blank (0) included.
        words: the graph is HLG; None: it is the topology of CTC alone.
        modified: the topology, see `ctc_topology`.
        device: where the log-probabilities will be.

    Raises:
        ValueError: a lexicon and models that do not fit together, see `compile_hlg`.
    """

    def __init__(self, num_tokens: int, words: Words | None = None, modified: bool = False, device: str = "cpu") -> None:
        self.words = words
        self._grammar: Any = None
        if words is None:
            graph = ctc_topology(num_tokens, modified)
        else:
            graph = compile_hlg(words.lexicon, words.arpa, num_tokens, modified, words.drop_words)
        self.graph = graph.to(torch.device(device))
        self._scaled = self.graph

    def lattice(
        self, log_probs: Tensor, lens: Tensor, pruning: Pruning | None = None, lm_scale: float = 1.0, names: Sequence[str] = ()
    ) -> Lattice:
        """The lattices of utterances, see `ctc_lattice`."""
        if getattr(self._scaled, "lm_scale", 1.0) != lm_scale:
            self._scaled, _ = scaled(self.graph, lm_scale)
        return ctc_lattice(self._scaled, log_probs, lens, pruning, lm_scale, names)

    def choose(self, lattice: Lattice, number: int = 1, rescore_paths: int = 100) -> list[list[Path]]:
        """Per utterance its best hypotheses, best first, by the larger model where there is one.

        Args:
            lattice: of `lattice`.
            number: how many, at most.
            rescore_paths: with a larger model: how many of the best paths are scored by it; 0: the whole lattice is.

        Raises:
            ValueError: the larger model knows no hypothesis of an utterance.
        """
        words = self.words
        if words is None or words.larger is None:
            return best_paths(lattice, number)
        if rescore_paths:
            paths = n_best(lattice, max(rescore_paths, number))
            return [row[:number] for row in rescored(paths, lattice, words.larger, words.lexicon, lattice.lm_scale)]
        if self._grammar is None:
            self._grammar = grammar_graph(words.larger, words.lexicon, drop_words=words.drop_words)
        return best_paths(rescored_lattice(lattice, self._grammar, lattice.lm_scale), number)


def best_paths(lattice: Lattice, number: int) -> list[list[Path]]:
    """Per utterance its best hypotheses, best first."""
    return [[path] for path in one_best(lattice)] if number == 1 else n_best(lattice, number)
