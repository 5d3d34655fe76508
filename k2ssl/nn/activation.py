"""SwooshL and SwooshR, alone and in layers that remember nothing but their input.

Formulas: arXiv 2310.11230, section 3.3. Both are softplus shifted right, tilted by -0.08 x, and moved to pass (almost) through zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2ssl.first_derivative import first_derivative_only
from k2ssl.nn.dropout import Dropout
from k2ssl.nn.initial import scale_initial
from k2ssl.nn.kernels import triton_kernels
from k2ssl.nn.precision import product_dtype
from k2ssl.nn.schedule import Clock, Schedule

_SLOPE = 0.08
_PIECE = 2**19  # elements
_MOST_THREADS = 2  # one alone looks values up

# "l" or "r" and float32 numbers -> values, or values and derivatives, without autograd; see `use_kernels`
ValueKernel = Callable[[str, Tensor], Tensor]
DerivativeKernel = Callable[[str, Tensor], tuple[Tensor, Tensor]]
_kernels: tuple[ValueKernel, DerivativeKernel] | None = None


def use_kernels(kernels: tuple[ValueKernel, DerivativeKernel] | None) -> None:
    """Let others compute both activations, outside of autograd's sight, where they are wanted in float32; None: PyTorch's operations do."""
    global _kernels
    _kernels = kernels


@dataclass(frozen=True)
class Swoosh:
    """log(1 + exp(x - shift)) - 0.08 x - offset; `name` is "l" or "r"."""

    name: str
    shift: float
    offset: float

    def __call__(self, x: Tensor) -> Tensor:
        """Value at `x`, any shape, in `x`'s dtype."""
        y = F.softplus(x - self.shift)
        y.sub_(x, alpha=_SLOPE)  # in place: memory is what costs here
        y -= self.offset
        return y

    def value(self, x: Tensor) -> Tensor:
        """The same in float32 at least and for no autograd to see, by the kernels that were chosen."""
        if _is_looked_up(x):
            return _looked_up(self, x)
        x = _at_least_float32(x)
        return self(x) if _kernels is None or x.dtype != torch.float32 else _kernels[0](self.name, x)

    def derivative(self, x: Tensor) -> Tensor:
        """d/dx at `x` in float32 at least, by the kernels that were chosen."""
        x = _at_least_float32(x)
        if _kernels is not None and x.dtype == torch.float32:
            return _kernels[1](self.name, x)[1]
        y = (x - self.shift).sigmoid_()
        y -= _SLOPE
        return y


swoosh_l = Swoosh("l", shift=4.0, offset=0.035)  # for feed-forward layers: "normally off"
swoosh_r = Swoosh("r", shift=1.0, offset=0.313261687)  # zero at x = 0: for convolutions


def _is_looked_up(x: Tensor) -> bool:
    """Not what merely stands for a tensor, as while a graph is traced; and other devices, and many threads, compute as fast."""
    real = type(x) is Tensor and not torch.compiler.is_compiling()
    cpu = x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.get_num_threads() <= _MOST_THREADS
    return real and cpu and _kernels is None


def _looked_up(activation: Swoosh, x: Tensor) -> Tensor:
    """Values at `x` in bfloat16, as float32: there are no more than 65,536, and to look one up takes half to two thirds of the time of computing it."""
    numbers = x.reshape(-1).view(torch.int16).to(torch.int32).add_(2**15)  # from uint16 a CPU would convert them one by one
    return _all_values(activation).index_select(0, numbers).view(x.shape)


@functools.cache
def _all_values(activation: Swoosh) -> Tensor:
    """Values at all bfloat16 numbers, in the order of their bits as signed integers."""
    return activation(torch.arange(-(2**15), 2**15, dtype=torch.int16, device="cpu").view(torch.bfloat16).float())


class SwooshDropoutLinear(nn.Module):
    """linear(dropout(swoosh(x))), keeping only `x` for the backward pass.

    Plain autograd would keep the activation's input, its output and the dropped-out output, each as wide as the hidden layer; here
    the latter two are computed again from `x`. The activation is computed in float32 under autocast.

    Args:
        in_dim, out_dim: widths of the linear layer.
        activation: `swoosh_l` or `swoosh_r`.
        clock: source of randomness.
        dropout: rate or schedule; one mask is shared by all time steps (axis 1) of a sequence.
        initial_scale: multiplies the linear layer's default initialisation.

    Upstream: ActivationDropoutAndLinear.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        activation: Swoosh,
        clock: Clock,
        dropout: float | Schedule = 0.0,
        initial_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.dropout = Dropout(dropout, clock, shared_dim=1)
        linear = scale_initial(nn.Linear(in_dim, out_dim), initial_scale)
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, in_dim) -> (N, T, out_dim)."""
        return swoosh_linear(x, self.weight, self.bias, self.activation, self.dropout.mask(x))


