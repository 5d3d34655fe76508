from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from k2ssl.models.frontend import Frontend, LogMelConfig, WaveformConfig, WaveformFrontend, build_frontend, normalize_audio

SMALL = {
    "group": WaveformConfig(channels=16),
    "group_normalised": WaveformConfig(channels=16, normalize_audio=True, bias=True),
    "layer": WaveformConfig(channels=16, norm="layer"),
    "logmel": LogMelConfig(channels=(2, 4, 8), output_dim=16),
}


def _frontend(name: str) -> Frontend:
    torch.manual_seed(0)
    frontend = build_frontend(SMALL[name])
    for parameter in frontend.parameters():  # away from weights of one and biases of zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    return frontend.eval()


def _audio(*samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(samples))
    audio = torch.zeros(len(samples), max(samples))
    for row, length in zip(audio, samples, strict=True):
        row[:length] = 0.1 * torch.randn(length, generator=generator) + 0.03
    return audio


@pytest.mark.parametrize(("recorded", "norm"), [("default", "group"), ("layer_norm", "layer")])
def test_both_modes_equal_the_recorded_outputs(golden, agreement, recorded: str, norm: str) -> None:
    arrays = golden(f"frontend_{recorded}")
    frontend = WaveformFrontend(WaveformConfig(channels=16, norm=norm, normalize_audio=False))
    state = {}
    for name in (name for name in arrays if name.startswith("state.")):
        ours = re.sub(r"^state\.conv_layers\.(\d+)\.0\.", r"layers.\1.conv.", name)
        ours = re.sub(r"^state\.conv_layers\.(\d+)\.2\.(1\.)?", r"layers.\1.norm.", ours)
        state[ours] = arrays[name]
    frontend.load_state_dict(state)
    with torch.no_grad():
        frames = frontend(arrays["wav"])
    agreement.absolute(f"frontend_{recorded}", frames.transpose(1, 2), arrays["y"], 1e-5)


def test_published_size_has_its_parameters_window_and_rate() -> None:
    frontend = build_frontend(WaveformConfig())
    assert sum(p.numel() for p in frontend.parameters()) == 512 * 10 + 512 * 512 * (4 * 3 + 2 * 2) + 2 * 512
    assert (frontend.receptive_field, frontend.stride, frontend.frame_rate, frontend.output_dim) == (400, 320, 50.0, 512)


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(samples=st.integers(400, 3500), zeros=st.integers(0, 3000), longer=st.integers(0, 3000))
@example(samples=400, zeros=1, longer=319)
@example(samples=719, zeros=321, longer=2000)
def test_an_utterance_does_not_feel_padding_nor_company(name: str, samples: int, zeros: int, longer: int) -> None:
    frontend = _frontend(name)
    audio = _audio(samples, samples + longer, 400)
    alone = audio[:1, :samples]
    lens = torch.tensor([samples, samples + longer, 400])
    with torch.no_grad():
        truth = frontend(alone)[0]
        padded = frontend(F.pad(alone, (0, zeros)), lens[:1])[0]
        batched = frontend(audio, lens)
        shortest = frontend(audio[2:, :400])[0]
    num_frames = frontend.num_frames(samples)
    assert truth.shape == (num_frames, 16)
    assert (padded[:num_frames] - truth).abs().max() < 1e-4
    assert (batched[0, :num_frames] - truth).abs().max() < 1e-4
    assert (batched[2, :1] - shortest).abs().max() < 1e-4
    assert batched.isfinite().all()


@pytest.mark.parametrize("config", [WaveformConfig(), WaveformConfig(norm="layer"), LogMelConfig()], ids=["group", "layer", "logmel"])
def test_published_sizes_do_not_feel_padding(config: WaveformConfig | LogMelConfig) -> None:
    torch.manual_seed(0)
    frontend = build_frontend(config).eval()
    audio = _audio(5003, 12000)
    with torch.no_grad():
        batched = frontend(audio, torch.tensor([5003, 12000]))
        for position, samples in enumerate((5003, 12000)):
            num_frames = frontend.num_frames(samples)
            alone = frontend(audio[position : position + 1, :samples])[0]
            assert (batched[position, :num_frames] - alone).abs().max() < 1e-4


