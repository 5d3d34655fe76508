"""Our losses, gradients, windows and activations against those of k2."""

from __future__ import annotations

from collections.abc import Callable

import k2
import pytest
import torch
from torch import Tensor

from k2ssl.lattice import swoosh
from k2ssl.lattice.transducer import forward_backward

Ours = Callable[[str], "dict[str, Tensor]"]
SEEDS = range(12)


def close(what: str, ours: Tensor, theirs: Tensor, allowed: float = 1e-4) -> None:
    """Relative where numbers are large; infinities are equal."""
    assert torch.equal(ours.isfinite(), theirs.isfinite()), what
    finite = ours.isfinite()
    difference = ((ours - theirs)[finite].abs() / theirs[finite].abs().clamp(min=1)).max().item() if finite.any() else 0.0
    assert difference <= allowed, f"{what}: differs by {difference:.2g}"


def gradients(losses: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(losses[losses.isfinite()].sum(), inputs)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_simple_loss_its_gradients_and_occupancies_are_those_of_k2(ours: Ours, seed: int) -> None:
    a = ours(f"transducer_{seed}")
    am, lm = a["am"].requires_grad_(), a["lm"].requires_grad_()
    lm_scale, am_scale = a["scales"].tolist()
    losses, (px_grad, py_grad) = k2.rnnt_loss_smoothed(
        lm, am, a["symbols"], 0, lm_scale, am_scale, a["boundary"], rnnt_type="regular", reduction="none", return_grad=True
    )
    close("loss", a["simple"], losses)
    for name, theirs in zip(("am", "lm"), gradients(losses, am, lm)):
        close(f"gradient of {name}", a[f"simple_{name}_grad"], theirs)
    close("px_grad", a["px_grad"], px_grad)
    close("py_grad", a["py_grad"], py_grad)


@pytest.mark.parametrize("seed", SEEDS)
def test_windows_are_those_of_k2(ours: Ours, seed: int) -> None:
    a = ours(f"transducer_{seed}")
    theirs = k2.get_rnnt_prune_ranges(a["px_grad"], a["py_grad"], a["boundary"], int(a["prune_range"]))
    assert torch.equal(a["ranges"], theirs)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_pruned_loss_and_its_gradient_are_those_of_k2(ours: Ours, seed: int) -> None:
    a = ours(f"transducer_{seed}")
    logits = a["logits"].requires_grad_()
    losses = k2.rnnt_loss_pruned(logits, a["symbols"], a["ranges"], 0, a["boundary"], rnnt_type="regular", reduction="none")
    close("loss", a["pruned"], losses)
    if losses.isfinite().all():  # k2 promises no gradient otherwise
        close("gradient", a["pruned_grad"], gradients(losses, logits)[0])


@pytest.mark.parametrize("seed", SEEDS)
def test_the_full_loss_and_its_gradient_are_those_of_k2(ours: Ours, seed: int) -> None:
    a = ours(f"transducer_{seed}")
    logits = a["every"].requires_grad_()
    losses = k2.rnnt_loss(logits, a["symbols"], 0, a["boundary"], rnnt_type="regular", reduction="none")
    close("loss", a["full"], losses)
    close("gradient", a["full_grad"], gradients(losses, logits)[0])


def test_most_of_the_pruned_losses_are_finite(ours: Ours) -> None:
    every = [ours(f"transducer_{seed}")["pruned"] for seed in SEEDS]
    assert sum(bool(losses.isfinite().all()) for losses in every) >= 6


@pytest.mark.parametrize("seed", range(3))
def test_the_ctc_loss_and_its_gradient_are_those_of_k2(ours: Ours, seed: int) -> None:
    a = ours(f"ctc_{seed}")
    log_probs = a["log_probs"].requires_grad_()
    targets = [row[:length].tolist() for row, length in zip(a["targets"], a["target_lens"])]
    segments = torch.tensor([[row, 0, length] for row, length in enumerate(a["lens"].tolist())], dtype=torch.int32)
    lattice = k2.intersect_dense(k2.ctc_graph(targets), k2.DenseFsaVec(log_probs, segments), output_beam=1000.0)
    loss = -lattice.get_tot_scores(use_double_scores=True, log_semiring=True).sum()
    close("loss", a["loss"].double(), loss.detach())
    # the gradient of PyTorch's loss is that behind a log-softmax; k2's is taken there
    (theirs,) = torch.autograd.grad(loss, log_probs)
    inside = torch.arange(log_probs.shape[1]) < a["lens"].unsqueeze(1)
    ours_behind, theirs_behind = (grad - log_probs.detach().exp() * grad.sum(-1, keepdim=True) for grad in (a["grad"], theirs))
    close("gradient", ours_behind[inside], theirs_behind[inside])


@pytest.mark.parametrize("name", ["l", "r"])
def test_k2_computes_the_same_activations_and_derivatives(ours: Ours, name: str) -> None:
    a = ours("swoosh")
    value, derivative = swoosh.forward_and_derivative(name, a["x"])
    close("value", a[name], value, 1e-6)
    close("value", a[name], swoosh.forward(name, a["x"]), 1e-6)
    close("derivative", a[f"{name}_grad"], derivative, 1e-6)


def test_an_impossible_lattice_has_no_occupancies() -> None:
    px, py = torch.full((2, 2, 4), float("-inf")), torch.zeros(2, 3, 3)
    px[1] = -1.0
    scores, px_grad, py_grad = forward_backward(px, py, torch.tensor([[0, 0, 2, 3]] * 2))
    assert scores.isfinite().tolist() == [False, True]
    assert not px_grad[0].any() and not py_grad[0].any()
    assert torch.allclose(px_grad[1].sum(), torch.tensor(2.0)) and torch.allclose(py_grad[1].sum(), torch.tensor(3.0))
