"""Where numbers stop being finite: hooks on every module that look at what it returns and at the gradient that comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class NonFiniteError(FloatingPointError):
    """A tensor holds values that are not finite.

    Attributes:
        place: which tensor, such as "output of encoder.0".
    """

    def __init__(self, place: str) -> None:
        super().__init__(f"{place} is not finite")
        self.place = place


class InfCheck:
    """While the block lasts, the first value that is not finite ends training, and is named.

        with InfCheck(model):
            model(batch).loss.backward()

    Looks at the input of the model, the output of every module in order of execution (a module's parts come before itself), the gradient
    at each of those outputs, and that of every parameter, in the order of the backward pass. A gradient that is not finite at the output
    of a module was computed by what comes after it.

    Waits for the device at every module: for finding a fault, not for training. Gradients are those of the scaled loss, so float16
    training with a loss scale may find an overflow that the scale would have dealt with.

    Raises:
        NonFiniteError: a FloatingPointError that names the place; from the forward or the backward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> InfCheck:
        self._handles.append(self._model.register_forward_pre_hook(_check_input, with_kwargs=True))
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_hook(_output_check(name or "the model")))
        for name, param in self._model.named_parameters():
            if param.requires_grad:
                self._handles.append(param.register_hook(_gradient_check(f"gradient of parameter {name}")))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def find_nonfinite(model: nn.Module, run: Callable[[], Tensor]) -> str | None:
    """Run a step again and name the first place where a value is not finite.

    Args:
        model: the module itself, not a wrapper that exchanges gradients: one rank may do this alone.
        run: the forward pass; returns the loss, with its scale if gradients had one. What it changes, such as the state of a clock, is for
            the caller to put back.

    Returns:
        "parameter NAME" if one is not finite to begin with; else what `InfCheck` finds first: "input of the model", "output of MODULE",
        then "loss", "gradient at the output of MODULE" and "gradient of parameter NAME"; None if all is finite. Gradients that parameters
        have are left as they are, and none are added.
    """
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    for name, param in model.named_parameters():
        if not _is_finite(param):
            return f"parameter {name}"
    try:
        with InfCheck(model):
            loss = run()
            if not _is_finite(loss):
                return "loss"
            torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    except NonFiniteError as found:
        return found.place
    return None


def _check_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not all(_is_finite(tensor) for tensor in tensors_in((args, kwargs))):
        raise NonFiniteError("input of the model")


def _output_check(name: str) -> Callable[[nn.Module, Any, Any], None]:
    check_gradient = _gradient_check(f"gradient at the output of {name}")

    def check(_: nn.Module, __: Any, output: Any) -> None:
        for tensor in tensors_in(output):
            if not _is_finite(tensor):
                raise NonFiniteError(f"output of {name}")
            if tensor.requires_grad:
                tensor.register_hook(check_gradient)  # goes with the graph; module hooks for gradients would forbid operations in place

    return check


def _gradient_check(place: str) -> Callable[[Tensor], None]:
    def check(gradient: Tensor) -> None:
        if not _is_finite(gradient):
            raise NonFiniteError(place)

    return check


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All floating-point tensors in nested dataclasses, mappings and sequences."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
