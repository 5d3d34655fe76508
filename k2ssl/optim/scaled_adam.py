"""ScaledAdam: Adam whose step is proportional to each tensor's size, and which learns that size as well."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .clipping import RunningMedianClipper
from .stacks import ParameterStacks

_MAX_SCALE_STEP = 0.1  # a size update moves a tensor's size by at most a tenth
_WARM_CORRECTION = 0.99  # the second moment's bias correction is dropped once it would change less than one per cent


class ScaledAdam(Optimizer):
    """ScaledAdam with running-median gradient clipping.

    Per tensor with more than one element, on its gradient g after clipping:

    - v <- beta2 v + (1 - beta2) g^2; step = -lr * max(rms, param_min_rms) * g / (sqrt(v / bias correction) + eps), where rms is the
      tensor's root mean square, refreshed every `size_update_period` steps;
    - at those steps also p * s is added, where s is an Adam step of rate lr * scalar_lr_scale on the logarithm of the tensor's size,
      (whose gradient is sum(p * g)), within +-0.1, never growing the tensor past `param_max_rms`, never moving one below
      `param_min_rms`;
    - momentum comes last: m <- beta1 m + (1 - beta1) step; p <- p + m.

    Tensors of one element take plain Adam steps of rate lr * scalar_lr_scale and are kept within +-scalar_max.

    Each parameter group is clipped on its own, against the median norm of its recent gradients, in which every gradient is multiplied
    by its parameter's rms (scalar_lr_scale for one element). A step in which that norm is not finite counts as a step of zero gradients:
    the parameters coast on their momentum and no state is poisoned. Nothing waits for the device; `clipping_report` does.

    So does a step for which the attribute `found_inf` is a scalar tensor that is not zero: that is how a training loop drops a step of
    finite gradients, or one that other parameters' gradients spoiled. The attribute stays as it is, and is no part of the state.

    A parameter whose gradient is None is left alone, with all its state (its momentum rests too); it continues from there, with its own
    bias correction, when gradients come again. A group without any gradient does not take part in the step.

    The state is a few tensors per *shape*, not per parameter; parameters themselves are only stacked at size updates. Peak memory beyond
    the two moments is about three times the largest stack.

    Args:
        params: (name, parameter) pairs such as `model.named_parameters()`, or groups: dictionaries with such pairs in "params", or with
            "params" and "names", and any of the options below. One dtype (float32 or float64) and one device per group. Low precision
            is for autocast: float16 or bfloat16 parameters are refused.
        lr: relative step; about the relative change of a tensor per step.
        clipping_scale: clip at this many times the median norm; None never clips (steps that are not finite are dropped all the same).
        betas: decay of the momentum and of the second moment.
        scalar_lr_scale: factor on lr for one-element tensors and for the sizes of the others.
        eps: added to the root of the second moments.
        param_min_rms, param_max_rms: limits on the size that scales steps, and to which size updates may lead.
        scalar_max: limit on the absolute value of one-element tensors.
        size_update_period: steps from one size update to the next.
        clipping_update_period: steps from one renewal of the clipping threshold to the next; as many norms are remembered.

    Raises:
        ValueError: options out of range; names missing, empty, duplicate, or more or fewer than the parameters; a parameter listed twice;
            parameters of another dtype than float32 or float64; a group that mixes dtypes or devices (at the first step).

    Source: arXiv 2310.11230, section 3.5, and upstream's `ScaledAdam`.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float = 0.03,
        clipping_scale: float | None = None,
        betas: tuple[float, float] = (0.9, 0.98),
        scalar_lr_scale: float = 0.1,
        eps: float = 1e-8,
        param_min_rms: float = 1e-5,
        param_max_rms: float = 3.0,
        scalar_max: float = 10.0,
        size_update_period: int = 4,
        clipping_update_period: int = 100,
    ) -> None:
        self._states: list[_GroupState | None] = []  # one per group, made at the group's first step
        defaults = {
            "lr": lr,
            "clipping_scale": clipping_scale,
            "betas": betas,
            "scalar_lr_scale": scalar_lr_scale,
            "eps": eps,
            "param_min_rms": param_min_rms,
            "param_max_rms": param_max_rms,
            "scalar_max": scalar_max,
            "size_update_period": size_update_period,
            "clipping_update_period": clipping_update_period,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of named parameters; see the class for what a group holds and what is refused."""
        taken = {name for group in self.param_groups for name in group["param_names"]}
        group = {**self.defaults, **param_group, "params": _pairs(param_group, taken)}
        group.pop("names", None)
        check_options(group)
        super().add_param_group(group)
        self._states.append(None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; the gradients are left as they are.

        Raises:
            ValueError: a sparse gradient, or a group that mixes dtypes or devices.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            grads = {name: p.grad for name, p in _named(group) if p.grad is not None}
            for name, grad in grads.items():
                if grad.is_sparse:
                    raise ValueError(f"ScaledAdam: the gradient of {name!r} is sparse, only dense gradients are supported")
            if grads:
                state = self._states[number] = self._states[number] or _GroupState(group)
                state.update(group, grads, getattr(self, "found_inf", None))
        return loss

    def clipping_report(self) -> dict[str, Any]:
        """Counts of clipped and non-finite steps over all groups, and under "groups" each group's norms, threshold and dominating
        parameters (see `RunningMedianClipper.report`). Waits for the device; meant for logging."""
        groups = [state.clipper.report(state.stacks.names) for state in self._states if state is not None]
        return {
            "clipped": sum(group["clipped"] for group in groups),
            "non_finite": sum(group["non_finite"] for group in groups),
            "groups": groups,
        }

    def state_dict(self) -> dict[str, Any]:
        """State by parameter name, whatever the order in which parameters were listed.

        Returns:
            "state": name -> tensors (those of the parameter's shape are views of the optimizer's own; clone before training goes on if
            they are not saved at once); "param_groups": per group the sorted names under "params", all options, the number of steps and
            the state of clipping. Only tensors and plain containers, to be loaded with `weights_only=True`.
        """
        saved: dict[str, Any] = {"state": {}, "param_groups": []}
        for group, state in zip(self.param_groups, self._states, strict=True):
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            entry = {**options, "params": sorted(group["param_names"]), "step": 0, "clipping": None}
            if state is not None:
                entry.update(step=state.step, clipping=state.clipper.state_dict())
                saved["state"].update(state.stacks.state_by_name())
            saved["param_groups"].append(entry)
        saved["state"] = dict(sorted(saved["state"].items()))
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, by name; tensors are copied to where the parameters are.

        A group with the same parameters as a saved one gets that one's options and clipping state, and continues bit by bit as the saved
        one would have. A group made up otherwise gets the state of its parameters, keeps its own options, and starts to collect norms for
        clipping anew (a warning says so), because the norm of another set of parameters is another quantity.

        Raises:
            ValueError: parameters missing or unknown, or of another shape; nothing has been changed then.
        """
        if not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(f"ScaledAdam.load_state_dict: keys are {sorted(state_dict)}, 'state' and 'param_groups' are needed")
        saved_groups = {frozenset(entry["params"]): entry for entry in state_dict["param_groups"]}
        _check_names(self.param_groups, saved_groups.keys())
        _check_shapes(self.param_groups, state_dict["state"])
        for number, group in enumerate(self.param_groups):
            entry = saved_groups.get(frozenset(group["param_names"]))
            if entry is not None:
                group.update({key: value for key, value in entry.items() if key not in ("params", "step", "clipping")})
            else:
                warnings.warn(
                    f"ScaledAdam: the parameters of group {number} were grouped otherwise when saved; its clipping starts anew",
                    stacklevel=2,
                )
            state = {name: state_dict["state"][name] for name in group["param_names"] if name in state_dict["state"]}
            self._states[number] = _load_group(group, state, entry, state_dict["param_groups"]) if state else None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_states": self._states}


class _GroupState:
    """State of one group: per-shape stacks, per-parameter vectors, and the clipper."""

    def __init__(self, group: dict[str, Any]) -> None:
        self.step = 0
        self.stacks = ParameterStacks(_named(group), group["size_update_period"])
        names = self.stacks.names
        self.clipper = RunningMedianClipper(group["clipping_scale"], group["clipping_update_period"], len(names), self.stacks.rms)

    def update(self, group: dict[str, Any], grads: Mapping[str, Tensor], found_inf: Tensor | None) -> None:
        """One step of the group, for the parameters that have a gradient."""
        stacks, period = self.stacks, group["size_update_period"]
        phase = self.step % period
        stacks.select(grads)
        factor, finite = self.clipper(stacks.gradient_norms(group["scalar_lr_scale"]), found_inf)
        if phase == period - 1:
            stacks.refresh_rms()
        stacks.count_step()
        gain = torch.where(stacks.is_scalar, group["scalar_lr_scale"], stacks.rms.clamp(min=group["param_min_rms"]))
        root = self._bias_correction(group["betas"][1]).sqrt()
        # gain * g / (sqrt(v) / root + eps) == g / (sqrt(v) * slope + offset): one pass less over every tensor
        slope, offset = 1.0 / (root * gain), group["eps"] / gain
        stacks.accumulate(phase, factor, finite, slope, offset, group["betas"], group["lr"])
        if phase == period - 1 and self.step > 0:
            stacks.add_scaled_parameters(self._size_step(group) * (1.0 - group["betas"][0]))
        stacks.apply(group["scalar_max"])
        self.step += 1

    def _bias_correction(self, beta2: float) -> Tensor:
        """(P,) 1 - beta2^steps while that matters."""
        correction = -torch.expm1(self.stacks.steps * math.log(beta2))
        return torch.where(correction < _WARM_CORRECTION, correction, 1.0)

    def _size_step(self, group: dict[str, Any]) -> Tensor:
        """(P,) relative change of every parameter's size."""
        stacks, period, rms = self.stacks, group["size_update_period"], self.stacks.rms
        beta2 = group["betas"][1] ** period  # one update stands for a period of steps
        second_moment = stacks.update_size_moment(beta2)
        correction = -torch.expm1(torch.ceil(stacks.steps / period) * math.log(beta2))
        rate = group["lr"] * group["scalar_lr_scale"]
        step = -rate * correction.sqrt() * stacks.size_grads.sum(dim=0) / (second_moment.sqrt() + group["eps"])
        step = torch.where(rms < group["param_min_rms"], 0.0, step.clamp(-_MAX_SCALE_STEP, _MAX_SCALE_STEP))
        step = torch.minimum(step, (group["param_max_rms"] - rms) / rms)
        return torch.where(stacks.is_scalar, 0.0, step)


def _load_group(
    group: dict[str, Any], state: Mapping[str, Mapping[str, Tensor]], entry: Mapping[str, Any] | None, entries: list[dict[str, Any]]
) -> _GroupState:
    loaded = _GroupState(group)
    loaded.stacks.load_state_by_name(state)
    if entry is None:
        # the phase within the size-update period must be that of the collected size gradients
        loaded.step = max(other["step"] for other in entries if not state.keys().isdisjoint(other["params"]))
    else:
        loaded.step = int(entry["step"])
        loaded.clipper.load_state_dict(entry["clipping"])
    return loaded


def _named(group: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    return list(zip(group["param_names"], group["params"], strict=True))


def _pairs(group: Mapping[str, Any], taken: set[str]) -> list[tuple[str, Tensor]]:
    """The group's (name, parameter) pairs, checked."""
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else list(params)
    names = group.get("names", group.get("param_names"))
    if names is not None:
        names = [names] if isinstance(names, str) else list(names)
        if len(names) != len(params):
            raise ValueError(f"ScaledAdam: names has {len(names)} entries for {len(params)} parameters")
        params = list(zip(names, (p[1] if isinstance(p, tuple) else p for p in params), strict=True))
    seen, seen_params = set(taken), set()
    for position, pair in enumerate(params):
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and pair[0] and isinstance(pair[1], Tensor)):
            raise ValueError(f"ScaledAdam: params[{position}] is not a (name, parameter) pair; pass model.named_parameters()")
        name, param = pair
        if name in seen:
            raise ValueError(f"ScaledAdam: name {name!r} is given to more than one parameter")
        if id(param) in seen_params:
            raise ValueError(f"ScaledAdam: parameter {name!r} is listed twice under different names")
        if param.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"ScaledAdam: parameter {name!r} is {param.dtype}; float32 or float64 is needed (use autocast for low precision)"
            )
        if param.numel() == 0:
            raise ValueError(f"ScaledAdam: parameter {name!r} of shape {tuple(param.shape)} has no elements")
        seen.add(name)
        seen_params.add(id(param))
    return params


