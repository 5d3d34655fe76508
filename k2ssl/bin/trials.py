"""What is tried before or instead of training: the worst batches, the time of a step, the largest micro-batch."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from k2ssl import distributed
from k2ssl.config import ConfigError, dump
from k2ssl.train.memory import available_bytes, gibibytes
from k2ssl.train.preflight import PreflightReport, preflight
from k2ssl.train.trainer import Trainer
from k2ssl.train.tuner import tune

if TYPE_CHECKING:
    from k2ssl.bin.training_run import Run
    from k2ssl.data.audio_dataset import Request
    from k2ssl.data.loader import BatchLoader

_WARM_UP = 5  # steps that are not timed: the first ones allocate memory and choose kernels
_TIMED = 50


@dataclass(frozen=True)
class PreflightConfig:
    """What is tried before training: whole steps with the worst batches of the epoch.

    Attributes:
        run: whether to try them.
        batches: so many batches from the beginning of the epoch are searched for the worst, by their durations alone.
        memory_limit_gib: memory that a step may take, GiB; 0: what the GPU, or the machine, has.
    """

    run: bool = True
    batches: int = 500
    memory_limit_gib: float = 0.0

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise ValueError(f"PreflightConfig: batches is {self.batches}, a whole number >= 1 is needed")
        if not (math.isfinite(self.memory_limit_gib) and self.memory_limit_gib >= 0):
            raise ValueError(f"PreflightConfig: memory_limit_gib is {self.memory_limit_gib}, a finite number >= 0 is needed")


def run_preflight(trainer: Trainer, loader: BatchLoader[Any], config: PreflightConfig) -> list[str]:
    """Whole steps with the worst batches; everything is as before afterwards.

    Returns:
        A table and a summary, for people.

    Raises:
        ValueError: a step does not fit into memory; names the batch and what to lower.
    """
    limit = _limit(trainer.device, config)
    report = measure_worst(trainer, loader, config.batches, limit)
    return [report.text(), f"largest peak {gibibytes(report.peak_bytes)} of {gibibytes(limit)}"]


def measure_worst(trainer: Trainer, loader: BatchLoader[Any], most_batches: int, limit_bytes: int | None) -> PreflightReport:
    """One update for each kind of worst batch, repeated for every micro-batch of an update."""
    from k2ssl.data.worst_batches import worst_requests

    worst = worst_requests(loader, most_batches)
    updates = ((name, [_readable(loader, request, worst.values())] * trainer.plan.accumulation) for name, request in worst.items())
    return preflight(trainer, updates, sample_rate=trainer.sample_rate, limit_bytes=limit_bytes)


def _readable(loader: BatchLoader[Any], request: Request, others: Iterable[Request]) -> Any:
    """The batch of a request; where nothing of it can be read, that of another one, since every rank makes as many updates.

    Raises:
        ValueError: none of them can be read.
    """
    refused: ValueError | None = None
    for one in (request, *others):
        try:
            return loader.read(one)
        except ValueError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def estimate(trainer: Trainer, loader: BatchLoader[Any], expected_steps: int) -> list[str]:
    """How long the run will take, from 50 steps on its own data, waiting for data included.

    Raises:
        ValueError: there is less than one update of data.
    """
    times, waits = [], []
    updates = _updates(trainer, loader)
    for _ in range(_WARM_UP + _TIMED):
        started = time.perf_counter()
        batches = next(updates)
        waits.append(time.perf_counter() - started)
        trainer.train_step(batches)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        times.append(time.perf_counter() - started)
    times, waits = times[_WARM_UP:], waits[_WARM_UP:]
    step = statistics.fmean(times)
    devices = distributed.world_size()
    unit = "GPU" if trainer.device.type == "cuda" else "CPU process"
    lines = [
        f"{len(times)} steps: {step:.3f} s each (median {statistics.median(times):.3f} s), {sum(waits) / sum(times):.1%} of it waiting for "
        f"data; {trainer.plan.seconds_per_update / step:,.0f} x real time; peak memory {gibibytes(trainer.memory.bytes)}"
    ]
    if expected_steps:
        hours = expected_steps * step / 3600
        lines.append(f"{expected_steps:,} steps will take {hours:,.2f} h = {hours * devices:,.2f} {unit}-hours on {devices} of these")
    else:
        lines.append("the length of the run is unknown: trainer.max_steps is 0 and a manifest has no summary of its hours")
    return lines


def tune_micro_batch(job: Any, make_run: Callable[[Any], Run], device: torch.device) -> list[str]:
    """The largest `trainer.batch.seconds_per_micro_batch` that fits, and the settings with it.

    Args:
        job: settings of a training program.
        make_run: a run, of a model of its own, from such settings.
        device: what has to suffice.

    Raises:
        ConfigError: several processes.
        ValueError: not even the smallest micro-batch fits.
    """
    if distributed.world_size() > 1:
        raise ConfigError("tune is True, which takes one process on one device: start it without torchrun")

    def measure(seconds: float) -> int:
        batch = replace(job.trainer.batch, seconds_per_update=seconds, seconds_per_micro_batch=seconds)
        trial = make_run(replace(job, trainer=replace(job.trainer, batch=batch)))
        return measure_worst(trial.trainer, trial.train_loader, job.preflight.batches, None).peak_bytes

    batch = job.trainer.batch
    if batch.seconds_per_update < 1:
        raise ConfigError(f"trainer.batch.seconds_per_update is {batch.seconds_per_update}, with tune at least 1 s is needed")
    start = max(1.0, min(batch.seconds_per_micro_batch, batch.seconds_per_update))
    tuned = tune(measure, _limit(device, job.preflight), start=start, most=batch.seconds_per_update)
    settings = replace(job, tune=False, trainer=replace(job.trainer, batch=replace(batch, seconds_per_micro_batch=float(tuned.seconds))))
    return [tuned.text(), "settings with it, to be saved as a file and given to the program:", dump(settings)]


def _updates(trainer: Trainer, loader: BatchLoader[Any]) -> Iterator[list[Any]]:
    """Micro-batches of one update after the other, epoch after epoch."""
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        batches, count = iter(loader), 0
        while group := list(islice(batches, trainer.plan.accumulation)):
            yield group
            count += 1
        if not count:
            raise ValueError(f"epoch {epoch} has no batch for every rank")
        epoch += 1


def _limit(device: torch.device, config: PreflightConfig) -> int:
    return int(config.memory_limit_gib * 2**30) if config.memory_limit_gib else available_bytes(device)
