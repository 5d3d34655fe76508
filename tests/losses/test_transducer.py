"""Transducer losses against recorded ones, torchaudio's, and each other."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from k2ssl.losses import transducer
from k2ssl.losses.transducer import full_loss, pruned_loss, simple_loss
from k2ssl.losses.transducer_lattice import make_boundary
from k2ssl.losses.transducer_pruning import prune_ranges

GOLDEN = {name: torch.from_numpy(array) for name, array in np.load(Path(__file__).parents[1] / "golden" / "rnnt.npz").items()}
SCALES = [(0.0, 0.0), (0.25, 0.0), (0.1, 0.2)]  # lm_scale, am_scale


def random_batch(seed: int, blank: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Full logits (N, T, S+1, V), symbols and boundary of random size."""
    generator = torch.Generator().manual_seed(seed)
    batch, num_frames, num_symbols, vocab_size = (int(torch.randint(2, 8, (), generator=generator)) for _ in range(4))
    logits = torch.randn(batch, num_frames, num_symbols + 1, vocab_size, generator=generator)
    symbols = torch.randint(0, vocab_size - 1, (batch, num_symbols), generator=generator)
    symbols += symbols >= blank
    symbol_lens = torch.randint(0, num_symbols + 1, (batch,), generator=generator)
    frame_lens = torch.randint(1, num_frames + 1, (batch,), generator=generator)
    symbol_lens[0], frame_lens[-1] = num_symbols, num_frames  # torchaudio wants tensors no longer than the longest
    return logits.requires_grad_(), symbols, make_boundary(symbol_lens, frame_lens)


