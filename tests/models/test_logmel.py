from __future__ import annotations

import math
import re

import pytest
import torch

from k2ssl.models.frontend import build_frontend
from k2ssl.models.logmel import LogMelConfig, LogMelFrontend

SMALL = LogMelConfig(channels=(2, 4, 8), output_dim=16)


def _frontend(config: LogMelConfig = SMALL) -> LogMelFrontend:
    torch.manual_seed(0)
    frontend = build_frontend(config)
    assert isinstance(frontend, LogMelFrontend)
    return frontend.eval()


def test_default_is_small_and_runs_at_50_frames_per_second() -> None:
    frontend = _frontend(LogMelConfig())
    assert sum(p.numel() for p in frontend.parameters()) < 2_000_000
    assert (frontend.receptive_field, frontend.stride, frontend.frame_rate, frontend.output_dim) == (400, 320, 50.0, 512)


@pytest.mark.parametrize("num_frames", [20, 21])
@pytest.mark.parametrize("frame", [0, 7, 12])
def test_a_frame_is_centred_on_the_same_samples_as_the_waveform_frontends(num_frames: int, frame: int) -> None:
    """With weights that look the same in both directions of time, a click in the middle of frame k's window must be felt
    symmetrically around frame k."""
    frontend = _frontend()
    for conv in (frontend.conv1, frontend.conv2, frontend.conv3, frontend.block.depthwise):
        conv.weight.data = (conv.weight.data + conv.weight.data.flip(2)) / 2
    middle = 320 * frame + 200
    audio = torch.zeros(1, 400 + 320 * (num_frames - 1))
    silence = frontend(audio)[0]
    audio[0, middle - 1 : middle + 1] = 0.5
    change = (frontend(audio)[0] - silence).norm(dim=-1)
    assert change[frame] > 0.05
    for distance in range(1, min(frame, num_frames - 1 - frame, 3) + 1):
        before, after = change[frame - distance].item(), change[frame + distance].item()
        # not exactly: pre-emphasis has a direction
        assert before == pytest.approx(after, rel=0.1)


def test_a_frame_depends_on_its_neighbourhood_only() -> None:
    frontend = _frontend()
    generator = torch.Generator().manual_seed(0)
    audio = 0.1 * torch.randn(1, 400 + 320 * 39, generator=generator)
    extended = torch.cat([audio, torch.zeros(1, 320 * 40)], 1)  # digital silence that counts as audio
    with torch.no_grad():
        alone, followed = frontend(audio)[0], frontend(extended)[0]
    torch.testing.assert_close(followed[:30], alone[:30], rtol=0, atol=1e-5)


def test_a_mask_at_padding_changes_nothing() -> None:
    frontend, audio = _frontend(), 0.1 * torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))
    lens, valid = torch.tensor([16000, 9000]), frontend.num_frames(9000)
    hidden = torch.zeros(2, frontend.num_frames(16000), dtype=torch.bool)
    hidden[1, 5:9] = True
    with torch.no_grad():
        plain = frontend(audio, lens, hidden)
        hidden[1, valid:] = True
        before, frames = hidden.clone(), frontend(audio, lens, hidden)
    assert torch.equal(frames[0], plain[0]) and torch.equal(frames[1, :valid], plain[1, :valid])
    assert torch.equal(hidden, before)


def test_an_utterance_of_one_frame_still_says_something() -> None:
    frontend = _frontend()
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(1, 400, generator=generator)
    tone = 0.1 * torch.sin(2 * math.pi * 440 * torch.arange(400) / 16000).unsqueeze(0)
    with torch.no_grad():
        frames = frontend(noise), frontend(tone)
    assert frames[0].shape == (1, 1, 16)
    assert (frames[0] - frames[1]).norm() > 0.3 * frames[0].norm()


def test_every_parameter_receives_a_gradient() -> None:
    frontend = _frontend().train()
    frontend(torch.randn(2, 2000, generator=torch.Generator().manual_seed(0)), torch.tensor([2000, 1200])).square().sum().backward()
    for name, parameter in frontend.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_gradients_have_the_strides_of_weights_which_replicas_need() -> None:
    frontend = LogMelFrontend(LogMelConfig(channels=(2, 4, 8), output_dim=16))
    frames = frontend(torch.randn(1, 8000))
    gradients = torch.autograd.grad(frames.sum(), list(frontend.parameters()))
    assert [gradient.stride() for gradient in gradients] == [parameter.stride() for parameter in frontend.parameters()]


def test_a_new_stack_lets_the_audio_through() -> None:
    """Default initialisation leaves frames that hardly change over time, whatever the audio does."""
    frontend = _frontend(LogMelConfig())
    generator = torch.Generator().manual_seed(0)
    envelope = torch.rand(20, generator=generator).repeat_interleave(800)
    with torch.no_grad():
        frames = frontend((envelope * 0.1 * torch.randn(16000, generator=generator)).unsqueeze(0))[0]
    assert frames.std(0).mean() > 0.1 * frames.std()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_bins": 0}, "num_bins is 0"),
        ({"frame_shift_ms": 10.01}, "frame_shift_ms is 10.01"),
        ({"mel_mean": math.inf}, "mel_mean is inf"),
        ({"mel_std": 0.0}, "mel_std is 0.0"),
        ({"channels": (8, 32)}, "channels: has 2 entries, 3 are needed"),
        ({"channels": (8, 0, 8)}, "channels is (8, 0, 8)"),
        ({"expansion": 0}, "expansion is 0"),
        ({"output_dim": 0}, "output_dim is 0"),
        ({"gradient_scale": -1.0}, "gradient_scale is -1.0"),
    ],
)
def test_impossible_configurations_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LogMelConfig(**arguments)  # type: ignore[arg-type]


def test_it_compiles_with_lengths_left_open() -> None:
    frontend = LogMelFrontend(LogMelConfig(channels=(4, 8, 16), output_dim=24))
    compiled = torch.compile(frontend, backend="aot_eager")
    for seconds in (0.4, 0.5, 1.0, 2.0):
        audio = torch.randn(2, int(16000 * seconds))
        torch.testing.assert_close(compiled(audio), frontend(audio))
        compiled(audio).sum().backward()
