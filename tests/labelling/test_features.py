"""MFCC against torchaudio, padding, hidden features, and windows stitched together."""

from __future__ import annotations

import itertools

import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torchaudio.compliance import kaldi

from k2ssl.labelling.features import FeatureFunction, HiddenFeatures, MfccConfig, MfccFeatures
from k2ssl.labelling.windows import normalized, windowed
from k2ssl.models.hubert import HubertConfig, HubertModel


def _speechlike(*shape: int) -> Tensor:
    """Noise with formant-like colour and a changing loudness, in [-1, 1]."""
    noise = torch.randn(*shape)
    coloured = F.conv1d(noise.view(-1, 1, shape[-1]), torch.hann_window(9).view(1, 1, 9), padding=4).view(shape)
    loudness = torch.sin(torch.arange(shape[-1]) / 3000.0).abs() + 0.01
    return coloured * loudness * 0.05


def _reference(audio: Tensor) -> Tensor:
    """(S,) to (T, 39) with torchaudio, as the published HuBERT recipe calls it."""
    ceps = kaldi.mfcc(audio.unsqueeze(0), use_energy=False, sample_frequency=16000).T
    slopes = torchaudio.functional.compute_deltas(ceps)
    return torch.cat([ceps, slopes, torchaudio.functional.compute_deltas(slopes)]).T