@pytest.mark.parametrize("name", SMALL)
def test_noise_in_the_padding_changes_no_valid_frame(name: str) -> None:
    frontend = _frontend(name)
    audio, lens = _audio(1500, 4000), torch.tensor([1500, 4000])
    noisy = audio.clone()
    noisy[0, 1500:] = 0.5
    num_frames = frontend.num_frames(1500)
    with torch.no_grad():
        clean, dirty = frontend(audio, lens), frontend(noisy, lens)
    torch.testing.assert_close(dirty[0, :num_frames], clean[0, :num_frames], rtol=0, atol=1e-6)


_HIDDEN = {"at the ends": [0, 1, 2, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 20, 25, 26], "inside": [5, 6, 7, 8, 10, 11, 12]}  # of 27 frames


def _hide(frames: list[int]) -> Tensor:
    hidden = torch.zeros(1, 27, dtype=torch.bool)
    hidden[0, frames] = True
    return hidden


@pytest.mark.parametrize(
    "config", [WaveformConfig(channels=16, norm="layer", normalize_audio=False), SMALL["logmel"]], ids=["layer", "logmel"]
)
@pytest.mark.parametrize("more", [0, 160])  # as many features as frames ask for, and one more
@pytest.mark.parametrize("spans", _HIDDEN)
def test_visible_frames_know_no_more_of_hidden_ones_than_their_own_windows_hold(
    config: WaveformConfig | LogMelConfig, more: int, spans: str
) -> None:
    torch.manual_seed(0)
    frontend, hidden, audio = build_frontend(config).eval(), _hide(_HIDDEN[spans]), _audio(400 + 320 * 26 + more)
    known = torch.zeros_like(audio, dtype=torch.bool)
    for frame in (~hidden[0]).nonzero().flatten().tolist():
        known[0, 320 * frame : 320 * frame + 400 + (more if frame == 26 else 0)] = True
    other = torch.where(known, audio, torch.randn(audio.shape, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        frames, others = frontend(audio, None, hidden), frontend(other, None, hidden)
        torch.testing.assert_close(others[~hidden], frames[~hidden], rtol=0, atol=1e-6)
        if isinstance(config, LogMelConfig):  # which without being told shows what is hidden
            assert (frontend(other) - frontend(audio))[~hidden].abs().amax() > 0.03


@pytest.mark.parametrize("name", SMALL)
def test_where_nothing_is_hidden_frames_are_the_same(name: str) -> None:
    frontend, audio, lens = _frontend(name), _audio(5000, 3000), torch.tensor([5000, 3000])
    hidden = torch.zeros(2, frontend.num_frames(5000), dtype=torch.bool)
    assert torch.equal(frontend(audio, lens, hidden), frontend(audio, lens))


@pytest.mark.parametrize("name", ["group", "logmel"])
@pytest.mark.parametrize("hidden", [torch.zeros(2, 3, dtype=torch.bool), torch.zeros(1, 15, dtype=torch.bool), torch.zeros(2, 15)])
def test_a_mask_of_another_shape_or_type_is_refused(name: str, hidden: Tensor) -> None:
    message = rf"hidden has shape {tuple(hidden.shape)} and type {hidden.dtype}, allowed is (2, 15) and torch.bool"
    with pytest.raises(ValueError, match=re.escape(message)):
        _frontend(name)(_audio(5000, 5000), None, hidden)


@pytest.mark.parametrize("spans", _HIDDEN)
def test_features_between_two_visible_frames_stay_visible(spans: str) -> None:
    frontend, hidden = _frontend("logmel"), _hide(_HIDDEN[spans])
    audio = _audio(400 + 320 * 26).requires_grad_()
    frontend(audio, None, hidden)[~hidden].square().sum().backward()
    expected = torch.zeros(400 + 320 * 26, dtype=torch.bool)
    for feature in range(2 * 27 - 1):  # every second one lies between two frames
        if not hidden[0, feature // 2] and not hidden[0, (feature + 1) // 2]:
            expected[160 * feature : 160 * feature + 400] = True
    assert audio.grad is not None
    assert torch.equal(audio.grad[0] != 0, expected)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_of_a_padded_batch_are_the_sum_over_its_utterances(name: str) -> None:
    frontend = _frontend(name).double()
    audio, lens = _audio(1500, 4000).double(), torch.tensor([1500, 4000])

    def gradients(frames: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(sum(f.sin().sum() for f in frames), list(frontend.parameters())))  # type: ignore[arg-type]

    batched = frontend(audio, lens)
    together = gradients([batched[0, : frontend.num_frames(1500)], batched[1]])
    alone = gradients([frontend(audio[:1, :1500]), frontend(audio[1:])])
    for ours, true in zip(together, alone, strict=True):
        # the log-mel features themselves are always float32
        assert (ours - true).norm() <= (1e-5 if name == "logmel" else 1e-9) * true.norm() + 1e-9


@pytest.mark.parametrize("name", ["group", "logmel"])
def test_promised_frames_are_the_frames_returned_at_every_length(name: str) -> None:
    frontend, audio = _frontend(name), _audio(1400)
    steps = {320 * k + 400 + offset for k in range(1, 4) for offset in (-1, 0, 1)}  # where one more frame appears
    with torch.no_grad():
        for samples in {*steps, *range(400, 1400, 7)}:
            assert frontend(audio[:, :samples]).size(1) == frontend.num_frames(samples)


def test_both_frontends_give_equally_many_frames_and_ints_agree_with_tensors() -> None:
    waveform, logmel = _frontend("group"), _frontend("logmel")
    samples = torch.arange(0, 4000)
    counts = waveform.num_frames(samples)
    assert counts.dtype == torch.int64
    assert counts.tolist() == logmel.num_frames(samples).tolist()
    assert counts.tolist() == [waveform.num_frames(n) for n in range(4000)]
    assert counts.tolist() == [0 if n < 400 else (n - 400) // 320 + 1 for n in range(4000)]
    assert waveform.num_frames(16000) == 49


def test_other_layers_bring_their_own_window_and_stride() -> None:
    frontend = build_frontend(WaveformConfig(channels=2, layers=((4, 3), (5, 2))))
    assert (frontend.receptive_field, frontend.stride) == (16, 6)
    for samples in range(16, 60):
        assert frontend(torch.ones(1, samples)).size(1) == frontend.num_frames(samples)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_gradient_scale_multiplies_every_gradient(name: str, scale: float) -> None:
    plain = _frontend(name)
    scaled = build_frontend(type(SMALL[name])(**{**vars(SMALL[name]), "gradient_scale": scale}))
    scaled.load_state_dict(plain.state_dict())
    audio = _audio(2000, 3000).requires_grad_()  # such that a graph would be built if nothing prevented it
    truth, frames = plain(audio), scaled(audio)
    assert torch.equal(frames, truth)
    truth.sin().sum().backward()
    if scale == 0:
        assert not frames.requires_grad
        assert not any(p.requires_grad for p in scaled.parameters())
        return
    frames.sin().sum().backward()
    for ours, true in zip(scaled.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and true.grad is not None
        torch.testing.assert_close(ours.grad, scale * true.grad, rtol=1e-4, atol=1e-6 * float(true.grad.norm()) + 1e-6)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("lens", [None, (700, 3000)])
def test_bfloat16_autocast_runs_and_every_gradient_is_finite(name: str, lens: tuple[int, ...] | None) -> None:
    frontend = _frontend(name).train()
    audio = _audio(*(lens or (3000, 3000)))
    with torch.autocast("cpu", torch.bfloat16):
        frames = frontend(audio, None if lens is None else torch.tensor(lens))
        frames.float().square().sum().backward()
    exact = frontend(audio, None if lens is None else torch.tensor(lens))
    num_frames = frontend.num_frames(700)
    assert frames.isfinite().all()
    assert (frames - exact)[:, :num_frames].norm() < 0.05 * exact[:, :num_frames].norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in frontend.parameters())


def test_normalised_audio_has_zero_mean_and_unit_variance_over_its_own_samples() -> None:
    audio, lens = _audio(900, 2000), torch.tensor([900, 2000])
    normal = normalize_audio(audio, lens)
    assert not normal[0, 900:].any()
    for row, length in zip(normal, (900, 2000), strict=True):
        assert row[:length].mean().abs() < 1e-5
        assert abs(row[:length].var(unbiased=False) - 1) < 2e-3  # eps against a variance of 0.01
    torch.testing.assert_close(normalize_audio(audio[1:]), normal[1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(normalize_audio(normal, lens), normal, rtol=6e-4, atol=1e-6)  # 5e-6 / variance


@pytest.mark.parametrize(("name", "normalises"), [("group", False), ("group_normalised", True), ("layer", True)])
def test_gain_and_offset_are_removed_where_the_audio_is_normalised(name: str, normalises: bool) -> None:
    frontend = _frontend(name)
    assert isinstance(frontend, WaveformFrontend) and frontend.normalizes_audio is normalises
    audio = _audio(3000)
    with torch.no_grad():
        moved, frames = frontend(30 * audio + 0.5), frontend(30 * audio)
    assert (moved - frames).norm() < 1e-3 * frames.norm()  # the group mode's first normalisation removes an offset as well


def test_layer_mode_normalises_raw_audio_unless_told_not_to() -> None:
    assert WaveformConfig(norm="layer").normalizes_audio
    assert not WaveformConfig(norm="layer", normalize_audio=False).normalizes_audio
    assert not WaveformConfig().normalizes_audio


@pytest.mark.parametrize("name", ["group", "logmel"])
@pytest.mark.parametrize(
    ("audio", "lens", "message"),
    [
        (torch.zeros(1, 399), None, "utterance 0 has 399 samples, at least 400"),
        (torch.zeros(3, 800), torch.tensor([800, 400, 399]), "utterance 2 has 399 samples, at least 400"),
        (torch.zeros(2, 800), torch.tensor([800, 801]), "utterance 1 has audio_lens 801, at most 800"),
        (torch.zeros(2, 800), torch.tensor([800]), "audio_lens has shape (1,), (2,) is needed"),
        (torch.zeros(2, 800), torch.tensor([800, 800], dtype=torch.int32), "audio_lens is torch.int32 on cpu"),
        (torch.zeros(1, 800), torch.tensor([800], device="meta"), "audio_lens is torch.int64 on meta"),
        (torch.zeros(800), None, "audio has shape (800,)"),
        (torch.zeros(0, 800), None, "audio has shape (0, 800)"),
        (torch.zeros(1, 800, dtype=torch.int16), None, "audio is torch.int16"),
    ],
)
def test_bad_batches_are_refused_before_any_compute(name: str, audio: Tensor, lens: Tensor | None, message: str) -> None:
    frontend = _frontend(name)
    frontend._frames = None  # type: ignore[method-assign, assignment]  # any compute would fail on this
    with pytest.raises(ValueError, match=re.escape(message)):
        frontend(audio, lens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels is 0"),
        ({"layers": ()}, "layers is ()"),
        ({"layers": ((3, 0),)}, "layers is ((3, 0),)"),
        ({"norm": "default"}, "norm: is 'default', allowed are 'group', 'layer'"),
        ({"sample_rate": 0}, "sample_rate is 0"),
        ({"gradient_scale": -0.1}, "gradient_scale is -0.1"),
        ({"gradient_scale": float("nan")}, "gradient_scale is nan"),
    ],
)
def test_impossible_configurations_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        WaveformConfig(**arguments)  # type: ignore[arg-type]
