"""The waveform frontend with matrix products against the same layers one after the other, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from k2ssl.models import frontend_layers
from k2ssl.models.frontend import WaveformConfig, WaveformFrontend

CONFIGS = {
    "group": WaveformConfig(channels=8),
    "group with bias, gradient scaled": WaveformConfig(channels=8, bias=True, normalize_audio=True, gradient_scale=0.1),
    "layer": WaveformConfig(channels=8, norm="layer"),
    "layer with bias, audio as it is": WaveformConfig(channels=8, norm="layer", bias=True, normalize_audio=False),
    "odd kernels and strides": WaveformConfig(channels=8, layers=((7, 3), (5, 2), (2, 3), (4, 4), (3, 1))),
}


def pair(name: str) -> tuple[WaveformFrontend, WaveformFrontend]:
    torch.manual_seed(0)
    fast, plain = (WaveformFrontend(CONFIGS[name]).double() for _ in range(2))
    for parameter in fast.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    plain.load_state_dict(fast.state_dict())
    plain.fast = False
    return fast, plain


def gradients(frontend: WaveformFrontend, audio: Tensor, lens: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """Valid frames of each utterance, and the gradients of a function of them."""
    frames = frontend(audio, lens)
    samples = [audio.shape[1]] * len(audio) if lens is None else lens.tolist()
    valid = [row[: frontend.num_frames(n)] for row, n in zip(frames, samples, strict=True)]
    total = sum((row.sin().sum() for row in valid), start=audio.new_zeros(()))
    return valid, list(torch.autograd.grad(total, list(frontend.parameters())))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lens", [None, (1400, 3000, 700)], ids=["whole", "padded"])
def test_frames_and_gradients_equal_those_of_the_plain_layers(name: str, lens: tuple[int, ...] | None) -> None:
    fast, plain = pair(name)
    audio = 0.1 * torch.randn(3, 3000, dtype=torch.float64) + 0.05
    tensor = None if lens is None else torch.tensor(lens)
    frames, grads = gradients(fast, audio, tensor)
    true_frames, true_grads = gradients(plain, audio, tensor)
    for ours, true in zip(frames, true_frames, strict=True):
        assert (ours - true).abs().max() < 1e-10
    largest = max(float(grad.norm()) for grad in true_grads)
    for ours, true in zip(grads, true_grads, strict=True):  # a bias before a normalisation over time has a gradient of 0
        assert (ours - true).norm() <= 1e-9 * true.norm() + 1e-11 * largest


def test_an_offset_of_the_audio_costs_no_precision() -> None:
    fast, plain = pair("group")
    audio = 0.01 * torch.randn(2, 3000, dtype=torch.float64) + 0.5
    with torch.no_grad():
        exact = plain(audio)
        assert (fast.float()(audio.float()) - exact).norm() <= (plain.float()(audio.float()) - exact).norm()


@pytest.mark.parametrize("how", ["switched off", "gradient for the audio", "a single layer"])
def test_the_plain_layers_run_where_the_fast_way_is_not_for(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = pair("group")
    audio = torch.randn(1, 1000, dtype=torch.float64)
    if how == "switched off":
        fast.fast = False
    elif how == "gradient for the audio":
        audio.requires_grad_()
    else:
        fast = WaveformFrontend(WaveformConfig(channels=8, layers=((10, 5),))).double()
    monkeypatch.setattr(frontend_layers, "convolve_windows", None)  # calling it would fail
    frames = fast(audio)
    assert frames.isfinite().all()
    if how == "gradient for the audio":
        assert torch.autograd.grad(frames.sum(), audio)[0].isfinite().all()


def test_state_dict_does_not_depend_on_the_way_of_computing() -> None:
    fast, plain = pair("layer with bias, audio as it is")
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert "fast" not in WaveformConfig.__dataclass_fields__
