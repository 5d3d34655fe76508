"""ScaledAdam's state, a few tensors per parameter shape, and the arithmetic that runs over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .shards import SumOverShards, is_sharded_tensor, local, piece_for, sharded_like

# Temporary memory is a few times the largest stack. A CPU also wants it to stay in its caches; a GPU wants few kernels.
_MAX_ELEMENTS_CPU = 2**18
_MAX_ELEMENTS = 2**24


class _Stack:
    """Parameters of one shape, with their two moments stacked along a leading axis (B, *shape).

    Of sharded parameters only this rank's pieces are here, and `shape` is that of a piece, which may be empty.
    """

    def __init__(self, start: int, params: list[Tensor]) -> None:
        self.start, self.whole = start, params
        self.is_scalar, self._sharded = params[0].numel() == 1, any(is_sharded_tensor(param) for param in params)
        first = local(params[0])
        self.exp_avg_sq = torch.zeros((len(params), *first.shape), dtype=first.dtype, device=first.device)
        self.delta = torch.zeros_like(self.exp_avg_sq)
        self.delta_rows = self.delta.unbind()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "delta_rows"}  # pickled, they would be no views any more

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, delta_rows=state["delta"].unbind())

    @property
    def params(self) -> list[Tensor]:
        # asked for anew each time: a parameter's data may be exchanged, as averaging does
        return [local(param) for param in self.whole] if self._sharded else self.whole

    def stacked_params(self) -> Tensor:
        """(B, *shape) the parameters; a view of a single one, so not to be written to."""
        params = self.params
        return params[0].unsqueeze(0) if len(params) == 1 else torch.stack(params)

    def positions(self) -> range:
        """Where these parameters are among all names."""
        return range(self.start, self.start + len(self.whole))

    def per_row(self, vector: Tensor, rows: list[int]) -> Tensor:
        """(P,) vector -> its entries for `rows`, shaped to broadcast over (B, *shape)."""
        if len(rows) == len(self.whole):
            part = vector[self.start : self.start + len(rows)]
        else:  # a list as an index would have to be copied to the device first
            part = torch.stack([vector[self.start + row] for row in rows])
        return part.view(-1, *[1] * self.whole[0].dim())


class ParameterStacks:
    """The parameters of one group in canonical order (by shape, then name), so that listing them otherwise changes nothing.

    All of it runs under `torch.no_grad`, which is the caller's to set.

    P is the number of parameters; vectors below are (P,) on the parameters' device. Where parameters are sharded, every rank has the
    moments of its pieces and all of the vectors, whose numbers are those of whole parameters and equal on all ranks.

    Attributes:
        names: in canonical order.
        is_scalar: whether the parameter has one element.
        rms: root mean square at the last refresh (1 for one-element tensors).
        steps: how many steps the parameter took.
        size_second_moment: second moment of the gradient with respect to the logarithm of the tensor's size.
        size_grads: (period, P) that gradient, sum(p * g), in each step of the current period.

    Raises:
        ValueError: the parameters differ in dtype or device.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], period: int) -> None:
        ordered = sorted(named, key=lambda pair: (pair[1].numel(), tuple(pair[1].shape), pair[0]))
        self.names = [name for name, _ in ordered]
        self._params = [param for _, param in ordered]  # not detached: see _Stack.params
        first = self._params[0]
        for name, param in zip(self.names, self._params, strict=True):
            if (param.dtype, param.device) != (first.dtype, first.device):
                raise ValueError(
                    f"ScaledAdam: {name!r} is {param.dtype} on {param.device}, {self.names[0]!r} of the same group is {first.dtype} on"
                    f" {first.device}; make one group per dtype and device"
                )
        self._stacks = _stack_equal_shapes(self._params)
        self._sum_over_shards = SumOverShards(self._params)
        self.is_scalar = torch.tensor([param.numel() == 1 for param in self._params], device=first.device)
        self._numel = torch.tensor([param.numel() for param in self._params], dtype=first.dtype, device=first.device)
        self.rms = self._measured_rms()
        self.steps = torch.zeros_like(self.rms)
        self.size_second_moment = torch.zeros_like(self.rms)
        self.size_grads = self.rms.new_zeros(period, len(self.names))
        self._grads: list[Tensor | None] = []
        self._present: tuple[bool, ...] = (True,) * len(self.names)
        self._mask: Tensor | None = None  # of the parameters that have gradients, None when all have

    def select(self, grads: Mapping[str, Tensor]) -> None:
        """Choose what the following calls act on: the parameters named in `grads`."""
        self._grads = [local(grads[name]) if name in grads else None for name in self.names]
        present = tuple(grad is not None for grad in self._grads)
        if present != self._present:
            self._present = present
            self._mask = None if all(present) else torch.tensor(present, device=self.rms.device)

    def gradient_norms(self, scalar_weight: float) -> Tensor:
        """(P,) norms of the gradients times the parameters' rms (or `scalar_weight`); 0 without a gradient."""
        norms = iter(torch._foreach_norm([grad for grad in self._grads if grad is not None]))
        zero = self.rms.new_zeros(())
        vector = torch.stack([zero if grad is None else next(norms) for grad in self._grads])
        if self._sum_over_shards:  # in float64, since squares of large norms would overflow
            vector = self._sum_over_shards(vector.double().square()).sqrt().to(vector.dtype)
        return vector * torch.where(self.is_scalar, scalar_weight, self.rms)

    def refresh_rms(self) -> None:
        """Measure the parameters again."""
        self.rms = self._kept(self._measured_rms(), self.rms)

    def count_step(self) -> None:
        """Count a step."""
        self.steps += 1 if self._mask is None else self._mask

    def update_size_moment(self, beta2: float) -> Tensor:
        """Let the second moment of the size gradients follow those of this period; returns it."""
        updated = torch.lerp(self.size_grads.square().mean(dim=0), self.size_second_moment, beta2)
        self.size_second_moment = self._kept(updated, self.size_second_moment)
        return self.size_second_moment

    def accumulate(
        self, phase: int, factor: Tensor, finite: Tensor, slope: Tensor, offset: Tensor, betas: tuple[float, float], lr: float
    ) -> None:
        """Take the gradients into the moments and into row `phase` of `size_grads`.

        With g = factor * gradient (zero unless `finite`): v <- beta2 v + (1 - beta2) g^2 and
        delta <- beta1 delta - (1 - beta1) lr g / (slope * sqrt(v) + offset).
        """
        beta1, beta2 = betas
        size_grads = torch.zeros_like(self.rms)
        factor = torch.where(finite, factor, 0.0)
        # memory that is allocated anew for every stack costs a CPU more than the arithmetic does
        room = torch.empty(2, max(stack.delta.numel() for stack in self._stacks), dtype=self.rms.dtype, device=self.rms.device)
        for stack in self._stacks:
            grads = [self._grads[position] for position in stack.positions()]
            rows = [row for row, grad in enumerate(grads) if grad is not None]
            if not rows:
                continue
            shape = (len(rows), *stack.delta.shape[1:])
            g, denominator = (part[: math.prod(shape)].view(shape) for part in room)
            present = [grad for grad in grads if grad is not None]
            if len(present) == 1:  # as are most of a large model's numbers; `stack` would copy them by one thread
                torch.mul(present[0], factor, out=g[0])
            else:
                torch.stack(present, out=g)
                g.mul_(factor)
            g.nan_to_num_(0.0, 0.0, 0.0)  # what 0 leaves of gradients that are not finite; a mask takes ten times as long
            whole = len(rows) == len(grads)
            v = stack.exp_avg_sq if whole else torch.stack([stack.exp_avg_sq[row] for row in rows])
            delta = stack.delta if whole else torch.stack([stack.delta[row] for row in rows])
            v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
            torch.sqrt(v, out=denominator)
            denominator.mul_(stack.per_row(slope, rows)).add_(stack.per_row(offset, rows))  # addcmul is slow where it broadcasts
            delta.mul_(beta1).addcdiv_(g, denominator, value=-(1.0 - beta1) * lr)
            if not whole:
                torch._foreach_copy_([stack.exp_avg_sq[row] for row in rows], list(v.unbind()))
                torch._foreach_copy_([stack.delta_rows[row] for row in rows], list(delta.unbind()))
            if not stack.is_scalar:  # g is not needed any more and becomes p * g
                params, size_grad = stack.params, size_grads[stack.start : stack.start + len(grads)]
                torch._foreach_mul_(list(g.unbind()), [params[row] for row in rows])
                if whole:
                    torch.sum(g.flatten(1), dim=1, out=size_grad)
                else:
                    torch._foreach_copy_([size_grad[row] for row in rows], list(g.flatten(1).sum(dim=1).unbind()))
        self.size_grads[phase] = self._sum_over_shards(size_grads)

    def add_scaled_parameters(self, scales: Tensor) -> None:
        """delta <- delta + scales * p, for (P,) `scales`."""
        scales = scales if self._mask is None else torch.where(self._mask, scales, 0.0)
        for stack in self._stacks:
            if not stack.is_scalar:
                stack.delta.addcmul_(stack.stacked_params(), stack.per_row(scales, list(range(len(stack.whole)))))

    def apply(self, scalar_max: float) -> None:
        """p <- p + delta; one-element tensors stay within +-scalar_max."""
        updated, deltas, scalars = [], [], []
        for stack in self._stacks:
            for position, param, delta in zip(stack.positions(), stack.params, stack.delta_rows, strict=True):
                if self._grads[position] is not None:
                    updated.append(param)
                    deltas.append(delta)
                    scalars += [param] if stack.is_scalar else []
        torch._foreach_add_(updated, deltas)
        if scalars:
            torch._foreach_clamp_min_(scalars, -scalar_max)
            torch._foreach_clamp_max_(scalars, scalar_max)
        self._grads = []  # gradients must be free to go

    def state_by_name(self) -> dict[str, dict[str, Tensor]]:
        """State of every parameter: views of the stacks and vectors; moments are sharded as the parameter is."""
        state = {}
        for stack in self._stacks:
            for row, (position, param) in enumerate(zip(stack.positions(), stack.whole, strict=True)):
                entry = {"step": self.steps[position]}
                entry["exp_avg_sq"] = sharded_like(stack.exp_avg_sq[row], param)
                entry["delta"] = sharded_like(stack.delta[row], param)
                if not stack.is_scalar:
                    entry["param_rms"] = self.rms[position]
                    entry["scale_exp_avg_sq"] = self.size_second_moment[position]
                    entry["scale_grads"] = self.size_grads[:, position]
                state[self.names[position]] = entry
        return state

    def load_state_by_name(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy what `state_by_name` returned, or the same with whole tensors; parameters that are not in it keep what they have."""
        own = self.state_by_name()
        for name, entry in state.items():
            for key, value in own[name].items():
                if value.shape == entry[key].shape:  # gradients collected for a size update of another period are of no use
                    local(value).copy_(piece_for(entry[key], value))

    def _measured_rms(self) -> Tensor:
        ones = self._numel.new_ones
        squares = torch.cat(
            [ones(len(stack.whole)) if stack.is_scalar else stack.stacked_params().square().flatten(1).sum(dim=1) for stack in self._stacks]
        )
        return torch.where(self.is_scalar, 1.0, (self._sum_over_shards(squares) / self._numel).sqrt_())

    def _kept(self, updated: Tensor, previous: Tensor) -> Tensor:
        """`updated` where there is a gradient, `previous` elsewhere."""
        return updated if self._mask is None else torch.where(self._mask, updated, previous)


def _stack_equal_shapes(params: list[Tensor]) -> list[_Stack]:
    """Stacks of neighbours of equal shape, of bounded size unless a single parameter is larger."""
    limit = _MAX_ELEMENTS_CPU if params[0].device.type == "cpu" else _MAX_ELEMENTS
    stacks, start = [], 0
    for end in range(1, len(params) + 1):
        shape = local(params[start]).shape
        full = (end - start) * shape.numel() >= limit
        if end == len(params) or full or params[end].shape != params[start].shape or local(params[end]).shape != shape:
            stacks.append(_Stack(start, params[start:end]))
            start = end
    return stacks
