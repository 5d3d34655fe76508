"""BiasNorm against recorded values and against plain autograd."""

from __future__ import annotations

import pytest
import torch

from k2ssl.nn.norm import BiasNorm
from k2ssl.nn.schedule import Clock


def test_value_and_gradients_agree_with_the_recorded_ones(golden, agreement) -> None:
    recorded = golden("bias_norm")
    norm = BiasNorm(24, Clock()).eval()
    with torch.no_grad():
        norm.bias.copy_(recorded["bias"])
        norm.log_scale.copy_(recorded["log_scale"])
    x = recorded["x"].requires_grad_()
    y = norm(x)
    y.backward(recorded["dy"])
    for ours, theirs in ((y, "y"), (x.grad, "dx"), (norm.bias.grad, "dbias"), (norm.log_scale.grad, "dlog_scale")):
        agreement.absolute(f"bias_norm {theirs}", ours, recorded[theirs], 1e-5)


def test_gradients_are_those_of_the_plain_formula() -> None:
    norm = BiasNorm(6, Clock()).double().eval()
    with torch.no_grad():
        norm.bias.normal_()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, norm.bias, norm.log_scale)
    grad = torch.randn_like(x)
    plain = x * norm.log_scale.exp() / (x - norm.bias).square().mean(dim=-1, keepdim=True).sqrt()
    for one, two in zip(torch.autograd.grad(norm(x), inputs, grad), torch.autograd.grad(plain, inputs, grad), strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-10)


def test_a_frame_of_zeros_stays_finite_with_a_zero_bias() -> None:
    norm = BiasNorm(4, Clock())
    torch.nn.init.zeros_(norm.bias)
    x = torch.zeros(1, 2, 4, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.isfinite(norm.bias.grad).all() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_module_in_half_precision_still_computes_in_float32(dtype: torch.dtype) -> None:
    norm = BiasNorm(64, Clock()).eval()
    x = (300 * torch.randn(5, 64)).to(dtype)
    expected = norm(x.float())
    half = norm.to(dtype)
    x.requires_grad_()
    y = half(x)
    y.float().square().sum().backward()
    torch.testing.assert_close(y.float(), expected, atol=0, rtol=0.02)
    assert half.bias.grad is not None and half.bias.grad.dtype == dtype and torch.isfinite(half.bias.grad).all()
    assert not half(torch.zeros(1, 64, dtype=dtype)).isnan().any()


def test_in_training_the_scale_is_turned_back_when_it_leaves_its_range() -> None:
    norm = BiasNorm(4, Clock())
    x = torch.randn(50, 4)
    signs = set()
    for value in (1.0, 1.7):
        torch.nn.init.constant_(norm.log_scale, value)
        for _ in range(30):
            norm.log_scale.grad = None
            (-norm(x).square().sum()).backward()  # this loss wants a larger scale
            signs.add((value, bool(norm.log_scale.grad > 0)))
    assert (1.0, True) not in signs and {(1.0, False), (1.7, True), (1.7, False)} <= signs