def check_options(group: Mapping[str, Any]) -> None:
    """Hold the options of a parameter group against what `ScaledAdam` accepts.

    Raises:
        ValueError: an option out of range; names it, its value and what is allowed.
    """

    def check(name: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise ValueError(f"ScaledAdam: {name} is {group[name]!r}, {allowed} is needed")

    check("lr", math.isfinite(group["lr"]) and group["lr"] >= 0, "a finite number >= 0")
    check(
        "betas", len(group["betas"]) == 2 and 0 <= group["betas"][0] < 1 and 0 < group["betas"][1] < 1, "0 <= beta1 < 1 and 0 < beta2 < 1"
    )
    for name in ("scalar_lr_scale", "eps", "param_min_rms", "scalar_max"):
        check(name, math.isfinite(group[name]) and group[name] > 0, "a finite number > 0")
    check(
        "param_max_rms",
        math.isfinite(group["param_max_rms"]) and group["param_max_rms"] > group["param_min_rms"],
        "more than param_min_rms",
    )
    for name in ("size_update_period", "clipping_update_period"):
        check(name, isinstance(group[name], int) and group[name] >= 1, "an integer >= 1")
    scale = group["clipping_scale"]
    check("clipping_scale", scale is None or (math.isfinite(scale) and scale > 0), "None or a finite number > 0")


def _check_names(groups: list[dict[str, Any]], saved: Iterable[frozenset[str]]) -> None:
    here, there = {name for group in groups for name in group["param_names"]}, set().union(*saved)
    if here != there:
        raise ValueError(
            "ScaledAdam.load_state_dict: parameters missing from the saved state:"
            f" {sorted(here - there)}; unknown ones in it: {sorted(there - here)}"
        )


def _check_shapes(groups: list[dict[str, Any]], saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    wrong = [
        f"{name} is {tuple(param.shape)}, saved {tuple(saved[name]['exp_avg_sq'].shape)}"
        for group in groups
        for name, param in _named(group)
        if name in saved and param.shape != saved[name]["exp_avg_sq"].shape
    ]
    if wrong:
        raise ValueError(f"ScaledAdam.load_state_dict: shapes differ: {'; '.join(wrong)}")
