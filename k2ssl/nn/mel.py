"""Log-mel filterbank features as Kaldi computes them, for a whole batch at once and on the batch's device."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_PREEMPHASIS = 0.97
_POVEY_POWER = 0.85  # the Povey window is a Hann window to this power
_FLOOR = torch.finfo(torch.float32).eps  # of the energies, before the logarithm


class LogMel(nn.Module):
    """(N, S) audio -> (N, T, num_bins) log energies in mel bands.

    Frames lie wholly inside the audio (Kaldi's snip_edges), so frame t sees the samples from t * frame_shift to
    t * frame_shift + frame_length and nothing else: what follows an utterance's end never changes its own frames. Per frame: remove
    the mean, pre-emphasis 0.97, Povey window, power spectrum (FFT of the next power of two), triangular bands equally spaced in mel,
    logarithm of at least 2^-23. No dither. Equal to `torchaudio.compliance.kaldi.fbank` on the same audio, which Kaldi would scale to
    16-bit integers and this library to [-1, 1]: a difference of 20.8 in every logarithm.

    Has no parameters, and its constants are not part of a state dict.

    Args:
        num_bins: number of mel bands.
        sample_rate: Hz.
        frame_length_ms, frame_shift_ms: milliseconds; both must be whole numbers of samples.
        low_freq: lower edge of the lowest band, Hz.
        high_freq: upper edge of the highest band, Hz; if not positive, relative to half the sample rate.

    Raises:
        ValueError: a value out of range, or so many bands that one of them falls between two bins of the FFT.
    """

    def __init__(
        self,
        num_bins: int = 80,
        sample_rate: int = 16000,
        frame_length_ms: float = 25.0,
        frame_shift_ms: float = 10.0,
        low_freq: float = 20.0,
        high_freq: float = -400.0,
    ) -> None:
        super().__init__()
        if sample_rate < 1:
            raise ValueError(f"LogMel: sample_rate is {sample_rate}, an integer >= 1 (Hz) is needed")
        self.sample_rate = sample_rate
        self.num_bins = num_bins
        self.frame_length = _whole_samples("frame_length_ms", frame_length_ms, sample_rate)
        self.frame_shift = _whole_samples("frame_shift_ms", frame_shift_ms, sample_rate)
        self.fft_size = 1 << max(1, (self.frame_length - 1).bit_length())
        bands = mel_bands(num_bins, sample_rate, self.fft_size, low_freq, high_freq)
        window = torch.hann_window(self.frame_length, periodic=False, dtype=torch.float64).pow(_POVEY_POWER)
        self.bands: Tensor
        self.register_buffer("bands", bands.float().to(window.device), persistent=False)
        self.window: Tensor
        self.register_buffer("window", window.float(), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """(N, S) float with S >= frame_length -> (N, T, num_bins) float32, T = (S - frame_length) // frame_shift + 1."""
        with torch.autocast(audio.device.type, enabled=False):  # logarithms of half-precision energies are worthless
            frames = audio.float().unfold(-1, self.frame_length, self.frame_shift)
            frames = frames - frames.mean(-1, keepdim=True)
            previous = torch.cat([frames[..., :1], frames[..., :-1]], -1)
            frames = (frames - _PREEMPHASIS * previous) * self.window.float()
            spectrum = torch.fft.rfft(frames, n=self.fft_size)
            power = spectrum.real.square() + spectrum.imag.square()
            return (power @ self.bands.float()).clamp(min=_FLOOR).log()


def mel_bands(num_bins: int, sample_rate: int, fft_size: int, low_freq: float, high_freq: float) -> Tensor:
    """(fft_size // 2 + 1, num_bins) float64 weights of triangular bands on the CPU, equally spaced and linear in mel = 1127 ln(1 + f / 700).

    Arguments and errors: see `LogMel`. As in Kaldi the bin at half the sample rate belongs to no band.
    """
    nyquist = sample_rate / 2
    top = high_freq if high_freq > 0 else nyquist + high_freq
    if num_bins < 1:
        raise ValueError(f"LogMel: num_bins is {num_bins}, an integer >= 1 is needed")
    if not 0 <= low_freq < nyquist:
        raise ValueError(f"LogMel: low_freq is {low_freq}, at least 0 and less than {nyquist} (half the sample rate) is needed")
    if not low_freq < top <= nyquist:
        raise ValueError(
            f"LogMel: high_freq is {high_freq}, that is {top} Hz; more than low_freq {low_freq} and at most {nyquist} is needed"
        )
    # on the CPU whatever the default device: the values are looked at
    edges = torch.linspace(_mel(low_freq), _mel(top), num_bins + 2, dtype=torch.float64, device="cpu")
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    freqs = torch.arange(fft_size // 2 + 1, dtype=torch.float64, device="cpu") * (sample_rate / fft_size)
    mel = (1127.0 * torch.log1p(freqs / 700.0)).unsqueeze(1)
    bands = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp(min=0)
    bands[-1] = 0
    empty = (bands.sum(0) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"LogMel: num_bins is {num_bins}, so many that bands {empty} hold no bin of a {fft_size}-point FFT; ask for fewer")
    return bands


def _mel(freq: float) -> float:
    return 1127.0 * math.log1p(freq / 700.0)


def _whole_samples(name: str, milliseconds: float, sample_rate: int) -> int:
    samples = milliseconds * sample_rate / 1000
    if not (samples >= 1 and samples == round(samples)):
        raise ValueError(
            f"LogMel: {name} is {milliseconds}, {samples} samples at {sample_rate} Hz; a whole number >= 1 of samples is needed"
        )
    return round(samples)
