from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from k2ssl.nn import masked_norm as masked_norm_file
from k2ssl.nn.masked_norm import MaskedTimeNorm, masked_time_norm

LENS = (7, 1, 4)
WIDTH = 7
EPS = 1e-5


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = 2.0 + 3.0 * torch.randn(3, 5, WIDTH, dtype=dtype, generator=generator)
    mask = torch.arange(WIDTH) >= torch.tensor(LENS).unsqueeze(1)
    return x, mask, torch.randn(5, dtype=dtype, generator=generator), torch.randn(5, dtype=dtype, generator=generator)


def _one_by_one(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The plain formula on each utterance cut to its own length."""
    rows = []
    for row, length in zip(x, LENS, strict=True):
        valid = row[:, :length]
        normal = (valid - valid.mean(1, keepdim=True)) / (valid.var(1, keepdim=True, unbiased=False) + EPS).sqrt()
        rows.append(F.pad(normal * weight[:, None] + bias[:, None], (0, WIDTH - length)))
    return torch.stack(rows)


def test_each_utterance_is_normalised_over_its_own_frames_only() -> None:
    x, mask, weight, bias = _inputs()
    torch.testing.assert_close(masked_time_norm(x, mask, weight, bias, EPS), _one_by_one(x, weight, bias), rtol=0, atol=1e-12)


def test_what_stands_in_the_padding_has_no_influence() -> None:
    x, mask, weight, bias = _inputs()
    dirty = x.masked_fill(mask.unsqueeze(1), 1e30)
    assert torch.equal(masked_time_norm(dirty, mask, weight, bias, EPS), masked_time_norm(x, mask, weight, bias, EPS))


def test_gradients_equal_autograd_of_the_plain_formula_in_float64() -> None:
    x, mask, weight, bias = (t.requires_grad_() if t.is_floating_point() else t for t in _inputs())
    probe = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad((masked_time_norm(x, mask, weight, bias, EPS) * probe).sum(), (x, weight, bias))
    plain = torch.autograd.grad((_one_by_one(x, weight, bias) * probe).sum(), (x, weight, bias))
    for our, true in zip(ours, plain, strict=True):
        torch.testing.assert_close(our, true, rtol=0, atol=1e-10)


def test_gradients_equal_finite_differences() -> None:
    x, mask, weight, bias = (t.requires_grad_() if t.is_floating_point() else t for t in _inputs())
    # the utterance of a single frame has variance 0, where eps makes the function too steep for finite differences
    x, mask = x.detach()[[0, 2]].requires_grad_(), mask[[0, 2]]
    assert torch.autograd.gradcheck(lambda *args: masked_time_norm(args[0], mask, *args[1:], EPS), (x, weight, bias))


def test_slices_of_channels_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    x, mask, weight, bias = (t.requires_grad_() if t.is_floating_point() else t for t in _inputs())
    results = []
    for size in (64, 2):
        monkeypatch.setattr(masked_norm_file, "_SLICE", size)
        for padding in (mask, None):
            y = masked_time_norm(x, padding, weight, bias, EPS)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))))
    for whole, sliced in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(whole, sliced, strict=True))


def test_nothing_wider_than_the_input_is_kept_for_the_backward_pass() -> None:
    x = torch.randn(2, 8, 500).bfloat16().requires_grad_()
    for mask in (None, torch.zeros(2, 500, dtype=torch.bool)):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            MaskedTimeNorm(8)(x, mask)
        assert [t.dtype for t in kept if t.numel() >= x.numel()] == [torch.bfloat16]


@pytest.mark.parametrize("padded", [False, True])
def test_unpadded_batch_equals_group_norm_with_as_many_groups_as_channels(padded: bool) -> None:
    x, _, weight, bias = _inputs(torch.float32)
    norm, reference = MaskedTimeNorm(5, EPS), torch.nn.GroupNorm(5, 5, EPS)
    for module in (norm, reference):
        module.load_state_dict({"weight": weight, "bias": bias})
    mask = torch.zeros(3, WIDTH, dtype=torch.bool) if padded else None
    torch.testing.assert_close(norm(x, mask), reference(x), rtol=0, atol=1e-5)


def test_a_single_frame_is_its_own_mean() -> None:
    assert torch.equal(MaskedTimeNorm(5)(torch.randn(1, 5, 1)), torch.zeros(1, 5, 1))


@pytest.mark.parametrize("masked", [False, True])
def test_statistics_of_half_precision_input_are_taken_in_float32(masked: bool) -> None:
    x = (100 + torch.randn(1, 2, 4000, generator=torch.Generator().manual_seed(3))).bfloat16().requires_grad_()
    norm = MaskedTimeNorm(2)
    y = norm(x, torch.zeros(1, 4000, dtype=torch.bool) if masked else None)
    truth = F.group_norm(x.detach().double(), 2)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert (y.double() - truth).abs().max() < 0.02  # half a unit in the last place of values up to 4