@pytest.mark.parametrize("samples", [400, 559, 560, 1000, 16000, 40123])
def test_mfcc_equal_those_of_torchaudio(samples: int, agreement) -> None:  # type: ignore[no-untyped-def]
    audio = _speechlike(1, samples)
    frames, lens = MfccFeatures()(audio, torch.tensor([samples]))
    assert lens.tolist() == [(samples - 400) // 160 + 1]
    agreement.absolute("39-dimensional MFCC of one utterance, against torchaudio", frames[0], _reference(audio[0]), 5e-4)


def test_mfcc_of_other_settings_equal_those_of_torchaudio() -> None:
    config = MfccConfig(sample_rate=8000, num_ceps=10, num_bins=20, low_freq=100.0, high_freq=-200.0, lifter=0.0, delta_window=7)
    audio = _speechlike(1, 9000)
    frames, _ = MfccFeatures(config)(audio, torch.tensor([9000]))
    ceps = kaldi.mfcc(
        audio, use_energy=False, sample_frequency=8000, num_ceps=10, num_mel_bins=20, low_freq=100.0, high_freq=-200.0, cepstral_lifter=0.0
    ).T
    slopes = torchaudio.functional.compute_deltas(ceps, win_length=7)
    expected = torch.cat([ceps, slopes, torchaudio.functional.compute_deltas(slopes, win_length=7)]).T
    torch.testing.assert_close(frames[0], expected, atol=5e-4, rtol=0)


def test_padding_and_company_never_change_a_valid_frame() -> None:
    function = MfccFeatures()
    lens = torch.tensor([20000, 399, 12345, 400, 0])
    audio = _speechlike(5, 20000)
    for row, samples in enumerate(lens.tolist()):
        audio[row, samples:] = torch.nan
    frames, frame_lens = function(audio, lens)
    assert frame_lens.tolist() == [123, 0, 75, 1, 0] == [function.num_frames(samples) for samples in lens.tolist()]
    for row, (samples, count) in enumerate(zip(lens.tolist(), frame_lens.tolist(), strict=True)):
        assert (frames[row, count:] == 0).all()
        if count:
            torch.testing.assert_close(frames[row, :count], _reference(audio[row, :samples]), atol=5e-4, rtol=0)


def test_the_scale_of_16_bit_integers_moves_c0_alone() -> None:
    audio, lens = _speechlike(1, 8000), torch.tensor([8000])
    difference = MfccFeatures()(audio * 32768, lens)[0] - MfccFeatures()(audio, lens)[0]
    offset = 2 * torch.log(torch.tensor(32768.0)) * 23**0.5
    torch.testing.assert_close(difference[..., 0], offset.expand(1, 48), atol=1e-3, rtol=0)
    assert difference[..., 1:].abs().max() < 1e-3


def test_a_batch_too_short_for_any_frame_gives_none() -> None:
    frames, lens = MfccFeatures()(torch.zeros(2, 300), torch.tensor([300, 0]))
    assert frames.shape == (2, 0, 39)
    assert lens.tolist() == [0, 0]


def test_mfcc_of_a_module_in_another_type_are_still_float32() -> None:
    audio, lens = torch.randn(1, 4000, generator=torch.Generator().manual_seed(1)), torch.tensor([4000])
    frames = MfccFeatures().double()(audio, lens)[0]
    assert frames.dtype == torch.float32
    torch.testing.assert_close(frames, MfccFeatures()(audio, lens)[0])


def test_mfcc_describe_themselves() -> None:
    function: FeatureFunction = MfccFeatures()
    assert (function.dim, function.sample_rate, function.stride, function.frame_rate) == (39, 16000, 160, 100.0)
    assert function.description["features"] == "mfcc"
    assert function.description["num_bins"] == 23


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"num_ceps": 24}, "num_ceps is 24, at least 1 and at most num_bins 23"),
        ({"num_ceps": 0}, "num_ceps is 0"),
        ({"lifter": -1.0}, "lifter is -1.0"),
        ({"delta_window": 4}, "delta_window is 4, an odd number"),
        ({"delta_window": 10**12 + 1}, "delta_window is 1000000000001, an odd number of frames from 3 to 999"),
        ({"sample_rate": 0}, "MfccConfig: sample_rate is 0, a number above 0 and at most 1000000"),
        ({"sample_rate": 10**9}, "MfccConfig: sample_rate is 1000000000"),
        ({"frame_shift_ms": 0.0}, "MfccConfig: frame_shift_ms is 0.0, a number above 0"),
        ({"frame_length_ms": float("inf")}, "MfccConfig: frame_length_ms is inf"),
        ({"frame_shift_ms": float("nan")}, "MfccConfig: frame_shift_ms is nan"),
        ({"frame_shift_ms": 0.1}, "MfccConfig: frame_shift_ms is 0.1, 1.6 samples at 16000 Hz; a whole number"),
        ({"num_bins": 0, "num_ceps": 0}, "MfccConfig: num_bins is 0"),
        ({"num_bins": 10**12}, "MfccConfig: num_bins is 1000000000000, .* at most 1024"),
        ({"num_bins": 500}, "MfccConfig: num_bins is 500, so many that bands"),
        ({"low_freq": 8000.0}, "MfccConfig: low_freq is 8000.0"),
        ({"high_freq": 8001.0}, "MfccConfig: high_freq is 8001.0, that is 8001.0 Hz; more than low_freq 20.0 and at most 8000.0"),
        ({"high_freq": float("nan")}, "MfccConfig: high_freq is nan"),
    ],
)
def test_bad_mfcc_settings_are_refused_by_name(settings_: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MfccConfig(**settings_)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("audio", "lens", "message"),
    [
        (torch.zeros(500), torch.tensor([500]), r"shape \(500,\)"),
        (torch.zeros(1, 500, dtype=torch.int16), torch.tensor([500]), "torch.int16"),
        (torch.zeros(2, 500), torch.tensor([500]), r"audio_lens is .* of shape \(1,\)"),
        (torch.zeros(1, 500), torch.tensor([500.0]), "audio_lens is torch.float32"),
        (torch.zeros(2, 500), torch.tensor([500, 501]), "utterance 1 has audio_lens 501"),
        (torch.zeros(2, 500), torch.tensor([-1, 5]), "utterance 0 has audio_lens -1"),
    ],
)
def test_bad_audio_is_refused_by_position(audio: Tensor, lens: Tensor, message: str) -> None:
    for function in (MfccFeatures(), _limited_encoder(2), windowed(_limited_encoder(2), 1.0, 0.5)):
        with pytest.raises(ValueError, match=message):
            function(audio, lens)


