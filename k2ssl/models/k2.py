"""Whether the Swoosh activations of this process are computed by k2's kernels.

    torch    PyTorch's operations
    k2       k2's kernels, where k2 is installed; float32 only, other formats stay with PyTorch

"auto", the default, means torch: on a CPU k2's kernels are slower (docs/performance.md), and on a GPU they were not measured. A backend that was asked for and cannot run is an error, never replaced by another one.
"""

from __future__ import annotations

import logging
from typing import Literal, get_args

from k2ssl.nn import activation

SwooshBackend = Literal["torch", "k2"]

_log = logging.getLogger(__name__)


def use_swoosh_backend(name: SwooshBackend | Literal["auto"]) -> None:
    """Choose who computes Swoosh, from the next call on; the choice is logged.

    Raises:
        ValueError: no such backend, or k2 does not load; says why.
    """
    allowed = ("auto", *get_args(SwooshBackend))
    if name not in allowed:
        raise ValueError(f"use_swoosh_backend: name is {name!r}, allowed are {', '.join(allowed)}")
    if name == "k2":
        try:
            from k2ssl.lattice import swoosh
        except ImportError as error:
            raise ValueError(f"use_swoosh_backend: name is 'k2', which cannot run here: {error}") from error
        activation.use_kernels((swoosh.forward, swoosh.forward_and_derivative))
    else:
        activation.use_kernels(None)
    _log.info("swoosh: backend %s (%s)", "k2" if name == "k2" else "torch", "automatic" if name == "auto" else "chosen")
