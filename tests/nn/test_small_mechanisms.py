"""Down- and up-sampling, bypass, limits, dropout, convolution, and zero gradients for skipped parameters."""

from __future__ import annotations

import pytest
import torch

from k2ssl.nn.bypass import Bypass
from k2ssl.nn.convolution import ConvolutionModule
from k2ssl.nn.dropout import Dropout, keep_mask
from k2ssl.nn.keep_in_graph import keep_in_graph
from k2ssl.nn.limit import limit_value
from k2ssl.nn.resample import Downsample, downsample_mask, upsample
from k2ssl.nn.schedule import Clock, Schedule


class AlwaysClock(Clock):
    """A clock whose every chance comes true."""

    def chance(self, probability: float) -> bool:
        return True


def test_downsampling_is_the_softmax_weighted_mean_of_groups_completed_by_the_last_frame() -> None:
    downsample = Downsample(4)
    torch.nn.init.normal_(downsample.bias)
    x = torch.randn(1, 6, 3)
    weights = downsample.bias.softmax(dim=0)
    last = x[:, 5]
    expected = [sum(w * x[:, t] for t, w in enumerate(weights)), weights[0] * x[:, 4] + (1 - weights[0]) * last]
    torch.testing.assert_close(downsample(x), torch.stack(expected, dim=1))


@pytest.mark.parametrize("frames", [1, 3, 4, 5, 8])
def test_downsampling_does_not_see_what_follows_an_utterance(frames: int) -> None:
    downsample = Downsample(4)
    torch.nn.init.normal_(downsample.bias)
    x = torch.randn(1, 11, 3)
    padding_mask = torch.arange(11).unsqueeze(0) >= frames
    alone, padded = downsample(x[:, :frames]), downsample(x, padding_mask)
    mask = downsample_mask(padding_mask, 4)
    assert mask is not None and int((~mask).sum()) == alone.shape[1] == -(-frames // 4)
    torch.testing.assert_close(padded[:, : alone.shape[1]], alone)


def test_gradients_of_downsampling_are_those_of_the_plain_formula() -> None:
    downsample = Downsample(4).double()
    torch.nn.init.normal_(downsample.bias)
    lens = [11, 6, 1, 8]
    x = torch.randn(4, 11, 3, dtype=torch.float64, requires_grad=True)
    y = downsample(x, torch.arange(11).unsqueeze(0) >= torch.tensor(lens).unsqueeze(1))
    probe = torch.randn_like(y)
    rows = []
    for row, n in zip(x, lens, strict=True):
        slots = torch.arange(-(-n // 4) * 4).clamp(max=n - 1)
        grouped = (row[slots].view(-1, 4, 3) * downsample.bias.softmax(dim=0)[:, None]).sum(dim=1)
        rows.append(torch.cat([grouped, grouped.new_zeros(3 - len(grouped), 3)]))
    plain = torch.stack(rows)
    torch.testing.assert_close(y, plain)
    for one, two in zip(*(torch.autograd.grad(z, (x, downsample.bias), probe) for z in (y, plain)), strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-10)


def test_downsampling_repeats_no_frame_by_index() -> None:
    names: list[str] = []

    def walk(node) -> None:  # type: ignore[no-untyped-def]
        if node is not None:
            names.append(node.name())
            for parent, _ in node.next_functions:
                walk(parent)

    for padding_mask in (None, torch.arange(11).unsqueeze(0) >= 6):
        walk(Downsample(4)(torch.randn(1, 11, 3, requires_grad=True), padding_mask).grad_fn)
    # gradients of repeated indices are added up in an order that differs between runs on a GPU; the one gather takes one frame a row
    assert not {"IndexSelectBackward0", "IndexBackward0"} & set(names) and names.count("GatherBackward0") == 1


def test_upsampling_repeats_frames_and_cuts() -> None:
    assert upsample(torch.tensor([[[1.0], [2.0]]]), 3, 5).flatten().tolist() == [1, 1, 1, 2, 2]


def test_the_bypass_interpolates_per_channel_and_skips_whole_sequences_in_training() -> None:
    bypass = Bypass(3, Clock(), Schedule((0, 0.5)))
    with torch.no_grad():
        bypass.scale.copy_(torch.tensor([0.2, 0.5, 1.0]))
    before, after = torch.randn(400, 2, 3), torch.randn(400, 2, 3)
    expected = before + bypass.scale * (after - before)
    y = bypass(before, after)
    skipped = (y == before).flatten(1).all(dim=1)
    assert 140 < int(skipped.sum()) < 260
    torch.testing.assert_close(y[~skipped], expected[~skipped])
    torch.testing.assert_close(bypass.eval()(before, after), expected)


def test_gradients_that_push_out_of_range_are_turned() -> None:
    x = torch.tensor([0.1, 0.1, 0.5, 0.5, 2.0, 2.0], requires_grad=True)
    limit_value(x, 0.2, 1.0, AlwaysClock()).backward(torch.tensor([1.0, -1, 1, -1, 1, -1]))
    assert x.grad is not None and x.grad.tolist() == [-1, -1, 1, -1, 1, 1]


def test_the_limit_acts_with_probability_six_tenths() -> None:
    clock = Clock(3)
    x = torch.ones(1, requires_grad=True)
    assert sum(limit_value(x, 0, 1, clock) is not x for _ in range(1000)) / 1000 == pytest.approx(0.6, abs=0.06)


def test_dropout_keeps_the_mean_and_its_draws_come_from_the_clock() -> None:
    clock = Clock()
    dropout = Dropout(Schedule((0, 0.3), (100, 0.0)), clock)
    x = torch.ones(200, 200)
    clock.seed(1)
    first = dropout(x)
    torch.rand(10)  # a global draw in between changes nothing
    clock.seed(1)
    assert torch.equal(dropout(x), first)
    assert first.mean().item() == pytest.approx(1.0, abs=0.02) and (first == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    clock.advance(100)
    assert dropout(x) is x
    assert keep_mask((1000, 1, 1), 0.2, clock, x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="rate is 1"):
        Dropout(1.0, clock)


def test_skipped_parameters_receive_zeros() -> None:
    weight, frozen = torch.ones(3, requires_grad=True), torch.ones(2)
    x = torch.randn(4, requires_grad=True)
    y = keep_in_graph(x, (weight, frozen))
    y.sum().backward()
    assert torch.equal(y, x) and weight.grad is not None and weight.grad.tolist() == [0, 0, 0]
    assert x.grad is not None and x.grad.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("frames", [1, 2, 9])
def test_the_convolution_does_not_see_padding(frames: int) -> None:
    module = ConvolutionModule(6, 5, Clock()).eval()
    x = torch.randn(1, 12, 6)
    padded = module(x, torch.arange(12).unsqueeze(0) >= frames)
    torch.testing.assert_close(padded[:, :frames], module(x[:, :frames]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", [0, 4, -3])
def test_an_even_kernel_is_refused(kernel: int) -> None:
    with pytest.raises(ValueError, match=f"kernel is {kernel}, allowed are odd numbers"):
        ConvolutionModule(6, kernel, Clock())
