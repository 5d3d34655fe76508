"""The two-layer perceptron that keeps its input only, against plain autograd."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from k2ssl.nn.activation import swoosh_l, swoosh_r
from k2ssl.nn.perceptron import perceptron


def _leaves(dtype: torch.dtype, frames: int = 7) -> list[Tensor]:
    """Input (2, frames, 5), and the weights and biases of a hidden layer of 12 and an output of 4."""
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2, frames, 5), (12, 5), (12,), (4, 12), (4,))]


def _plain(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return F.linear(swoosh_r(F.linear(x, weight1, bias1)), weight2, bias2)


@pytest.mark.parametrize("piece", [1000, 60, 1])  # all at once; five of the fourteen rows; one of them
def test_value_and_gradients_are_those_of_plain_autograd(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr("k2ssl.nn.perceptron._PIECE", piece)
    leaves = _leaves(torch.float64)
    above = torch.randn(2, 7, 4, dtype=torch.float64)
    ours, truth = perceptron(*leaves, swoosh_r), _plain(*leaves)
    torch.testing.assert_close(ours, truth, atol=1e-12, rtol=1e-12)
    for one, two in zip(torch.autograd.grad(ours, leaves, above), torch.autograd.grad(truth, leaves, above), strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)


def test_frames_that_are_not_in_rows_and_no_frames_at_all_are_taken() -> None:
    x, *weights = _leaves(torch.float64)
    turned = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(perceptron(turned, *weights, swoosh_r), _plain(x, *weights), atol=1e-12, rtol=1e-12)
    leaves = _leaves(torch.float32, frames=0)
    y = perceptron(*leaves, swoosh_l)
    assert y.shape == (2, 0, 4)
    assert not any(grad.any() for grad in torch.autograd.grad(y.sum(), leaves))


def test_only_the_gradients_that_are_wanted_are_computed() -> None:
    for wanted in product((False, True), repeat=5):
        leaves = [leaf.detach().requires_grad_(one) for leaf, one in zip(_leaves(torch.float64), wanted, strict=True)]
        if not any(wanted):
            assert not perceptron(*leaves, swoosh_r).requires_grad
            continue
        perceptron(*leaves, swoosh_r).square().sum().backward()
        found = [leaf.grad for leaf in leaves]
        assert [grad is not None for grad in found] == list(wanted)
        chosen = [leaf for leaf in leaves if leaf.requires_grad]
        for one, two in zip(torch.autograd.grad(_plain(*leaves).square().sum(), chosen), [g for g in found if g is not None], strict=True):
            torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)


def test_under_autocast_the_activation_and_sums_over_pieces_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(shape) for shape in ((2, 4000, 5), (12, 5), (12,), (4, 12), (4,))]
    above = torch.rand(2, 4000, 4)
    leaves, above = [leaf.bfloat16().double().requires_grad_() for leaf in leaves], above.bfloat16()  # rounding these is not what is tested
    exact = torch.autograd.grad(_plain(*leaves), leaves, above.double())
    ours = [leaf.detach().float().requires_grad_() for leaf in leaves]
    monkeypatch.setattr("k2ssl.nn.perceptron._PIECE", 1200)
    with torch.autocast("cpu", torch.bfloat16):
        y = perceptron(*ours, swoosh_r)
    found = torch.autograd.grad(y, ours, above)
    errors = [((one - two).norm() / two.norm()).item() for one, two in zip((*found, y), (*exact, _plain(*leaves)), strict=True)]
    # bfloat16 has 8 bits: one rounding is 2e-3 of each number
    assert max(errors[1:4]) < 5e-4 and errors[4] < 1e-6 and errors[5] < 3.2e-3, errors
    with torch.autocast("cpu", torch.bfloat16):
        again = perceptron(*ours, swoosh_r)
        inside = torch.autograd.grad(again, ours, above)
    assert all(torch.equal(one, two) for one, two in zip(inside, found, strict=True))


def test_it_compiles_with_lengths_left_open() -> None:
    _, *weights = _leaves(torch.float32)
    compiled = torch.compile(lambda x: perceptron(x, *weights, swoosh_r), backend="aot_eager", fullgraph=True)
    for frames in (7, 9, 30, 31):
        x = torch.randn(2, frames, 5)
        torch.testing.assert_close(compiled(x), _plain(x, *weights))


def test_only_the_input_and_the_parameters_are_kept_for_the_backward_pass() -> None:
    leaves = _leaves(torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        perceptron(*leaves, swoosh_r)
    assert {t.data_ptr() for t in kept} == {leaf.data_ptr() for leaf in leaves[:4]}


def test_under_autocast_products_are_in_bfloat16_and_gradients_have_the_parameters_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("k2ssl.nn.perceptron._PIECE", 60)
    leaves = _leaves(torch.float32)
    truth = _plain(*leaves)
    exact = torch.autograd.grad(truth.sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        y = perceptron(*leaves, swoosh_r)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), truth, atol=0.02 * truth.abs().max().item(), rtol=0)
    for one, two in zip(torch.autograd.grad(y.float().sum(), leaves), exact, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, two, atol=0.02 * two.abs().max().item(), rtol=0)
