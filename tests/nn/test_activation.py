"""Swoosh against recorded values; the fused layer against plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from k2ssl.nn import activation
from k2ssl.nn.activation import Swoosh, SwooshDropoutLinear, swoosh, swoosh_l, swoosh_r
from k2ssl.nn.schedule import Clock


@pytest.mark.parametrize(("activation", "name"), [(swoosh_l, "swoosh_l"), (swoosh_r, "swoosh_r")])
def test_values_and_derivatives_agree_with_the_recorded_truth(golden, agreement, activation: Swoosh, name: str) -> None:
    recorded = golden("swoosh")
    x = recorded["x"]
    # float32 has 7 digits and the values reach 26: 1e-6 is asked for of |x| <= 10, beyond that of the value's size
    near = x.abs() <= 10
    agreement.absolute(f"{name}, float32, |x| <= 10", activation(x.float())[near], recorded[name][near], 1e-6)
    torch.testing.assert_close(activation(x.float()).double(), recorded[name], atol=1e-6, rtol=1.2e-7)
    agreement.absolute(f"{name} derivative, float32", activation.derivative(x.float()), recorded[f"{name}_deriv"], 1e-6)
    torch.testing.assert_close(activation(x), recorded[name], atol=3e-9, rtol=0)  # upstream rounds the offset to 9 digits


@pytest.mark.parametrize("activation", [swoosh_l, swoosh_r])
def test_values_looked_up_for_bfloat16_are_those_computed_in_float32_bit_for_bit(activation: Swoosh) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)  # infinities and what is no number included
    shuffled = every[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))].view(2**8, 2**8).t()  # not in rows
    values = activation.value(shuffled)
    assert values.dtype == torch.float32 and values.shape == shuffled.shape
    assert torch.equal(values.contiguous().view(torch.int32), activation(shuffled.float()).contiguous().view(torch.int32))


def test_values_are_looked_up_wherever_they_were_first_asked_for() -> None:
    layer = SwooshDropoutLinear(32, 16, swoosh_r, Clock())
    x = torch.randn(2, 9, 32)

    def autocast_layer(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    activation._all_values.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # tensors without values
        assert autocast_layer(mode.from_tensor(x.bfloat16())).shape == (2, 9, 16)
    with torch.device("meta"), torch.inference_mode():
        expected = autocast_layer(x.bfloat16())
    wanted = x.bfloat16().requires_grad_()
    y = autocast_layer(wanted)
    torch.testing.assert_close(y, expected, atol=0, rtol=0)
    y.sum().backward()
    compiled = torch.compile(autocast_layer, backend="aot_eager")
    torch.testing.assert_close(compiled(x.bfloat16()), expected)


@pytest.mark.parametrize("activation", [swoosh_l, swoosh_r])
@pytest.mark.parametrize("piece", [1000, 10])
def test_the_activation_alone_has_the_gradient_of_the_plain_formula_and_keeps_its_input_only(
    monkeypatch: pytest.MonkeyPatch, activation: Swoosh, piece: int
) -> None:
    monkeypatch.setattr("k2ssl.nn.activation._PIECE", piece)
    torch.manual_seed(0)
    x = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        value = swoosh(x, activation)
    truth = activation(x)
    torch.testing.assert_close(value, truth, atol=1e-15, rtol=1e-12)
    (ours,) = torch.autograd.grad(value, x, grad)
    (plain,) = torch.autograd.grad(truth, x, grad)
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]
    rounded = x.detach().bfloat16()
    assert torch.equal(swoosh(rounded, activation), activation(rounded.double()).bfloat16())  # nothing is rounded before the result


def test_values_are_looked_up_on_a_few_threads_and_not_where_other_kernels_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []
    monkeypatch.setattr(Swoosh, "__call__", lambda self, x: asked.append(x.dtype) or x)
    x = torch.randn(1, 4, 3).bfloat16()
    activation._all_values(swoosh_l)
    asked.clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    swoosh_l.value(x)
    assert not asked
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    swoosh_l.value(x)
    assert asked == [torch.float32]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(activation, "_kernels", (lambda name, x: asked.append(name) or x, lambda name, x: (x, x)))
    swoosh_l.value(x)
    assert asked == [torch.float32, "l"]


def _plain(layer: SwooshDropoutLinear, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    shift = {id(swoosh_l): 4.0, id(swoosh_r): 1.0}[id(layer.activation)]
    offset = {id(swoosh_l): 0.035, id(swoosh_r): 0.313261687}[id(layer.activation)]
    hidden = torch.logaddexp(x.new_zeros(()), x - shift) - 0.08 * x - offset
    return F.linear(hidden if mask is None else hidden * mask, layer.weight, layer.bias)


@pytest.mark.parametrize("activation", [swoosh_l, swoosh_r])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("piece", [1000, 60, 10])  # all at once; two of the three utterances; two of the six frames
def test_gradients_of_the_fused_layer_are_those_of_the_plain_formula(
    monkeypatch: pytest.MonkeyPatch, activation: Swoosh, dropout: float, piece: int
) -> None:
    monkeypatch.setattr("k2ssl.nn.activation._PIECE", piece)
    clock = Clock(1)
    layer = SwooshDropoutLinear(5, 4, activation, clock, dropout=dropout).double()
    x = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.weight, layer.bias)
    grad = torch.randn(3, 6, 4, dtype=torch.float64)

    clock.seed(8)
    value = layer(x)
    fused = torch.autograd.grad(value, inputs, grad)
    clock.seed(8)
    mask = layer.dropout.mask(x)
    assert (mask is None) == (dropout == 0.0)
    truth = _plain(layer, x, mask)
    plain = torch.autograd.grad(truth, inputs, grad)
    for one, two in zip((value, *fused), (truth, *plain), strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-10)


def test_the_dropout_mask_is_shared_by_the_frames_of_an_utterance() -> None:
    layer = SwooshDropoutLinear(64, 4, swoosh_l, Clock(), dropout=0.5)
    mask = layer.dropout.mask(torch.zeros(7, 30, 64))
    assert mask is not None and mask.shape == (7, 1, 64)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    assert layer.eval().dropout.mask(torch.zeros(7, 30, 64)) is None


def test_only_the_input_is_kept_for_the_backward_pass() -> None:
    layer = SwooshDropoutLinear(256, 8, swoosh_l, Clock())
    kept: list[torch.Tensor] = []
    x = torch.randn(2, 50, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert [t.data_ptr() for t in kept if t.numel() >= x.numel()] == [x.data_ptr()]


def test_under_autocast_the_output_is_bfloat16_and_close_to_float32() -> None:
    layer = SwooshDropoutLinear(32, 16, swoosh_r, Clock())
    x = torch.randn(2, 9, 32, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    grad = torch.autograd.grad(y.float().square().sum(), layer.weight)[0]
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, expected, atol=0.05 * expected.abs().max().item(), rtol=0)


def test_frames_that_are_not_in_rows_are_one_product_with_the_weights() -> None:
    layer = SwooshDropoutLinear(32, 16, swoosh_r, Clock())
    frames = torch.randn(3, 32, 9).transpose(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(frames.contiguous())
    products: list[tuple[int, ...]] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                products.append(tuple(args[-2].shape))
            return function(*args, **(kwargs or {}))

    with Products(), torch.autocast("cpu", torch.bfloat16):
        y = layer(frames)
    assert products == [(27, 32)]
    torch.testing.assert_close(y, expected)
