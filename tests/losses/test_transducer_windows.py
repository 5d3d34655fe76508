"""The recursion over windows against that over the whole lattice with everything else closed, and its cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from k2ssl.losses.transducer import full_loss, pruned_loss, simple_loss
from k2ssl.losses.transducer_lattice import check_boundary, lattice_loss, make_boundary, window_loss
from k2ssl.losses.transducer_pruning import prune_ranges

NEG_INF = float("-inf")


def random_windows(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Arcs px, py (N, T, R), ranges, boundary and S of random size; windows are anything that never falls, boundaries anything inside."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    batch, num_frames, num_symbols = draw(1, 5), draw(1, 12), draw(0, 9)
    width = draw(1, num_symbols + 1)
    rises = torch.randint(0, max(width, 2), (batch, num_frames), generator=generator)
    starts = (rises.cumsum(1) - rises[:, :1] * draw(0, 1)).clamp_(max=num_symbols + 1 - width)
    boundary = torch.zeros(batch, 4, dtype=torch.int64)
    for n in range(batch):
        boundary[n, 1] = draw(0, num_frames - 1) if draw(0, 1) else 0
        boundary[n, 3] = draw(int(boundary[n, 1]) + 1, num_frames)
        first, last = int(starts[n, boundary[n, 1]]), int(starts[n, boundary[n, 3] - 1])
        boundary[n, 0] = draw(first, first + width - 1)
        boundary[n, 2] = max(boundary[n, 0], draw(last, last + width - 1))
    check_boundary(boundary, batch, num_symbols, num_frames)
    ranges = starts.unsqueeze(2) + torch.arange(width)
    px, py = (-2 * torch.rand(ranges.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return px.requires_grad_(), py.requires_grad_(), ranges, boundary, num_symbols


def on_whole_lattice(px: Tensor, py: Tensor, ranges: Tensor, boundary: Tensor, num_symbols: int) -> Tensor:
    closed = px.new_full((*ranges.shape[:2], num_symbols + 1), NEG_INF)
    px_grid = closed.scatter(2, ranges, px)[:, :, :-1].transpose(1, 2)
    px_grid = torch.cat([px_grid, torch.full_like(px_grid[:, :, :1], NEG_INF)], dim=2)
    consumed = torch.arange(px_grid.shape[2]) >= boundary[:, 3].view(-1, 1, 1)
    return lattice_loss(px_grid.masked_fill(consumed, NEG_INF), closed.scatter(2, ranges, py).transpose(1, 2), boundary)[0]


@pytest.mark.parametrize("seed", range(40))
def test_loss_and_gradients_equal_those_of_the_whole_lattice_with_everything_else_closed(seed: int) -> None:
    px, py, ranges, boundary, num_symbols = random_windows(seed)
    expected = on_whole_lattice(px, py, ranges, boundary, num_symbols)
    loss = window_loss(px, py, ranges, boundary, num_symbols)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    weight = torch.arange(1.0, len(loss) + 1)
    expected_grads = torch.autograd.grad((weight * expected).sum(), (px, py), allow_unused=True)
    grads = torch.autograd.grad((weight * loss).sum(), (px, py))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, torch.zeros_like(grad) if expected_grad is None else expected_grad, rtol=0, atol=1e-12)


def test_the_random_windows_above_hold_possible_and_impossible_utterances() -> None:
    losses = torch.cat([window_loss(*random_windows(seed)) for seed in range(40)])
    assert 50 < losses.isfinite().sum() < len(losses) - 10
    assert not losses.isnan().any()


def test_an_utterance_that_begins_outside_its_window_is_impossible() -> None:
    ranges = (torch.tensor([2, 2, 3]).unsqueeze(1) + torch.arange(3)).unsqueeze(0)
    arcs = torch.zeros(1, 3, 3)
    for begin, possible in ((1, False), (2, True), (4, True), (5, False)):
        loss = window_loss(arcs, arcs, ranges, torch.tensor([[begin, 0, 5, 3]]), 5)
        assert loss.isfinite().item() is possible, begin


def test_a_nan_is_not_lost() -> None:
    px, py, ranges, boundary, num_symbols = random_windows(3)
    assert window_loss(px, py, ranges, boundary, num_symbols).isfinite().any()
    assert window_loss(px, torch.full_like(py, float("nan")), ranges, boundary, num_symbols).isnan().all()


class Operations(TorchDispatchMode):
    """Counts operations and the numbers that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.count += 1
        self.numbers += result.numel() if isinstance(result, Tensor) else 0
        return result


