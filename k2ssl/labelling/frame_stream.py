"""Frames as they come: an endless, resumable stream, and a uniform sample of fixed size drawn while streaming."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from k2ssl import distributed


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on `key` (non-negative integers) alone, so that nothing need be saved to draw the same again."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))


class FrameStream:
    """This rank's frames, epoch after epoch, in pieces of any size.

    Nothing is read before the first `take`.

    Args:
        batches: `batches(epoch)` yields (F, D) tensors, the same ones whenever it is called with the same epoch.
        epoch, offset: where to start: that many frames of that epoch are skipped.
    """

    def __init__(self, batches: Callable[[int], Iterator[Tensor]], epoch: int, offset: int = 0) -> None:
        self._batches, self._epoch, self._to_skip, self._fetched = batches, epoch, offset, 0
        self._current: Iterator[Tensor] | None = None
        self._rest: Tensor | None = None  # of the last fetched tensor, not yet taken

    @property
    def position(self) -> tuple[int, int]:
        """(epoch, offset) of the first frame not yet taken."""
        return self._epoch, self._fetched + self._to_skip - (0 if self._rest is None else len(self._rest))

    def take(self, num_frames: int) -> Tensor:
        """The next (num_frames, D); goes on with the next epoch where one ends.

        Raises:
            ValueError: an epoch without a frame, or one that ends before the place where to start.
        """
        parts: list[Tensor] = []
        missing = num_frames
        while missing:
            if self._rest is None or not len(self._rest):
                self._rest = self._fetch()
            parts.append(self._rest[:missing])
            self._rest = self._rest[missing:]
            missing -= len(parts[-1])
        return torch.cat(parts)

    def _fetch(self) -> Tensor:
        """The next tensor of this epoch or of the next one, without the frames that are still to be skipped."""
        while True:
            if self._current is None:
                self._current = iter(self._batches(self._epoch))
            for part in self._current:
                skipped = min(self._to_skip, len(part))
                self._fetched += len(part)
                self._to_skip -= skipped
                if skipped < len(part):
                    return part[skipped:]
            if self._to_skip:
                raise ValueError(
                    f"features: epoch {self._epoch} has {self._fetched} frames for rank {distributed.rank()}, "
                    f"{self._fetched + self._to_skip} were taken before the interruption: they are not the same features"
                )
            if not self._fetched:
                raise ValueError(f"features: epoch {self._epoch} holds no frame for rank {distributed.rank()}, at least 1 is needed")
            self._epoch, self._fetched, self._current = self._epoch + 1, 0, None


class Reservoir:
    """A uniform sample without replacement of all frames shown, over all ranks, in bounded memory.

    Every frame gets a random key, and those with the lowest keys are kept: the union of the ranks' samples, cut to size, is then
    a sample of all frames, however unevenly they are spread over ranks.

    Args:
        capacity: frames to keep.
        key: seeds the draws; the rank is added to it.
    """

    def __init__(self, capacity: int, key: Sequence[int]) -> None:
        self.capacity = capacity
        self.num_shown = 0
        self._generator = generator(*key, distributed.rank())
        self._keys: list[Tensor] = []
        self._frames: list[Tensor] = []
        self._limit = float("inf")
        self._held = 0

    def show(self, frames: Tensor) -> None:
        """(F, D) on any device; kept frames move to the CPU."""
        keys = torch.rand(len(frames), generator=self._generator, dtype=torch.float64)
        self.num_shown += len(frames)
        low = (keys < self._limit).nonzero().squeeze(1)
        self._keys.append(keys[low])
        self._frames.append(frames[low.to(frames.device)].cpu().float())
        self._held += len(low)
        if self._held >= 2 * self.capacity:
            self._keep_lowest()

    def gather(self, device: torch.device) -> Tensor:
        """(at most capacity, D) on the CPU: the sample over all ranks, in random order, the same on every rank.

        Every rank must have been shown a frame; tensors travel between ranks from `device`.
        """
        self._keep_lowest()
        keys, frames = self._keys[0], self._frames[0]
        everyone = distributed.all_gather_rows(keys.to(device)).cpu()
        if len(everyone) > self.capacity:
            limit = everyone.kthvalue(self.capacity).values
            keys, frames = keys[keys <= limit], frames[keys <= limit]
            everyone = everyone[everyone <= limit]
        return distributed.all_gather_rows(frames.to(device)).cpu()[everyone.argsort(stable=True)]

    def _keep_lowest(self) -> None:
        keys, frames = torch.cat(self._keys), torch.cat(self._frames)
        if len(keys) > self.capacity:
            chosen = keys.topk(self.capacity, largest=False).indices
            keys, frames = keys[chosen], frames[chosen]
            self._limit = keys.max().item()
        self._keys, self._frames, self._held = [keys], [frames], len(keys)
