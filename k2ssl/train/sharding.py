"""A model dealt out to the ranks (FSDP): each holds a piece of every parameter, its gradient and its optimizer state.

    model = shard(model, units)          # before the optimizer is made
    ...
    output.loss.backward()
    average_replicated_gradients(model)  # once, after the last micro-batch
    norm = gradient_norm(model.parameters())

Parameters keep their type; low precision is left to autocast. Parameters without dimensions, which cannot be dealt out, stay whole on
every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from k2ssl import distributed
from k2ssl.batch import LossOutput
from k2ssl.optim.scaled_adam import ScaledAdam
from k2ssl.optim.shards import is_sharded_tensor, local, piece_for, sharded_like


def shard(model: nn.Module, units: Sequence[nn.Module]) -> nn.Module:
    """Deal the parameters of `model` out to all ranks, in place, with the values of rank 0; returns `model`.

    The parameters of a unit are brought together on every rank while the unit computes and let go afterwards; what is in no unit stays
    together from the forward pass to the end of the backward pass. Gradients are means over the ranks, as those of
    DistributedDataParallel; `model.set_requires_gradient_sync(False)` lets micro-batches add theirs up first. Only `model(batch)` brings
    parameters together, none of its other methods.

    Args:
        model: on its device. The optimizer is made afterwards, over the parameters that the model has then.
        units: modules of `model` that do not overlap, such as the layers of its encoder.

    Raises:
        ValueError: a single process; a unit that is not within `model`, or lies within another.

    Source: torch's `fully_shard` (FSDP2).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # slow to import, and not needed to show --help

    if distributed.world_size() == 1:
        raise ValueError("shard: there is one process, at least two are needed; start them with torchrun")
    _check_units(model, units)
    _register_output()
    for tensor in [*model.parameters(), *model.buffers()]:
        distributed.broadcast(tensor.detach())
    mesh = init_device_mesh(next(model.parameters()).device.type, (distributed.world_size(),))
    whole = {param for param in model.parameters() if param.dim() == 0}
    for unit in units:
        fully_shard(unit, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was applied."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def average_replicated_gradients(model: nn.Module) -> None:
    """Replace the gradients of the parameters that stayed whole by their means over the ranks; missing ones count as zeros.

    To be called on every rank after the last backward pass of an update. Without sharded parameters there is nothing to do.
    """
    if not is_sharded(model):
        return
    params = [param for param in model.parameters() if param.requires_grad and not is_sharded_tensor(param)]
    if not params:
        return
    packed = torch.stack([torch.zeros_like(param) if param.grad is None else param.grad for param in params])
    distributed.all_reduce_sum(packed).div_(distributed.world_size())
    for param, grad in zip(params, packed.unbind(), strict=True):
        param.grad = grad.clone()


def gradient_norm(params: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients, sharded or not, a float32 scalar on their device and equal on all ranks; waits for nothing.

    Gradients that are not sharded must be equal on all ranks.

    Raises:
        ValueError: no parameter has a gradient.
    """
    grads = [param.grad for param in params if param.grad is not None]
    if not grads:
        raise ValueError("gradient_norm: no parameter has a gradient")
    sharded = [local(grad) for grad in grads if is_sharded_tensor(grad)]
    whole = [grad for grad in grads if not is_sharded_tensor(grad)]
    total = _sum_of_squares(whole, grads[0].device)
    if sharded:
        total = total + distributed.all_reduce_sum(_sum_of_squares(sharded, grads[0].device))
    return total.sqrt().float()


@torch.no_grad()
def full_state(state: Any) -> Any:
    """Nested state with its sharded tensors put together; every rank must call it with a state of the same structure.

    Returns:
        The same structure. On rank 0 all tensors are whole, on the CPU, and copies; elsewhere None stands in their place.
    """
    if isinstance(state, Mapping):
        return {key: full_state(item) for key, item in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(full_state(item) for item in state)
    if not isinstance(state, Tensor):
        return state
    whole = state.full_tensor() if is_sharded_tensor(state) else state
    return whole.to("cpu", copy=True) if distributed.is_main() else None


def load_full_state(
    model: nn.Module, optimizer: Optimizer | None, model_state: Mapping[str, Any], optimizer_state: Mapping[str, Any]
) -> None:
    """Put back what `full_state` made of the `state_dict` of model and optimizer, from any number of ranks; on every rank.

    Args:
        model, optimizer: sharded, or not.
        model_state, optimizer_state: complete on this rank.

    Raises:
        ValueError: names or shapes differ from those of the model, or the optimizer refuses its part.
    """
    _load_model(model, model_state)
    if isinstance(optimizer, ScaledAdam):
        optimizer.load_state_dict(optimizer_state)  # knows parameters by name and takes its pieces
    elif optimizer is not None:
        optimizer.load_state_dict(_sharded_optimizer_state(optimizer, optimizer_state))


@torch.no_grad()
def _load_model(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    if own.keys() != saved.keys():
        missing, unknown = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
        raise ValueError(f"load_full_state: parameters missing from the saved state: {missing}; unknown ones in it: {unknown}")
    wrong = [
        f"{name} is {tuple(value.shape)}, saved {tuple(saved[name].shape)}"
        for name, value in own.items()
        if value.shape != saved[name].shape
    ]
    if wrong:
        raise ValueError(f"load_full_state: shapes differ: {'; '.join(wrong)}")
    for name, value in own.items():
        local(value).copy_(piece_for(saved[name], value))


def _sharded_optimizer_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The state of one of torch's optimizers, which knows parameters by position, dealt out as the parameters are."""
    positions = [position for group in saved["param_groups"] for position in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if len(positions) != len(params):
        raise ValueError(f"load_full_state: the saved state is of {len(positions)} parameters, this optimizer has {len(params)}")
    state = {}
    for position, param in zip(positions, params, strict=True):
        entry = saved["state"].get(position)
        if entry is None:
            continue
        state[position] = {key: _dealt_out(value, param) for key, value in entry.items()}
    return {**saved, "state": state}


def _dealt_out(value: Any, param: Tensor) -> Any:
    """A copy, which torch would not make: steps change the tensors that an optimizer has loaded."""
    if not isinstance(value, Tensor):
        return value
    if value.shape != param.shape or not is_sharded_tensor(param):
        return value.clone()
    return sharded_like(piece_for(value, param).to(local(param).device, copy=True), param)


def _sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Float64 scalar, 0 for no tensors: squares of large norms must not overflow."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(tensors)).double().square().sum()


def _check_units(model: nn.Module, units: Sequence[nn.Module]) -> None:
    names = {module: name for name, module in model.named_modules()}
    for unit in units:
        if unit not in names or unit is model:
            raise ValueError(f"shard: units holds a {type(unit).__name__} that is not a module within {type(model).__name__}")
    for unit in units:
        inner = set(unit.modules()) - {unit}
        if both := [names[other] for other in units if other in inner]:
            raise ValueError(f"shard: units overlap: {both[0]} lies within {names[unit]}")
    if len(set(units)) != len(units):
        raise ValueError("shard: units holds a module twice")


def _register_output() -> None:
    """Let torch see the tensors inside a `LossOutput`: it must know of the loss, where the backward pass of the whole model begins."""
    if LossOutput not in pytree.SUPPORTED_NODES:
        pytree.register_dataclass(LossOutput)
