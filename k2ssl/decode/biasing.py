"""Context biasing: a list of phrases whose tokens score higher.

The list becomes an automaton that reads a hypothesis token by token, for all hypotheses at once. What it gives a token sequence y:

    score x (tokens of every place in y where a phrase stands)  +  score x (tokens with which y is inside a phrase)

The second part is lent, so that a search does not drop a rare phrase before it is complete: the longest end of y that begins a phrase,
counted from the last phrase complete within it. It is taken back as soon as a token breaks the phrase off, and at the end. So a whole
hypothesis gets the first part only. Phrases that overlap or contain each other count each for itself.

Source: Aho and Corasick, CACM 18(6), 1975. Upstream's ContextGraph lends the tokens of a complete phrase once more until the next token.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class ContextGraph:
    """The automaton of a list of phrases; its tables hold no arc of failure, they are followed when it is built.

    A state is the longest end of what was read that begins a phrase; state 0 the empty one. Memory: 4 bytes per state and distinct
    token, with about as many states as the phrases have tokens.

    Letters: M hypotheses, V vocabulary size.

    Args:
        phrases: token ids of each phrase; repetitions of a phrase count once.
        score: nats per token, > 0; upstream's programs use 2.

    Raises:
        ValueError: no phrases, an empty phrase, a negative token, a score that is not a finite number > 0.
    """

    def __init__(self, phrases: Sequence[Sequence[int]], score: float) -> None:
        _check(phrases, score)
        self.score = score
        self.tokens = frozenset(token for phrase in phrases for token in phrase)
        children, depth, complete = _trie(phrases)
        column = {token: number for number, token in enumerate(sorted(self.tokens), start=1)}  # 0: tokens of no phrase
        after, earned = _follow_failures(children, depth, complete, column)
        lent = torch.tensor(depth) - torch.tensor(complete)
        self._after = after
        self._lent = score * lent.float()
        self._gain = score * (torch.tensor(earned) + lent).float()
        self._column = torch.zeros(max(self.tokens) + 2, dtype=torch.int64)
        for token, number in column.items():
            self._column[token] = number

    def to(self, device: torch.device) -> ContextGraph:
        """The same with its tables on `device`."""
        if self._after.device == device:
            return self
        moved = object.__new__(ContextGraph)
        for name, value in vars(self).items():
            setattr(moved, name, value.to(device) if isinstance(value, Tensor) else value)
        return moved

    @property
    def num_states(self) -> int:
        return self._after.shape[0]

    def start(self, batch: int) -> Tensor:
        """(batch,) int64 states before the first token."""
        return torch.zeros(batch, dtype=torch.int64, device=self._after.device)

    def scores(self, state: Tensor, vocab_size: int) -> Tensor:
        """(M, V) float32: what each next token adds to the score after states (M,), less what it takes back."""
        gained = self._gain[self._after[state].long()] - self._lent[state].unsqueeze(1)
        columns = self._column[:vocab_size]
        return gained[:, F.pad(columns, (0, vocab_size - columns.shape[0]))]

    def advance(self, state: Tensor, token: Tensor) -> Tensor:
        """(M,) states after the tokens (M,) int64."""
        return self._after[state, self._column[token.clamp(max=self._column.shape[0] - 1)]].long()

    def final(self, state: Tensor) -> Tensor:
        """(M,) float32, <= 0: takes back what is lent when the sentence ends."""
        return -self._lent[state]


def _trie(phrases: Sequence[Sequence[int]]) -> tuple[list[dict[int, int]], list[int], list[int]]:
    """Per node: its children by token, its depth, and the depth of the last complete phrase on the way to it."""
    children: list[dict[int, int]] = [{}]
    depth, is_end = [0], [False]
    for phrase in phrases:
        node = 0
        for token in phrase:
            if token not in children[node]:
                children[node][token] = len(children)
                children.append({})
                depth.append(depth[node] + 1)
                is_end.append(False)
            node = children[node][token]
        is_end[node] = True
    complete = [0] * len(children)
    for node, below in enumerate(children):  # a child's number is larger than its parent's
        for child in below.values():
            complete[child] = depth[child] if is_end[child] else complete[node]
    return children, depth, complete


def _follow_failures(
    children: list[dict[int, int]], depth: list[int], complete: list[int], column: dict[int, int]
) -> tuple[Tensor, list[int]]:
    """(states, columns) int32 next states, and the tokens of all phrases that end at each state."""
    after = np.zeros((len(children), len(column) + 1), dtype=np.int32)
    shorter, earned = [0] * len(children), [0] * len(children)  # shorter: the next longest end of a state that begins a phrase
    queue = deque([0])
    while queue:  # breadth first: what is shorter is done before
        state = queue.popleft()
        row = after[shorter[state]].copy()
        for token, child in children[state].items():
            shorter[child] = int(row[column[token]])
            row[column[token]] = child
            queue.append(child)
        after[state] = row
        earned[state] = earned[shorter[state]] + (depth[state] if complete[state] == depth[state] else 0)
    return torch.from_numpy(after), earned


def _check(phrases: Sequence[Sequence[int]], score: float) -> None:
    if not (math.isfinite(score) and score > 0):
        raise ValueError(f"ContextGraph: score is {score}, allowed is a finite number > 0")
    if not phrases:
        raise ValueError("ContextGraph: phrases is empty, at least one phrase is needed")
    for number, phrase in enumerate(phrases):
        if not phrase or min(phrase) < 0:
            raise ValueError(f"ContextGraph: phrase {number} is {list(phrase)}, allowed are one or more token ids >= 0")
