"""Learning rates over batches and epochs: Eden, Eden2, tri-stage and polynomial decay."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol


class HasGroups(Protocol):
    """The part of an optimizer that a schedule writes to."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


class LearningRateSchedule(ABC):
    """Multiplies every parameter group's own base rate by one factor, so that rates per module keep their ratios.

    A group's base rate is its "lr" when the first schedule takes it over, kept under "initial_lr" and thus saved with the optimizer.
    Building a schedule sets the rates of batch 0; call `advance` before `optimizer.step`.

    Args:
        optimizer: whose groups' "lr" to write.
    """

    def __init__(self, optimizer: HasGroups) -> None:
        self._optimizer = optimizer
        self.advance(0.0, 0.0)

    @abstractmethod
    def lr_factor(self, batch: float, epoch: float) -> float:
        """What base rates are multiplied by after `batch` optimizer steps and `epoch` epochs (both from 0); a pure function."""

    def advance(self, batch: float, epoch: float) -> None:
        """Write the rates of this moment into the groups.

        Raises:
            ValueError: `batch` or `epoch` is negative or not finite.
        """
        for field, value in (("batch", batch), ("epoch", epoch)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{type(self).__name__}.advance: {field} is {value}, a finite number >= 0 is needed")
        self.batch, self.epoch = float(batch), float(epoch)
        factor = self.lr_factor(self.batch, self.epoch)
        for group in self._optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    def state_dict(self) -> dict[str, float]:
        """Where the schedule stands; base rates are the optimizer's to save."""
        return {"batch": self.batch, "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where the saved schedule stood, and write the rates; call it after the optimizer's own `load_state_dict`."""
        self.advance(state["batch"], state["epoch"])

    def _check(self, field: str, value: float, valid: bool, allowed: str) -> None:
        if not (math.isfinite(value) and valid):
            raise ValueError(f"{type(self).__name__}: {field} is {value}, {allowed} is needed")


class Eden(LearningRateSchedule):
    """((b^2 + B^2) / B^2)^(-1/4) * ((e^2 + E^2) / E^2)^(-1/4) * w for batch b and epoch e, w rising linearly in the warm-up.

    Args:
        optimizer: whose groups' "lr" to write.
        lr_batches: B, batches; the rate falls with 1/sqrt(b) well beyond it.
        lr_epochs: E, epochs, likewise.
        warmup_batches: w reaches 1 at this batch; 0 for no warm-up.
        warmup_start: w at batch 0, between 0 and 1.

    Raises:
        ValueError: an argument out of range.

    Source: arXiv 2310.11230, section 3.6. Pre-training takes 7500, 10.5, 5000, 0; fine-tuning 100 000, 100, 0.
    """

    def __init__(
        self, optimizer: HasGroups, lr_batches: float, lr_epochs: float, warmup_batches: float = 500.0, warmup_start: float = 0.5
    ) -> None:
        self._check("lr_batches", lr_batches, lr_batches > 0, "a finite number > 0")
        self._check("lr_epochs", lr_epochs, lr_epochs > 0, "a finite number > 0")
        self._check("warmup_batches", warmup_batches, warmup_batches >= 0, "a finite number >= 0")
        self._check("warmup_start", warmup_start, 0 <= warmup_start <= 1, "a number in [0, 1]")
        self.lr_batches, self.lr_epochs = lr_batches, lr_epochs
        self.warmup_batches, self.warmup_start = warmup_batches, warmup_start
        super().__init__(optimizer)

    def lr_factor(self, batch: float, epoch: float) -> float:
        decay = (1.0 + (batch / self.lr_batches) ** 2) ** -0.25 * (1.0 + (epoch / self.lr_epochs) ** 2) ** -0.25
        return decay * _warmup(batch, self.warmup_batches, self.warmup_start)


class Eden2(LearningRateSchedule):
    """((b^2 + B^2) / B^2)^(-1/2) * w for batch b: Eden without epochs, falling with 1/b.

    Args:
        optimizer, lr_batches, warmup_batches, warmup_start: as of `Eden`.

    Raises:
        ValueError: an argument out of range.

    Source: upstream's `Eden2`.
    """

    def __init__(self, optimizer: HasGroups, lr_batches: float, warmup_batches: float = 500.0, warmup_start: float = 0.5) -> None:
        self._check("lr_batches", lr_batches, lr_batches > 0, "a finite number > 0")
        self._check("warmup_batches", warmup_batches, warmup_batches >= 0, "a finite number >= 0")
        self._check("warmup_start", warmup_start, 0 <= warmup_start <= 1, "a number in [0, 1]")
        self.lr_batches, self.warmup_batches, self.warmup_start = lr_batches, warmup_batches, warmup_start
        super().__init__(optimizer)

    def lr_factor(self, batch: float, epoch: float) -> float:
        return (1.0 + (batch / self.lr_batches) ** 2) ** -0.5 * _warmup(batch, self.warmup_batches, self.warmup_start)


class TriStage(LearningRateSchedule):
    """Linear warm-up from `init_scale` to 1, hold at 1, exponential decay to `final_scale`, which then stays.

    Args:
        optimizer: whose groups' "lr" to write.
        warmup_batches, hold_batches, decay_batches: lengths of the stages; each may be 0, but not all. `from_ratios` finds them from
            the length of training.
        init_scale, final_scale: factors at batch 0 and at the end, in (0, 1] (init_scale may be 0).

    Raises:
        ValueError: an argument out of range.

    Source: fairseq's tri-stage schedule, used to fine-tune wav2vec 2.0 and HuBERT.
    """

    def __init__(
        self,
        optimizer: HasGroups,
        warmup_batches: float,
        hold_batches: float,
        decay_batches: float,
        init_scale: float = 0.01,
        final_scale: float = 0.01,
    ) -> None:
        lengths = (warmup_batches, hold_batches, decay_batches)
        for field, value in zip(("warmup_batches", "hold_batches", "decay_batches"), lengths, strict=True):
            self._check(field, value, value >= 0 and sum(lengths) > 0, "a finite number >= 0 (not all three 0)")
        self._check("init_scale", init_scale, 0 <= init_scale <= 1, "a number in [0, 1]")
        self._check("final_scale", final_scale, 0 < final_scale <= 1, "a number in (0, 1]")
        self.warmup_batches, self.hold_batches, self.decay_batches = lengths
        self.init_scale, self.final_scale = init_scale, final_scale
        super().__init__(optimizer)

    @classmethod
    def from_ratios(
        cls,
        optimizer: HasGroups,
        max_batches: float,
        phase_ratio: tuple[float, float, float] = (0.1, 0.4, 0.5),
        init_scale: float = 0.01,
        final_scale: float = 0.01,
    ) -> TriStage:
        """Stages as shares of `max_batches`, rounded down to whole batches.

        Raises:
            ValueError: `phase_ratio` is negative somewhere or does not sum to 1, or `max_batches` is not positive.
        """
        return cls(optimizer, *stage_lengths(max_batches, phase_ratio), init_scale, final_scale)

    def lr_factor(self, batch: float, epoch: float) -> float:
        if batch < self.warmup_batches:
            return _warmup(batch, self.warmup_batches, self.init_scale)
        decayed = batch - self.warmup_batches - self.hold_batches
        if decayed < 0:
            return 1.0
        if decayed >= self.decay_batches:
            return self.final_scale
        return self.final_scale ** (decayed / self.decay_batches)


class Polynomial(LearningRateSchedule):
    """Linear warm-up from 0 to 1, then (1 - end_scale) * remaining^power + end_scale, where `remaining` falls linearly from 1 to 0.

    Args:
        optimizer: whose groups' "lr" to write.
        warmup_batches: the factor reaches 1 at this batch; 0 for no warm-up.
        max_batches: the factor reaches `end_scale` at this batch and stays; more than `warmup_batches`.
        power: 1 for a straight line.
        end_scale: in [0, 1].

    Raises:
        ValueError: an argument out of range.

    Source: fairseq's polynomial decay; HuBERT Base pre-training takes 32 000 batches of warm-up, power 1, end 0.
    """

    def __init__(self, optimizer: HasGroups, warmup_batches: float, max_batches: float, power: float = 1.0, end_scale: float = 0.0) -> None:
        self._check("warmup_batches", warmup_batches, warmup_batches >= 0, "a finite number >= 0")
        self._check("max_batches", max_batches, max_batches > warmup_batches, f"a finite number > warmup_batches ({warmup_batches})")
        self._check("power", power, power > 0, "a finite number > 0")
        self._check("end_scale", end_scale, 0 <= end_scale <= 1, "a number in [0, 1]")
        self.warmup_batches, self.max_batches, self.power, self.end_scale = warmup_batches, max_batches, power, end_scale
        super().__init__(optimizer)

    def lr_factor(self, batch: float, epoch: float) -> float:
        if batch < self.warmup_batches:
            return _warmup(batch, self.warmup_batches, 0.0)
        remaining = max(0.0, (self.max_batches - batch) / (self.max_batches - self.warmup_batches))
        return (1.0 - self.end_scale) * remaining**self.power + self.end_scale


def stage_lengths(max_batches: float, phase_ratio: tuple[float, float, float]) -> tuple[float, float, float]:
    """Lengths in whole batches of the three stages that share `max_batches` in the given ratio.

    Raises:
        ValueError: `phase_ratio` is negative somewhere or does not sum to 1, or `max_batches` is not positive.
    """
    if not (math.isfinite(max_batches) and max_batches > 0):
        raise ValueError(f"TriStage: max_batches is {max_batches}, a finite number > 0 is needed")
    if len(phase_ratio) != 3 or min(phase_ratio) < 0 or not math.isclose(sum(phase_ratio), 1.0, abs_tol=1e-6):
        raise ValueError(f"TriStage: phase_ratio is {phase_ratio}, three numbers >= 0 that sum to 1 are needed")
    # the tolerance keeps 0.29 * 100 = 28.999999999999996 at 29 batches
    warmup, hold, decay = (float(math.floor(max_batches * ratio + 1e-6)) for ratio in phase_ratio)
    return warmup, hold, decay


def _warmup(batch: float, length: float, start: float) -> float:
    """Rises linearly from `start` at batch 0 to 1 at batch `length`."""
    return 1.0 if batch >= length else start + (1.0 - start) * (batch / length)
