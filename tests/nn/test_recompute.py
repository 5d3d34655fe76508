"""Recomputation: gradients and draws are those of a plain call, and less is remembered."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from k2ssl.nn.dropout import Dropout
from k2ssl.nn.fused_attention import FusedSelfAttention
from k2ssl.nn.recompute import recompute
from k2ssl.nn.schedule import Clock


class _DrawsInBackward(torch.autograd.Function):
    """Identity whose gradient is multiplied by a draw from the clock."""

    @staticmethod
    def forward(ctx, x: Tensor, clock: Clock) -> Tensor:
        ctx.clock = clock
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * torch.rand((), generator=ctx.clock.generator(grad.device)) * (1 + ctx.clock.chance(0.5)), None


class _Block(torch.nn.Module):
    """All ways of drawing: masks, host decisions, seeds for fused kernels."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.attention = FusedSelfAttention(8, 2, dropout=0.4, clock=clock)
        self.dropout = Dropout(0.5, clock)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        x = self.dropout(torch.tanh(self.attention(x)))
        x = torch.sin(x) * 2 if self.clock.chance(0.5) else torch.cos(x) * 3
        return self.dropout(torch.tanh(x)) * factor


def _plain(function: Callable[..., Tensor], clock: Clock, *args: object, **kwargs: object) -> Tensor:
    return function(*args, **kwargs)


def _run(call: Callable[..., Tensor], steps: int = 6) -> tuple[list[Tensor], list[int]]:
    """Gradients of some steps through three blocks, and a draw after each forward and backward pass."""
    torch.manual_seed(0)
    clock = Clock(1)
    blocks = [_Block(clock) for _ in range(3)]
    x = torch.randn(2, 5, 8, requires_grad=True)
    gradients, draws = [], []
    for step in range(steps):
        y = x
        for block in blocks:
            y = _DrawsInBackward.apply(call(block, clock, y, factor=1.0 + step), clock)
        draws.append(clock.draw_seed())
        y.sum().backward()
        draws.append(clock.draw_seed())
        gradients += [x.grad.clone(), *(p.grad.clone() for block in blocks for p in block.parameters())]
    return gradients, draws


def test_gradients_and_all_draws_are_those_of_a_plain_call() -> None:
    plain, recomputed = _run(_plain), _run(recompute)
    assert len(set(plain[1])) == len(plain[1]) and plain[1] == recomputed[1]
    assert all(torch.equal(one, two) for one, two in zip(plain[0], recomputed[0], strict=True))


def test_torchs_default_generator_is_neither_read_nor_moved() -> None:
    before = torch.get_rng_state()
    clock = Clock(1)
    block, x = _Block(clock), torch.randn(2, 5, 8, requires_grad=True)
    torch.set_rng_state(before)
    recompute(block, clock, x).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_graph_that_is_retained_is_recomputed_at_every_backward_pass() -> None:
    clock = Clock(2)
    block, x = _Block(clock), torch.randn(2, 5, 8, requires_grad=True)
    y = recompute(block, clock, x)
    clock.draw_seed()
    present = clock.state_dict()["host"]
    first, again = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert first.any() and torch.equal(first, again)
    assert clock.state_dict()["host"] == present


def test_only_inputs_are_remembered() -> None:
    saved: dict[bool, int] = {}
    for recomputing in (False, True):
        clock = Clock(2)
        block, x = _Block(clock), torch.randn(2, 50, 8, requires_grad=True)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            (recompute if recomputing else _plain)(block, clock, x)
        parameters = {p.data_ptr() for p in block.parameters()}
        saved[recomputing] = sum(t.nbytes for t in kept if t.data_ptr() not in parameters)
        assert not recomputing or {t.data_ptr() for t in kept if t.numel()} == {x.data_ptr()}
    assert saved[True] == 2 * 50 * 8 * 4 and saved[False] > 5 * saved[True]


def test_a_function_that_draws_elsewhere_is_found_out_where_that_changes_what_it_remembers() -> None:
    calls: list[int] = []

    def changing(x: Tensor) -> Tensor:
        calls.append(1)
        return (x[:2] if len(calls) > 1 else x).exp().sum()

    x = torch.randn(5, requires_grad=True)
    loss = recompute(changing, Clock(), x)
    with pytest.raises(CheckpointError):
        loss.backward()
