"""Sums of what models report, kept on the device until somebody wants to read them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from k2ssl.batch import LossOutput
from k2ssl.distributed import all_gather_rows, all_reduce_sum

_OURS = ("loss", "num_targets", "dropped_batches")
_SCALAR = -1  # instead of a length, where layouts are compared


class MetricSums:
    """Adds up `LossOutput`s over micro-batches without waiting for the device, then over ranks, and derives what people read.

    Sums are kept in float64 (float32 on "mps", which has no float64): a month of counts stays exact. A micro-batch whose loss is not
    finite is left out with all its numbers and counted instead: one bad batch must not hide all others of its interval.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """
        Args:
            device: where outputs lie.
        """
        self._device = torch.device(device)
        self._dtype = torch.float32 if self._device.type == "mps" else torch.float64
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, output: LossOutput) -> None:
        """Add the sums of one micro-batch on this rank. No host synchronisation.

        Raises:
            ValueError: a metric has a name that is taken, two dimensions or more, or another length than before; nothing is added then.
        """
        self._check(output.metrics)
        finite = torch.isfinite(output.loss)
        for name, value in {"loss": output.loss, "num_targets": output.num_targets, **output.metrics}.items():
            self._add(name, torch.where(finite, value, 0))
        self._add("dropped_batches", ~finite)

    def reduce(self) -> dict[str, float]:
        """Sum over ranks, copy to the host, clear, and return the same values on every rank.

        - `loss`: per target; `num_targets` itself; `dropped_batches`: micro-batches left out because their loss was not finite.
        - for metrics `num_X`: `loss_X` and `correct_X` become the means `loss_X` and `accuracy_X`.
        - a histogram H of counts becomes `perplexity_H` (2 to the entropy of its shares) and `classes_H` (how many are not empty).
        - a scalar `count_X`: itself.
        - any other scalar: per target.

        A mean over nothing is NaN. All ranks must call this together; they may have added different metrics, or none: first they tell
        each other what they have, by exchanges of the same number and order whatever that is, so that no rank can be left waiting. Ranks
        exchange CPU tensors.

        Raises:
            ValueError: a histogram has different lengths on different ranks; raised on all of them.
        """
        layout = _agree({name: value.numel() if value.ndim else _SCALAR for name, value in self._sums.items()})
        sizes = [abs(length) for length in layout.values()]
        empty = [torch.zeros(size, dtype=self._dtype, device=self._device) for size in sizes]
        parts = [self._sums[name].flatten() if name in self._sums else zeros for name, zeros in zip(layout, empty, strict=True)]
        summed = all_reduce_sum(torch.cat(parts).cpu().double()).split(sizes)
        self._sums = {}
        named = list(zip(layout.items(), summed, strict=True))
        scalars = {name: part.item() for (name, length), part in named if length == _SCALAR}
        histograms = {name: part for (name, length), part in named if length != _SCALAR}
        return derive(scalars, histograms)

    def state_dict(self) -> dict[str, Any]:
        """The sums of this rank since the last `reduce`, on the CPU. Waits for the device."""
        return {"sums": {name: value.cpu().clone() for name, value in self._sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: it is the state of something else.
        """
        if set(state) != {"sums"}:
            raise ValueError(f"MetricSums.load_state_dict: keys are {sorted(state)}, allowed is exactly sums")
        self._sums = {name: value.to(self._device, self._dtype, copy=True) for name, value in state["sums"].items()}

    def _add(self, name: str, value: Tensor) -> None:
        if name not in self._sums:
            self._sums[name] = torch.zeros(value.shape, dtype=self._dtype, device=self._device)
        self._sums[name] += value

    def _check(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value in metrics.items():
            if name in _OURS:
                raise ValueError(f"MetricSums: a metric is named {name!r}, allowed are names other than {', '.join(_OURS)}")
            if value.ndim > 1:
                raise ValueError(f"MetricSums: metric {name!r} has shape {tuple(value.shape)}, allowed are scalars and histograms (K,)")
            if name in self._sums and self._sums[name].shape != value.shape:
                raise ValueError(
                    f"MetricSums: metric {name!r} has shape {tuple(value.shape)}, before it had {tuple(self._sums[name].shape)}"
                )


def derive(scalars: Mapping[str, float], histograms: Mapping[str, Tensor]) -> dict[str, float]:
    """What people read, from sums over all ranks; see `MetricSums.reduce`."""
    targets = scalars["num_targets"]
    values = {"loss": _ratio(scalars["loss"], targets), "num_targets": targets, "dropped_batches": scalars["dropped_batches"]}
    for name, value in scalars.items():
        kind, _, group = name.partition("_")
        if name in _OURS or (kind == "num" and (f"loss_{group}" in scalars or f"correct_{group}" in scalars)):
            continue
        if kind in ("loss", "correct") and f"num_{group}" in scalars:
            mean = f"accuracy_{group}" if kind == "correct" else name
            values[mean] = _ratio(value, scalars[f"num_{group}"])
        elif kind == "count":
            values[name] = value
        else:
            values[name] = _ratio(value, targets)
    for name, counts in histograms.items():
        values[f"perplexity_{name}"] = perplexity(counts)
        values[f"classes_{name}"] = float((counts > 0).sum())
    return values


def perplexity(counts: Tensor) -> float:
    """2 to the entropy, in bits, of the shares of (K,) counts: K if all are equal, 1 if one has everything, NaN for no counts."""
    shares = counts.double() / counts.double().sum()
    return math.exp(torch.special.entr(shares).sum().item())


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan


def _agree(own: Mapping[str, int]) -> dict[str, int]:
    """Names and lengths of all ranks together, in one order everywhere."""
    line = bytearray(json.dumps(own).encode() + b"\n")
    everyone = bytes(all_gather_rows(torch.frombuffer(line, dtype=torch.uint8)).tolist())
    together = dict.fromkeys(_OURS, _SCALAR)
    for rank, text in enumerate(everyone.splitlines()):
        for name, length in json.loads(text).items():
            if together.setdefault(name, length) != length:
                raise ValueError(
                    f"MetricSums: metric {name!r} has length {length} on rank {rank} and {together[name]} before (-1: a scalar)"
                )
    return together
