"""Averages of a model's weights: kept while training, recovered for a range of steps, or taken over given models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class RunningAverage:
    """Mean of a model's weights over the steps since step 0, one sample every `period` steps, in float64 on the CPU.

    Parameters and persistent floating-point buffers are averaged; other buffers are those of the last update. Until the first update the
    weights are those that the model was made with, and `step` is 0.

    Args:
        model: as it is without a wrapper such as DistributedDataParallel, whose names differ; or its `state_dict`, put together where it
            is sharded.
        period: optimizer steps from one update to the next.

    Raises:
        ValueError: `period` is not a whole number >= 1.

    Source: icefall's `update_averaged_model`; there the first checkpoint turns the average into float32.
    """

    def __init__(self, model: nn.Module | Mapping[str, Tensor], period: int = 200) -> None:
        if type(period) is not int or period < 1:
            raise ValueError(f"RunningAverage: period is {period!r}, allowed is a whole number >= 1")
        self.period = period
        self.step = 0  # of the last update
        self._average = {name: _in_float64(value).clone() for name, value in _tensors(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module | Mapping[str, Tensor], step: int) -> None:
        """Call after optimizer step number `step`, counted from 1; acts at multiples of the period, and waits for the device then.

        `model` is the module, or its `state_dict` put together where it is sharded.
        """
        if step == 0 or step % self.period:
            return
        weight = (step - self.step) / step  # 1 the first time, whatever the step: the weights before it are not known
        for name, value in _tensors(model).items():
            average = self._average[name]
            if average.is_floating_point():
                average.mul_(1.0 - weight).add_(value.to("cpu"), alpha=weight)
            else:
                average.copy_(value)
        self.step = step

    def state_dict(self) -> dict[str, Any]:
        """{"step": of the last update, "model": float64 tensors by name}, the tensors being those that `update` changes: copy what must stay."""
        return {"step": self.step, "model": dict(self._average)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: it belongs to another model; nothing has been changed then.
        """
        model = state["model"]
        _check_same({"this model": self._average, "the saved average": model})
        wrong = [name for name, value in model.items() if value.dtype != self._average[name].dtype]
        if wrong:
            raise ValueError(f"RunningAverage: {wrong[0]} is {model[wrong[0]].dtype}, {self._average[wrong[0]].dtype} is needed")
        for name, value in model.items():
            self._average[name].copy_(value)
        self.step = int(state["step"])

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` has the averaged weights, rounded to its own types; afterwards its own again, bit by bit."""
        own = {name: value.clone() for name, value in _tensors(model).items()}
        try:
            _fill(model, self._average)
            yield
        finally:
            _fill(model, own)


def average_over_range(start: Mapping[str, Any] | None, end: Mapping[str, Any]) -> dict[str, Tensor]:
    """Mean of the weights over the steps from `start` (exclusive) to `end` (inclusive), recovered from their running averages.

    Exact up to float64 rounding where both averages have been updated with one period; the steps are those of their last updates.

    Args:
        start: content of a checkpoint, with `RunningAverage.state_dict()` under "average"; None means step 0.
        end: content of a later checkpoint of the same run.

    Returns:
        Name -> tensor, float64 on the CPU; buffers that are not floating-point are those of `end`.

    Raises:
        ValueError: a running average is missing or has never been updated, `start` is not before `end`, or the models differ.

    Source: icefall's `average_checkpoints_with_averaged_model`.
    """
    last, average = _running_average(end, "the end")
    if start is None:
        return {name: value.clone() for name, value in average.items()}
    first, before = _running_average(start, "the start")
    if first >= last:
        raise ValueError(f"the running average of the start goes to step {first}, that of the end to step {last}, which must be later")
    _check_same({"the start": before, "the end": average})
    return {
        # average + (average - before) * share, not a difference of two sums: steps may be many, weights small
        name: value + (value - before[name]) * (first / (last - first)) if value.is_floating_point() else value.clone()
        for name, value in average.items()
    }


def average_of(models: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Plain mean of state dictionaries, which are taken one after the other.

    Returns:
        Name -> tensor, float64 on the CPU; buffers that are not floating-point are those of the last model.

    Raises:
        ValueError: there are none, or they differ in names or shapes.
    """
    total: dict[str, Tensor] = {}
    count = 0
    for count, model in enumerate(models, start=1):
        if count == 1:
            total = {name: _in_float64(value).clone() for name, value in model.items()}
            continue
        _check_same({"model 1": total, f"model {count}": model})
        for name, value in model.items():
            if value.is_floating_point():
                total[name].add_(value.to("cpu"))
            else:
                total[name].copy_(value)
    if count == 0:
        raise ValueError("average_of: no models are given, at least one is needed")
    return {name: value / count if value.is_floating_point() else value for name, value in total.items()}


def _tensors(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    state = model.state_dict() if isinstance(model, nn.Module) else model
    return {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}


def _in_float64(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float64 if value.is_floating_point() else value.dtype)


@torch.no_grad()
def _fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in _tensors(model).items():
        value.copy_(values[name])


def _running_average(content: Mapping[str, Any], which: str) -> tuple[int, Mapping[str, Tensor]]:
    state = content.get("average")
    if state is None:
        raise ValueError(f"{which} has no running average; a training checkpoint that has been averaged is needed")
    if state["step"] == 0:
        raise ValueError(f"the running average of {which} has never been updated; a later checkpoint is needed")
    return int(state["step"]), state["model"]


def _check_same(models: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Two models, by what they are called in messages, have the same tensors."""
    (one, left), (two, right) = models.items()
    for name in [*left, *right]:
        if name not in left or name not in right:
            raise ValueError(f"the models differ: {name} is in {one if name in left else two} only")
        if left[name].shape != right[name].shape:
            raise ValueError(f"the models differ: {name} is {tuple(left[name].shape)} in {one}, {tuple(right[name].shape)} in {two}")
