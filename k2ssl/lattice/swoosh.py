"""Swoosh activations by k2's kernels.

k2's own autograd keeps derivatives in eight bits, rounded at random; here they are computed again instead, so that gradients are exact.
"""

from __future__ import annotations

from torch import Tensor

from k2ssl.lattice.package import k2

_FORWARD = {"l": k2.swoosh_l_forward, "r": k2.swoosh_r_forward}
_BOTH = {"l": k2.swoosh_l_forward_and_deriv, "r": k2.swoosh_r_forward_and_deriv}


def forward(name: str, x: Tensor) -> Tensor:
    """Swoosh "l" or "r" of float32 `x` of any shape, without autograd."""
    value: Tensor = _FORWARD[name](x.detach().contiguous())
    return value


def forward_and_derivative(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same and its derivative."""
    value, derivative = _BOTH[name](x.detach().contiguous())
    return value, derivative
