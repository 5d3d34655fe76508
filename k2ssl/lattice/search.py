"""Lattices: what of a decoding graph remains of the frames of CTC, pruned.

Letters beside those of `k2ssl.batch`: V classes, blank (0) included.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from k2ssl.lattice.empty import EmptyLatticeError
from k2ssl.lattice.package import k2

_log = logging.getLogger(__name__)


class Width(Protocol):
    """How wide a search is."""

    @property
    def search_beam(self) -> float: ...

    def wider(self: W) -> W: ...


W = TypeVar("W", bound=Width)


@dataclass(frozen=True)
class Pruning:
    """How much of a graph is looked at.

    Attributes:
        search_beam: at a frame, states that are worse than the best by more nats are dropped.
        output_beam: arcs whose best path is worse than the best path by more nats are dropped from the lattice.
        min_active, max_active: states to keep at a frame, at least and at most, whatever their scores; k2 holds to it roughly.

    Raises:
        ValueError: a value out of range.
    """

    search_beam: float = 20.0
    output_beam: float = 8.0
    min_active: int = 30
    max_active: int = 10000

    def __post_init__(self) -> None:
        for name in ("search_beam", "output_beam"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Pruning: {name} is {getattr(self, name)}, a number > 0 is needed")
        if not 0 <= self.min_active <= self.max_active or self.max_active < 1:
            raise ValueError(
                f"Pruning: min_active is {self.min_active}, max_active {self.max_active}; 0 <= min <= max and max >= 1 are needed"
            )

    def wider(self) -> Pruning:
        """Twice the beams, and four times the states."""
        return Pruning(2 * self.search_beam, 2 * self.output_beam, 4 * self.min_active, 4 * self.max_active)


@dataclass(frozen=True)
class Lattice:
    """Paths of N utterances.

    Attributes:
        fsa: a vector of N automata; `aux_labels` are outputs (words of a graph with a lexicon, else tokens), `tokens` the tokens that begin on
            an arc and `frame` where (0 without a token), `scores` everything that was summed, `lm_scores` the unscaled part of an n-gram
            model (where there is one).
        lm_scale: weight of `lm_scores` in `scores`.
    """

    fsa: Any
    lm_scale: float = 0.0


def ctc_lattice(
    graph: Any, log_probs: Tensor, lens: Tensor, pruning: Pruning | None = None, lm_scale: float = 1.0, names: Sequence[str] = ()
) -> Lattice:
    """Lattices of utterances, each as if it were alone. One whose lattice is empty is tried once more with a wider beam.

    Args:
        graph: `ctc_topology`, or HLG of `compile_hlg`, on the device of `log_probs`.
        log_probs: (N, T, V) log-probabilities.
        lens: (N,) int64 CPU, frames of each utterance, at least 1.
        pruning: the beam; None: the defaults.
        lm_scale: weight of the n-gram model of an HLG.
        names: of the utterances, for messages.

    Raises:
        ValueError: shapes, dtypes or lengths that do not fit; log-probabilities of nan.
        EmptyLatticeError: no path is left with the wider beam either; names the utterances.
    """
    check_scores("ctc_lattice", "log_probs", log_probs, lens)
    if (most := int(graph.labels.max())) >= log_probs.shape[2]:
        raise ValueError(f"ctc_lattice: the graph has the token {most}, log_probs has classes 0..{log_probs.shape[2] - 1}")
    graph, scale = scaled(graph, lm_scale)
    log_probs = log_probs.float().contiguous()

    def search(rows: list[int], width: Pruning) -> Any:
        segments = torch.tensor([[row, 0, int(lens[row])] for row in rows], dtype=torch.int32)
        dense = k2.DenseFsaVec(log_probs, segments)
        beams = (width.search_beam, width.output_beam, width.min_active, width.max_active)
        return k2.intersect_dense_pruned(graph, dense, *beams, frame_idx_name="frame")

    fsa = search_twice(search, len(lens), pruning or Pruning(), names)
    if not hasattr(fsa, "tokens"):  # a graph without a lexicon
        fsa.tokens = fsa.aux_labels.clone()
    return Lattice(fsa, scale)


def search_twice(search: Callable[[list[int], W], Any], num_utterances: int, pruning: W, names: Sequence[str]) -> Any:
    """A vector of lattices, of `search(rows, pruning)`; rows that come out empty are searched again with a wider beam.

    Raises:
        EmptyLatticeError: rows come out empty again.
    """
    fsa = search(list(range(num_utterances)), pruning)
    empty = _empty(fsa)
    if not empty:
        return fsa
    wider = pruning.wider()
    said = [names[row] if names else str(row) for row in empty]
    _log.warning("no path is left of utterance %s: searching again with a search beam of %g", ", ".join(said), wider.search_beam)
    again = search(empty, wider)
    if still := [empty[row] for row in _empty(again)]:
        error = EmptyLatticeError(still, f"tried search_beam {pruning.search_beam:g} and {wider.search_beam:g}")
        raise error.named(names) if names else error
    place = list(range(num_utterances))
    for number, row in enumerate(empty):
        place[row] = num_utterances + number
    return k2.index_fsa(k2.cat([fsa, again]), torch.tensor(place, dtype=torch.int32, device=fsa.device))


def _empty(fsa: Any) -> list[int]:
    arcs = fsa.arcs.shape().remove_axis(1).row_splits(1).diff()
    return (arcs == 0).nonzero().flatten().tolist()


def scaled(graph: Any, lm_scale: float) -> tuple[Any, float]:
    """The graph with a weight of its n-gram model, a copy unless it has that weight, and the weight; 0 where it has no such model."""
    if len(graph.shape) == 2:
        graph = k2.create_fsa_vec([graph])
    if not hasattr(graph, "lm_scores"):
        return graph, 0.0
    now = getattr(graph, "lm_scale", 1.0)
    if lm_scale != now:
        graph = graph.clone()  # k2 writes scores into the arcs, which others may share
        graph.scores = graph.scores + (lm_scale - now) * graph.lm_scores
        graph.lm_scale = lm_scale
    return graph, lm_scale


def check_scores(function: str, name: str, scores: Tensor, lens: Tensor) -> None:
    """
    Raises:
        ValueError: not scores (N, T, V) of at least one utterance with lengths (N,), or nan among them; names the argument.
    """
    if scores.dim() != 3 or not scores.is_floating_point():
        raise ValueError(f"{function}: {name} is {scores.dtype} {tuple(scores.shape)}, floating point of three dimensions is needed")
    batch, frames, _ = scores.shape
    if lens.dtype != torch.int64 or lens.shape != (batch,) or lens.device.type != "cpu":
        raise ValueError(
            f"{function}: lens is {lens.dtype} {tuple(lens.shape)} on {lens.device}, int64 of shape ({batch},) on the CPU is needed"
        )
    if batch == 0 or not bool(((lens > 0) & (lens <= frames)).all()):
        raise ValueError(f"{function}: lens is {lens.tolist()}, at least one utterance of 1..{frames} frames each is needed")
    for row, length in enumerate(lens.tolist()):
        if bool(scores[row, :length].isnan().any()):
            raise ValueError(f"{function}: {name} of utterance {row} holds nan, numbers are needed")
