"""Backward passes written by hand have no backward pass of their own: what is done where somebody asks for one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def first_derivative_only(backward: Callable[..., Result]) -> Callable[..., Result]:
    """For the method `backward` of an autograd function, below `@staticmethod`: it refuses to be part of a second derivative.

    PyTorch's own `once_differentiable` lets one pass, and come out wrong, where the incoming gradient needs none: that a first derivative
    also depends on what was saved in the forward pass is not known to it.

    Raises:
        RuntimeError: by the decorated method, in a backward pass with `create_graph=True`.
    """

    @functools.wraps(backward)
    def guarded(*arguments: object) -> Result:
        if torch.is_grad_enabled():
            raise RuntimeError(f"{backward.__module__} can be differentiated once: its backward pass was called with create_graph=True")
        return backward(*arguments)

    return guarded
