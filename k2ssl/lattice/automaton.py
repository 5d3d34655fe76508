"""Arcs that are put together one by one, and the automaton of k2 made of them."""

from __future__ import annotations

from array import array
from typing import Any

import torch
from torch import Tensor

from k2ssl.lattice.package import k2

FINAL = -1  # k2's label of arcs into the final state, in inputs and outputs


class Arcs:
    """Arcs of an automaton with inputs, outputs and scores; states are numbered from 0, which is the start, as the caller likes."""

    def __init__(self) -> None:
        self._whole, self._scores, self._num_states = array("i"), array("f"), 1

    def state(self) -> int:
        """A new state."""
        self._num_states += 1
        return self._num_states - 1

    def add(self, source: int, target: int, label: int, output: int, score: float = 0.0) -> None:
        """An arc that takes `label` and gives `output`, 0 for nothing; `score` is a log-probability in nats."""
        self._whole.extend((source, target, label, output))
        self._scores.append(score)

    def end(self, source: int, score: float = 0.0) -> None:
        """Let a sequence end in a state."""
        self.add(source, FINAL, FINAL, FINAL, score)

    def fsa(self) -> Any:
        """The automaton, arc-sorted, with outputs as `aux_labels`."""
        table = torch.tensor(self._whole, dtype=torch.int32).view(-1, 4)
        table[table[:, 1] == FINAL, 1] = self._num_states  # k2 wants the final state last
        order = table[:, 0].argsort(stable=True)
        table, scores = table[order], torch.tensor(self._scores)[order]
        # k2 reads the fourth column as the bits of a float
        arcs = torch.cat([table[:, :3], _bits(scores)], dim=1)
        return k2.arc_sort(k2.Fsa(arcs, aux_labels=table[:, 3].contiguous()))


def _bits(scores: Tensor) -> Tensor:
    return scores.view(torch.int32).unsqueeze(1)
