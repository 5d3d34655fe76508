"""Windows of the pruned transducer loss: recorded ones, and what must hold of any."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from k2ssl.losses.transducer import pruned_loss
from k2ssl.losses.transducer_lattice import lattice_loss, make_boundary
from k2ssl.losses.transducer_pruning import prune, prune_ranges

GOLDEN = {name: torch.from_numpy(array) for name, array in np.load(Path(__file__).parents[1] / "golden" / "rnnt.npz").items()}


def occupancies(seed: int, boundary: Tensor, sharpness: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch, num_symbols, num_frames = len(boundary), int(boundary[:, 2].max()), int(boundary[:, 3].max())
    px = sharpness * torch.randn(batch, num_symbols, num_frames + 1, generator=generator)
    px.masked_fill_(torch.arange(num_frames + 1) >= boundary[:, 3].view(-1, 1, 1), float("-inf"))
    py = sharpness * torch.randn(batch, num_symbols + 1, num_frames, generator=generator)
    _, px_grad, py_grad = lattice_loss(px, py, boundary)
    return px_grad, py_grad


def test_ranges_equal_the_recorded_ones() -> None:
    px_grad, py_grad = GOLDEN["smoothed_0.25_0.0.px_grad"], GOLDEN["smoothed_0.25_0.0.py_grad"]
    ranges = prune_ranges(px_grad, py_grad, GOLDEN["boundary"], int(GOLDEN["s_range"]))
    assert torch.equal(ranges, GOLDEN["ranges"])


def test_pruned_embeddings_equal_the_recorded_ones() -> None:
    am, lm = prune(GOLDEN["emb_am"], GOLDEN["emb_lm"], GOLDEN["ranges"])
    assert torch.equal(am, GOLDEN["am_pruned"])
    assert torch.equal(lm, GOLDEN["lm_pruned"])


def test_gradient_of_pruning_adds_up_over_windows() -> None:
    lm = GOLDEN["emb_lm"].clone().requires_grad_()
    am = GOLDEN["emb_am"].clone().requires_grad_()
    am_pruned, lm_pruned = prune(am, lm, GOLDEN["ranges"])
    (am_pruned + lm_pruned).sum().backward()
    counts = torch.zeros(lm.shape[:2])
    for n, window in enumerate(GOLDEN["ranges"].flatten(1)):
        for position in window.tolist():
            counts[n, position] += 1
    assert torch.equal(lm.grad, counts.unsqueeze(2).expand_as(lm))
    assert torch.equal(am.grad, torch.full_like(am, 4.0))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lens=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 15)), min_size=1, max_size=4),
    prune_range=st.integers(2, 7),
    seed=st.integers(0, 1000),
)
def test_windows_stay_inside_never_fall_overlap_and_reach_both_ends(lens: list[tuple[int, int]], prune_range: int, seed: int) -> None:
    boundary = make_boundary(*torch.tensor(lens).unbind(1))
    num_symbols, num_frames = boundary[:, 2].max(), boundary[:, 3].max()
    ranges = prune_ranges(*occupancies(seed, boundary), boundary, prune_range)
    width = min(prune_range, int(num_symbols) + 1)
    assert ranges.shape == (len(lens), num_frames, width)
    assert torch.equal(ranges - ranges[:, :, :1], torch.arange(width).expand_as(ranges))
    starts = ranges[:, :, 0]
    assert not starts[:, 0].any()
    assert ranges.min() >= 0 and ranges.max() <= num_symbols
    rises = starts.diff(dim=1)
    assert bool((rises >= 0).all()) and bool((rises < max(width, 1)).all())
    for n, (symbols, frames) in enumerate(lens):
        if symbols <= (width - 1) * frames:
            assert symbols in ranges[n, frames - 1]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lens=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    prune_range=st.integers(2, 5),
    seed=st.integers(0, 1000),
)
def test_an_alignment_fits_exactly_where_there_are_frames_enough(lens: list[tuple[int, int]], prune_range: int, seed: int) -> None:
    boundary = make_boundary(*torch.tensor(lens).unbind(1))
    ranges = prune_ranges(*occupancies(seed, boundary), boundary, prune_range)
    width, num_symbols = ranges.shape[2], int(boundary[:, 2].max())
    loss = pruned_loss(torch.zeros(*ranges.shape, 4), torch.ones(len(lens), num_symbols, dtype=torch.int64), ranges, boundary)
    assert loss.isfinite().tolist() == [symbols <= (width - 1) * frames for symbols, frames in lens]


def test_window_lies_over_the_mass_of_a_peaked_lattice() -> None:
    # symbol s + 1 is emitted at frame 2 s, with certainty
    num_symbols, num_frames = 6, 14
    px = torch.full((1, num_symbols, num_frames + 1), -50.0)
    px[0, torch.arange(num_symbols), 2 * torch.arange(num_symbols)] = 0.0
    boundary = torch.tensor([[0, 0, num_symbols, num_frames]])
    _, px_grad, py_grad = lattice_loss(px, torch.zeros(1, num_symbols + 1, num_frames), boundary)
    ranges = prune_ranges(px_grad, py_grad, boundary, 2)
    for s in range(num_symbols):
        assert ranges[0, 2 * s].tolist() == [s, s + 1]


def test_ranges_of_an_utterance_do_not_depend_on_its_batch() -> None:
    boundary = make_boundary(torch.tensor([9, 4]), torch.tensor([20, 11]))
    px_grad, py_grad = occupancies(5, boundary)
    both = prune_ranges(px_grad, py_grad, boundary, 3)
    alone = prune_ranges(px_grad[1:, :4, :12], py_grad[1:, :5, :11], boundary[1:], 3)
    assert torch.equal(both[1:, :11], alone)


def test_bad_arguments_are_refused() -> None:
    boundary = make_boundary(torch.tensor([3]), torch.tensor([5]))
    px_grad, py_grad = torch.zeros(1, 3, 6), torch.zeros(1, 4, 5)
    with pytest.raises(ValueError, match="prune_range is 1"):
        prune_ranges(px_grad, py_grad, boundary, 1)
    with pytest.raises(ValueError, match=r"must be \(N, S, T\+1\)"):
        prune_ranges(px_grad[:, :, :5], py_grad, boundary, 2)
    with pytest.raises(ValueError, match="begin at symbol 0"):
        prune_ranges(px_grad, py_grad, torch.tensor([[1, 0, 3, 5]]), 2)
    with pytest.raises(ValueError, match=r"am \(1, 5, 2\) and lm \(1, 4, 3\)"):
        prune(torch.zeros(1, 5, 2), torch.zeros(1, 4, 3), torch.zeros(1, 5, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="ranges must be int64"):
        prune(torch.zeros(1, 5, 2), torch.zeros(1, 4, 2), torch.zeros(1, 5, 2))
    with pytest.raises(ValueError, match=r"\(1, 5, 1\.\.4\)"):
        prune(torch.zeros(1, 5, 2), torch.zeros(1, 4, 2), torch.zeros(1, 5, 5, dtype=torch.int64))
