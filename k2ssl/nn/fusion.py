"""Chains of elementwise operations as one kernel each, by torch.compile, where that is asked for.

Each operation of a chain reads its operands from memory and writes its result there; compiled, the chain reads its inputs and writes its
result once. Whole layers are not compiled: what acts in a step is drawn at random in most of their modules, and every combination would be
a graph of its own. The functions marked here decide nothing at random and ask nothing of the host, so that the number of graphs depends on
dtypes and on which arguments are None, not on lengths, steps or draws.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_MOST_GRAPHS = 64  # of one function; torch's own limit of 8 is below what two dtypes, an optional mask and two modes of autograd make

_backend: str | None = None
_compiled: dict[tuple[str, Callable[..., Any]], Callable[..., Any]] = {}


def use_fusion(backend: str | None) -> None:
    """Compile what is `fusible` from now on, in this process.

    Args:
        backend: torch.compile's; "inductor" needs a C++ compiler for a CPU and Triton for a GPU, and seconds per graph at its first use
            (it keeps what it compiled on disk). "aot_eager" compiles nothing, for tests. None: run all functions as they are written.

    Rounding differs from that of the functions as written, since what lies between two operations of a chain is never rounded to memory.
    """
    global _backend
    if backend is not None:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
        torch._dynamo.config.force_parameter_static_shapes = False  # else a graph for every width of a stack
        torch.fx.experimental._config.use_duck_shape = False  # else one more where two lengths happen to be equal
    _backend = backend


def fuses() -> bool:
    """Whether what is `fusible` will be compiled; for functions whose form as written suits a device better than one chain."""
    return _backend is not None


def fusible(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function of tensors, of any sizes, to be compiled as `use_fusion` says.

    A graph that breaks is an error, never a slow path that nobody notices.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if _backend is None or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        key = (_backend, function)
        if key not in _compiled:
            _compiled[key] = torch.compile(function, backend=_backend, dynamic=True, fullgraph=True)
        result: R = _compiled[key](*args, **kwargs)
        return result

    return call


def check_fusion(device: torch.device) -> None:
    """Compile something small on `device` by the backend that was chosen, or nothing if none was.

    Raises:
        ValueError: it cannot be compiled here: no compiler, no Triton, or a backend that torch does not know.
    """
    if not fuses():
        return
    try:
        value = _double(torch.ones(3, device=device))
    except Exception as error:  # every part of torch's compiler has errors of its own
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"elementwise operations cannot be fused on {device}: {reason}") from error
    if value.tolist() != [2.0, 2.0, 2.0]:
        raise ValueError(f"elementwise operations cannot be fused on {device}: a compiled function doubles 1 to {value.tolist()}")


@fusible
def _double(x: torch.Tensor) -> torch.Tensor:
    return x * 2
