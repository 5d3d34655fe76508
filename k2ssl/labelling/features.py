"""Frames to cluster: MFCC, hidden states of an encoder handed in as a function, and long recordings in overlapping windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from k2ssl.nn.mel import LogMel

Scalar = str | int | float | bool | None


class FeatureFunction(Protocol):
    """Audio to frames. The description holds plain values that name the features wholly, for the lineage of labels.

    Attributes:
        dim: C, numbers per frame.
        sample_rate: Hz, that audio must have.
        stride: samples from one frame to the next.
        description: plain values; the key "features" names the kind.
    """

    @property
    def dim(self) -> int: ...

    @property
    def sample_rate(self) -> int: ...

    @property
    def stride(self) -> int: ...

    @property
    def frame_rate(self) -> float:
        """sample_rate / stride, Hz."""
        ...

    @property
    def description(self) -> Mapping[str, Scalar]: ...

    def num_frames(self, num_samples: int) -> int:
        """Frames of so many samples."""
        ...

    def __call__(self, audio: Tensor, audio_lens: Tensor) -> tuple[Tensor, Tensor]:
        """(N, S) audio and (N,) int64 CPU lengths to (N, T, C) float32 frames on the audio's device and (N,) int64 CPU frame counts.

        Frames from an utterance's count on are zero, and what pads the audio never changes a frame before it.
        """
        ...


@dataclass(frozen=True)
class MfccConfig:
    """Cepstra with their slopes; the defaults are those of HuBERT's first iteration (arXiv 2106.07447, section IV-B).

    Attributes:
        sample_rate: of the audio, Hz.
        num_ceps: cepstral coefficients, C0 among them.
        num_bins: number of mel bands.
        low_freq: lower edge of the lowest band, Hz.
        high_freq: upper edge of the highest band, Hz; 0 is half the sample rate, and a negative number so much below it.
        lifter: strength of the cepstral liftering, 0 for none.
        frame_length_ms: length of a frame, ms.
        frame_shift_ms: from one frame to the next, ms.
        delta_window: frames that a slope is fitted to, odd.
    """

    sample_rate: int = 16000
    num_ceps: int = 13
    num_bins: int = 23
    low_freq: float = 20.0
    high_freq: float = 0.0
    lifter: float = 22.0
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    delta_window: int = 5

    def __post_init__(self) -> None:
        for name, most in (("sample_rate", 10**6), ("num_bins", 1024), ("frame_length_ms", 10_000), ("frame_shift_ms", 10_000)):
            if not 0 < getattr(self, name) <= most:
                raise ValueError(f"MfccConfig: {name} is {getattr(self, name)}, a number above 0 and at most {most} is needed")
        try:
            LogMel(self.num_bins, self.sample_rate, self.frame_length_ms, self.frame_shift_ms, self.low_freq, self.high_freq)
        except ValueError as error:
            raise ValueError(str(error).replace("LogMel", "MfccConfig", 1)) from error
        if not 1 <= self.num_ceps <= self.num_bins:
            raise ValueError(f"MfccConfig: num_ceps is {self.num_ceps}, at least 1 and at most num_bins {self.num_bins} is needed")
        if not (math.isfinite(self.lifter) and self.lifter >= 0):
            raise ValueError(f"MfccConfig: lifter is {self.lifter}, a finite number >= 0 is needed")
        if not 3 <= self.delta_window <= 999 or self.delta_window % 2 == 0:
            raise ValueError(f"MfccConfig: delta_window is {self.delta_window}, an odd number of frames from 3 to 999 is needed")


class MfccFeatures(nn.Module):
    """(N, S) audio -> (N, T, 3 * num_ceps) cepstra with their first and second slopes, as Kaldi computes them, for a batch at once.

    Cepstra: orthonormal DCT-II of the log mel energies (`LogMel`; C0 is the DCT's, not the log energy: use_energy false), scaled by
    1 + lifter / 2 * sin(pi i / lifter). Slopes: least squares over `delta_window` frames, edges repeated, the second being slopes of the
    first. Frames lie wholly inside the audio; an utterance shorter than a frame has none.

    Audio is in [-1, 1], as soundfile reads it and as the published HuBERT labels were made. Kaldi itself scales to 16-bit integers,
    which adds 2 ln 32768 = 20.8 to every log energy: by the DCT that moves C0 alone, by 99.7, and no slope. Distances between frames,
    hence clusters, stay what they are, but for frames so quiet that the floor of the energies, 2^-23, is reached.
    """

    def __init__(self, config: MfccConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MfccConfig()
        self.mel = LogMel(
            config.num_bins, config.sample_rate, config.frame_length_ms, config.frame_shift_ms, config.low_freq, config.high_freq
        )
        self.cepstra: Tensor
        self.register_buffer("cepstra", _cepstral_basis(config.num_bins, config.num_ceps, config.lifter).float(), persistent=False)

    @property
    def dim(self) -> int:
        return 3 * self.config.num_ceps

    @property
    def sample_rate(self) -> int:
        return self.config.sample_rate

    @property
    def stride(self) -> int:
        return self.mel.frame_shift

    @property
    def frame_rate(self) -> float:
        return self.sample_rate / self.stride

    @property
    def description(self) -> Mapping[str, Scalar]:
        return {"features": "mfcc", **asdict(self.config)}

    def num_frames(self, num_samples: int) -> int:
        return max(0, (num_samples - self.mel.frame_length) // self.stride + 1)

    @torch.no_grad()
    def forward(self, audio: Tensor, audio_lens: Tensor) -> tuple[Tensor, Tensor]:
        """See `FeatureFunction`.

        Raises:
            ValueError: shapes or lengths that do not fit, the utterance named by its position.
        """
        frame_lens = torch.tensor([self.num_frames(samples) for samples in check_lens(audio, audio_lens)])
        width = int(frame_lens.max())
        if width == 0:
            return audio.new_zeros(audio.shape[0], 0, self.dim, dtype=torch.float32), frame_lens
        with torch.autocast(audio.device.type, enabled=False):
            cepstra = self.mel(audio)[:, :width] @ self.cepstra.float()
            slopes = self._slopes(cepstra, frame_lens)
            frames = torch.cat([cepstra, slopes, self._slopes(slopes, frame_lens)], -1)
        return _zero_after(frames, frame_lens), frame_lens

    def _slopes(self, x: Tensor, frame_lens: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, C) as `torchaudio.functional.compute_deltas`, each utterance with its own last frame repeated."""
        reach = self.config.delta_window // 2
        frames = x.shape[1]
        here = torch.arange(-reach, frames + reach, device=x.device)
        last = (frame_lens - 1).clamp(min=0).to(x.device, non_blocking=True).unsqueeze(1)
        index = torch.minimum(here.clamp(min=0).unsqueeze(0), last)
        x = x[torch.arange(x.shape[0], device=x.device).unsqueeze(1), index]  # (N, reach + T + reach, C)
        rise = torch.zeros_like(x[:, :frames])
        for distance in range(1, reach + 1):
            later, earlier = x[:, reach + distance : reach + distance + frames], x[:, reach - distance : reach - distance + frames]
            rise.add_(later, alpha=distance).sub_(earlier, alpha=distance)
        return rise / (2 * sum(distance**2 for distance in range(1, reach + 1)))


class HiddenFeatures:
    """Hidden states of any layer as a `FeatureFunction`.

    Args:
        encode: (N, S) audio on the encoder's device and (N,) int64 CPU lengths to (N, num_frames(S), dim) frames of the wanted layer or
            stack. It runs without gradients; putting the model into evaluation mode is the caller's task.
        dim: numbers per frame.
        sample_rate: Hz.
        stride: samples from one frame to the next.
        num_frames: frames of so many samples.
        description: plain values that name the features: layer, hash of the checkpoint.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(
        self,
        encode: Callable[[Tensor, Tensor], Tensor],
        *,
        dim: int,
        sample_rate: int,
        stride: int,
        num_frames: Callable[[int], int],
        description: Mapping[str, Scalar],
    ) -> None:
        for name, value in (("dim", dim), ("sample_rate", sample_rate), ("stride", stride)):
            if value < 1:
                raise ValueError(f"HiddenFeatures: {name} is {value}, an integer >= 1 is needed")
        self.encode, self.num_frames = encode, num_frames
        self.dim, self.sample_rate, self.stride = dim, sample_rate, stride
        self.description = dict(description)

    @property
    def frame_rate(self) -> float:
        return self.sample_rate / self.stride

    @torch.no_grad()
    def __call__(self, audio: Tensor, audio_lens: Tensor) -> tuple[Tensor, Tensor]:
        """See `FeatureFunction`. Utterances too short for a frame are kept from the encoder and have none.

        Raises:
            ValueError: shapes or lengths that do not fit, or an encoder whose frames are not (N, num_frames(S), dim).
        """
        lens = check_lens(audio, audio_lens)
        frame_lens = torch.tensor([self.num_frames(samples) for samples in lens])
        frames = audio.new_zeros(len(lens), int(frame_lens.max()), self.dim, dtype=torch.float32)
        whole = [position for position, count in enumerate(frame_lens.tolist()) if count]
        if whole:
            longest = max(lens[position] for position in whole)
            encoded = self.encode(audio[whole, :longest], audio_lens[whole])
            asked = (len(whole), frames.shape[1], self.dim)
            if tuple(encoded.shape) != asked:
                raise ValueError(f"HiddenFeatures: the encoder gave frames of shape {tuple(encoded.shape)}, {asked} was announced")
            frames[whole] = encoded.float()
        return _zero_after(frames, frame_lens), frame_lens


def check_lens(audio: Tensor, audio_lens: Tensor) -> list[int]:
    """The lengths as numbers; looks at shapes and at host memory only, so it never waits for a device.

    Raises:
        ValueError: audio that is not (N >= 1, S) floating point, lengths that are not (N,) int64 on the CPU, or one outside 0..S.
    """
    if audio.dim() != 2 or audio.shape[0] == 0 or not audio.is_floating_point():
        raise ValueError(f"audio is {audio.dtype} of shape {tuple(audio.shape)}, floating point (utterances >= 1, samples) is needed")
    if audio_lens.shape != audio.shape[:1] or audio_lens.dtype != torch.int64 or audio_lens.device.type != "cpu":
        raise ValueError(
            f"audio_lens is {audio_lens.dtype} of shape {tuple(audio_lens.shape)} on {audio_lens.device}, "
            f"int64 of shape {tuple(audio.shape[:1])} on the cpu is needed"
        )
    lens: list[int] = audio_lens.tolist()
    for position, samples in enumerate(lens):
        if not 0 <= samples <= audio.shape[1]:
            raise ValueError(f"utterance {position} has audio_lens {samples}, at least 0 and at most {audio.shape[1]} is allowed")
    return lens


def _cepstral_basis(num_bins: int, num_ceps: int, lifter: float) -> Tensor:
    """(num_bins, num_ceps) float64: orthonormal DCT-II times the liftering."""
    order = torch.arange(num_ceps, dtype=torch.float64)
    middle = torch.arange(num_bins, dtype=torch.float64).unsqueeze(1) + 0.5
    basis = torch.cos(math.pi / num_bins * middle * order) * math.sqrt(2 / num_bins)
    basis[:, 0] = math.sqrt(1 / num_bins)
    return basis * (1 + lifter / 2 * torch.sin(math.pi * order / lifter)) if lifter else basis


def _zero_after(frames: Tensor, frame_lens: Tensor) -> Tensor:
    """(N, T, C) with the frames from an utterance's count on zero, whatever they held."""
    lens = frame_lens.to(frames.device, non_blocking=True)
    padding = torch.arange(frames.shape[1], device=frames.device).unsqueeze(0) >= lens.unsqueeze(1)
    return frames.masked_fill(padding.unsqueeze(2), 0.0)
