"""Who computes the recursions of the transducer lattice.

    torch    plain PyTorch, on any device
    triton   one fused kernel per recursion, on CUDA devices (on the CPU in Triton's interpreter: TRITON_INTERPRET=1 before the first import)
    k2       k2.mutual_information_recursion, where k2 is installed

"auto", the default, means triton on CUDA devices where it is installed and finds what it compiles with, else torch. A backend that was
asked for and cannot run is an error, never replaced by another one. Which one runs on a device is logged when first used there.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from k2ssl.gpu_kernels import why_no_triton
from k2ssl.losses import transducer_sweep
from k2ssl.losses.transducer_diagonals import Diagonals

Backend = Literal["torch", "triton", "k2"]
NewArcs = Callable[[int, int, int, torch.device], tuple[Tensor, Tensor, Tensor]]
Sweep = Callable[[Diagonals], Tensor]

_log = logging.getLogger(__name__)
_chosen: Backend | Literal["auto"] = "auto"
_announced: set[tuple[str, str]] = set()


def use_lattice_backend(name: Backend | Literal["auto"]) -> None:
    """Choose the backend of this process, from the next loss on.

    Raises:
        ValueError: no such backend, or it is not installed.
    """
    global _chosen
    allowed = ("auto", *get_args(Backend))
    if name not in allowed:
        raise ValueError(f"use_lattice_backend: name is {name!r}, allowed are {', '.join(allowed)}")
    if name != "auto" and (missing := _not_installed(name)):
        raise ValueError(f"use_lattice_backend: name is {name!r}, which cannot run here: {missing}")
    _chosen = name


def lattice_backend(device: torch.device | str) -> Backend:
    """The backend that a loss on `device` uses.

    Raises:
        ValueError: the chosen backend cannot run on that device.
    """
    device = torch.device(device)
    if _chosen == "auto":
        return "triton" if device.type == "cuda" and not why_no_triton() else "torch"
    if why := _cannot_run(_chosen, device):
        raise ValueError(f"lattice_backend: {_chosen!r} was chosen and cannot run on {device}: {why}")
    return _chosen


def announced_backend(device: torch.device) -> Backend:
    """`lattice_backend`, logged the first time that it is used on a kind of device."""
    name = lattice_backend(device)
    if (name, device.type) not in _announced:
        _announced.add((name, device.type))
        fallback = why_no_triton() if _chosen == "auto" and device.type == "cuda" else None
        reason = f"; no triton: {fallback}" if fallback else ""
        _log.info("transducer lattice: backend %s on %s (%s%s)", name, device.type, "automatic" if _chosen == "auto" else "chosen", reason)
    return name


def recursion(name: Literal["torch", "triton"]) -> tuple[NewArcs, Sweep]:
    """How a backend lays out arcs, and its two recursions over them."""
    if name == "torch":
        return transducer_sweep.new_arcs, transducer_sweep.sweep
    from k2ssl.losses.transducer_kernel import new_arcs, sweep  # imports triton, which not every machine has

    return new_arcs, sweep


def _not_installed(name: Backend) -> str | None:
    if name != "torch" and importlib.util.find_spec(name) is None:
        return f"the package {name} is not installed"
    if name == "k2":
        try:
            import k2ssl.lattice.transducer  # noqa: F401 -- loads k2, which fails where it was built for another torch
        except ImportError as error:
            return str(error)
    return None


def _cannot_run(name: Backend, device: torch.device) -> str | None:
    if name == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "its kernels are for CUDA devices (tests on a CPU set TRITON_INTERPRET=1 before the first import)"
    if name == "k2":
        from k2ssl.lattice.transducer import cannot_run  # imports k2

        return cannot_run(device)
    return None
