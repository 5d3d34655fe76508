"""Against torch's own convolution, activation and normalisation, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from k2ssl.nn import row_convolution
from k2ssl.nn.row_convolution import activate, convolve_activated, convolve_windows

ROWS, CHANNELS, OUT = 24, 5, 7


@pytest.fixture(params=[2**20, 250, 45], ids=["one piece", "two utterances at once", "pieces"])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(row_convolution, "_PIECE_CPU", request.param)
    return request.param


def parameters(kernel: int, with_norm: bool, with_bias: bool) -> tuple[tuple[Tensor, Tensor] | None, Tensor, Tensor | None]:
    torch.manual_seed(0)
    norm = tuple(torch.randn(CHANNELS, dtype=torch.float64, requires_grad=True) for _ in range(2)) if with_norm else None
    weight = torch.randn(OUT, CHANNELS, kernel, dtype=torch.float64, requires_grad=True)
    return norm, weight, torch.randn(OUT, dtype=torch.float64, requires_grad=True) if with_bias else None  # type: ignore[return-value]


def plain(rows: Tensor, norm: tuple[Tensor, Tensor] | None, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """(R, C_in) -> the whole windows, by conv1d."""
    x = rows if norm is None else F.layer_norm(rows, (CHANNELS,), *norm)
    return F.conv1d(F.gelu(x).t().unsqueeze(0), weight, bias, stride)[0].t()


def check(fast: Tensor, truth: Tensor, leaves: list[Tensor]) -> None:
    """Values and the gradients of a sum that weighs every element differently."""
    assert (fast - truth).abs().max() < 1e-12
    seen = torch.randn(truth.shape, dtype=truth.dtype)
    for ours, true in zip(torch.autograd.grad((fast * seen).sum(), leaves), torch.autograd.grad((truth * seen).sum(), leaves), strict=True):
        assert (ours - true).norm() <= 1e-12 * true.norm()


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (7, 2), (1, 1), (3, 1), (5, 4), (2, 3)])
@pytest.mark.parametrize(("with_norm", "with_bias"), [(False, False), (True, True)])
@pytest.mark.usefixtures("piece")
def test_convolution_of_rows_equals_conv1d_with_all_gradients(kernel: int, stride: int, with_norm: bool, with_bias: bool) -> None:
    norm, weight, bias = parameters(kernel, with_norm, with_bias)
    rows = torch.randn(ROWS, CHANNELS, dtype=torch.float64, requires_grad=True)
    truth = plain(rows, norm, weight, bias, stride)
    out = convolve_activated(rows, norm, weight, bias, stride)
    assert out.shape == (ROWS // stride, OUT)
    check(out[: len(truth)], truth, [rows, weight, *(norm or ()), *([] if bias is None else [bias])])


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.usefixtures("piece")
def test_convolution_of_windows_equals_conv1d_utterance_by_utterance(with_norm: bool) -> None:
    norm, weight, bias = parameters(3, with_norm, True)
    windows = torch.randn(3, ROWS, 4, dtype=torch.float64)
    first = torch.randn(3, 4, CHANNELS, dtype=torch.float64, requires_grad=True)
    truth = torch.stack([plain(windows[i] @ first[i], norm, weight, bias, 2) for i in range(3)])
    out = convolve_windows(windows, first, norm, weight, bias, 2, torch.float64).view(3, ROWS // 2, OUT)
    check(out[:, : truth.shape[1]], truth, [first, weight, *(norm or ())])


def test_bfloat16_differs_from_float64_by_its_rounding_only() -> None:
    norm, weight, bias = parameters(3, True, True)
    assert norm is not None and bias is not None
    rows = torch.randn(ROWS, CHANNELS, dtype=torch.float64)
    leaves = [rows, weight, bias, *norm]
    truth = convolve_activated(rows.requires_grad_(), norm, weight, bias, 2)
    low = convolve_activated(rows.bfloat16(), norm, weight, bias, 2)
    assert low.dtype == torch.bfloat16
    assert (low.double() - truth).norm() < 0.01 * truth.norm()
    for ours, true in zip(
        torch.autograd.grad(low.double().square().sum(), leaves), torch.autograd.grad(truth.square().sum(), leaves), strict=True
    ):
        assert ours.dtype == torch.float64
        assert (ours - true).norm() < 0.02 * true.norm()


def test_only_the_input_is_kept_for_the_backward_pass() -> None:
    norm, weight, bias = parameters(3, True, True)
    rows = torch.randn(ROWS, CHANNELS, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        convolve_activated(rows, norm, weight, bias, 2)
    assert norm is not None
    inputs = {tensor.data_ptr() for tensor in (rows, weight, *norm)}
    assert {tensor.data_ptr() for tensor in kept} == inputs


def test_activation_is_gelu_after_an_optional_layer_norm() -> None:
    rows = torch.randn(4, CHANNELS)
    weight, bias = torch.randn(CHANNELS), torch.randn(CHANNELS)
    assert torch.equal(activate(rows, None), F.gelu(rows))
    assert torch.equal(activate(rows, (weight, bias)), F.gelu(F.layer_norm(rows, (CHANNELS,), weight, bias)))
