"""linear -> Swoosh -> linear over frames, keeping nothing but the frames: the hidden layer is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from k2ssl.first_derivative import first_derivative_only
from k2ssl.nn.activation import Swoosh, activated, times_derivative
from k2ssl.nn.precision import product_dtype

_PIECE = 2**19  # elements of the hidden layer


def perceptron(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, activation: Swoosh) -> Tensor:
    """linear(activation(linear(x))): (N, T, C) -> (N, T, out_dim).

    A CPU computes it in pieces whose hidden layer fits its cache, so that none is written to memory; the gradients of the weights are
    summed over pieces in float32 at least.

    Args:
        x: (N, T, C).
        weight1, bias1: (hidden_dim, C) and (hidden_dim,).
        weight2, bias2: (out_dim, hidden_dim) and (out_dim,).
        activation: computed in float32 under autocast.
    """
    return _Perceptron.apply(x, weight1, bias1, weight2, bias2, activation, product_dtype(x))


class _Perceptron(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, activation: Swoosh, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight1, bias1, weight2)
        ctx.activation = activation
        ctx.dtype = dtype
        ctx.bias_dtype = bias2.dtype
        with torch.autocast(x.device.type, enabled=False):
            w1, b1, w2, b2 = (tensor.to(dtype) for tensor in (weight1, bias1, weight2, bias2))
            rows = x.reshape(-1, x.shape[-1])
            out = rows.new_empty(len(rows), len(w2), dtype=dtype)
            for part in _parts(rows, len(w1)):
                hidden = F.linear(rows[part].to(dtype), w1, b1)
                torch.addmm(b2, _activated(hidden, activation), w2.t(), out=out[part])
        return out.view(*x.shape[:-1], len(w2))

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, bias1, weight2 = ctx.saved_tensors
        w1, b1, w2 = (tensor.to(ctx.dtype) for tensor in (weight1, bias1, weight2))
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        # of weight1, bias1 and weight2
        sums = [
            torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) if wanted else None
            for tensor, wanted in zip((weight1, bias1, weight2), ctx.needs_input_grad[1:4], strict=True)
        ]
        for part in _parts(rows, len(w1)):
            piece, above = rows[part].to(ctx.dtype), grad_rows[part].to(ctx.dtype)
            hidden = F.linear(piece, w1, b1)
            grad_hidden = times_derivative((above @ w2)[None], hidden[None], None, ctx.activation)[0]
            if grad_x is not None:
                grad_x[part] = grad_hidden @ w1
            if sums[0] is not None:
                sums[0] += grad_hidden.t() @ piece
            if sums[1] is not None:
                sums[1] += grad_hidden.sum(0, dtype=sums[1].dtype)
            if sums[2] is not None:
                sums[2] += above.t() @ _activated(hidden, ctx.activation)
        grads = [None if total is None else total.to(of.dtype) for total, of in zip(sums, (weight1, bias1, weight2), strict=True)]
        grad_bias2 = grad_rows.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[4] else None
        return None if grad_x is None else grad_x.view_as(x), *grads, grad_bias2, None, None


def _activated(hidden: Tensor, activation: Swoosh) -> Tensor:
    return activated(hidden[None], None, activation, hidden.dtype)[0]


def _parts(rows: Tensor, hidden_dim: int) -> Iterator[slice]:
    """Pieces of the rows; on a GPU, which wants few kernels, and while a graph is traced, whose lengths are open, all of them."""
    step = max(1, _PIECE // hidden_dim)
    if rows.device.type != "cpu" or torch.compiler.is_compiling() or len(rows) <= step:
        yield slice(None)
        return
    for start in range(0, len(rows), step):
        yield slice(start, start + step)
