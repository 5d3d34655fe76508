"""A larger n-gram model for what a first search has left, and how good its best choice could be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from k2ssl.lattice.arpa import Arpa
from k2ssl.lattice.lexicon import Lexicon
from k2ssl.lattice.package import k2
from k2ssl.lattice.paths import LatticeArcs, Path, arcs_of
from k2ssl.lattice.search import Lattice


def rescored(paths: Sequence[Sequence[Path]], lattice: Lattice, arpa: Arpa, lexicon: Lexicon, lm_scale: float) -> list[list[Path]]:
    """The best paths of each utterance with the scores of another n-gram model in place of the first one's, best first.

    Args:
        paths: of `n_best`.
        lattice: which they are of.
        arpa: the other model; it scores exactly, without a graph.
        lexicon: of the words.
        lm_scale: weight of the other model.

    Raises:
        ValueError: every path of an utterance has a word that the model does not know; says which utterance.
    """
    result = []
    for row, found in enumerate(paths):
        scored = []
        for path in found:
            lm_score = arpa.log_prob([lexicon.words[word - 1] for word in path.outputs])
            if lm_score > -math.inf:
                score = path.score - lattice.lm_scale * path.lm_score + lm_scale * lm_score
                scored.append(replace(path, score=score, lm_score=lm_score))
        if not scored:
            raise ValueError(
                f"{arpa.path}: each of the {len(found)} hypotheses of utterance {row} has a word that this model does not know"
            )
        result.append(sorted(scored, key=lambda path: -path.score))
    return result


def rescored_lattice(lattice: Lattice, grammar: Any, lm_scale: float) -> Lattice:
    """The whole lattice with the scores of another n-gram model in place of the first one's; on the host.

    Args:
        lattice: of a graph with words.
        grammar: of `grammar_graph`, with back-offs that are labelled 0.
        lm_scale: weight of the other model.

    Raises:
        ValueError: the model knows no path of an utterance; says which.
    """
    words = k2.arc_sort(_on_words(lattice))
    scorer = grammar.clone()  # k2 writes scores into the arcs
    del scorer.aux_labels  # it gives what it takes
    scorer.lm_scores = grammar.scores.clone()
    scorer.scores = lm_scale * grammar.scores
    parts = []
    for row in range(words.shape[0]):
        part = k2.connect(k2.intersect(scorer, words[row], treat_epsilons_specially=True))
        if part.num_arcs == 0:
            raise ValueError(f"rescored_lattice: each path of utterance {row} has a word that the language model does not know")
        parts.append(k2.invert(k2.top_sort(part)))
    return Lattice(k2.create_fsa_vec(parts), lm_scale)


def _on_words(lattice: Lattice) -> Any:
    """The lattice on the host with words as labels and without the scores of its n-gram model."""
    fsa = lattice.fsa.to("cpu")
    if isinstance(fsa.aux_labels, k2.RaggedTensor):
        fsa = k2.expand_ragged_attributes(fsa, ragged_attribute_names=["aux_labels"])
    if hasattr(fsa, "lm_scores"):
        scores = fsa.scores - lattice.lm_scale * fsa.lm_scores
        fsa = fsa.clone()
        del fsa.lm_scores
        fsa.scores = scores
    return k2.invert(fsa)


def oracle_errors(lattice: Lattice, references: Sequence[Sequence[int]]) -> list[int]:
    """The fewest errors (substituted, deleted and inserted words) that any path of an utterance makes.

    Args:
        lattice: of N utterances.
        references: ids of the words that were said, of each utterance; 0 for one that the lexicon lacks.

    Raises:
        ValueError: another number of references than of utterances.
    """
    if len(references) != lattice.fsa.shape[0]:
        raise ValueError(f"oracle_errors: {len(references)} references for {lattice.fsa.shape[0]} utterances")
    return [_fewest_errors(arcs, reference) for arcs, reference in zip(arcs_of(k2.top_sort(lattice.fsa)), references)]


def _fewest_errors(arcs: LatticeArcs, reference: Sequence[int]) -> int:
    """One edit distance per state and beginning of the reference; states come in an order in which arcs lead on."""
    said = np.array(reference, dtype=np.int64)
    deleted = np.arange(len(said) + 1)
    distances: dict[int, Any] = {0: deleted}
    for source, target, outputs in zip(arcs.sources, arcs.targets, arcs.outputs):
        distance = distances[source]
        for word in outputs:
            distance = _after(distance, said != word, deleted)
        before = distances.get(target)
        distances[target] = distance if before is None else np.minimum(before, distance)
    return int(distances[max(arcs.targets)][-1])


def _after(distance: Any, differs: Any, deleted: Any) -> Any:
    """Edit distances with one more word."""
    inserted = distance + 1
    inserted[1:] = np.minimum(inserted[1:], distance[:-1] + differs)
    return np.minimum.accumulate(inserted - deleted) + deleted


def error_rate(errors: Sequence[int], references: Sequence[Sequence[int]]) -> float:
    """Errors per word; nan without words."""
    words = sum(map(len, references))
    return sum(errors) / words if words else math.nan
