"""One optimizer step: micro-batches forward and backward, gradients of the whole update, a verdict, the step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from k2ssl import distributed
from k2ssl.batch import LossOutput
from k2ssl.optim.shards import local
from k2ssl.train.contract import Batch
from k2ssl.train.loss_scale import LossScale
from k2ssl.train.metrics import MetricSums
from k2ssl.train.precision import autocast
from k2ssl.train.sharding import average_replicated_gradients, gradient_norm, is_sharded, shard

Normalization = Literal["targets", "none"]
Sharding = Literal["none", "fsdp"]


class Judge(Protocol):
    """Decides on the device whether a step may change the model; see `Guard.judge`."""

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Moment:
    """Where training stands when a step is made.

    Attributes:
        seed: of the run.
        step: optimizer steps done.
        batch_count: adjusted batch count of this step, which drives the model's schedules.
    """

    seed: int
    step: int
    batch_count: float


class Update:
    """Makes optimizer steps. Losses are sums; their gradients are divided once, after the backward passes of all micro-batches.

    Dividing gradients instead of the loss keeps what the backward passes add in absolute terms (the penalty on attention scores) at the
    size relative to the summed loss that it was made for, and lets the divisor be the number of targets of the *whole* update, which is
    only known at its end.

    What a micro-batch draws is told by `draws_of`.

    Args:
        model: see `k2ssl.batch`; it has a `clock` and `check_batch`, and may have `frozen_parameters()`, which do not learn in this step.
            Its attribute `step` is set to the number of optimizer steps done.
        optimizer: honours an attribute `found_inf`.
        dtype: of the forward pass.
        normalize_by: "targets" divides gradients by the number of targets of the update; "none" by the number of micro-batches only, as
            upstream does.
        parallel: `model` as the ranks run it together; see `parallelise`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        device: torch.device,
        dtype: torch.dtype,
        *,
        normalize_by: Normalization = "targets",
        parallel: nn.Module | None = None,
    ) -> None:
        self.model = model
        self.parallel = parallel or model
        self.optimizer = optimizer
        self.device = device
        self.dtype = dtype
        self.normalize_by = normalize_by
        self.loss_scale = LossScale(device) if dtype == torch.float16 else None
        self.metrics = MetricSums(device)
        self.grad_norm = torch.zeros((), device=device)
        self.params = [param for param in model.parameters() if param.requires_grad]

    def __call__(self, batches: Sequence[Batch], moment: Moment, judge: Judge) -> Tensor:
        """Make one step; returns on the device whether it was accepted (True) or counted as a step without gradients.

        Raises:
            ValueError: a batch that the model refuses.
        """
        model: Any = self.model
        clock = model.clock
        clock.advance(moment.batch_count)
        model.step = moment.step  # for what goes by updates, not by audio
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        num_targets = torch.zeros_like(loss)
        for number, batch in enumerate(batches):
            clock.seed(*draws_of(moment.seed, number, moment.step))
            output = self._forward_backward(batch, is_last=number == len(batches) - 1)
            loss += output.loss.detach()
            num_targets += output.num_targets
            self.metrics.add(output)
        if distributed.world_size() > 1:
            clock.merge_flags(distributed.all_reduce_sum, self.device)
        loss, num_targets = distributed.all_reduce_sum(torch.stack([loss, num_targets])).unbind()
        average_replicated_gradients(self.parallel)
        for param in getattr(model, "frozen_parameters", tuple)():
            param.grad = None  # gradients of zero would count in the optimizer's statistics
        self._divide_gradients(num_targets, len(batches))
        self.grad_norm = gradient_norm(self.params)
        accepted = judge.judge(loss / num_targets.clamp(min=1), self.grad_norm)
        self.optimizer.found_inf = (~accepted).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.loss_scale is not None:
            self.loss_scale.update(accepted, moment.step + 1)
        return accepted

    def _forward_backward(self, batch: Batch, is_last: bool) -> LossOutput:
        self.model.check_batch(batch)  # type: ignore[operator]
        batch = batch.to(self.device)
        with self._synchronising(is_last):
            with autocast(self.dtype, self.device):
                output: LossOutput = self.parallel(batch)
            (output.loss if self.loss_scale is None else output.loss * self.loss_scale.scale).backward()
        return output

    def _synchronising(self, is_last: bool) -> AbstractContextManager[object]:
        """Gradients travel between ranks in the last micro-batch only."""
        if isinstance(self.parallel, DistributedDataParallel):
            return nullcontext() if is_last else self.parallel.no_sync()
        if is_sharded(self.parallel):
            self.parallel.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        return nullcontext()

    def _divide_gradients(self, num_targets: Tensor, num_batches: int) -> None:
        """Divide the gradients, of which the ranks have the mean already, as `normalize_by` says."""
        grads = [local(param.grad) for param in self.params if param.grad is not None]
        if self.normalize_by == "targets":
            factor = distributed.world_size() / num_targets.clamp(min=1)
        else:
            factor = torch.full_like(num_targets, 1.0 / num_batches)
        if self.loss_scale is not None:
            factor = factor / self.loss_scale.scale
        torch._foreach_mul_(grads, factor.to(torch.float32))


def draws_of(seed: int, number: int, step: int | None = None) -> tuple[int, ...]:
    """What the model's clock is seeded with for this rank's micro-batch `number`: of the update after `step` steps, or of a validation.

    It is the place of the micro-batch counted over ranks that matters: one process that accumulates two of them draws what two processes
    draw. Validation has one part less: none of training's draws is repeated, and all validations draw the same.
    """
    place = number * distributed.world_size() + distributed.rank()
    return (seed, place) if step is None else (seed, step, place)


def parallelise(model: nn.Module, device: torch.device, sharding: Sharding, units: Sequence[nn.Module] = ()) -> nn.Module:
    """`model` as the ranks run it together: itself alone, replicated by DDP, or sharded.

    Raises:
        ValueError: sharding is asked for in a single process.
    """
    if distributed.world_size() == 1:
        if sharding != "none":
            raise ValueError(f"sharding is {sharding!r}, which takes several processes; start them with torchrun, or leave it at 'none'")
        return model
    if sharding == "fsdp":
        return shard(model, units)
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
