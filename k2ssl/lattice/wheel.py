"""Which k2 would fit, known without importing it."""

from __future__ import annotations

import sys

import torch


def wheel_that_fits() -> str:
    """What a wheel of k2 must be built for to load beside this torch, and where such wheels are listed."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    release = str(torch.__version__).partition("+")[0]
    return (
        f"the wheel that fits is built for torch {release}, {cuda} and Python {sys.version_info[0]}.{sys.version_info[1]}; "
        "the documentation of k2 lists wheels, and one for another torch does not load"
    )
