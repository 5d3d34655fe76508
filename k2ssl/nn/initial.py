"""Initial scales: PyTorch's default initialisation of a layer, multiplied by a constant.

The Zipformer starts the last projection of every branch small, so that each layer begins close to the identity
(arXiv 2310.11230; upstream ScaledLinear).
"""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def scale_initial(layer: nn.Linear, scale: float) -> nn.Linear:
    """Multiply the initial weight of `layer` by `scale`; its bias, if any, becomes uniform in +-0.1 * scale. Returns `layer`."""
    layer.weight.mul_(scale)
    if layer.bias is not None:
        nn.init.uniform_(layer.bias, -0.1 * scale, 0.1 * scale)
    return layer
