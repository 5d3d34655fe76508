"""Who computes what `triton_kernels` is for: these kernels on a GPU where they compile and give what PyTorch gives, else PyTorch."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch
import torch.nn.functional as F

from k2ssl.gpu_kernels import why_no_triton

_FORMATS = (torch.float32, torch.bfloat16, torch.float16)
_MOST_APART = 1e-4  # of numbers near 1 in float32

_log = logging.getLogger(__name__)
_wanted = True


def use_triton(wanted: bool) -> None:
    """Let Triton's kernels compute, the default, or not, from the next call on, in this process."""
    global _wanted
    _wanted = wanted


def triton_kernels(device: torch.device, *dtypes: torch.dtype) -> ModuleType | None:
    """`k2ssl.nn.triton_kernels` if they compute numbers of these formats on `device`, else None; logged when first asked for a device.

    The first call for a GPU compiles them, and waits for it.
    """
    if device.type != "cuda" or not _wanted or any(dtype not in _FORMATS for dtype in dtypes):
        return None
    return _tried(device)


@functools.cache
def _tried(device: torch.device) -> ModuleType | None:
    why = why_no_triton()
    if not why:
        try:
            from k2ssl.nn import triton_kernels as kernels

            apart = difference(kernels, device)
            why = None if apart <= _MOST_APART else f"its kernels differ from PyTorch by {apart:.2g}"
        except Exception as error:  # Triton's compiler and the driver have errors of their own
            why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if why:
        _log.warning("Swoosh and first convolution on %s: PyTorch, slower, since Triton cannot: %s", device, why)
        return None
    _log.info("Swoosh and first convolution on %s: Triton", device)
    return kernels


def difference(kernels: ModuleType, device: torch.device) -> float:
    """The most that any number of small examples differs by between the kernels and PyTorch in float64; NaN if one gives NaN.

    Formats of two bytes are only tried, with and without masks: their rounding says nothing. Autograd takes no part, since the first call
    may come from anywhere, such as a layer that is computed again.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, grad, mask, windows, matrices, above = (
        draw(2, 70, 40),
        draw(2, 40, 70),
        draw(2, 1, 70),
        draw(2, 40, 11),
        draw(2, 11, 70),
        draw(80, 70),
    )
    x = x.transpose(1, 2)
    products = windows.double() @ matrices.double()
    slopes = torch.ops.aten.gelu_backward(above.double().view(products.shape), products)
    truths = [
        (F.softplus(x.double() - 1.0) - 0.08 * x - 0.3) * mask,
        (torch.sigmoid(x.double() - 1.0) - 0.08) * grad * mask,
        F.gelu(products).flatten(0, 1),
        windows.double().transpose(1, 2) @ slopes,
    ]
    x, grad, mask, windows, matrices, above = (tensor.to(device) for tensor in (x, grad, mask, windows, matrices, above))

    def run(dtype: torch.dtype, mask: torch.Tensor | None) -> list[torch.Tensor]:
        return [
            kernels.swoosh(x.to(dtype), mask, 1.0, 0.08, 0.3, dtype),
            kernels.swoosh_backward(grad.to(dtype), x.to(dtype), mask, 1.0, 0.08),
            kernels.gelu_of_products(windows, matrices, dtype),
            kernels.gelu_of_products_backward(above.to(dtype), windows, matrices),
        ]

    for dtype in _FORMATS:
        for factors in (None, mask):
            found = run(dtype, factors)
            if dtype == torch.float32 and factors is not None:
                apart = [(one.cpu() - truth).abs().max() for one, truth in zip(found, truths, strict=True)]
    return float(torch.stack(apart).max())
