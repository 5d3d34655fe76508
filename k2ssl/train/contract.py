"""What the training loop needs of batches and loaders, which are made elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Batch(Protocol):
    """What the loop needs of any of the batches of `k2ssl.batch`."""

    @property
    def ids(self) -> tuple[str, ...]: ...

    @property
    def num_samples(self) -> int: ...

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Any: ...


class Loader(Protocol):
    """What the loop needs of a loader; `k2ssl.data.batch_loader.BatchLoader` has it."""

    def __iter__(self) -> Iterator[Any]: ...

    def set_epoch(self, epoch: int) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def start_at(self, epoch: int, batches: int) -> None: ...


class Evaluation(Protocol):
    """Numbers of one validation beside its losses; see `Trainer`."""

    def add(self, batch: Any) -> None:
        """Take in a batch, on the device; the model has the weights that are validated and is in evaluation mode. No gradients."""

    def result(self) -> dict[str, float]:
        """The numbers over all ranks, by name; all ranks call this together, also those that had no batch."""


@dataclass(frozen=True)
class Made:
    """An update that was made.

    Attributes:
        step: its number, from 1.
        batch_count: adjusted batch count that it was made with.
        batches: this rank's micro-batches.
        loss_scale: the factor on its loss, on the device; None: there was none.
    """

    step: int
    batch_count: float
    batches: tuple[Batch, ...]
    loss_scale: Tensor | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(name for batch in self.batches for name in batch.ids)
