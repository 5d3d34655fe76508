"""The worst batches through whole training steps before training, so that memory runs out now or not at all."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from k2ssl import distributed
from k2ssl.optim.shards import is_sharded_tensor
from k2ssl.train.memory import DoesNotFitError, PeakMemory, gibibytes, is_out_of_memory

_ADVICE = "lower the seconds of audio per micro-batch, drop the longest utterances, or turn on activation checkpointing"


class AudioBatch(Protocol):
    """What is asked of a batch; all of `k2ssl.batch` have it."""

    @property
    def audio(self) -> Tensor: ...

    @property
    def num_samples(self) -> int: ...


class Steps(Protocol):
    """What is asked of a trainer: whole optimizer steps, averaging included, and a state that can be put back."""

    model: nn.Module
    device: torch.device

    def train_step(self, batches: list[Any]) -> object: ...

    def update_average(self, now: bool = False) -> None: ...

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


@dataclass(frozen=True)
class PreflightRow:
    """One update.

    Attributes:
        name: what is special about its batches.
        utterances: in all micro-batches.
        micro_batches: how many.
        seconds: audio in all of them, padding not counted.
        longest: length to which the longest micro-batch is padded, seconds.
        peak_bytes: most memory in use during the update; of several ranks, the largest.
        took: seconds of time.
    """

    name: str
    utterances: int
    micro_batches: int
    seconds: float
    longest: float
    peak_bytes: int
    took: float

    def size(self) -> str:
        """For messages: "12 utterances, 81.3 s of audio, the longest 15.2 s, in 2 micro-batches"."""
        parts = f", in {self.micro_batches} micro-batches" if self.micro_batches > 1 else ""
        return f"{self.utterances} utterances, {self.seconds:.1f} s of audio, the longest {self.longest:.1f} s{parts}"


@dataclass(frozen=True)
class PreflightReport:
    """What `preflight` measured, in the order of the batches."""

    rows: tuple[PreflightRow, ...]

    @property
    def peak_bytes(self) -> int:
        """The largest peak."""
        return max(row.peak_bytes for row in self.rows)

    def text(self) -> str:
        """A table for people."""
        width = max(len("update"), *(len(row.name) for row in self.rows))
        head = f"{'update':{width}}  utterances  micro-batches  audio (s)  longest (s)  peak memory  time (s)"
        return "\n".join([head, *(_line(row, width) for row in self.rows)])


def preflight(
    trainer: Steps, batches: Iterable[tuple[str, Sequence[AudioBatch]]], *, sample_rate: int = 16000, limit_bytes: int | None = None
) -> PreflightReport:
    """Make one whole training step of every entry, and put everything back as it was, bit by bit.

    With several ranks every rank calls this with as many entries; peaks are the largest over the ranks. A rank that runs out of memory
    cannot tell the others, which wait for its gradients: it ends with the message, and torchrun ends them.

    The state to put back is kept in the memory of the CPU meanwhile, as it is while a checkpoint is written.

    Args:
        trainer: see `Steps`.
        batches: (name, micro-batches of one update) pairs, such as the longest utterances and the most utterances.
        sample_rate: of the audio, Hz.
        limit_bytes: memory that a step may take; None: what there is.

    Raises:
        DoesNotFitError: (a ValueError) a step does not fit; names the batch, its size and what to lower.
        ValueError: no batches.
    """
    saved = _on_host(trainer.state_dict())
    forked = [trainer.device] if trainer.device.type == "cuda" else []
    rows: list[PreflightRow] = []
    problem: str | None = None
    try:
        with torch.random.fork_rng(forked):
            for name, update in batches:
                row = _row(name, update, sample_rate)
                try:
                    if not rows:
                        trainer.train_step(list(update))  # the optimizer makes its state in its first step, too late to be measured
                    rows.append(_measured(trainer, update, row))
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    problem = f"preflight: the update {name!r} ({row.size()}) runs out of memory on {trainer.device}; {_ADVICE}"
                # outside of the handler, which would keep what the failed step had allocated
                if problem is None and limit_bytes is not None and rows[-1].peak_bytes > limit_bytes:
                    took, allowed = gibibytes(rows[-1].peak_bytes), gibibytes(limit_bytes)
                    problem = f"preflight: the update {name!r} ({row.size()}) takes {took}, {allowed} are allowed; {_ADVICE}"
                if problem is not None:
                    break
    finally:
        trainer.model.zero_grad(set_to_none=True)
        trainer.load_state_dict(saved)
        if trainer.device.type == "cuda":
            torch.cuda.empty_cache()  # blocks of sizes that may never be asked for again
    if problem is not None:
        raise DoesNotFitError(problem)
    if not rows:
        raise ValueError("preflight: batches is empty, at least one update is needed")
    return PreflightReport(tuple(rows))


def _row(name: str, update: Sequence[AudioBatch], sample_rate: int) -> PreflightRow:
    return PreflightRow(
        name=name,
        utterances=sum(batch.audio.shape[0] for batch in update),
        micro_batches=len(update),
        seconds=sum(batch.num_samples for batch in update) / sample_rate,
        longest=max(batch.audio.shape[1] for batch in update) / sample_rate,
        peak_bytes=0,
        took=0.0,
    )


def _measured(trainer: Steps, update: Sequence[AudioBatch], row: PreflightRow) -> PreflightRow:
    trainer.model.zero_grad(set_to_none=True)
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    began = time.perf_counter()
    with PeakMemory(trainer.device) as peak:
        trainer.train_step(list(update))
        trainer.update_average(now=True)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        largest = distributed.all_gather_rows(torch.tensor([peak.bytes])).max()
    return replace(row, peak_bytes=int(largest), took=time.perf_counter() - began)


def _on_host(value: Any) -> Any:
    """A copy that training does not change; tensors go to the memory of the CPU, where they do not count on the device."""
    if isinstance(value, Mapping):
        return {key: _on_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_host(item) for item in value)
    if isinstance(value, Tensor):
        value = value.detach()
        # a sharded tensor cannot leave its kind of device, and is small
        return value.clone() if is_sharded_tensor(value) else value.to("cpu", copy=True)
    return copy.deepcopy(value)


def _line(row: PreflightRow, width: int) -> str:
    return (
        f"{row.name:{width}}  {row.utterances:10}  {row.micro_batches:13}  {row.seconds:9.1f}  {row.longest:11.1f}"
        f"  {gibibytes(row.peak_bytes):>11}  {row.took:8.2f}"
    )
