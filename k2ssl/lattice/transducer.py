"""The transducer lattice on k2."""

from __future__ import annotations

import torch
from torch import Tensor

from k2ssl.lattice.package import k2


def cannot_run(device: torch.device) -> str | None:
    """Why this build of k2 cannot compute on `device`; None where it can."""
    if device.type == "cpu" or (device.type == "cuda" and k2.with_cuda):
        return None
    return f"this build of k2 has no support for {device.type} devices"


def forward_backward(px: Tensor, py: Tensor, boundary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-likelihoods and occupancies of whole lattices, accumulated in the dtype of `px`; k2 waits for the device to check `boundary`.

    Args:
        px, py: (N, S, T+1) and (N, S+1, T) log-probabilities of symbols and blanks.
        boundary: (N, 4) int64 on the same device.

    Returns:
        (N,), (N, S, T+1), (N, S+1, T); occupancies are zero where no alignment is possible.
    """
    scores, (px_grad, py_grad) = k2.mutual_information_recursion(px.contiguous(), py.contiguous(), boundary, return_grad=True)
    impossible = (scores == float("-inf")).view(-1, 1, 1)
    return scores, px_grad.masked_fill(impossible, 0.0), py_grad.masked_fill(impossible, 0.0)
