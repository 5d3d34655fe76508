"""Frames as they come: an endless, resumable stream, and a uniform sample of fixed size drawn while streaming."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from k2ssl import distributed
from k2ssl.labelling.kmeans_model import check_finite


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on `key` (non-negative integers) alone, so that nothing need be saved to draw the same again."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1)))


class FrameSource(ABC):
    """This rank's frames of every epoch, the same ones whenever they are asked for, readable from any place that was reached before."""

    @abstractmethod
    def start(self, epoch: int, place: int) -> Iterator[tuple[int, Tensor]]:
        """Pairs of (F, D) frames and the place behind them, which rises, from `place` on; place 0 is the beginning of the epoch.

        Raises:
            ValueError: the epoch ends before `place`.
        """


class Replayed(FrameSource):
    """A function's frames; places are numbers of tensors, and those before a place are computed anew and thrown away.

    Args:
        batches: `batches(epoch)` yields (F, D) tensors, the same ones whenever it is called with the same epoch.
    """

    def __init__(self, batches: Callable[[int], Iterator[Tensor]]) -> None:
        self.batches = batches

    def start(self, epoch: int, place: int) -> Iterator[tuple[int, Tensor]]:
        """See `FrameSource`."""
        number = 0
        for number, frames in enumerate(self.batches(epoch), start=1):
            if number > place:
                yield number, frames
        if number < place:
            raise ValueError(f"{_of_rank(epoch)} has {number} batches, {place} were taken before the interruption: {_NOT_THE_SAME}")


class CheckedFrames(FrameSource):
    """The frames of another source as float32 on a device, refused where they are not finite or not (F, D) with one D.

    Attributes:
        dim: D; 0 until the first frames have come.
    """

    def __init__(self, source: FrameSource, device: torch.device) -> None:
        self.source, self.device, self.dim = source, device, 0

    def start(self, epoch: int, place: int) -> Iterator[tuple[int, Tensor]]:
        """See `FrameSource`.

        Raises:
            ValueError: names the epoch, the batch and what is wrong.
        """
        for after, frames in self.source.start(epoch, place):
            what = f"features of epoch {epoch}, batch {after - 1}"
            if frames.dim() != 2 or not frames.is_floating_point() or frames.shape[1] != (self.dim or frames.shape[1]):
                raise ValueError(
                    f"{what}: {frames.dtype} of shape {tuple(frames.shape)}, floating point (frames, {self.dim or 'dimensions'}) is needed"
                )
            check_finite(frames, what)
            self.dim = frames.shape[1]
            yield after, frames.detach().to(self.device, torch.float32)


class FrameStream:
    """This rank's frames, epoch after epoch, in pieces of any size.

    Nothing is read before the first `take`.

    Args:
        source: of the frames.
        epoch, place, offset: where to start: so many frames after that place of that epoch.
    """

    def __init__(self, source: FrameSource, epoch: int, place: int = 0, offset: int = 0) -> None:
        self._source, self._epoch, self._after, self._to_skip = source, epoch, place, offset
        self._before = place  # the place before the tensor that `_rest` is of; `_after` is that behind it
        self._current: Iterator[tuple[int, Tensor]] | None = None
        self._rest: Tensor | None = None  # of the last fetched tensor, not yet taken
        self._size = 0  # of the last fetched tensor, frames
        self._any = place > 0 or offset > 0  # whether this epoch has a frame

    @property
    def position(self) -> tuple[int, int, int]:
        """(epoch, place, offset) of the first frame not yet taken."""
        if self._rest is None or not len(self._rest):
            return self._epoch, self._after, self._to_skip
        return self._epoch, self._before, self._size - len(self._rest)

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
        """The next tensor of this epoch or of the next one that holds a frame, without the frames that are still to be skipped."""
        while True:
            if self._current is None:
                self._current = self._source.start(self._epoch, self._after)
            for after, part in self._current:
                self._before, self._after, self._size = self._after, after, len(part)
                skipped, self._to_skip = self._to_skip, 0
                if skipped > len(part):
                    raise ValueError(
                        f"{_of_rank(self._epoch)} has {len(part)} frames where {skipped} were taken before the interruption: {_NOT_THE_SAME}"
                    )
                if skipped < len(part):
                    self._any = True
                    return part[skipped:]
            if self._to_skip:
                raise ValueError(
                    f"{_of_rank(self._epoch)} ends where {self._to_skip} frames were taken before the interruption: {_NOT_THE_SAME}"
                )
            if not self._any:
                raise ValueError(f"features: epoch {self._epoch} holds no frame for rank {distributed.rank()}, at least 1 is needed")
            self._epoch, self._after, self._any, self._current = self._epoch + 1, 0, False, None


_NOT_THE_SAME = "they are not the same features"


def _of_rank(epoch: int) -> str:
    return f"features: epoch {epoch} of rank {distributed.rank()}"


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

    @property
    def dim(self) -> int:
        """Numbers per frame; at least one frame must have been shown."""
        return self._frames[0].shape[1]

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

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors to go on from; forgets what will not be part of the sample."""
        self._keep_lowest()
        return {
            "keys": self._keys[0],
            "frames": self._frames[0],
            "limit": self._limit,
            "num_shown": self.num_shown,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._keys, self._frames, self._held = [state["keys"]], [state["frames"]], len(state["keys"])
        self._limit, self.num_shown = state["limit"], state["num_shown"]
        self._generator.set_state(state["generator"])

    def _keep_lowest(self) -> None:
        keys, frames = torch.cat(self._keys), torch.cat(self._frames)
        if len(keys) > self.capacity:
            chosen = keys.topk(self.capacity, largest=False).indices
            keys, frames = keys[chosen], frames[chosen]
            self._limit = keys.max().item()
        self._keys, self._frames, self._held = [keys], [frames], len(keys)