def swoosh(x: Tensor, activation: Swoosh) -> Tensor:
    """activation(x) in the dtype of `x` (N, T, C), computed in float32 at least, keeping only `x` for the backward pass."""
    return _Swoosh.apply(x, activation)


class _Swoosh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Swoosh) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        return activated(x, None, activation, x.dtype)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return times_derivative(grad, x, None, ctx.activation), None


def swoosh_linear(x: Tensor, weight: Tensor, bias: Tensor, activation: Swoosh, mask: Tensor | None = None) -> Tensor:
    """linear(activation(x) * mask), keeping only `x` for the backward pass: (N, T, in_dim) -> (N, T, out_dim).

    Args:
        x: (N, T, in_dim).
        weight: (out_dim, in_dim).
        bias: (out_dim,).
        activation: computed in float32 under autocast.
        mask: (N, 1, in_dim) factors of dropout; None for 1.
    """
    return _SwooshDropoutLinear.apply(x, weight, bias, mask, activation, product_dtype(x))


class _SwooshDropoutLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, activation: Swoosh, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight, mask)
        ctx.activation = activation
        ctx.dtype = dtype
        ctx.bias_dtype = bias.dtype
        with torch.autocast(x.device.type, enabled=False):
            hidden = activated(x, mask, activation, dtype)
            return F.linear(hidden, weight.to(dtype), bias.to(dtype))

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask = ctx.saved_tensors
        grad = grad.to(ctx.dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            hidden = activated(x, mask, ctx.activation, ctx.dtype)
            grad_weight = (rows.t() @ hidden.reshape(rows.shape[0], -1)).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = times_derivative(grad @ weight.to(ctx.dtype), x, mask, ctx.activation)
        grad_bias = rows.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None


def activated(x: Tensor, mask: Tensor | None, activation: Swoosh, dtype: torch.dtype) -> Tensor:
    """activation(x) * mask in `dtype`, without autograd: (N, T, C) -> (N, T, C).

    Frames come out in rows whatever the strides of `x`: `F.linear` would copy its weights per utterance.
    """
    if _kernels is None and (kernels := triton_kernels(x.device, x.dtype, dtype)):
        found: Tensor = kernels.swoosh(x, mask, activation.shift, _SLOPE, activation.offset, dtype)
        return found
    hidden = x.new_empty(x.shape, dtype=dtype)
    for part in _parts(x):
        values = activation.value(x[part])
        hidden[part] = values if mask is None else values.mul_(mask[part[0]])
    return hidden


def times_derivative(grad: Tensor, x: Tensor, mask: Tensor | None, activation: Swoosh) -> Tensor:
    """grad * activation'(x) * mask in the dtype of `x`, without autograd."""
    if _kernels is None and (kernels := triton_kernels(x.device, x.dtype, grad.dtype)):
        found: Tensor = kernels.swoosh_backward(grad, x, mask, activation.shift, _SLOPE)
        return found
    grad_x = torch.empty_like(x)
    for part in _parts(x):
        derivative = activation.derivative(x[part])
        if mask is not None:
            derivative *= mask[part[0]]
        grad_x[part] = derivative.mul_(grad[part])
    return grad_x


def _parts(x: Tensor) -> Iterator[tuple[int | slice, ...]]:
    """Indices that cut (N, T, C) into pieces that fit a CPU's cache; on other devices, which want few kernels, and in graphs, all of it."""
    size = math.prod(x.shape[1:])  # of an utterance
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() <= _PIECE:
        yield (slice(None),)
    elif size <= _PIECE:  # several utterances at once
        step = _PIECE // size
        for start in range(0, len(x), step):
            yield (slice(start, start + step),)
    else:
        step = max(1, _PIECE // x.shape[2])
        for utterance in range(len(x)):
            for start in range(0, x.shape[1], step):
                yield utterance, slice(start, start + step)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
