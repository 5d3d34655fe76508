"""The factor on the loss that keeps small float16 gradients from vanishing, adjusted without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# After so many steps a scale below so much is doubled, whatever the number of steps since it was halved.
_RESCUES = ((400, 32.0), (100, 8.0))


class LossScale:
    """A power of two that the loss is multiplied by before the backward pass, and that gradients are divided by after it.

    It is halved by every step that was not accepted and doubled after `growth_interval` accepted ones in a row. A small scale recovers
    faster than that: at every 100th step it is doubled when below 8, at every 400th when below 32.

    All of it is on the device and nothing waits for it; ranks that agree on the steps agree on the scale. What it means when the scale
    becomes tiny all the same is for `Guard.check_log` to say.

    Args:
        device: where the scale is needed.
        init: first value.
        growth_interval: in accepted steps.

    Attributes:
        scale: scalar float32; a new tensor after every `update`.

    Raises:
        ValueError: an argument out of range.

    Source: torch's `GradScaler` with its defaults for growth and backoff; the first value of 1 and the recoveries are upstream's recipe.
    """

    def __init__(self, device: torch.device | str, init: float = 1.0, growth_interval: int = 2000) -> None:
        if not (math.isfinite(init) and init > 0):
            raise ValueError(f"LossScale: init is {init}, a finite number > 0 is needed")
        if growth_interval < 1:
            raise ValueError(f"LossScale: growth_interval is {growth_interval}, an integer >= 1 is needed")
        self.growth_interval = growth_interval
        self._init = init
        self.scale = torch.tensor(init, dtype=torch.float32, device=device)
        self._accepted = torch.zeros((), dtype=torch.int32, device=device)  # in a row, since the scale changed by itself

    @torch.no_grad()
    def update(self, accept: Tensor, step: int) -> None:
        """Account for one step.

        Args:
            accept: scalar bool on the scale's device, False where the step was dropped.
            step: how many steps were made, with this one.

        Raises:
            ValueError: `step` is less than 1.
        """
        if step < 1:
            raise ValueError(f"LossScale.update: step is {step}, the number of steps with this one, >= 1, is needed")
        accepted = torch.where(accept, self._accepted + 1, 0)
        grown = self.scale * 2
        grows = (accepted >= self.growth_interval) & torch.isfinite(grown)
        scale = torch.where(accept, torch.where(grows, grown, self.scale), self.scale * 0.5)
        self._accepted = torch.where(accepted >= self.growth_interval, 0, accepted)
        limit = next((limit for period, limit in _RESCUES if step % period == 0), 0.0)
        self.scale = torch.where(scale < limit, scale * 2, scale) if limit else scale

    def rescue(self) -> None:
        """Be at least the first value again: for a state that was saved while the scale was collapsing."""
        self.scale = self.scale.clamp(min=self._init)

    def state_dict(self) -> dict[str, Any]:
        """Tensors of what changes, on their device."""
        return {"scale": self.scale, "accepted": self._accepted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: keys are missing or unknown.
        """
        if set(state) != {"scale", "accepted"}:
            raise ValueError(f"LossScale.load_state_dict: keys are {sorted(state)}, allowed are exactly ['accepted', 'scale']")
        self.scale = state["scale"].to(self.scale, copy=True)
        self._accepted = state["accepted"].to(self._accepted, copy=True)