def operations_of_losses(num_symbols: int, num_frames: int) -> tuple[Operations, Operations]:
    """Of simple loss with prune ranges, and of the pruned loss, both with their gradients."""
    generator = torch.Generator().manual_seed(0)
    am, lm = (torch.randn(2, length, 4, generator=generator).requires_grad_() for length in (num_frames, num_symbols + 1))
    symbols, boundary = torch.ones(2, num_symbols, dtype=torch.int64), make_boundary(*torch.tensor([[num_symbols] * 2, [num_frames] * 2]))
    with Operations() as simple_operations:
        simple = simple_loss(am, lm, symbols, boundary, lm_scale=0.25)
        ranges = prune_ranges(simple.px_grad, simple.py_grad, boundary, 5)
        simple.loss.sum().backward()
    logits = torch.randn(*ranges.shape, 4, generator=generator).requires_grad_()
    with Operations() as pruned_operations:
        pruned_loss(logits, symbols, ranges, boundary).sum().backward()
    return simple_operations, pruned_operations


def test_number_of_operations_grows_with_symbols_plus_frames_and_not_with_their_product() -> None:
    small, large = operations_of_losses(10, 100), operations_of_losses(40, 400)
    for few, many in zip(small, large, strict=True):
        assert many.count < 4.2 * few.count
        assert many.count < 12 * (40 + 400) + 200


def test_work_of_the_pruned_loss_hardly_grows_with_the_transcript() -> None:
    _, short = operations_of_losses(10, 300)
    _, long = operations_of_losses(100, 300)
    assert long.numbers < 1.5 * short.numbers


def test_second_derivatives_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    am, lm, logits = (torch.randn(size, generator=generator).requires_grad_() for size in ((1, 5, 4), (1, 4, 4), (1, 5, 4, 4)))
    symbols, boundary = torch.tensor([[1, 2, 3]]), make_boundary(torch.tensor([3]), torch.tensor([5]))
    ranges = torch.arange(4).expand(1, 5, 4)
    for loss, inputs in (
        (simple_loss(am, lm, symbols, boundary).loss, am),
        (pruned_loss(logits, symbols, ranges, boundary), logits),
        (full_loss(logits, symbols, boundary), logits),
    ):
        torch.autograd.grad(loss.sum(), inputs, retain_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(loss.sum(), inputs, create_graph=True)


def test_windows_that_are_none_are_refused() -> None:
    symbols, boundary = torch.ones(2, 3, dtype=torch.int64), make_boundary(torch.tensor([3, 2]), torch.tensor([3, 3]))
    good = (torch.tensor([[0, 1, 2], [0, 0, 1]]).unsqueeze(2) + torch.arange(2)).contiguous()
    logits = torch.zeros(2, 3, 2, 4)
    assert pruned_loss(logits, symbols, good, boundary).isfinite().all()
    for where, value, message in (
        ((1, 2), [1, 3], r"utterance 1 hold \[1, 3\] at frame 2; allowed are neighbouring positions in 0\.\.3"),
        ((0, 1), [3, 4], r"utterance 0 hold \[3, 4\] at frame 1"),
        ((0, 0), [-1, 0], r"utterance 0 hold \[-1, 0\] at frame 0"),
        ((0, 2), [0, 1], r"utterance 0 hold \[0, 1\] at frame 2; .*none below those of the frame before"),
    ):
        bad = good.clone()
        bad[where] = torch.tensor(value)
        with pytest.raises(ValueError, match=message):
            pruned_loss(logits, symbols, bad, boundary)


def test_what_lies_outside_an_utterance_has_no_influence_be_it_nan() -> None:
    for seed in range(20):
        px, py, ranges, boundary, num_symbols = random_windows(seed)
        expected = window_loss(px, py, ranges, boundary, num_symbols)
        expected_grads = torch.autograd.grad(expected.sum(), (px, py))
        frame, (begin_symbol, begin_frame, end_symbol, end_frame) = (
            torch.arange(px.shape[1]).view(-1, 1),
            boundary.view(-1, 4, 1, 1).unbind(1),
        )
        outside = (ranges < begin_symbol) | (ranges > end_symbol) | (frame < begin_frame) | (frame >= end_frame)
        px, py = (x.detach().masked_fill(outside, float("nan")).requires_grad_() for x in (px, py))
        loss = window_loss(px, py, ranges, boundary, num_symbols)
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)
        for grad, expected_grad in zip(torch.autograd.grad(loss.sum(), (px, py)), expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0)
