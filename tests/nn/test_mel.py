from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor
from torchaudio.compliance import kaldi

from k2ssl.nn.mel import LogMel


def _speech_like(samples: int, sample_rate: int = 16000) -> Tensor:
    """(3, samples): a chirp with a changing envelope and an offset, quiet noise, and digital silence with one click."""
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(samples, dtype=torch.float64) / sample_rate
    chirp = 0.4 * (0.5 + 0.5 * torch.sin(2 * math.pi * 3 * t)) * torch.sin(2 * math.pi * (150 + 2000 * t) * t) + 0.05
    noise = 0.01 * torch.randn(samples, dtype=torch.float64, generator=generator)
    click = torch.zeros(samples, dtype=torch.float64)
    click[samples // 2] = 0.9
    return torch.stack([chirp + noise, noise, click]).float()


@pytest.mark.parametrize("samples", [400, 559, 560, 16001])
@pytest.mark.parametrize(
    ("num_bins", "sample_rate", "high_freq"),
    [(80, 16000, -400.0), (23, 16000, 0.0), (40, 8000, 3800.0)],
    ids=["fbank", "mfcc", "telephone"],
)
def test_equal_to_the_library_on_the_same_audio(samples: int, num_bins: int, sample_rate: int, high_freq: float) -> None:
    audio = _speech_like(samples, sample_rate)
    ours = LogMel(num_bins, sample_rate, high_freq=high_freq)(audio)
    for row, mine in zip(audio.double(), ours, strict=True):
        # asked in float64: in float32 its own rounding reaches 1e-3 in bands far below the loudest one
        theirs = kaldi.fbank(row.unsqueeze(0), num_mel_bins=num_bins, sample_frequency=sample_rate, high_freq=high_freq)
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=1e-3)


def test_equal_to_a_naive_float64_computation_of_one_frame() -> None:
    audio = _speech_like(1200)[0].double().numpy()
    frame = audio[320:720] - audio[320:720].mean()
    emphasised = np.array([frame[i] - 0.97 * frame[max(i - 1, 0)] for i in range(400)])
    window = np.array([(0.5 - 0.5 * math.cos(2 * math.pi * i / 399)) ** 0.85 for i in range(400)])
    power = np.abs(np.fft.rfft(emphasised * window, 512)) ** 2

    def mel(freq: float) -> float:
        return 1127 * math.log(1 + freq / 700)

    step = (mel(7600) - mel(20)) / 81
    for band in (0, 7, 40, 79):
        centre = mel(20) + (band + 1) * step
        energy = sum(power[k] * max(0.0, 1 - abs(mel(k * 31.25) - centre) / step) for k in range(256))
        ours = LogMel()(torch.tensor(audio).float().unsqueeze(0))[0, 2, band].item()
        assert ours == pytest.approx(math.log(energy), abs=1e-4)


def test_autocast_changes_nothing() -> None:
    audio, mel = _speech_like(4000), LogMel()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = mel(audio)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, mel(audio))


def test_silence_is_finite() -> None:
    features = LogMel()(torch.zeros(1, 800))
    torch.testing.assert_close(features, torch.full_like(features, math.log(2.0**-23)))


def test_a_state_dict_holds_no_constants() -> None:
    assert not LogMel().state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_bins": 0}, "num_bins is 0"),
        ({"num_bins": 200}, "num_bins is 200"),
        ({"sample_rate": 0}, "sample_rate is 0"),
        ({"low_freq": 9000.0}, "low_freq is 9000.0"),
        ({"high_freq": 8001.0}, "high_freq is 8001.0"),
        ({"high_freq": -7990.0}, "high_freq is -7990.0"),
        ({"frame_shift_ms": 0.0}, "frame_shift_ms is 0.0"),
        ({"frame_length_ms": 25.01}, "frame_length_ms is 25.01"),
    ],
)
def test_impossible_filterbanks_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LogMel(**arguments)


def test_a_filterbank_can_be_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        mel = LogMel()
    assert mel.bands.device.type == mel.window.device.type == "meta"
    assert mel.bands.shape == LogMel().bands.shape
