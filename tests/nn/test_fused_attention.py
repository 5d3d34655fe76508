from __future__ import annotations

import pytest
import torch
from torch import Tensor

from k2ssl.nn.fused_attention import FusedSelfAttention
from k2ssl.nn.schedule import Clock


def naive(attention: FusedSelfAttention, x: Tensor, lens: list[int]) -> Tensor:
    """The formula, utterance by utterance and head by head; zeros at padding."""
    dim = x.shape[2]
    width = dim // attention.num_heads
    output = torch.zeros_like(x)
    for index, length in enumerate(lens):
        projected = x[index, :length] @ attention.qkv.weight.T + attention.qkv.bias
        heads = []
        for head in range(attention.num_heads):
            query, key, value = (projected[:, part * dim + head * width :][:, :width] for part in range(3))
            heads.append(torch.softmax(query @ key.T / width**0.5, dim=1) @ value)
        output[index, :length] = torch.cat(heads, dim=1) @ attention.out.weight.T + attention.out.bias
    return output


@pytest.mark.parametrize("lens", [[7, 7, 7], [7, 1, 4]])
def test_output_equals_the_formula(lens: list[int]) -> None:
    torch.manual_seed(0)
    attention = FusedSelfAttention(12, 3, 0.0, Clock()).double()
    x = 3 * torch.randn(3, 7, 12, dtype=torch.float64)
    valid = torch.arange(7)[None] < torch.tensor(lens)[:, None]
    output = attention(x, None if min(lens) == 7 else valid[:, None, None, :])
    assert output.isfinite().all()
    assert (output - naive(attention, x, lens))[valid].abs().max() < 1e-12


def test_dropout_keeps_the_expectation_and_takes_its_seed_from_the_clock() -> None:
    torch.manual_seed(0)
    clock = Clock(3)
    attention = FusedSelfAttention(8, 2, 0.25, clock).requires_grad_(False)
    x = torch.randn(1, 6, 8).expand(4000, -1, -1)
    dropped = attention.train()(x)
    exact = attention.eval()(x[:1])[0]
    assert (dropped.mean(0) - exact).abs().max() < 5 * (dropped.std(0) / 4000**0.5).max()
    clock.seed(3)
    assert torch.equal(attention.train()(x), dropped)
    assert not torch.equal(attention(x), dropped)


@pytest.mark.parametrize("num_heads", [0, 5])
def test_heads_that_do_not_divide_the_width_are_refused(num_heads: int) -> None:
    with pytest.raises(ValueError, match=f"num_heads {num_heads}"):
        FusedSelfAttention(12, num_heads, 0.0, Clock())
