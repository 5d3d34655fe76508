"""Whole cuts as padded batches; and what every dataset is asked for and returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from lhotse.cut import Cut
from torch.utils.data import Dataset

from k2ssl.batch import AudioBatch
from k2ssl.data.audio import AudioError, read_padded

B = TypeVar("B")


@dataclass(frozen=True)
class Request:
    """What a worker is asked for: the cuts of one batch, in one epoch."""

    epoch: int
    cuts: tuple[Cut, ...]


@dataclass(frozen=True)
class Loaded(Generic[B]):
    """What a worker returns.

    Attributes:
        batch: of the cuts that could be read; None if there is none.
        failures: (cut id, reason) of the others.
    """

    batch: B | None
    failures: tuple[tuple[str, str], ...] = ()

    def pin_memory(self) -> Loaded[B]:
        """The same in page-locked memory; DataLoader asks for it."""
        batch: Any = self.batch
        return self if batch is None else replace(self, batch=batch.pin_memory())


class BatchDataset(Dataset[Loaded[B]], Generic[B]):
    """Turns requests into batches; the base of all datasets here.

    Args:
        normalize: bring every utterance to zero mean and unit variance.
    """

    def __init__(self, normalize: bool = False) -> None:
        self.normalize = normalize

    def __getitem__(self, request: Request) -> Loaded[B]:
        """The batch asked for; cuts that cannot be read are left out of it and named."""
        raise NotImplementedError

    def row_seconds(self, durations: Sequence[float]) -> float:
        """Seconds of every row of a batch of cuts of these durations, s; here all are padded to the longest."""
        return max(durations)

    def identity(self) -> dict[str, Any]:
        """What two datasets must have in common to make the same batch of the same request: plain values by name."""
        return {"normalize": self.normalize}


class AudioDataset(BatchDataset[AudioBatch]):
    """Whole cuts, zero-padded at the end."""

    def __getitem__(self, request: Request) -> Loaded[AudioBatch]:
        audio, lens, read, failures = read_padded(request.cuts, self.normalize)
        batch = AudioBatch(audio, lens, tuple(cut.id for cut in read)) if read else None
        return Loaded(batch, as_pairs(failures))


def as_pairs(failures: list[AudioError]) -> tuple[tuple[str, str], ...]:
    """(cut id, reason) of each; exceptions with several arguments do not survive the way between processes."""
    return tuple((failure.cut_id, failure.reason) for failure in failures)
