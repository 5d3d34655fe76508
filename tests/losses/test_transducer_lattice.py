"""The lattice recursion against a double loop, against the enumeration of all paths, and against finite differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from k2ssl.losses.transducer_lattice import check_boundary, lattice_loss, make_boundary


def random_lattice(seed: int, batch: int, num_symbols: int, num_frames: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    px = -2 * torch.rand(batch, num_symbols, num_frames + 1, generator=generator, dtype=dtype)
    py = -2 * torch.rand(batch, num_symbols + 1, num_frames, generator=generator, dtype=dtype)
    return px.requires_grad_(), py.requires_grad_()


def double_loop(px: Tensor, py: Tensor, boundary: list[int]) -> Tensor:
    """-p[end] of one utterance, node by node, differentiable by autograd."""
    begin_symbol, begin_frame, end_symbol, end_frame = boundary
    p: dict[tuple[int, int], Tensor] = {(begin_symbol, begin_frame): px.new_zeros(())}
    for s in range(begin_symbol, end_symbol + 1):
        for t in range(begin_frame, end_frame + 1):
            arriving = []
            if (s - 1, t) in p:
                arriving.append(p[s - 1, t] + px[s - 1, t])
            if (s, t - 1) in p:
                arriving.append(p[s, t - 1] + py[s, t - 1])
            if arriving:
                p[s, t] = torch.stack(arriving).logsumexp(0)
    return -p[end_symbol, end_frame]


def path_enumeration(px: Tensor, py: Tensor, num_symbols: int, num_frames: int) -> tuple[float, Tensor, Tensor]:
    """Likelihood and expected arc counts, summed over every alignment."""
    total, px_count, py_count = 0.0, torch.zeros_like(px), torch.zeros_like(py)
    for symbol_steps in itertools.combinations(range(num_symbols + num_frames), num_symbols):
        s, t, log_prob, arcs = 0, 0, 0.0, []
        for step in range(num_symbols + num_frames):
            if step in symbol_steps:
                log_prob += float(px[s, t])
                arcs.append((px_count, s, t))
                s += 1
            else:
                log_prob += float(py[s, t])
                arcs.append((py_count, s, t))
                t += 1
        total += math.exp(log_prob)
        for count, *arc in arcs:
            count[tuple(arc)] += math.exp(log_prob)
    return -math.log(total), px_count / total, py_count / total


def test_loss_and_occupancies_equal_the_enumeration_of_all_paths() -> None:
    px, py = random_lattice(0, 1, 3, 4)
    loss, px_grad, py_grad = lattice_loss(px, py, torch.tensor([[0, 0, 3, 4]]))
    expected_loss, expected_px, expected_py = path_enumeration(px[0].detach(), py[0].detach(), 3, 4)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-12)
    torch.testing.assert_close(px_grad[0], expected_px, rtol=0, atol=1e-12)
    torch.testing.assert_close(py_grad[0], expected_py, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradients_equal_autograd_through_a_double_loop_on_random_boundaries(seed: int) -> None:
    sizes = torch.Generator().manual_seed(100 + seed)
    num_symbols, num_frames = (int(torch.randint(1, 8, (), generator=sizes)) for _ in range(2))
    px, py = random_lattice(seed, 5, num_symbols, num_frames)
    begin = torch.stack(
        [torch.randint(0, num_symbols + 1, (5,), generator=sizes), torch.randint(0, num_frames, (5,), generator=sizes)], dim=1
    )
    end = torch.stack([begin[:, 0], begin[:, 1] + 1], 1)
    end = torch.maximum(end, (torch.rand(5, 2, generator=sizes) * torch.tensor([num_symbols + 1, num_frames + 1])).long())
    boundary = torch.cat([begin, end], dim=1)
    check_boundary(boundary, 5, num_symbols, num_frames)
    weight = torch.rand(5, generator=sizes, dtype=torch.float64)

    loss = lattice_loss(px, py, boundary)[0]
    px_grad, py_grad = torch.autograd.grad((loss * weight).sum(), (px, py))
    expected = torch.stack([double_loop(px[n], py[n], boundary[n].tolist()) for n in range(5)])
    # an utterance of one frame and no symbols has a single arc, so a lattice may leave px without any gradient
    px_expected, py_expected = torch.autograd.grad((expected * weight).sum(), (px, py), allow_unused=True)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(px_grad, torch.zeros_like(px) if px_expected is None else px_expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(py_grad, py_expected, rtol=0, atol=1e-12)


def test_gradients_pass_gradcheck() -> None:
    px, py = random_lattice(1, 2, 3, 3)
    boundary = torch.tensor([[0, 0, 3, 3], [0, 0, 1, 2]])
    assert torch.autograd.gradcheck(lambda px, py: lattice_loss(px, py, boundary)[0], (px, py))


def test_every_symbol_and_every_frame_is_used_once_and_nothing_outside_an_utterance() -> None:
    px, py = random_lattice(2, 2, 5, 6, torch.float32)
    _, px_grad, py_grad = lattice_loss(px, py, torch.tensor([[0, 0, 5, 6], [0, 0, 2, 4]]))
    torch.testing.assert_close(px_grad.sum(2), torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 0, 0, 0]]))
    torch.testing.assert_close(py_grad.sum(1), torch.tensor([[1.0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]))
    assert not px_grad.requires_grad and not py_grad.requires_grad


def test_impossible_utterance_has_infinite_loss_and_zero_gradient_and_leaves_its_neighbour_alone() -> None:
    px, py = random_lattice(3, 2, 3, 4)
    boundary = torch.tensor([[0, 0, 3, 4], [0, 0, 3, 4]])
    blocked = torch.zeros(2, 3, 5, dtype=torch.bool)
    blocked[0, 1] = True  # the second symbol of the first utterance can be emitted nowhere
    loss = lattice_loss(px.masked_fill(blocked, float("-inf")), py, boundary)[0]
    px_grad, py_grad = torch.autograd.grad(loss.sum(), (px, py))
    assert loss[0] == float("inf")
    assert not px_grad[0].any() and not py_grad[0].any()
    torch.testing.assert_close(loss[1], double_loop(px[1], py[1], [0, 0, 3, 4]))
    torch.testing.assert_close(px_grad[1].sum(1), -torch.ones(3, dtype=torch.float64))


def test_float32_occupancies_of_a_long_utterance_stay_exact() -> None:
    generator = torch.Generator().manual_seed(4)
    px = (5 * torch.randn(1, 60, 801, generator=generator) - 9).requires_grad_()
    py = (5 * torch.randn(1, 61, 800, generator=generator) - 9).requires_grad_()
    boundary = torch.tensor([[0, 0, 60, 800]])
    loss, px_grad, py_grad = lattice_loss(px, py, boundary)
    assert loss.item() > 2000  # where a float32 accumulation would already be 1e-4 off per step
    _, px_exact, py_exact = lattice_loss(px.double(), py.double(), boundary)
    torch.testing.assert_close(px_grad.double(), px_exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(py_grad.double(), py_exact, rtol=0, atol=1e-6)


def test_make_boundary_begins_at_zero() -> None:
    boundary = make_boundary(torch.tensor([3, 0]), torch.tensor([7, 5]))
    assert boundary.tolist() == [[0, 0, 3, 7], [0, 0, 0, 5]]


@pytest.mark.parametrize(
    ("boundary", "message"),
    [
        (torch.tensor([[0, 0, 3, 4], [0, 0, 4, 4]]), r"utterance 1 is \[0, 0, 4, 4\]"),
        (torch.tensor([[0, 0, 3, 5], [0, 0, 3, 4]]), r"utterance 0 .*end frame <= 4"),
        (torch.tensor([[0, 0, 3, 0], [0, 0, 3, 4]]), "begin frame < end frame"),
        (torch.tensor([[2, 0, 1, 4], [0, 0, 3, 4]]), "begin symbol <= end symbol"),
        (torch.tensor([[-1, 0, 1, 4], [0, 0, 3, 4]]), "utterance 0"),
        (torch.tensor([[0, 0, 3, 4]]), r"shape \(2, 4\)"),
        (torch.tensor([[0, 0, 3, 4], [0, 0, 3, 4]], dtype=torch.int32), "int64"),
        (torch.zeros(2, 4, dtype=torch.int64, device="meta"), "CPU"),
    ],
)
def test_bad_boundaries_are_refused(boundary: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_boundary(boundary, batch=2, num_symbols=3, num_frames=4)
