"""Chains of elementwise operations, compiled: the same numbers, and no more graphs than there are kinds of chains."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from k2ssl.models.zipformer import Zipformer, ZipformerConfig
from k2ssl.nn.fusion import check_fusion, fuses, fusible, use_fusion
from k2ssl.nn.row_convolution import convolve_activated
from k2ssl.nn.schedule import Clock

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _unfused() -> Iterator[None]:
    yield
    use_fusion(None)
    torch._dynamo.reset()


def _step(encoder: Zipformer, batch: int, frames: int, step: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Output and gradients of a training step in which every draw follows from `step`."""
    encoder.clock.seed(step)
    encoder.clock.advance(float(step))
    x = torch.randn(batch, frames, encoder.input_dim, generator=torch.Generator().manual_seed(step), requires_grad=True)
    padding_mask = torch.arange(frames) >= torch.full((batch, 1), frames).sub_(torch.arange(batch).unsqueeze(1)) if step % 2 else None
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = encoder(x, padding_mask).frames
    gradients = torch.autograd.grad(output.float().square().sum(), [x, *encoder.parameters()])
    return output.detach(), *gradients


def _encoder() -> Zipformer:
    torch.manual_seed(0)
    config = ZipformerConfig(
        num_layers=(1, 1), downsampling=(1, 2), dim=(16, 24), feedforward_dim=(32, 48), unmasked_dim=(8, 16), num_heads=(2, 2),
        kernel=(5, 5), query_head_dim=4, pos_head_dim=4, value_head_dim=4, pos_dim=8,
    )  # fmt: skip
    return Zipformer(config, Clock()).train()


def test_a_training_step_through_the_compiler_is_that_of_the_functions_as_written() -> None:
    encoder = _encoder()
    plain = [_step(copy.deepcopy(encoder), 3, 20 + step, step) for step in range(4)]
    use_fusion("aot_eager")
    assert fuses()
    fused = [_step(copy.deepcopy(encoder), 3, 20 + step, step) for step in range(4)]
    for one, two in zip(plain, fused, strict=True):
        torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-5)
    encoder.recompute_layers = True
    again = [_step(copy.deepcopy(encoder), 3, 20 + step, step) for step in range(4)]
    assert all(torch.equal(one, two) for step in zip(fused, again, strict=True) for one, two in zip(*step, strict=True))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_give_the_same_training_step_within_rounding(dtype: torch.dtype) -> None:
    encoder = _encoder()
    exact = _step(copy.deepcopy(encoder), 2, 12, 1)
    plain = _step(copy.deepcopy(encoder), 2, 12, 1, dtype)
    use_fusion("inductor")
    fused = _step(copy.deepcopy(encoder), 2, 12, 1, dtype)
    for truth, one, two in zip(exact, plain, fused, strict=True):
        size = truth.norm() + 1e-6
        # in bfloat16 what is fused may round otherwise, but not be further from the truth than what it replaces
        allowed = 1e-5 if dtype == torch.float32 else 1.5 * float((one - truth).norm() / size) + 1e-3
        assert float((two - truth).norm() / size) <= allowed


def test_neither_lengths_nor_draws_nor_schedules_make_new_graphs() -> None:
    encoder = _encoder()
    use_fusion("aot_eager")
    before = counters["stats"]["unique_graphs"]
    for step in range(8):
        _step(encoder, 2 + step % 4, 11 + 3 * step, step)
    graphs = counters["stats"]["unique_graphs"] - before
    assert 8 <= graphs <= 30
    for step in range(8, 32):
        _step(encoder, 2 + step % 4, 11 + 3 * step, 1000 * step)
    assert counters["stats"]["unique_graphs"] - before == graphs


def test_the_normalised_frontend_is_the_same_through_the_compiler() -> None:
    rows = torch.randn(12, 6, requires_grad=True)
    norm = (torch.rand(6, requires_grad=True), torch.randn(6, requires_grad=True))
    weight = torch.randn(5, 6, 3, requires_grad=True)
    inputs = (rows, *norm, weight)
    plain = torch.autograd.grad(convolve_activated(rows, norm, weight, None, 2).square().sum(), inputs)
    use_fusion("aot_eager")
    fused = torch.autograd.grad(convolve_activated(rows, norm, weight, None, 2).square().sum(), inputs)
    torch.testing.assert_close(fused, plain)


def test_what_cannot_be_one_graph_is_an_error() -> None:
    @fusible
    def asks_the_host(x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x

    assert asks_the_host(torch.ones(2)).tolist() == [1.0, 1.0]
    use_fusion("aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        asks_the_host(torch.ones(2))


def test_a_machine_on_which_nothing_compiles_is_told_of() -> None:
    check_fusion(torch.device("cpu"))  # nothing was asked for
    use_fusion("no_such_backend")
    with pytest.raises(ValueError, match="cannot be fused on cpu"):
        check_fusion(torch.device("cpu"))
