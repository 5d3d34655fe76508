"""Validation: the same masks and crops every time, so that two losses can be compared."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from k2ssl import distributed
from k2ssl.train.metrics import MetricSums
from k2ssl.train.precision import autocast
from k2ssl.train.sharding import is_sharded
from k2ssl.train.update import draws_of

if TYPE_CHECKING:
    from k2ssl.train.contract import Batch
    from k2ssl.train.trainer import Trainer


def is_time_to_validate(trainer: Trainer) -> bool:
    """Whether the present step is one after which the settings want a validation."""
    every = trainer.config.valid_every
    return every > 0 and trainer.progress.step % every == 0


def validate_once(trainer: Trainer, loader: Iterable[Batch] | None) -> None:
    """Validate the trainer's present step and log it, unless that was done or there is nothing to validate with. The step's checkpoint gets
    the score; where there is none, it is written if the score is among the best. Called by all ranks."""
    step, started, checkpoints = trainer.progress.step, time.monotonic(), trainer.checkpoints
    if loader is None or trainer.validated == step:
        return
    values = trainer.validate(loader)
    trainer.meter.started += time.monotonic() - started  # this was no training
    if not values:
        trainer.stopping = True  # whoever goes on validates first
        return
    score = values[trainer.score_by]
    trainer.validated, trainer.score = step, score
    if trainer.log is not None:
        trainer.log.valid(step, values)
    if trainer.saved == step:
        with distributed.failing_together():
            if checkpoints is not None:
                checkpoints.rate(step, score)
    elif distributed.broadcast_object(checkpoints is not None and checkpoints.is_among_best(score)):
        trainer.save()


@torch.no_grad()
def validate(trainer: Trainer, loader: Iterable[Batch]) -> dict[str, float]:
    """Means over all batches of all ranks, and what the trainer's evaluation adds. Training is not disturbed: its clock is put back.

    Empty where a request to stop came in between: what was summed up is worth nothing then. (Sharded ranks, which compute together, go
    on to the end.)

    Raises:
        ValueError: there is no batch.
    """
    model, clock = trainer.model, trainer.model.clock
    sharded = is_sharded(trainer.update.parallel)
    net = trainer.update.parallel if sharded else model
    before: Any = clock.state_dict()  # type: ignore[union-attr]
    metrics = MetricSums(trainer.device)
    evaluation = trainer.evaluation() if trainer.evaluation is not None else None
    count, stopped = 0, False
    model.eval()
    try:
        with _averaged(trainer):
            for number, batch in enumerate(loader):
                clock.seed(*draws_of(trainer.seed, number))  # type: ignore[operator, union-attr]
                model.check_batch(batch)  # type: ignore[operator]
                moved = batch.to(trainer.device)
                with autocast(trainer.update.dtype, trainer.device):
                    metrics.add(net(moved))
                    if evaluation is not None:
                        evaluation.add(moved)
                count += 1
                stopped = trainer.stop.requested and not sharded
                if stopped:
                    break
    finally:
        model.train()
        clock.load_state_dict(before)  # type: ignore[union-attr]
    counts = distributed.all_reduce_sum(torch.tensor([count, int(stopped)]))
    if not counts[0]:
        raise ValueError("validation: the loader gave no batch on any rank")
    if counts[1]:
        return {}
    values = metrics.reduce()
    return values if evaluation is None else {**values, **evaluation.result()}


@contextmanager
def _averaged(trainer: Trainer) -> Iterator[None]:
    """Inside, every rank's model has the averaged weights, if validation is to use them and there is an average yet."""
    if not trainer.config.valid_average or not distributed.broadcast_object(trainer.average is not None and trainer.average.step > 0):
        yield
        return
    weights = [value for value in trainer.model.state_dict().values() if value.is_floating_point()]
    own = [value.clone() for value in weights]
    try:
        with nullcontext() if trainer.average is None else trainer.average.swapped_in(trainer.model):
            for value in weights:
                distributed.broadcast(value)
            yield
    finally:
        for value, before in zip(weights, own, strict=True):
            value.copy_(before)
