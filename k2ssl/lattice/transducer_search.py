"""The frame-synchronous beam search of a transducer over a graph, on k2.

At every frame each path takes one arc: blank, or one token that the graph allows. Paths that agree in the state of the graph and in the last
tokens, which is all that a stateless predictor sees, share what comes after, so that the result is a lattice.

Letters beside those of `k2ssl.batch`: M contexts of all utterances, V classes, blank (0) included. Source: arXiv 2211.00484.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k2ssl.lattice.package import k2
from k2ssl.lattice.search import Lattice, check_scores, scaled, search_twice

# (M, C) frames and (M, context_size) last tokens, int64, -1 before the start -> (M, V) log-probabilities
Scorer = Callable[[Tensor, Tensor], Tensor]

_NEVER = -1e6  # log-probability of what cannot be; k2 takes differences, so that it is finite


@dataclass(frozen=True)
class TransducerPruning:
    """How much is looked at.

    Attributes:
        search_beam: at a frame, states that are worse than the best by more nats are dropped.
        max_states: pairs of a context and a state of the graph that are kept at a frame.
        max_contexts: different contexts that are kept at a frame, so that the joint network is asked as often.

    Raises:
        ValueError: a value out of range.
    """

    search_beam: float = 20.0
    max_states: int = 64
    max_contexts: int = 8

    def __post_init__(self) -> None:
        if not self.search_beam > 0:
            raise ValueError(f"TransducerPruning: search_beam is {self.search_beam}, a number > 0 is needed")
        for name in ("max_states", "max_contexts"):
            if getattr(self, name) < 1:
                raise ValueError(f"TransducerPruning: {name} is {getattr(self, name)}, at least 1 is needed")

    def wider(self) -> TransducerPruning:
        """Twice the beam, and four times the states and contexts."""
        return TransducerPruning(2 * self.search_beam, 4 * self.max_states, 4 * self.max_contexts)


@torch.no_grad()
def transducer_lattice(
    graph: Any,
    log_probs_of: Scorer,
    encoder_out: Tensor,
    lens: Tensor,
    vocab_size: int,
    context_size: int,
    pruning: TransducerPruning | None = None,
    lm_scale: float = 1.0,
    names: Sequence[str] = (),
) -> Lattice:
    """Lattices of utterances, each as if it were alone. One whose lattice is empty is tried once more with a wider beam.

    Args:
        graph: `transducer_topology`, or LG of `compile_lg`, on the device of `encoder_out`.
        log_probs_of: what the predictor and the joint network say.
        encoder_out: (N, T, C).
        lens: (N,) int64 CPU, frames of each utterance, at least 1.
        vocab_size: V.
        context_size: how many last tokens the predictor sees. Before the first token stand blank, and -1 before that.
        pruning: the beam; None: the defaults.
        lm_scale: weight of the n-gram model of an LG.
        names: of the utterances, for messages.

    Raises:
        ValueError: shapes, dtypes or lengths that do not fit; frames of nan.
        EmptyLatticeError: no path is left with the wider beam either; names the utterances.
    """
    check_scores("transducer_lattice", "encoder_out", encoder_out, lens)
    if (most := int(graph.labels.max())) >= vocab_size:
        raise ValueError(f"transducer_lattice: the graph has the token {most}, there are 0..{vocab_size - 1}")
    graph, scale = scaled(graph, lm_scale)
    single = graph[0]

    def search(rows: list[int], width: TransducerPruning) -> Any:
        config = k2.RnntDecodingConfig(vocab_size, context_size, width.search_beam, width.max_states, width.max_contexts)
        streams = k2.RnntDecodingStreams([k2.RnntDecodingStream(single) for _ in rows], config)
        own, frames = lens[rows], encoder_out[rows]
        behind = int(_ends().take_a_frame)
        for t in range(int(own.max()) + behind):
            shape, contexts = streams.get_contexts()
            row = shape.row_ids(1).long()
            now = frames[:, min(t, frames.shape[1] - 1)].index_select(0, row)
            log_probs = log_probs_of(now, _with_start(contexts.long())).float()
            ended = (own <= t).to(row.device).index_select(0, row)  # there an utterance may do nothing but end
            streams.advance(log_probs.masked_fill(ended.unsqueeze(1), _NEVER).contiguous())
        streams.terminate_and_flush_to_streams()
        return k2.connect(streams.format_output((own + behind).tolist()))

    fsa = k2.top_sort(search_twice(search, len(lens), pruning or TransducerPruning(), names))
    if scale and _ends().lose_score:
        fsa.scores = torch.where(fsa.labels == -1, fsa.scores + scale * fsa.lm_scores, fsa.scores)
    fsa.tokens = fsa.labels.clamp(min=0)
    fsa.frame = _frames(fsa)
    return Lattice(fsa, scale)


@dataclass(frozen=True)
class _Ends:
    """What k2 does at the end of an utterance: whether it spends the last frame on it, leaving its scores out, and whether it leaves the score
    of the graph's arc to the final state out."""

    take_a_frame: bool
    lose_score: bool


@functools.cache
def _ends() -> _Ends:
    """Asked of k2 itself, as nothing promises that it stays so (1.23.4 does both)."""
    graph = k2.Fsa.from_str("0 0 1 0\n0 1 -1 -4\n1")
    streams = k2.RnntDecodingStreams([k2.RnntDecodingStream(graph)], k2.RnntDecodingConfig(2, 1, 10.0, 8, 8))
    streams.get_contexts()
    streams.advance(torch.tensor([[-1.0, -2.0]]))
    streams.terminate_and_flush_to_streams()
    total = streams.format_output([1]).get_tot_scores(use_double_scores=True, log_semiring=False).item()
    return _Ends(take_a_frame=total in (0.0, -4.0), lose_score=total in (0.0, -1.0))


def _with_start(contexts: Tensor) -> Tensor:
    """k2 fills contexts with 0 before the first token; here the last of these stands for blank, those before it are -1."""
    earlier = (contexts[:, :-1] == 0) & (contexts[:, 1:] == 0)
    return torch.cat([contexts[:, :-1].masked_fill(earlier, -1), contexts[:, -1:]], dim=1)


def _frames(fsa: Any) -> Tensor:
    """The frame at which each arc is taken: every arc leads one frame on, and the lattice begins at frame 0."""
    table = fsa.arcs.values()[:, :2].tolist()
    ends = fsa.arcs.shape().remove_axis(1).row_splits(1).tolist()
    frames = []
    for first, last in zip(ends, ends[1:]):
        at = {0: 0}
        for source, target in table[first:last]:
            frames.append(at[source])
            at[target] = at[source] + 1
    return torch.tensor(frames, dtype=torch.int32, device=fsa.device)