def _limited_encoder(context: int, dim: int = 6, receptive_field: int = 400, stride: int = 320) -> HiddenFeatures:
    """Frames of HuBERT's grid, each a non-linear function of its own and `context` neighbours' samples on either side."""
    generator = torch.Generator().manual_seed(3)
    kernel = torch.randn(dim, 1, receptive_field, generator=generator) / 20
    mixing = torch.randn(dim, dim, 2 * context + 1, generator=generator) / 3

    def encode(audio: Tensor, audio_lens: Tensor) -> Tensor:
        frames = F.conv1d(audio.unsqueeze(1), kernel, stride=stride).tanh()
        lens = (audio_lens - receptive_field) // stride + 1
        frames = frames * (torch.arange(frames.shape[2]) < lens.unsqueeze(1)).unsqueeze(1)
        return F.conv1d(frames, mixing, padding=context).tanh().transpose(1, 2)

    def num_frames(samples: int) -> int:
        return max(0, (samples - receptive_field) // stride + 1)

    return HiddenFeatures(encode, dim=dim, sample_rate=16000, stride=stride, num_frames=num_frames, description={"features": "layer 2"})


def test_hidden_features_keep_short_utterances_from_the_encoder() -> None:
    function = _limited_encoder(1)
    audio = torch.randn(3, 5000)
    frames, lens = function(audio, torch.tensor([399, 3000, 0]))
    assert lens.tolist() == [0, 9, 0]
    torch.testing.assert_close(frames[1:2], function(audio[1:2, :3000], torch.tensor([3000]))[0])
    assert (frames[[0, 2]] == 0).all()


def test_frames_of_another_count_than_announced_are_refused() -> None:
    function = HiddenFeatures(
        lambda a, n: a.new_zeros(1, 3, 4), dim=4, sample_rate=16000, stride=320, num_frames=lambda n: 2, description={}
    )
    with pytest.raises(ValueError, match=r"gave frames of shape \(1, 3, 4\), \(1, 2, 4\) was announced"):
        function(torch.zeros(1, 1000), torch.tensor([1000]))


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 60000),
    window=st.integers(9000, 20000),
    overlap=st.integers(4000, 6000),
    at_once=st.integers(1, 3),
    align=st.sampled_from([1, 2, 4]),
)
def test_windows_stitched_equal_the_whole_recording_where_context_is_limited(
    samples: int, window: int, overlap: int, at_once: int, align: int
) -> None:
    function = _limited_encoder(context=5)  # 5 frames of 320 samples and the window's surplus are less than half of 4000 samples
    audio = torch.randn(2, samples, generator=torch.Generator().manual_seed(samples))
    lens = torch.tensor([samples, samples // 2])
    expected, expected_lens = function(audio, lens)
    pieces = windowed(function, window / 16000, overlap / 16000, align, at_once)
    frames, frame_lens = pieces(audio, lens)
    assert frame_lens.tolist() == expected_lens.tolist()
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=0)
    if samples > window:
        starts = pieces.starts(samples)
        assert all(start % (320 * align) == 0 for start in starts)
        assert samples <= starts[-1] + window < samples + 320 * align
        overlaps = [first + window - second for first, second in itertools.pairwise(starts)]
        assert min(overlaps) >= overlap
        assert max(overlaps) - min(overlaps) <= 320 * align


def test_each_half_of_an_overlap_comes_from_its_own_window() -> None:
    calls: list[int] = []

    def encode(audio: Tensor, audio_lens: Tensor) -> Tensor:
        calls.append(len(calls))
        return torch.full((1, audio.shape[1] // 10, 1), float(calls[-1]))

    function = HiddenFeatures(encode, dim=1, sample_rate=1000, stride=10, num_frames=lambda samples: samples // 10, description={})
    frames, _ = windowed(function, 1.0, 0.2)(torch.zeros(1, 1800), torch.tensor([1800]))
    assert frames.flatten().tolist() == [0.0] * 90 + [1.0] * 90  # windows of 100 frames from 0 and 80, which share 20


def test_windows_that_leave_gaps_are_refused() -> None:
    with pytest.raises(ValueError, match="do not cover a recording without gaps"):
        windowed(_limited_encoder(1), 0.6, 0.0)  # 9600 samples hold 29 frames of 320, not 30
    with pytest.raises(ValueError, match=r"overlap_seconds is 1\.0 and max_seconds 0\.5"):
        windowed(_limited_encoder(1), 0.5, 1.0)
    with pytest.raises(ValueError, match="windows_at_once is 0"):
        windowed(_limited_encoder(1), 1.0, 0.5, windows_at_once=0)


def test_windows_of_a_function_that_counts_frames_otherwise_are_refused() -> None:
    function = HiddenFeatures(
        lambda a, n: a.new_zeros(1, a.shape[1] // 300, 1),
        dim=1,
        sample_rate=1000,
        stride=250,
        num_frames=lambda n: n // 300,
        description={},
    )
    with pytest.raises(ValueError, match="frames are not 250 samples apart"):
        windowed(function, 3.0, 1.0)(torch.zeros(1, 20000), torch.tensor([20000]))


def test_normalised_audio_is_that_of_layer_norm_over_the_whole_recording() -> None:
    audio, lens = _speechlike(2, 30000) * 0.1 + 0.02, torch.tensor([30000, 17000])
    audio[1, 17000:] = 9.0
    frames, _ = normalized(windowed(_limited_encoder(2), 0.7, 0.3))(audio, lens)
    for row, samples in enumerate(lens.tolist()):
        own = F.layer_norm(audio[row : row + 1, :samples], (samples,))
        expected, counts = _limited_encoder(2)(own, lens[row : row + 1])
        torch.testing.assert_close(frames[row : row + 1, : int(counts)], expected, atol=1e-4, rtol=0)
    assert normalized(_limited_encoder(2)).description == {"features": "layer 2", "normalize": True}
    assert windowed(_limited_encoder(2), 0.7, 0.3).description["window_seconds"] == 0.7


@pytest.mark.parametrize("kind", ["hidden", "stacks"])
def test_layers_and_stacks_of_a_model_are_features(kind: str) -> None:
    model = HubertModel(HubertConfig.tiny()).eval()

    def encode(audio: Tensor, audio_lens: Tensor) -> Tensor:
        return getattr(model.encode(audio, audio_lens, return_hidden=True).output, kind)[1]

    audio, lens = _speechlike(3, 24000), torch.tensor([24000, 9000, 100])
    expected = encode(audio[:2], lens[:2])
    frontend = model.frontend
    function = HiddenFeatures(
        encode,
        dim=expected.shape[2],
        sample_rate=frontend.sample_rate,
        stride=frontend.stride,
        num_frames=frontend.num_frames,
        description={"features": "layer 2"},
    )
    frames, frame_lens = function(audio, lens)
    assert frame_lens.tolist() == [74, 27, 0]
    assert not frames.requires_grad
    for row, count in enumerate([74, 27]):
        torch.testing.assert_close(frames[row, :count], expected[row, :count].detach(), atol=1e-5, rtol=1e-4)
    pieces, piece_lens = windowed(function, 1.0, 0.5, align_frames=8)(audio, lens)
    assert piece_lens.tolist() == [74, 27, 0]
    assert pieces.shape == frames.shape
    torch.testing.assert_close(pieces[1], frames[1], atol=1e-5, rtol=1e-4)  # no longer than a window
    assert torch.nn.functional.cosine_similarity(pieces[0], frames[0]).mean() > 0.8
