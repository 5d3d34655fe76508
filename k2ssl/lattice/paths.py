"""From lattices to hypotheses: the best path of an utterance, or its best paths with different outputs."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from k2ssl.lattice.package import k2
from k2ssl.lattice.search import Lattice


@dataclass(frozen=True)
class Path:
    """One way through a lattice.

    Attributes:
        outputs: ids of its words, or of its tokens where the graph had no lexicon.
        tokens: ids of its tokens.
        frames: the frame at which each token begins.
        score: log-probability in nats of this alignment, with everything that the graph adds.
        lm_score: the part of an n-gram model, unscaled; 0 without one.
    """

    outputs: tuple[int, ...]
    tokens: tuple[int, ...]
    frames: tuple[int, ...]
    score: float
    lm_score: float = 0.0


def one_best(lattice: Lattice) -> list[Path]:
    """The best path of each utterance."""
    return [arcs.path(range(arcs.num_arcs)) for arcs in arcs_of(k2.shortest_path(lattice.fsa, use_double_scores=True))]


def n_best(lattice: Lattice, number: int) -> list[list[Path]]:
    """Per utterance the best paths with different outputs, best first; fewer where the lattice holds fewer.

    Exact: a search from the start in the order of (score so far + best score to the end), in which beginnings that agree in state and outputs
    are followed once. On the host, and slower than sampling paths, but nothing is left to chance.

    Raises:
        ValueError: `number` below 1.
    """
    if number < 1:
        raise ValueError(f"n_best: number is {number}, at least 1 is needed")
    to_end = lattice.fsa.get_backward_scores(use_double_scores=True, log_semiring=False).cpu()
    states = lattice.fsa.arcs.shape().row_splits(1).tolist()
    return [
        [arcs.path(found) for found in arcs.best(to_end[first:last].tolist(), number)]
        for arcs, first, last in zip(arcs_of(lattice.fsa), states, states[1:])
    ]


@dataclass(frozen=True)
class LatticeArcs:
    """The arcs of one utterance's lattice as lists, in the order of their source states."""

    sources: list[int]
    targets: list[int]
    labels: list[int]
    outputs: list[tuple[int, ...]]
    tokens: list[int]
    frames: list[int]
    scores: list[float]
    lm_scores: list[float]

    @property
    def num_arcs(self) -> int:
        """How many there are."""
        return len(self.scores)

    def path(self, arcs: Sequence[int]) -> Path:
        """What a sequence of arcs, one behind the other, stands for."""
        emitting = [arc for arc in arcs if self.tokens[arc] > 0]
        return Path(
            tuple(output for arc in arcs for output in self.outputs[arc]),
            tuple(self.tokens[arc] for arc in emitting),
            tuple(self.frames[arc] for arc in emitting),
            math.fsum(self.scores[arc] for arc in arcs),
            math.fsum(self.lm_scores[arc] for arc in arcs),
        )

    def best(self, to_end: list[float], number: int) -> Iterator[list[int]]:
        """The arcs of the best paths with different outputs; `to_end` is the best score from each state on."""
        leaving: dict[int, list[int]] = {}
        for arc, source in enumerate(self.sources):
            leaving.setdefault(source, []).append(arc)
        outputs: dict[tuple[int, int], int] = {}  # beginnings by number, so that they compare fast
        followed: set[tuple[int, int]] = set()
        trail: list[tuple[int, int]] = [(-1, -1)]  # (arc, place of what is before it)
        waiting = [(-to_end[0], 0, 0, 0, 0.0)] if to_end and self.num_arcs else []
        while waiting and number:
            _, place, state, begun, score = heapq.heappop(waiting)
            if (state, begun) in followed:
                continue
            followed.add((state, begun))
            if place and self.labels[trail[place][0]] < 0:
                number -= 1
                yield _follow(trail, place)
                continue
            for arc in leaving.get(state, ()):
                target, after = self.targets[arc], begun
                for output in self.outputs[arc]:
                    after = outputs.setdefault((after, output), len(outputs) + 1)
                total = score + self.scores[arc]
                if (target, after) not in followed and to_end[target] > -math.inf:
                    trail.append((arc, place))
                    heapq.heappush(waiting, (-total - to_end[target], len(trail) - 1, target, after, total))


def _follow(trail: list[tuple[int, int]], place: int) -> list[int]:
    arcs = []
    while place:
        arc, place = trail[place]
        arcs.append(arc)
    return arcs[::-1]


def arcs_of(fsa: Any) -> Iterator[LatticeArcs]:
    """The arcs of each automaton of a vector; one transfer."""
    ends = fsa.arcs.shape().remove_axis(1).row_splits(1).tolist()
    table = fsa.arcs.values()[:, :3].cpu()
    scores, tokens, frames = fsa.scores.detach().cpu(), fsa.tokens.cpu(), fsa.frame.cpu()
    lm_scores = fsa.lm_scores.cpu() if hasattr(fsa, "lm_scores") else scores.new_zeros(len(scores))
    outputs = _outputs(fsa.aux_labels)
    for first, last in zip(ends, ends[1:]):
        part = slice(first, last)
        sources, targets, labels = table[part].t().tolist()
        numbers: list[Tensor] = [tokens, frames, scores, lm_scores]
        yield LatticeArcs(sources, targets, labels, outputs[part], *(values[part].tolist() for values in numbers))


def _outputs(values: Any) -> list[tuple[int, ...]]:
    """What each arc gives: none, one or several numbers."""
    if isinstance(values, k2.RaggedTensor):
        return [tuple(value for value in arc if value > 0) for arc in values.tolist()]
    return [(value,) if value > 0 else () for value in values.tolist()]
