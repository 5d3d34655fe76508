"""From configuration to optimizer and schedule."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .scaled_adam import ScaledAdam, check_options
from .schedules import Eden, Eden2, HasGroups, LearningRateSchedule, Polynomial, TriStage

_ONLY_SCALED_ADAM = (
    "clipping_scale",
    "clipping_update_period",
    "scalar_lr_scale",
    "param_min_rms",
    "param_max_rms",
    "scalar_max",
    "size_update_period",
)
_ONLY_ADAMW = ("weight_decay", "max_grad_norm")
_SCHEDULE_OPTIONS = {
    "eden": ("lr_batches", "lr_epochs", "warmup_batches", "warmup_start"),
    "eden2": ("lr_batches", "warmup_batches", "warmup_start"),
    "tri_stage": ("warmup_batches", "max_batches", "phase_ratio", "hold_batches", "decay_batches", "init_scale", "final_scale"),
    "polynomial": ("warmup_batches", "max_batches", "power", "end_scale"),
}


@dataclass(frozen=True)
class OptimConfig:
    """Which optimizer, with what options.

    Attributes:
        name: which optimizer; each refuses the options that only the other one has.
        lr: base learning rate; ScaledAdam's is relative to each tensor's size.
        betas: decay of the momentum and of the second moment, per step.
        eps: added to the root of the second moment.
        lr_scales: prefix of parameter names (a module, such as "encoder.layers.0", or one parameter; a dot may follow) = factor on its
            rate. Factors of nested prefixes multiply. Each resulting rate is a group of its own, and ScaledAdam clips each group on its own.
        clipping_scale: ScaledAdam clips gradients at this many times the running median norm; 0 never clips.
        clipping_update_period: steps from one renewal of ScaledAdam's clipping threshold to the next; the median is of as many norms.
        scalar_lr_scale: ScaledAdam's factor on the rate of parameters of one element, and of the sizes of all others.
        param_min_rms: a tensor of a smaller root mean square takes ScaledAdam's steps as if it had this one.
        param_max_rms: root mean square beyond which ScaledAdam lets no tensor's learnt size grow.
        scalar_max: ScaledAdam keeps parameters of one element within plus and minus this.
        size_update_period: steps from one update of the tensors' sizes by ScaledAdam to the next.
        weight_decay: AdamW's, for parameters with more than one axis; biases, norms' weights and scalars do not decay.
        max_grad_norm: AdamW's gradients are scaled down to this norm over all parameters; 0 never clips. Gradients whose norm is not
            finite are left as they are; the training loop drops their step.

    Raises:
        ValueError: a value out of range, or an option that only the other optimizer has.
    """

    name: Literal["scaled_adam", "adamw"] = "scaled_adam"
    lr: float = 0.045
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    lr_scales: Mapping[str, float] = field(default_factory=dict)
    clipping_scale: float = 2.0
    clipping_update_period: int = 100
    scalar_lr_scale: float = 0.1
    param_min_rms: float = 1e-5
    param_max_rms: float = 3.0
    scalar_max: float = 10.0
    size_update_period: int = 4
    weight_decay: float = 0.01
    max_grad_norm: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ("scaled_adam", "adamw"):
            raise ValueError(f"optim: name is {self.name!r}, one of 'scaled_adam', 'adamw' is needed")
        foreign = _ONLY_ADAMW if self.name == "scaled_adam" else _ONLY_SCALED_ADAM
        for option in fields(self):
            if option.name in foreign and getattr(self, option.name) != option.default:
                raise ValueError(f"optim: {option.name} is {getattr(self, option.name)}, but {self.name!r} has no such option")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"optim: lr is {self.lr}, a finite number > 0 is needed")
        for name in ("clipping_scale", "weight_decay", "max_grad_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"optim: {name} is {getattr(self, name)}, a finite number >= 0 is needed")
        for prefix, scale in self.lr_scales.items():
            if not (math.isfinite(scale) and scale > 0):
                raise ValueError(f"optim: lr_scales[{prefix!r}] is {scale}, a finite number > 0 is needed")
        if self.name == "scaled_adam":
            check_options(_scaled_adam_options(self))
        else:  # AdamW would check these itself, but making an optimizer imports torch._dynamo, which takes longer than all of --help
            if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
                raise ValueError(f"optim: betas is {self.betas}, two numbers >= 0 and < 1 are needed")
            if not (math.isfinite(self.eps) and self.eps >= 0):
                raise ValueError(f"optim: eps is {self.eps}, a finite number >= 0 is needed")


@dataclass(frozen=True)
class ScheduleConfig:
    """Which learning-rate schedule, with what options. The defaults are those published for pre-training.

    Attributes:
        name: which schedule; each refuses the options that it does not have.
        lr_batches: batches after which the rate begins to fall: well beyond, as 1 / root of the batches (eden), 1 / batches (eden2).
        lr_epochs: epochs after which it begins to fall besides: well beyond, as 1 / root of the epochs (eden).
        warmup_batches: length of the warm-up, in batches (tri_stage: unless `max_batches` is given).
        warmup_start: factor on the rate at batch 0 (eden, eden2).
        max_batches: length of training, in batches (polynomial; tri_stage: shared out by `phase_ratio`, or 0 to state lengths).
        phase_ratio: shares of warm-up, hold and decay (tri_stage).
        hold_batches: length of the stage of constant rate, in batches, where `max_batches` is 0 (tri_stage).
        decay_batches: length of the stage of falling rate, in batches, where `max_batches` is 0 (tri_stage).
        init_scale: factor on the rate at batch 0 (tri_stage).
        final_scale: factor on the rate from the end of the decay on (tri_stage).
        power: exponent of the decay; 1 is a straight line (polynomial).
        end_scale: factor on the rate from the end of the decay on (polynomial).

    Raises:
        ValueError: a value out of range, an option that the schedule does not have, or a tri_stage whose decay has no length.
    """

    name: Literal["eden", "eden2", "tri_stage", "polynomial"] = "eden"
    lr_batches: float = 7500.0
    lr_epochs: float = 10.5
    warmup_batches: float = 5000.0
    warmup_start: float = 0.0
    max_batches: float = 0.0
    phase_ratio: tuple[float, float, float] = (0.1, 0.4, 0.5)
    hold_batches: float = 0.0
    decay_batches: float = 0.0
    init_scale: float = 0.01
    final_scale: float = 0.01
    power: float = 1.0
    end_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in _SCHEDULE_OPTIONS:
            raise ValueError(f"schedule: name is {self.name!r}, one of {', '.join(map(repr, _SCHEDULE_OPTIONS))} is needed")
        for option in fields(self)[1:]:
            if option.name not in _SCHEDULE_OPTIONS[self.name] and getattr(self, option.name) != option.default:
                raise ValueError(f"schedule: {option.name} is {getattr(self, option.name)}, but {self.name!r} has no such option")
        if self.name == "tri_stage" and self.max_batches == self.decay_batches == 0:
            raise ValueError("schedule: max_batches and decay_batches are both 0, the length of tri_stage must be given by one of them")
        build_schedule(self, _NoGroups())  # the schedules know what they accept


def build_optimizer(config: OptimConfig, model: nn.Module) -> Optimizer:
    """The optimizer over the parameters of `model` that require gradients, in groups of equal rate (and weight decay).

    Parameters are listed by name, so that the state of either optimizer does not depend on the order in which modules were made.

    A training loop drops a step without waiting for the device by setting the optimizer's attribute `found_inf` to a float32 scalar, 1
    for a step to drop, 0 for any other, as torch's `GradScaler` does. AdamW then leaves parameters, moments and step counts as they are;
    ScaledAdam counts a step of zero gradients. Without that attribute AdamW, unlike ScaledAdam, takes whatever gradients it gets.

    AdamW is torch's fused one, the only one that knows `found_inf`; on a device that has none, torch refuses the first step with a
    RuntimeError.

    Raises:
        ValueError: a prefix in `lr_scales` that begins no parameter's name, or a model without trainable parameters.
    """
    scales = _scale_by_name(config.lr_scales, model)
    members: dict[tuple[float, bool], list[tuple[str, Tensor]]] = {}
    for name, param in sorted(model.named_parameters()):
        if param.requires_grad:
            decays = config.name == "adamw" and param.dim() > 1
            members.setdefault((scales[name], decays), []).append((name, param))
    if not members:
        raise ValueError("build_optimizer: model has no parameter that requires a gradient")
    groups: list[dict[str, Any]] = []
    for (scale, decays), named in sorted(members.items(), key=lambda item: item[0]):
        group: dict[str, Any] = {"params": named, "lr": config.lr * scale}
        if config.name == "adamw":
            group["weight_decay"] = config.weight_decay if decays else 0.0
        groups.append(group)
    return _make_optimizer(config, groups)


def build_schedule(config: ScheduleConfig, optimizer: HasGroups) -> LearningRateSchedule:
    """The schedule that `config` names, at batch 0.

    Raises:
        ValueError: a value out of range.
    """
    if config.name == "eden":
        return Eden(optimizer, config.lr_batches, config.lr_epochs, config.warmup_batches, config.warmup_start)
    if config.name == "eden2":
        return Eden2(optimizer, config.lr_batches, config.warmup_batches, config.warmup_start)
    if config.name == "polynomial":
        return Polynomial(optimizer, config.warmup_batches, config.max_batches, config.power, config.end_scale)
    if config.max_batches != 0:
        return TriStage.from_ratios(optimizer, config.max_batches, config.phase_ratio, config.init_scale, config.final_scale)
    return TriStage(optimizer, config.warmup_batches, config.hold_batches, config.decay_batches, config.init_scale, config.final_scale)


class _NoGroups:
    """What a schedule may write to when it is made for its checks alone; see `OptimConfig` for why this is no optimizer."""

    param_groups: list[dict[str, Any]] = []  # noqa: RUF012 (stays empty)


def _scale_by_name(lr_scales: Mapping[str, float], model: nn.Module) -> dict[str, float]:
    """Every parameter's product of the factors whose prefix its name has, in whole components."""
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    for prefix, scale in sorted(lr_scales.items()):
        matched = _beginning_with(prefix, scales)
        if not matched:
            raise ValueError(f"build_optimizer: lr_scales prefix {prefix!r} begins no parameter's name; {_what_exists(prefix, scales)}")
        for name in matched:
            scales[name] *= scale
    return scales


