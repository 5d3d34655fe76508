from __future__ import annotations

import math

import pytest
import torch

from k2ssl.nn.conv_position import ConvPosition


@pytest.mark.parametrize("kernel", [1, 2, 7, 8])
@pytest.mark.parametrize("frames", [1, 2, 20])
def test_output_equals_the_formula_tap_by_tap(kernel: int, frames: int) -> None:
    torch.manual_seed(0)
    dim, groups = 6, 3
    position = ConvPosition(dim, kernel, groups).double()
    gain, direction = (getattr(position.conv.parametrizations.weight, name).data for name in ("original0", "original1"))
    gain.normal_()
    position.conv.bias.data.normal_()
    x = torch.randn(2, frames, dim, dtype=torch.float64)
    expected = position.conv.bias.expand(2, frames, dim).clone()
    for tap in range(kernel):
        weight = torch.zeros(dim, dim, dtype=torch.float64)  # block diagonal: channels of one group see each other
        for channel in range(dim):
            start = channel // 2 * 2
            weight[channel, start : start + 2] = direction[channel, :, tap] * gain[0, 0, tap] / direction[:, :, tap].norm()
        for frame in range(frames):
            source = frame - kernel // 2 + tap
            if 0 <= source < frames:
                expected[:, frame] += x[:, source] @ weight.T
    expected = 0.5 * expected * (1 + torch.erf(expected / math.sqrt(2)))
    output = position(x)
    assert output.shape == x.shape
    assert (output - expected).abs().max() < 1e-12


@pytest.mark.parametrize(("dim", "kernel", "groups"), [(6, 0, 3), (6, 3, 4), (0, 3, 1)])
def test_bad_sizes_are_refused(dim: int, kernel: int, groups: int) -> None:
    with pytest.raises(ValueError, match=f"dim {dim}"):
        ConvPosition(dim, kernel, groups)
