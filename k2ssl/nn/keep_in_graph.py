"""Zero gradients for parameters that a random decision left out of this step.

`DistributedDataParallel` waits for a gradient of every parameter. A layer or term that is skipped at random would leave it waiting,
or force `find_unused_parameters`, which costs a graph traversal per step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from k2ssl.first_derivative import first_derivative_only


def keep_in_graph(x: Tensor, params: Iterable[Tensor]) -> Tensor:
    """`x` unchanged; in backward each of `params` that requires a gradient receives zeros."""
    return _KeepInGraph.apply(x, *(param for param in params if param.requires_grad))


class _KeepInGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *params: Tensor) -> Tensor:
        ctx.like = [(param.shape, param.dtype, param.device) for param in params]
        return x.view_as(x)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like))
