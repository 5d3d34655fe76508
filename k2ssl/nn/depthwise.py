"""Depthwise convolutions over frames whose channels come last, in the layout that a CPU's library takes as it is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from k2ssl.first_derivative import first_derivative_only
from k2ssl.nn.precision import product_dtype

# formats in which oneDNN has a fast convolution here, whose own gradients are slower than that; elsewhere they are as fast or faster
_FAST: set[torch.dtype] = set()
if torch.backends.mkldnn.is_available():  # builds without it, as macOS has them, do not know the operator below
    _FAST = {torch.float32, torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {torch.float32}
_WINDOW = 16  # frames whose products with the input are a convolution of its own
_FRAMES = 128  # at a time, some two megabytes


class DepthwiseConvolution(nn.Conv1d):
    """Convolution over time of every channel apart, as many frames out as in; channels last.

    On a CPU it runs as a two-dimensional convolution of width one, which oneDNN has for frames whose channels come last: the same sums
    without reordering the frames, several times as fast, and what follows gets frames in rows.

    Args:
        dim: channels C.
        kernel: odd number of taps.

    Raises:
        ValueError: an even or non-positive kernel.
    """

    def __init__(self, dim: int, kernel: int) -> None:
        _check_kernel("DepthwiseConvolution", kernel)
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, C)."""
        if x.device.type != "cpu":
            return super().forward(x.transpose(1, 2)).transpose(1, 2)
        padding = (int(self.padding[0]), 0)
        weight = as_matrix(self.weight).unsqueeze(3)
        return F.conv2d(_image(x.unsqueeze(2)), weight, self.bias, padding=padding, groups=self.groups).permute(0, 2, 3, 1).squeeze(2)


class DepthwiseConvolution2d(nn.Conv2d):
    """Convolution over time and bands of every channel apart, as many of both out as in; channels last.

    On a CPU both gradients are computed as the convolutions that they are, several times as fast as oneDNN's own functions for them,
    where it has a fast convolution; the weights' gradient is summed in float32 at least.

    Args:
        dim: channels C.
        kernel: odd number of taps in time and in bands.

    Raises:
        ValueError: an even or non-positive kernel.
    """

    def __init__(self, dim: int, kernel: int) -> None:
        _check_kernel("DepthwiseConvolution2d", kernel)
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, bands, C) -> the same."""
        assert self.bias is not None
        if x.device.type != "cpu":
            return self._conv_forward(x.permute(0, 3, 1, 2), as_matrix(self.weight), self.bias).permute(0, 2, 3, 1)
        return _CpuDepthwise2d.apply(x.to(product_dtype(x)), as_matrix(self.weight), self.bias)


def as_matrix(weight: Tensor) -> Tensor:
    """The same weights seen by way of a matrix, so that their gradient comes back with their strides.

    Where channels come last, the gradient of a depthwise or 1 x 1 convolution has other strides than its weights along the axes of
    length one; nothing depends on these, but DistributedDataParallel would copy such gradients and warn of it.
    """
    return weight.flatten(1).view_as(weight)


class _CpuDepthwise2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = bias.dtype
        with torch.autocast("cpu", enabled=False):
            image = F.conv2d(_image(x), weight.to(x.dtype), bias.to(x.dtype), padding=weight.shape[-1] // 2, groups=len(weight))
        return image.permute(0, 2, 3, 1)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        with torch.autocast("cpu", enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = _input_gradient(x, grad, weight.to(grad.dtype))
            if ctx.needs_input_grad[1]:
                grad_weight = _weight_gradient(x, grad, weight).to(weight.dtype)
        grad_bias = grad.sum((0, 1, 2), dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


def _input_gradient(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """Of the input (N, T, bands, C), from the output's in the same shape."""
    padding = weight.shape[-1] // 2
    if grad.dtype in _FAST:  # oneDNN's function for it takes eight times as long as its convolution, which it is with mirrored weights
        image = F.conv2d(_image(grad), weight.flip(2, 3), padding=padding, groups=len(weight))
    else:
        image = conv2d_input(_image(x).shape, weight, _image(grad), padding=padding, groups=len(weight))
    return image.permute(0, 2, 3, 1)


def _weight_gradient(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """Of the weights (C, 1, K, K), from input and output gradient (N, T, bands, C); in float32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    if wide not in _FAST:
        options = {"padding": weight.shape[-1] // 2, "groups": len(weight)}
        return conv2d_weight(_image(x).to(wide), weight.shape, _image(grad).to(wide), **options)
    # oneDNN's function for it takes ten times as long as its convolution. And it is one: of a window of the input with the window's output
    # gradients for a kernel. Each window of each channel is a channel here, some of them at a time, such that copies fit the cache.
    total = x.new_zeros(weight.shape, dtype=wide)
    surplus = -x.shape[1] % _WINDOW
    margin = weight.shape[-1] // 2
    for frames, gradients in zip(x, grad, strict=True):
        frames = F.pad(frames, (0, 0, margin, margin, margin, margin + surplus))
        gradients = F.pad(gradients, (0, 0, 0, 0, 0, surplus))
        for start in range(0, len(gradients), _FRAMES):
            stop = start + _FRAMES
            total += _window_products(frames[start : stop + 2 * margin], gradients[start:stop], 2 * margin)
    return total


def _window_products(frames: Tensor, grad: Tensor, more: int) -> Tensor:
    """The weights' gradient (C, 1, more + 1, more + 1) of grad (T, bands, C), T whole windows, frames (T + more, bands + more, C)."""
    inputs = frames.float().unfold(0, _WINDOW + more, _WINDOW)  # (windows, bands, C, frames)
    kernels = grad.float().unflatten(0, (-1, _WINDOW))  # (windows, frames, bands, C)
    num_windows, channels = inputs.shape[0], inputs.shape[2]
    image = _image(inputs.permute(3, 1, 0, 2).flatten(2).unsqueeze(0))
    products = F.conv2d(image, kernels.permute(0, 3, 1, 2).flatten(0, 1).unsqueeze(1), groups=num_windows * channels)
    return products[0].unflatten(0, (num_windows, channels)).sum(0).unsqueeze(1)


def _image(x: Tensor) -> Tensor:
    """(N, T, bands, C) -> (N, C, T, bands), channels last in memory."""
    return x.contiguous().permute(0, 3, 1, 2)


def _check_kernel(name: str, kernel: int) -> None:
    if kernel < 1 or kernel % 2 == 0:  # there would be more frames out than in
        raise ValueError(f"{name}: kernel is {kernel}, allowed are odd numbers >= 1")
