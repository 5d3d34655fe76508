"""The waveform frontend, seven convolutions from 16 kHz audio to 50 frames per second, and the choice between the two frontends.

Source: wav2vec 2.0 (arXiv 2006.11477, section 4) and HuBERT (arXiv 2106.07447). Upstream: ConvFeatureExtractionModel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2ssl.batch import padding_mask_from_lens
from k2ssl.models.frontend_base import Frontend, check_gradient_scale
from k2ssl.models.frontend_layers import EPS, ChannelNorm, ConvLayer, frames_from_rows
from k2ssl.models.logmel import LogMelConfig, LogMelFrontend
from k2ssl.nn.masked_norm import MaskedTimeNorm, masked_time_norm
from k2ssl.structure import check_types

__all__ = ["Frontend", "FrontendConfig", "LogMelConfig", "LogMelFrontend", "WaveformConfig", "WaveformFrontend", "build_frontend"]


@dataclass(frozen=True)
class WaveformConfig:
    """Convolutions over samples; the defaults are the published Base size: 4.2 M parameters, 400 samples per frame, 320 between frames.

    Attributes:
        channels: of every convolution, and of the frames.
        layers: (kernel, stride) of each convolution.
        norm: "group" normalises every channel over time after the first convolution only (Base; upstream: default), "layer" normalises
            over channels after every convolution (Large; upstream: layer_norm).
        bias: whether the convolutions have a bias.
        normalize_audio: bring every utterance to zero mean and unit variance first (upstream: do_normalize). None, the default, does
            so exactly for norm "layer", as published. With "group" it is superfluous: the first normalisation removes gain and offset
            already. With "layer" a model that normalises is right for raw audio and for whole utterances that a data set has normalised
            before (the second time changes an utterance of variance v by the fraction 5e-6 / v: 0.05 % at an rms of 0.1). For crops
            out of normalised utterances it replaces the utterance's statistics by the crop's; set False to keep the former.
        gradient_scale: factor on the gradient that enters the frontend; 0 freezes it. The published Base recipes use 0.1, Large 1.
        sample_rate: of the audio, Hz.

    Raises:
        ValueError: a value out of range.
    """

    channels: int = 512
    layers: tuple[tuple[int, int], ...] = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
    norm: Literal["group", "layer"] = "group"
    bias: bool = False
    normalize_audio: bool | None = None
    gradient_scale: float = 1.0
    sample_rate: int = 16000

    def __post_init__(self) -> None:
        check_types(self)
        if self.channels < 1:
            raise ValueError(f"WaveformConfig: channels is {self.channels}, an integer >= 1 is needed")
        if not self.layers or any(len(layer) != 2 or min(layer) < 1 for layer in self.layers):
            raise ValueError(f"WaveformConfig: layers is {self.layers}, one or more pairs (kernel >= 1, stride >= 1) are needed")
        if self.sample_rate < 1:
            raise ValueError(f"WaveformConfig: sample_rate is {self.sample_rate}, an integer >= 1 (Hz) is needed")
        check_gradient_scale("WaveformConfig", self.gradient_scale)

    @property
    def normalizes_audio(self) -> bool:
        """`normalize_audio`, with the default filled in."""
        return self.norm == "layer" if self.normalize_audio is None else self.normalize_audio

    @property
    def stride(self) -> int:
        """Samples between the windows of neighbouring frames."""
        return math.prod(stride for _, stride in self.layers)

    @property
    def receptive_field(self) -> int:
        """Samples that one frame sees."""
        samples = 1
        for kernel, stride in reversed(self.layers):
            samples = (samples - 1) * stride + kernel
        return samples


class WaveformFrontend(Frontend):
    """A stack of convolutions without padding, each followed by its normalisation and GELU. Frames are not normalised at the end.

    Attributes:
        fast: compute with matrix products on channels-last rows, see `row_convolution`: the same to rounding errors, in less time and
            memory. Not used for a single layer, nor when the audio itself wants a gradient. On unless cleared.
    """

    def __init__(self, config: WaveformConfig) -> None:
        super().__init__(config.channels, config.sample_rate, config.receptive_field, config.stride, config.gradient_scale)
        self.normalizes_audio = config.normalizes_audio
        self.layers = nn.ModuleList(
            ConvLayer(config.channels if i else 1, config.channels, kernel, stride, config.bias, _norm(config, i))
            for i, (kernel, stride) in enumerate(config.layers)
        )
        self.fast = True
        self._freeze_if_unscaled()

    def _frames(self, audio: Tensor, audio_lens: Tensor | None, hidden: Tensor | None) -> Tensor:
        # a frame never sees more than its window, so there is nothing to keep from the others
        x = normalize_audio(audio, audio_lens) if self.normalizes_audio else audio
        if self.fast and len(self.layers) > 1 and not audio.requires_grad:
            return frames_from_rows(cast(Sequence[ConvLayer], self.layers), x, audio_lens, self.num_frames(audio.shape[1]))
        x = x.to(next(self.parameters()).dtype).unsqueeze(1)
        lens = audio_lens
        for layer in self.layers:
            x, lens = layer(x, lens)
        return x.transpose(1, 2)


def _norm(config: WaveformConfig, layer: int) -> nn.Module | None:
    if config.norm == "layer":
        return ChannelNorm(config.channels)
    return MaskedTimeNorm(config.channels, EPS) if layer == 0 else None


def normalize_audio(audio: Tensor, audio_lens: Tensor | None = None) -> Tensor:
    """Zero mean and unit variance (of 1e-5 + variance) for each utterance.

    Args:
        audio: (N, S) float.
        audio_lens: (N,) int64 sample counts, or None if nothing is padded.

    Returns:
        (N, S), zero at padding.
    """
    if audio_lens is None:
        return F.layer_norm(audio.to(torch.promote_types(audio.dtype, torch.float32)), audio.shape[1:], eps=EPS).to(audio.dtype)
    mask = padding_mask_from_lens(audio_lens, audio.size(1), audio.device)
    return masked_time_norm(audio.unsqueeze(1), mask, audio.new_ones(1), audio.new_zeros(1), EPS).squeeze(1)


FrontendConfig = WaveformConfig | LogMelConfig


def build_frontend(config: FrontendConfig) -> Frontend:
    """The frontend that `config` describes."""
    return WaveformFrontend(config) if isinstance(config, WaveformConfig) else LogMelFrontend(config)
