"""Seconds of audio as the unit of a batch: how an update is dealt to ranks and micro-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class BatchConfig:
    """How much audio an update takes, whatever the number of GPUs.

    Attributes:
        seconds_per_update: audio of one optimizer step over all ranks, s; 4800 is the published 8 x 600.
        seconds_per_micro_batch: most audio that one rank takes at a time, s; what fits into its memory. Updates are accumulated over as
            many micro-batches as needed, all of one size.
        reference_seconds: audio per step for which the model's own schedules (dropouts, balancers) were written, s; they advance by
            seconds_per_update / reference_seconds at every step.

    Raises:
        ValueError: a value out of range.
    """

    seconds_per_update: float = 4800.0
    seconds_per_micro_batch: float = 600.0
    reference_seconds: float = 600.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"BatchConfig: {name} is {value}, a finite number of seconds > 0 is needed")
        if self.seconds_per_update > 1e6 * self.seconds_per_micro_batch:
            raise ValueError(
                f"BatchConfig: seconds_per_micro_batch is {self.seconds_per_micro_batch}, at least a millionth of seconds_per_update,"
                f" {self.seconds_per_update}, is needed"
            )


@dataclass(frozen=True)
class BatchPlan:
    """What `BatchConfig` means for so many ranks.

    Attributes:
        world_size: ranks.
        accumulation: micro-batches per rank and update.
        micro_batch_seconds: audio of each, at most, s.
        seconds_per_update: the product of the three, s.
        count_per_step: by how much the adjusted batch count advances at each step. Source: upstream's get_adjusted_batch_count, steps *
            micro-batches * max_duration * world_size / ref_duration.
    """

    world_size: int
    accumulation: int
    micro_batch_seconds: float
    seconds_per_update: float
    count_per_step: float

    @classmethod
    def of(cls, config: BatchConfig, world_size: int) -> BatchPlan:
        """The fewest micro-batches that keep within `seconds_per_micro_batch`; seconds per update are kept exactly."""
        # the tolerance keeps 4800 / (8 * 600.0000001) at one micro-batch
        accumulation = max(1, math.ceil(config.seconds_per_update / (config.seconds_per_micro_batch * world_size) - 1e-9))
        return cls(
            world_size=world_size,
            accumulation=accumulation,
            micro_batch_seconds=config.seconds_per_update / (accumulation * world_size),
            seconds_per_update=config.seconds_per_update,
            count_per_step=config.seconds_per_update / config.reference_seconds,
        )

    def text(self) -> str:
        """One line for people."""
        return (
            f"{self.seconds_per_update:g} s of audio per update = {self.world_size} rank{'s' * (self.world_size > 1)} x "
            f"{self.accumulation} micro-batch{'es' * (self.accumulation > 1)} x {self.micro_batch_seconds:g} s"
        )

    def same_batches(self, saved: Mapping[str, Any]) -> bool:
        """Whether the loader of the saved plan gave the same batches as ours."""
        return all(saved.get(name) == getattr(self, name) for name in ("world_size", "micro_batch_seconds"))

    def changes(self, saved: Mapping[str, Any]) -> list[str]:
        """What differs from a saved plan and matters for training, one line each."""
        found = []
        if saved.get("seconds_per_update") != self.seconds_per_update:
            found.append(
                f"seconds per update were {saved.get('seconds_per_update')}, they are {self.seconds_per_update:g} now: learning rate and "
                "batch no longer match as they did"
            )
        if saved.get("count_per_step") != self.count_per_step:
            found.append(
                f"the adjusted batch count advanced by {saved.get('count_per_step')} a step, it advances by {self.count_per_step:g} now"
            )
        if not self.same_batches(saved):
            found.append(
                f"{saved.get('world_size')} ranks x {saved.get('accumulation')} micro-batches x {saved.get('micro_batch_seconds')} s became "
                f"{self.world_size} x {self.accumulation} x {self.micro_batch_seconds:g} s: the rest of the epoch is cut into other batches"
            )
        return found