def _beginning_with(prefix: str, names: Iterable[str]) -> list[str]:
    prefix = prefix.removesuffix(".")
    return [name for name in names if name == prefix or name.startswith(prefix + ".")]


def _what_exists(prefix: str, names: Iterable[str]) -> str:
    """How names go on after the longest part of `prefix` that begins some."""
    parts = prefix.removesuffix(".").split(".")
    for end in range(len(parts) - 1, 0, -1):
        known = ".".join(parts[:end]) + "."
        if found := {name.removeprefix(known).split(".")[0] for name in names if name.startswith(known)}:
            return f"names that begin with {known!r} go on with {sorted(found)}"
    return f"names begin with {sorted({name.split('.')[0] for name in names})}"


def _make_optimizer(config: OptimConfig, groups: list[dict[str, Any]]) -> Optimizer:
    if config.name == "scaled_adam":
        return ScaledAdam(groups, **_scaled_adam_options(config))
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)
    adamw.register_load_state_dict_pre_hook(_match_by_name)
    adamw.register_step_pre_hook(_match_strides)
    if config.max_grad_norm > 0:
        adamw.register_step_pre_hook(functools.partial(_clip_before_step, config.max_grad_norm))
    return adamw


def _scaled_adam_options(config: OptimConfig) -> dict[str, Any]:
    options = {name: getattr(config, name) for name in ("lr", "betas", "eps", *_ONLY_SCALED_ADAM)}
    return {**options, "clipping_scale": config.clipping_scale or None}


