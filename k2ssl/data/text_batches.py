"""Sentences without audio, as token ids: what a language model is trained on."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class TextBatch:
    """Sentences.

    Attributes:
        tokens: (N, U) int64 token ids, U of the longest sentence, 0 at padding.
        token_lens: (N,) int64 token counts, always on the CPU.
        ids: which sentences of the text, for messages.
    """

    tokens: Tensor
    token_lens: Tensor
    ids: tuple[str, ...]

    @property
    def num_samples(self) -> int:
        """Samples of audio: a text has none."""
        return 0

    def to(self, device: torch.device | str, non_blocking: bool = True) -> TextBatch:
        """The same batch on another device; `token_lens` stays on the CPU."""
        return replace(self, tokens=self.tokens.to(device, non_blocking=non_blocking))


class TokenizedText:
    """All sentences of a text, held in memory: 2 bytes a token (4 where there are more than 65,536 symbols) and 8 bytes a sentence.

    Args:
        sentences: token ids of each, at least one.
        vocab_size: ids are smaller.

    Attributes:
        tokens: (number of all tokens,) unsigned.
        begins: (sentences + 1,) int64, where each sentence begins.
    """

    def __init__(self, sentences: Iterable[Sequence[int]], vocab_size: int) -> None:
        kind = "H" if vocab_size <= 2**16 else "I"
        tokens, begins = array(kind), array("q", [0])
        for sentence in sentences:
            tokens.extend(sentence)
            begins.append(len(tokens))
        self.tokens = np.frombuffer(tokens, dtype=kind) if tokens else np.empty(0, dtype=kind)
        self.begins = np.frombuffer(begins, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.begins) - 1

    @property
    def lens(self) -> NDArray[np.int64]:
        """(sentences,) numbers of tokens."""
        return np.diff(self.begins)

    @property
    def sha256(self) -> str:
        """Texts with the same hash have the same sentences in the same order."""
        digest = hashlib.sha256(self.begins.tobytes())
        digest.update(self.tokens.astype(np.uint32).tobytes())
        return digest.hexdigest()

    def batch(self, numbers: NDArray[np.int64]) -> TextBatch:
        """The sentences of these numbers."""
        lens = self.lens_of(numbers)
        places = self.begins[numbers][:, None] + np.arange(lens.max(initial=0))
        padding = np.arange(lens.max(initial=0)) >= lens[:, None]
        tokens = self.tokens[np.where(padding, 0, places)].astype(np.int64)
        tokens[padding] = 0
        return TextBatch(torch.from_numpy(tokens), torch.from_numpy(lens), tuple(f"sentence {number + 1}" for number in numbers))

    def lens_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) numbers of tokens of some sentences."""
        return self.begins[numbers + 1] - self.begins[numbers]


class TextLoader:
    """Batches of sentences of similar length; goes on exactly where it was.

    Every epoch has each sentence once, drawn into batches and an order of their own from `seed` and the epoch's number.

    Args:
        text: the sentences. Those that are longer than a batch are left out.
        tokens_per_batch: most tokens of a batch, padding and the ends of sentences counted.
        seed: of the order; None: the shortest first, always the same.

    Attributes:
        left_out: number of sentences that are too long.

    Raises:
        ValueError: no sentence is left.
    """

    def __init__(self, text: TokenizedText, tokens_per_batch: int, seed: int | None) -> None:
        self._text, self._most, self._seed = text, tokens_per_batch, seed
        self._kept = np.flatnonzero(text.lens < tokens_per_batch)
        self.left_out = len(text) - len(self._kept)
        if not len(self._kept):
            raise ValueError(f"the text has no sentence of at most {tokens_per_batch - 1:,} tokens, at least one is needed")
        self._epoch = self._done = 0
        self._resumed = False

    def num_batches(self) -> int:
        """Of an epoch; the same for all."""
        return len(self._cut(self._by_length(None))) - 1

    def set_epoch(self, epoch: int) -> None:
        """Iterate over this epoch next; from its beginning, unless a state of it was loaded."""
        if epoch != self._epoch:
            self._epoch, self._done, self._resumed = epoch, 0, False

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how many of its batches were handed out."""
        return {"epoch": self._epoch, "batches": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after what `state_dict` told."""
        self.start_at(state["epoch"], state["batches"])

    def start_at(self, epoch: int, batches: int) -> None:
        """Go on after so many batches of an epoch."""
        self._epoch, self._done, self._resumed = epoch, batches, True

    def __iter__(self) -> Iterator[TextBatch]:
        if not self._resumed:
            self._done = 0
        self._resumed = False
        draw = None if self._seed is None else np.random.default_rng((self._seed, self._epoch))
        order = self._by_length(draw)
        cuts = self._cut(order)
        numbers = np.arange(len(cuts) - 1)
        for number in (numbers if draw is None else draw.permutation(numbers))[self._done :]:
            self._done += 1
            yield self._text.batch(order[cuts[number] : cuts[number + 1]])

    def _by_length(self, draw: np.random.Generator | None) -> NDArray[np.int64]:
        """The sentences from the shortest to the longest, those of one length in an order that is drawn."""
        kept = self._kept if draw is None else draw.permutation(self._kept)
        return kept[np.argsort(self._text.lens_of(kept), kind="stable")]

    def _cut(self, order: NDArray[np.int64]) -> list[int]:
        """Where batches begin, and the end."""
        sizes = self._text.lens_of(order) + 1
        cuts = [0]
        while cuts[-1] < len(order):
            begin = cuts[-1]
            rest = sizes[begin : begin + self._most // int(sizes[begin])]  # sizes grow: no more than these can fit
            cuts.append(begin + int(np.count_nonzero(rest * np.arange(1, len(rest) + 1) <= self._most)))
        return cuts
