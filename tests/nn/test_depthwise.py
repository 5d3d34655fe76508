"""Depthwise convolutions with channels last, beside torch's own with channels first."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from k2ssl.nn.depthwise import DepthwiseConvolution, DepthwiseConvolution2d


@pytest.mark.parametrize("kernel", [1, 5, 15])
def test_depthwise_convolution_on_the_cpu_equals_conv1d_with_its_gradients(kernel: int) -> None:
    torch.manual_seed(0)
    conv = DepthwiseConvolution(6, kernel).double()
    x = torch.randn(2, 11, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *conv.parameters()]
    truth = torch.nn.functional.conv1d(x.transpose(1, 2), conv.weight, conv.bias, padding=kernel // 2, groups=6).transpose(1, 2)
    fast = conv(x)
    torch.testing.assert_close(fast, truth, rtol=1e-13, atol=1e-13)
    seen = torch.randn_like(truth)
    for ours, true in zip(torch.autograd.grad((fast * seen).sum(), leaves), torch.autograd.grad((truth * seen).sum(), leaves), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frames_and_their_gradients_stay_in_rows_and_weights_gradients_have_the_strides_of_their_weights(dtype: torch.dtype) -> None:
    conv = DepthwiseConvolution(6, 5)
    x = torch.randn(2, 11, 6, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = conv(x)
    assert y.is_contiguous() and y.dtype == dtype
    y.backward(torch.randn_like(y))
    assert x.grad is not None and x.grad.is_contiguous()
    assert conv.weight.grad is not None and conv.weight.grad.stride() == conv.weight.stride()


def _with_gradients(y: Tensor, seen: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [y, *torch.autograd.grad((y * seen).sum(), leaves)]


@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_depthwise_convolution_over_bands_equals_conv2d_with_its_gradients(kernel: int) -> None:
    torch.manual_seed(0)
    conv = DepthwiseConvolution2d(6, kernel).double()
    x = torch.randn(2, 11, 5, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *conv.parameters()]
    image = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=kernel // 2, groups=6)
    seen = torch.randn_like(x)
    pairs = zip(_with_gradients(conv(x), seen, leaves), _with_gradients(image.permute(0, 2, 3, 1), seen, leaves), strict=True)
    for ours, true in pairs:
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)


def test_depthwise_convolution_under_autocast_keeps_its_weights_gradient_in_float32() -> None:
    torch.manual_seed(0)
    conv = DepthwiseConvolution2d(6, 7)
    x = torch.randn(2, 40, 20, 6).bfloat16().requires_grad_()
    leaves = [x, *conv.parameters()]
    seen = torch.randn(2, 40, 20, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    ours = _with_gradients(y, seen, leaves)
    assert [value.dtype for value in ours] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    exact = DepthwiseConvolution2d(6, 7).double()
    exact.load_state_dict(conv.state_dict())
    wide = x.detach().double().requires_grad_()
    true = _with_gradients(exact(wide), seen.double(), [wide, *exact.parameters()])
    for value, truth, limit in zip(ours, true, [1e-2, 1e-2, 1e-5, 1e-5], strict=True):
        assert (value - truth).abs().max() < limit * truth.abs().max()


@pytest.mark.parametrize(("frames", "kernel"), [(1, 7), (16, 3), (40, 1), (300, 5)])  # less than a window; whole ones; several parts
@pytest.mark.parametrize("fast", [{torch.float32}, set()], ids=["fast", "without"])
def test_gradients_of_a_depthwise_convolution_in_float32_are_those_of_conv2d(
    monkeypatch: pytest.MonkeyPatch, frames: int, kernel: int, fast: set[torch.dtype]
) -> None:
    monkeypatch.setattr("k2ssl.nn.depthwise._FAST", fast)
    torch.manual_seed(0)
    conv = DepthwiseConvolution2d(6, kernel)
    exact = DepthwiseConvolution2d(6, kernel).double()
    exact.load_state_dict(conv.state_dict())
    x = torch.randn(2, frames, 5, 6, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    seen = torch.randn_like(x)
    image = torch.nn.functional.conv2d(wide.permute(0, 3, 1, 2), exact.weight, exact.bias, padding=kernel // 2, groups=6)
    true = _with_gradients(image.permute(0, 2, 3, 1), seen.double(), [wide, *exact.parameters()])
    for ours, truth in zip(_with_gradients(conv(x), seen, [x, *conv.parameters()]), true, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - truth).abs().max() < 2e-6 * truth.abs().max()


def test_nothing_is_computed_for_gradients_that_nobody_wants() -> None:
    conv = DepthwiseConvolution2d(6, 3).requires_grad_(False)
    x = torch.randn(1, 4, 4, 6, requires_grad=True)
    conv(x).sum().backward()
    assert x.grad is not None and conv.weight.grad is None
    y = conv(x.detach())
    assert not y.requires_grad


@pytest.mark.parametrize("module", [DepthwiseConvolution, DepthwiseConvolution2d])
@pytest.mark.parametrize("kernel", [0, 4, -3])
def test_an_even_kernel_is_refused_by_name(module: type[DepthwiseConvolution | DepthwiseConvolution2d], kernel: int) -> None:
    with pytest.raises(ValueError, match=f"{module.__name__}: kernel is {kernel}, allowed are odd numbers"):
        module(6, kernel)


def test_it_loads_where_torch_was_built_without_onednn() -> None:
    program = """
import types, torch
torch.backends.mkldnn.is_available = lambda: False
torch.ops.mkldnn = types.SimpleNamespace()  # its operators are not registered then
from k2ssl.nn.depthwise import DepthwiseConvolution2d
conv = DepthwiseConvolution2d(3, 3)
conv(torch.randn(1, 4, 5, 3)).sum().backward()
assert conv.weight.grad.any()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
