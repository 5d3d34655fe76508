"""Who computes what `triton_kernels` is for: these kernels on a GPU where they compile and give what PyTorch gives, else PyTorch."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from k2ssl.gpu_kernels import why_no_triton

_FORMATS = (torch.float32, torch.bfloat16, torch.float16)
_MOST_APART = 1e-4  # of numbers near 1 in float32
_EPS = 1e-5

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
        _log.warning("Swoosh and frontend on %s: PyTorch, slower, since Triton cannot: %s", device, why)
        return None
    _log.info("Swoosh and frontend on %s: Triton", device)
    return kernels


def difference(kernels: ModuleType, device: torch.device) -> float:
    """The most that any number of small examples differs by between the kernels and PyTorch in float64; NaN if one gives NaN.

    Formats of two bytes are only tried, with and without masks: their rounding says nothing. Autograd takes no part, since the first call
    may come from anywhere, such as a layer that is computed again.
    """
    example = _example(torch.Generator().manual_seed(0))
    truths = _truths(**example)
    there = {name: tensor.to(device) for name, tensor in example.items()}
    for dtype in _FORMATS:
        for masked in (False, True):
            found = _run(kernels, dtype, masked, **there)
            if dtype == torch.float32 and masked:
                apart = [(one.cpu() - truth).abs().max() for one, truth in zip(found, truths, strict=True)]
    return float(torch.stack(apart).max())


def _example(generator: torch.Generator) -> dict[str, Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    swoosh = {"x": draw(2, 70, 40).transpose(1, 2), "grad": draw(2, 40, 70), "mask": draw(2, 1, 70)}
    products = {"windows": draw(2, 40, 11), "matrices": draw(2, 11, 70)}
    return {**swoosh, **products, "rows": draw(80, 70), "scale": draw(70), "shift": draw(70), "above": draw(80, 70)}


def _run(kernels: ModuleType, dtype: torch.dtype, masked: bool, **example: Tensor) -> list[Tensor]:
    """What the kernels give for numbers of this format."""
    x, grad, rows, above = (example[name].to(dtype) for name in ("x", "grad", "rows", "above"))
    mask = example["mask"] if masked else None
    products, norm = (example["windows"], example["matrices"]), (example["scale"], example["shift"], _EPS)
    return [
        kernels.swoosh(x, mask, 1.0, 0.08, 0.3, dtype),
        kernels.swoosh_backward(grad, x, mask, 1.0, 0.08),
        kernels.gelu_of_products(*products, dtype),
        kernels.gelu_of_products_backward(above, *products),
        kernels.normal_gelu(rows, *norm, dtype),
        *kernels.normal_gelu_backward(above, rows, *norm),
    ]


def _truths(**example: Tensor) -> list[Tensor]:
    """The same in float64, with masks."""
    x, grad, mask, windows, matrices, rows, scale, shift, above = (tensor.double() for tensor in example.values())
    products = windows @ matrices
    normal, mean, inverse = torch.native_layer_norm(rows, [len(scale)], scale, shift, _EPS)
    below = torch.ops.aten.gelu_backward(above, normal)
    return [
        (F.softplus(x - 1.0) - 0.08 * x - 0.3) * mask,
        (torch.sigmoid(x - 1.0) - 0.08) * grad * mask,
        F.gelu(products).flatten(0, 1),
        windows.mT @ torch.ops.aten.gelu_backward(above.view(products.shape), products),
        F.gelu(normal),
        *torch.ops.aten.native_layer_norm_backward(below, rows, [len(scale)], mean, inverse, scale, shift, [True, True, True]),
    ]
