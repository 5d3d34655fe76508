"""Attention weights against a naive double loop; the custom gradients against plain autograd."""

from __future__ import annotations

import pytest
import torch

from k2ssl.nn.attention import AttentionWeights, NonlinearAttention, SelfAttention, make_uniform, score_softmax
from k2ssl.nn.positional import relative_positions
from k2ssl.nn.schedule import Clock


class NeverClock(Clock):
    """A clock whose every chance fails."""

    def chance(self, probability: float) -> bool:
        return False


@pytest.mark.parametrize("frames", [1, 7, 200])
def test_the_positional_table_agrees_with_the_recorded_one(golden, agreement, frames: int) -> None:
    table = relative_positions(frames, 48, torch.device("cpu"))
    agreement.absolute("rel_pos", table, golden("rel_pos")[f"t{frames}"][0], 1e-6)


@pytest.mark.parametrize("dim", [0, 7])
def test_a_positional_table_of_pairs_has_an_even_width(dim: int) -> None:
    with pytest.raises(ValueError, match=f"dim is {dim}, an even number >= 2"):
        relative_positions(5, dim, torch.device("cpu"))


def test_weights_agree_with_a_loop_over_heads_and_frames() -> None:
    n, frames, dim, heads, query_dim, pos_dim = 2, 5, 12, 3, 4, 6
    module = AttentionWeights(dim, heads, query_dim, 2, pos_dim, Clock()).eval().double()
    x = torch.randn(n, frames, dim, dtype=torch.float64)
    table = relative_positions(frames, pos_dim, x.device).double()
    padding_mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    weights = module(x, table, padding_mask)

    projected = x @ module.in_proj.weight.t() + module.in_proj.bias
    position_keys = table @ module.linear_pos.weight.t()
    for i in range(n):
        valid = 5 - 2 * i
        for h in range(heads):
            q = projected[i, :, h * query_dim : (h + 1) * query_dim]
            k = projected[i, :, heads * query_dim :][:, h * query_dim : (h + 1) * query_dim]
            p = projected[i, :, 2 * heads * query_dim :][:, 2 * h : 2 * h + 2]
            for t1 in range(frames):
                scores = torch.stack(
                    [q[t1] @ k[t2] + p[t1] @ position_keys[frames - 1 + t2 - t1, 2 * h : 2 * h + 2] for t2 in range(valid)]
                )
                torch.testing.assert_close(weights[i, h, t1, :valid], scores.softmax(dim=0))
                assert weights[i, h, t1, valid:].sum() == 0


def test_attention_modules_agree_with_their_formulas() -> None:
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    weights = torch.rand(2, 3, 5, 5, dtype=torch.float64).softmax(dim=-1)
    attention = SelfAttention(12, 3, 4, Clock()).eval().double()
    values = attention.in_proj(x)
    heads = [torch.einsum("nts,nsd->ntd", weights[:, h], values[..., 4 * h : 4 * h + 4]) for h in range(3)]
    torch.testing.assert_close(attention(x, weights), attention.out_proj(torch.cat(heads, dim=-1)))

    nonlinear = NonlinearAttention(12, 9, Clock()).eval().double()
    s, v, y = nonlinear.in_proj(x).chunk(3, dim=-1)
    expected = nonlinear.out_proj(torch.einsum("nts,nsd->ntd", weights[:, 0], v * s.tanh()) * y)
    torch.testing.assert_close(nonlinear(x, weights[:, :1]), expected)


def test_softmax_of_the_sum_has_the_plain_gradients_and_keeps_only_its_result() -> None:
    content, positional = (2 * torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    padding_mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    grad = torch.randn_like(content)
    plain = (content + positional).masked_fill(padding_mask[:, None, None], float("-inf")).softmax(dim=-1)
    ours = score_softmax(content, positional, padding_mask)
    torch.testing.assert_close(ours, plain)
    inputs = (content, positional)
    for one, two in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(plain, inputs, grad), strict=True):
        torch.testing.assert_close(one, two, atol=1e-13, rtol=1e-10)

    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16):
        score_softmax(content.detach().float().requires_grad_())
    assert [(t.dtype, t.shape) for t in kept] == [(torch.bfloat16, content.shape)]


@pytest.mark.parametrize("halves", [True, False])
def test_large_scores_are_penalised_by_a_constant_gradient(halves: bool) -> None:
    scores = torch.tensor([-30.0, -25.0, 0.0, 25.0, 26.0]).expand(1, 1, 5, 5)
    parts = [scores / 2, scores / 2] if halves else [scores.clone()]
    for part in parts:
        part.requires_grad_()
    grad = torch.randn(1, 1, 5, 5)
    gradients = [torch.autograd.grad(score_softmax(*parts, penalise=penalise), parts, grad) for penalise in (True, False)]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one - two, torch.tensor([-1e-4, 0, 0, 0, 1e-4]).expand(1, 1, 5, 5), atol=1e-6, rtol=0)


def test_uniform_attention_averages_over_positions_of_positive_weight() -> None:
    weights = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.0, 0.1, 0.1, 0.8]])
    assert torch.allclose(make_uniform(weights), torch.tensor([[0.5, 0.5, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3]]))


@pytest.mark.parametrize("skip", [True, False])
def test_the_position_projection_has_a_gradient_also_when_positions_are_left_out(skip: bool) -> None:
    clock = Clock()
    clock.chance = lambda probability: skip and probability == 0.5  # type: ignore[method-assign]
    module = AttentionWeights(8, 2, 4, 2, 6, clock)
    (module(torch.randn(1, 4, 8), relative_positions(4, 6, torch.device("cpu"))) ** 2).sum().backward()
    assert module.linear_pos.weight.grad is not None
    assert bool((module.linear_pos.weight.grad == 0).all()) == skip


def test_a_positional_table_of_another_length_is_refused() -> None:
    module = AttentionWeights(8, 2, 4, 2, 6, Clock())
    with pytest.raises(ValueError, match="positions has 11 rows, 9 are needed for 5 frames"):
        module(torch.randn(1, 5, 8), relative_positions(6, 6, torch.device("cpu")))


def test_initial_scales_are_the_published_ones() -> None:
    module = AttentionWeights(256, 4, 32, 4, 48, NeverClock())
    assert module.in_proj.weight.abs().max().item() == pytest.approx(256**-0.5 * 32**-0.25, rel=0.01)
    assert module.linear_pos.weight.abs().max().item() == pytest.approx(48**-0.5 * 0.05, rel=0.03)
    assert module.in_proj.bias.abs().max().item() <= 0.1 * 32**-0.25
