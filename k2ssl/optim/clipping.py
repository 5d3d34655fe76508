"""Gradient clipping against the running median of recent gradient norms, without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_EARLY_STEPS = (10, 20, 40)  # first estimates of the threshold, before a whole period of norms is known
_EARLY_SLACK = 2.0  # norms change rapidly at first, so early thresholds are that much more generous


class RunningMedianClipper:
    """Scales gradients down to `scale` times the median norm of the last `period` steps.

    The norms, the threshold and the counters live on the device of the parameters. The host only knows the number of steps, which
    decides when the threshold is renewed: at every multiple of `period`, and early at steps 10, 20 and 40 (below `period`) with
    twice the value. Step 0 is neither recorded nor clipped. The median of n sorted norms is entry 2 * (n // 4), counted from 0.

    A step whose norm is not finite is answered with (0, False): the caller drops its gradients. A median that is not finite or zero
    leaves the threshold as it was; `report` tells, and it is for the training loop to decide whether to go on.

    Args:
        scale: threshold in units of the median norm; None never scales but still drops steps that are not finite.
        period: how many norms are kept, in steps.
        num_parameters: how many norms each step brings (P).
        like: any tensor of the dtype and device to use.

    Source: ScaledAdam of arXiv 2310.11230 (`clipping_scale`, `clipping_update_period`).
    """

    def __init__(self, scale: float | None, period: int, num_parameters: int, like: Tensor) -> None:
        self.scale, self.period, self.step = scale, period, 0
        self._state = {
            "norms": like.new_zeros(period),
            "threshold": like.new_tensor(float("inf")),
            "last_norm": like.new_zeros(()),
            "clipped": like.new_zeros((), dtype=torch.int64),
            "non_finite": like.new_zeros((), dtype=torch.int64),
        }
        self._culprits = like.new_zeros(num_parameters)

    def __call__(self, norms: Tensor, found_inf: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Account for one step.

        Args:
            norms: (P,) gradient norm of every parameter, in the units that are to be compared.
            found_inf: scalar; unless it is zero, the step counts as one whose norm is infinite.

        Returns:
            factor: scalar in [0, 1] for the gradients, and finite: scalar bool, False where the gradients must be replaced by zero
            (a factor alone would not do: zero times infinity is not zero).
        """
        state = self._state
        total = torch.linalg.vector_norm(norms)
        if found_inf is not None:
            total = torch.where(found_inf == 0, total, float("inf"))
        finite = torch.isfinite(total)
        if self.step > 0:
            state["norms"][self.step % self.period] = total
            self._renew_threshold()
        self.step += 1
        factor = torch.where(finite, (state["threshold"] / (total + 1e-20)).clamp(max=1.0), 0.0)
        clipped = factor < 1.0
        state["last_norm"] = total
        state["clipped"] += clipped & finite
        state["non_finite"] += ~finite
        self._culprits = torch.where(clipped, norms, self._culprits)
        return factor, finite

    def _renew_threshold(self) -> None:
        if self.scale is None:
            return
        early = self.step in _EARLY_STEPS and self.step < self.period
        if not early and self.step % self.period != 0:
            return
        median = _median(self._recorded(self.step))
        threshold = self.scale * median * (_EARLY_SLACK if early else 1.0)
        usable = torch.isfinite(threshold) & (threshold > 0)
        self._state["threshold"] = torch.where(usable, threshold, self._state["threshold"])

    def _recorded(self, last_step: int) -> Tensor:
        """Norms of the steps 1 to `last_step`, at most the latest `period` of them."""
        norms = self._state["norms"]
        return norms if last_step >= self.period else norms[1 : last_step + 1]

    def report(self, names: list[str], num_culprits: int = 5) -> dict[str, Any]:
        """What happened so far, as plain numbers; waits for the device.

        Args:
            names: names of the P parameters.
            num_culprits: how many parameters to name at most.

        Returns:
            steps, clipped, non_finite: counts since the start; last_norm, median_norm, threshold: floats (inf or nan where they are
            so); dominating: for the last step that was scaled down or dropped, pairs of a parameter's name and its share of the
            squared norm, largest first (nan for gradients that were not finite, which come first).
        """
        state = {key: value.cpu() for key, value in self._state.items()}
        recorded = self._recorded(self.step - 1) if self.step > 1 else None
        squares = self._culprits.double().cpu() ** 2
        finite = torch.isfinite(squares)
        shares = torch.where(finite, squares / squares[finite].sum().clamp(min=1e-300), float("nan"))
        order = torch.where(finite, squares, float("inf")).argsort(descending=True, stable=True)[:num_culprits]
        return {
            "steps": self.step,
            "clipped": int(state["clipped"]),
            "non_finite": int(state["non_finite"]),
            "last_norm": float(state["last_norm"]),
            "median_norm": float("nan") if recorded is None else float(_median(recorded)),
            "threshold": float(state["threshold"]),
            "dominating": [(names[i], float(shares[i])) for i in order.tolist() if squares[i] != 0],
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything but the dominating parameters of the past; tensors and a number."""
        return {"step": self.step, **self._state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: saved with another number of norms.
        """
        if len(state["norms"]) != self.period:
            raise ValueError(f"clipping: norms has {len(state['norms'])} entries, clipping_update_period {self.period} needs as many")
        self.step = int(state["step"])
        for key, value in self._state.items():
            # a copy: the caller's tensors must not change as training goes on
            self._state[key] = state[key].detach().to(device=value.device, dtype=value.dtype, copy=True)


def _median(norms: Tensor) -> Tensor:
    """Entry 2 * (n // 4) of the sorted norms; those that are not finite sort last."""
    return norms.sort().values[2 * (len(norms) // 4)]