def _clip_before_step(max_norm: float, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
    norm = nn.utils.get_total_norm([param.grad for param in params])
    # a norm of zero asks for no scaling; infinity would turn gradients to zero or NaN, and hide where it came from
    nn.utils.clip_grads_with_norm_(params, max_norm, torch.where(norm.isfinite(), norm, 0.0))


def _match_strides(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """The fused kernel for CPUs reads gradients in the order of memory, whatever their strides (torch 2.11)."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None and param.grad.stride() != param.stride():
                param.grad = torch.empty_like(param).copy_(param.grad)


def _match_by_name(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """torch matches parameters by position; here those of a saved state are matched by name, in whatever groups they were. Rates are those
    of the present groups. How the saved one computed is taken over."""
    if not all(group.get("fused") for group in state_dict["param_groups"]):
        raise ValueError("AdamW.load_state_dict: the saved state is of an AdamW that is not fused, a fused one's is needed")
    saved = {
        name: (group, state_dict["state"].get(number))
        for group in state_dict["param_groups"]
        for name, number in zip(group.get("param_names") or (), group["params"], strict=False)
    }
    here = [name for group in optimizer.param_groups for name in group["param_names"]]
    if set(here) != set(saved):
        raise ValueError(
            f"AdamW.load_state_dict: parameters differ; missing from the saved state: {sorted(set(here) - set(saved))},"
            f" unknown ones in it: {sorted(set(saved) - set(here))}"
        )
    if [group["param_names"] for group in optimizer.param_groups] == [group["param_names"] for group in state_dict["param_groups"]]:
        return state_dict
    number = {name: i for i, name in enumerate(here)}
    groups = []
    for group in optimizer.param_groups:
        names = group["param_names"]
        own = {key: group[key] for key in ("lr", "initial_lr", "param_names") if key in group}
        groups.append({**saved[names[0]][0], **own, "params": [number[name] for name in names]})
    return {**state_dict, "state": {number[name]: state for name, (_, state) in saved.items() if state is not None}, "param_groups": groups}