class LargeResults(TorchDispatchMode):
    """Names the operations that return at least `size` float32 numbers in memory that was not given to them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bytes, self.made_by = 4 * size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        if (
            isinstance(result, Tensor)
            and result.untyped_storage().nbytes() >= self.bytes
            and result.untyped_storage().data_ptr() not in given
        ):
            self.made_by.append(str(func))
        return result


def all_positions(logits: Tensor) -> Tensor:
    return torch.arange(logits.shape[2]).expand(logits.shape[:3]).contiguous()


def worst(actual: Tensor, expected: Tensor) -> float:
    return (actual.detach() - expected).abs().max().item()


@pytest.mark.parametrize(("lm_scale", "am_scale"), SCALES)
def test_simple_loss_its_occupancies_and_gradients_equal_the_recorded_ones(agreement, lm_scale: float, am_scale: float) -> None:
    am, lm = GOLDEN["am"].clone().requires_grad_(), GOLDEN["lm"].clone().requires_grad_()
    simple = simple_loss(am, lm, GOLDEN["symbols"], GOLDEN["boundary"], lm_scale=lm_scale, am_scale=am_scale)
    simple.loss.sum().backward()
    actual = {"loss": simple.loss, "px_grad": simple.px_grad, "py_grad": simple.py_grad, "dam": am.grad, "dlm": lm.grad}
    for name, tensor in actual.items():
        agreement.absolute(f"rnnt simple loss: {name}", tensor, GOLDEN[f"smoothed_{lm_scale}_{am_scale}.{name}"], 1e-4)


def test_ranges_from_our_own_occupancies_equal_the_recorded_ones(agreement) -> None:
    simple = simple_loss(GOLDEN["am"], GOLDEN["lm"], GOLDEN["symbols"], GOLDEN["boundary"], lm_scale=0.25)
    ranges = prune_ranges(simple.px_grad, simple.py_grad, GOLDEN["boundary"], int(GOLDEN["s_range"]))
    agreement.absolute("rnnt prune ranges", ranges, GOLDEN["ranges"], 0)


def test_pruned_loss_and_its_gradient_equal_the_recorded_ones(agreement) -> None:
    logits = GOLDEN["logits"].clone().requires_grad_()
    loss = pruned_loss(logits, GOLDEN["symbols"], GOLDEN["ranges"], GOLDEN["boundary"])
    loss.sum().backward()
    agreement.absolute("rnnt pruned loss", loss, GOLDEN["pruned_loss"], 1e-4)
    agreement.absolute("rnnt pruned loss: gradient", logits.grad, GOLDEN["dlogits"], 1e-4)


def test_full_loss_and_its_gradient_equal_the_recorded_ones(agreement) -> None:
    logits = GOLDEN["full_logits"].clone().requires_grad_()
    loss = full_loss(logits, GOLDEN["symbols"], GOLDEN["boundary"])
    loss.sum().backward()
    agreement.absolute("rnnt full loss", loss, GOLDEN["full_loss"], 1e-4)
    agreement.absolute("rnnt full loss: gradient", logits.grad, GOLDEN["dfull_logits"], 1e-4)


@pytest.mark.parametrize(("seed", "blank"), [(0, 0), (1, 0), (2, 1), (3, 0), (4, 1)])
def test_full_loss_and_its_gradient_equal_torchaudio(seed: int, blank: int) -> None:
    logits, symbols, boundary = random_batch(seed, blank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchaudio announces the end of its own loss
        expected = torchaudio.functional.rnnt_loss(
            logits, symbols.int(), boundary[:, 3].int(), boundary[:, 2].int(), blank=blank, reduction="none"
        )
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)
    loss = full_loss(logits, symbols, boundary, blank)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert worst(loss, expected.detach()) < 1e-4
    assert worst(grad, expected_grad) < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_pruned_loss_with_windows_over_everything_equals_the_full_loss(seed: int) -> None:
    logits, symbols, boundary = random_batch(seed)
    expected = full_loss(logits, symbols, boundary)
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)
    loss = pruned_loss(logits, symbols, all_positions(logits), boundary)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_simple_loss_equals_the_full_loss_of_added_logits(seed: int) -> None:
    logits, symbols, boundary = random_batch(seed)
    am, lm = logits.detach()[:, :, 0].clone().requires_grad_(), logits.detach()[:, 0].clone().requires_grad_()
    expected = full_loss(am.unsqueeze(2) + lm.unsqueeze(1), symbols, boundary)
    expected_grads = torch.autograd.grad(expected.sum(), (am, lm))
    loss = simple_loss(am, lm, symbols, boundary).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    for grad, expected_grad in zip(torch.autograd.grad(loss.sum(), (am, lm)), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-5)


def test_fully_smoothed_loss_is_that_of_the_predictor_alone() -> None:
    logits, symbols, boundary = random_batch(5)
    am, lm = logits.detach()[:, :, 0], logits.detach()[:, 0]
    expected = full_loss(lm.unsqueeze(1).expand(-1, am.shape[1], -1, -1), symbols, boundary)
    loss = simple_loss(am, lm, symbols, boundary, lm_scale=1.0).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)


def test_gradients_pass_gradcheck_in_float64() -> None:
    generator = torch.Generator().manual_seed(6)
    am, lm = torch.randn(2, 4, 5, generator=generator), torch.randn(2, 4, 5, generator=generator)
    am, lm = am.double().requires_grad_(), lm.double().requires_grad_()
    symbols, boundary = torch.tensor([[1, 4, 2], [3, 1, 0]]), make_boundary(torch.tensor([3, 2]), torch.tensor([4, 3]))
    assert torch.autograd.gradcheck(lambda am, lm: simple_loss(am, lm, symbols, boundary, 0, 0.25, 0.1).loss, (am, lm))
    simple = simple_loss(am, lm, symbols, boundary)
    ranges = prune_ranges(simple.px_grad, simple.py_grad, boundary, 2)
    logits = torch.randn(2, 4, 2, 5, generator=generator).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: pruned_loss(logits, symbols, ranges, boundary), (logits,))
    logits = torch.randn(2, 4, 4, 5, generator=generator).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: full_loss(logits, symbols, boundary), (logits,))


def test_loss_and_gradient_do_not_depend_on_how_many_rows_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, symbols, boundary = random_batch(9)
    expected = full_loss(logits, symbols, boundary)
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)
    assert logits[..., 0].numel() % 7 and logits[..., 0].numel() > 14
    monkeypatch.setattr(transducer, "_rows_at_once", lambda logits: 7)
    loss = full_loss(logits, symbols, boundary)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-6)


def test_nothing_of_the_size_of_the_logits_is_made_but_their_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(2, 6, 4, 200).requires_grad_()
    symbols, boundary = torch.ones(2, 3, dtype=torch.int64), make_boundary(torch.tensor([3, 2]), torch.tensor([6, 4]))
    made = LargeResults(logits.numel() // 4)
    monkeypatch.setattr(transducer, "_rows_at_once", lambda logits: 7)
    with made:
        full_loss(logits, symbols, boundary).sum().backward()
    assert made.made_by == ["aten.empty_like.default"]


def test_losses_are_float32_under_bfloat16_autocast() -> None:
    logits, symbols, boundary = random_batch(7)
    am, lm = logits.detach()[:, :, 0].bfloat16().requires_grad_(), logits.detach()[:, 0].bfloat16().requires_grad_()
    half = logits.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [
            simple_loss(am, lm, symbols, boundary, lm_scale=0.25).loss,
            pruned_loss(half, symbols, all_positions(half), boundary),
            full_loss(half, symbols, boundary),
        ]
    wide = half.float()
    expected = [
        simple_loss(am.float(), lm.float(), symbols, boundary, lm_scale=0.25).loss,
        pruned_loss(wide, symbols, all_positions(half), boundary),
        full_loss(wide, symbols, boundary),
    ]
    for loss, wanted in zip(losses, expected, strict=True):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-6)
    (grad,) = torch.autograd.grad(losses[1].sum(), half)
    (wide_grad,) = torch.autograd.grad(expected[1].sum(), wide)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad, wide_grad.bfloat16())


def test_padding_has_neither_influence_nor_gradient() -> None:
    logits, symbols, boundary = random_batch(8)
    inside_frames = torch.arange(logits.shape[1]) < boundary[:, 3:]
    inside_symbols = torch.arange(logits.shape[2]) <= boundary[:, 2:3]
    padding = ~(inside_frames[:, :, None, None] & inside_symbols[:, None, :, None])
    assert padding.any()
    expected = full_loss(logits, symbols, boundary)
    other_symbols = symbols.where(torch.arange(symbols.shape[1]) < boundary[:, 2:3], -7)
    loss = full_loss(logits.masked_fill(padding, 30.0), other_symbols, boundary)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(expected.sum(), logits)
    assert not grad.masked_select(padding).any()
    assert grad.masked_select(~padding).any()


def test_simple_loss_of_an_utterance_does_not_depend_on_its_batch() -> None:
    am, lm, symbols, boundary = GOLDEN["am"], GOLDEN["lm"], GOLDEN["symbols"], GOLDEN["boundary"]
    both = simple_loss(am, lm, symbols, boundary, lm_scale=0.25)
    num_symbols, num_frames = boundary[1, 2:].tolist()
    alone = simple_loss(am[1:2, :num_frames], lm[1:2, : num_symbols + 1], symbols[1:2, :num_symbols], boundary[1:2], lm_scale=0.25)
    torch.testing.assert_close(both.loss[1:2], alone.loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(both.py_grad[1:2, : num_symbols + 1, :num_frames], alone.py_grad, rtol=0, atol=1e-5)


def test_bad_input_is_refused_before_any_compute() -> None:
    am, lm, symbols = torch.zeros(2, 5, 4), torch.zeros(2, 4, 4), torch.ones(2, 3, dtype=torch.int64)
    boundary = make_boundary(torch.tensor([3, 1]), torch.tensor([5, 2]))
    with pytest.raises(ValueError, match=r"am \(2, 5, 4\) and lm \(2, 4, 3\)"):
        simple_loss(am, lm[:, :, :3], symbols, boundary)
    with pytest.raises(ValueError, match=r"lm_scale 0\.7 and am_scale 0\.5"):
        simple_loss(am, lm, symbols, boundary, lm_scale=0.7, am_scale=0.5)
    with pytest.raises(ValueError, match="symbols of utterance 0 hold 4 at position 1"):
        simple_loss(am, lm, torch.tensor([[1, 4, 1], [1, 9, 9]]), boundary)
    with pytest.raises(ValueError, match=r"symbols of utterance 1 hold 0 at position 0; .*without blank"):
        simple_loss(am, lm, torch.tensor([[1, 2, 1], [0, 0, 0]]), boundary)
    with pytest.raises(ValueError, match=r"symbols must be int64 of shape \(2, 3\)"):
        simple_loss(am, lm, symbols.int(), boundary)
    with pytest.raises(ValueError, match="symbols are on meta"):
        simple_loss(am, lm, symbols.to("meta"), boundary)
    with pytest.raises(ValueError, match="blank is 4"):
        full_loss(torch.zeros(2, 5, 4, 4), symbols, boundary, blank=4)
    with pytest.raises(ValueError, match="logits has shape"):
        full_loss(torch.zeros(2, 5, 4), symbols, boundary)
    with pytest.raises(ValueError, match="boundary of utterance 0"):
        full_loss(torch.zeros(2, 4, 4, 4), symbols, boundary)
    ranges = torch.zeros(2, 5, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"must be \(N, T, R, V\) and \(N, T, R\)"):
        pruned_loss(torch.zeros(2, 5, 3, 4), symbols, ranges, boundary)
