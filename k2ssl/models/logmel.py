"""The log-mel frontend: Kaldi filterbanks at 100 Hz and two-dimensional convolutions down to 50 Hz.

The stack follows the Zipformer's (arXiv 2310.11230, section 3.1; upstream: Conv2dSubsampling) with one change: convolutions are
padded in time instead of eating frames, such that there are exactly as many frames as the waveform frontend gives, centred on the
same samples, and labels fit both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2ssl.batch import padding_mask_from_lens
from k2ssl.models.frontend_base import Frontend, check_gradient_scale
from k2ssl.nn.activation import swoosh, swoosh_r
from k2ssl.nn.depthwise import DepthwiseConvolution2d, as_matrix
from k2ssl.nn.mel import LogMel
from k2ssl.nn.perceptron import perceptron
from k2ssl.structure import check_types

_TIME_STRIDE = 2


@dataclass(frozen=True)
class LogMelConfig:
    """Log-mel features and convolutions; the defaults see 25 ms every 10 ms, give 50 frames per second and have 1.5 M parameters.

    The features are brought to a convenient range by fixed numbers, `(log energy - mel_mean) / mel_std`. Statistics of the utterance
    would make a frame depend on everything around it (a second of digital silence after a second of noise moves the noise's features by
    1.1 standard deviations) and would leave nothing at all of an utterance of one frame. The default numbers were measured on audio in
    [-1, 1]: mean and deviation are -6.6 and 3.9 on audiobooks, -7.9 and 3.8 on office recordings; digital silence is -15.9.

    Attributes:
        num_bins: number of mel bands.
        sample_rate: of the audio, Hz.
        frame_length_ms: length of the window that a feature is computed from, ms; a whole number of samples.
        frame_shift_ms: from one feature to the next, ms; a whole number of samples. A frame takes two.
        low_freq: lower edge of the lowest band, Hz.
        high_freq: upper edge of the highest band, Hz; 0 is half the sample rate, and a negative number so much below it.
        mel_mean: subtracted from the log energies, nats.
        mel_std: the log energies are divided by it then, nats.
        channels: of each of the three convolutions.
        expansion: hidden width of the residual block, in multiples of the last convolution's channels.
        output_dim: channels of the frames.
        gradient_scale: factor on the gradient that enters the frontend; 0 freezes it.

    Raises:
        ValueError: a value out of range.
    """

    num_bins: int = 80
    sample_rate: int = 16000
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    low_freq: float = 20.0
    high_freq: float = -400.0
    mel_mean: float = -7.0
    mel_std: float = 4.0
    channels: tuple[int, int, int] = (8, 32, 128)
    expansion: int = 3
    output_dim: int = 512
    gradient_scale: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        self.build_mel()  # the one place that knows which filterbanks are possible
        if not math.isfinite(self.mel_mean):
            raise ValueError(f"LogMelConfig: mel_mean is {self.mel_mean}, a finite number is needed")
        if not (math.isfinite(self.mel_std) and self.mel_std > 0):
            raise ValueError(f"LogMelConfig: mel_std is {self.mel_std}, a finite number > 0 is needed")
        if min(self.channels) < 1:
            raise ValueError(f"LogMelConfig: channels is {self.channels}, integers >= 1 are needed")
        for name in ("expansion", "output_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"LogMelConfig: {name} is {getattr(self, name)}, an integer >= 1 is needed")
        check_gradient_scale("LogMelConfig", self.gradient_scale)

    def build_mel(self) -> LogMel:
        """The filterbank described."""
        return LogMel(self.num_bins, self.sample_rate, self.frame_length_ms, self.frame_shift_ms, self.low_freq, self.high_freq)


class LogMelFrontend(Frontend):
    """Filterbank, three 3 x 3 convolutions, a residual block, and a linear layer over the remaining channels and bands.

    `receptive_field` is the window that a frame is centred on; the convolutions let a frame also see its neighbours, 0.1 s to both
    sides. A span of ten masked frames would lie open to the visible frames around it, and the prediction of its codes would be
    copying: features of `hidden` frames are set to zero before the convolutions (VietASR, arXiv 2505.21527, masks before them as well).
    Padded frames are set to zero before every operation that mixes frames, which is what an utterance on its own finds beyond its
    ends. Frames are not normalised at the end.
    """

    def __init__(self, config: LogMelConfig) -> None:
        mel = config.build_mel()
        super().__init__(config.output_dim, config.sample_rate, mel.frame_length, _TIME_STRIDE * mel.frame_shift, config.gradient_scale)
        self.mel = mel
        self.mel_mean = config.mel_mean
        self.mel_std = config.mel_std
        first, second, third = config.channels
        self.conv1 = nn.Conv2d(1, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, stride=(_TIME_STRIDE, 2), padding=1)
        self.conv3 = nn.Conv2d(second, third, 3, stride=(1, 2), padding=1)
        self.block = _ResidualBlock(third, config.expansion * third)
        num_bands = math.ceil(math.ceil(config.num_bins / 2) / 2)
        self.out = nn.Linear(third * num_bands, config.output_dim)
        self.apply(_initialise)
        self._freeze_if_unscaled()

    def _frames(self, audio: Tensor, audio_lens: Tensor | None, hidden: Tensor | None) -> Tensor:
        x = (self.mel(audio) - self.mel_mean) / self.mel_std
        fine, coarse = self._padding_masks(audio, audio_lens)
        if hidden is not None:
            if coarse is not None:
                hidden = hidden.masked_fill(coarse[:, :, 0, 0], False)  # hidden with padding, an utterance's last feature would be, too
            x = x.masked_fill(_hidden_features(hidden, x.size(1)).unsqueeze(2), 0)
        x = x.to(self.out.weight.dtype).unsqueeze(3)  # (N, T at 100 Hz, bands, 1), channels last from here on
        x = _convolve(self.conv1, _zero_padding(x, fine))
        x = _convolve(self.conv2, _zero_padding(x, fine))  # time and bands halved
        x = _convolve(self.conv3, _zero_padding(x, coarse))  # bands halved
        x = self.block(_zero_padding(x, coarse))
        frames: Tensor = self.out(x.transpose(2, 3).flatten(2))
        return frames

    def _padding_masks(self, audio: Tensor, audio_lens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """(N, T, 1, 1) masks, True at padding, before and after the halving of the frame rate."""
        if audio_lens is None:
            return None, None
        fine_lens = torch.div(audio_lens - self.mel.frame_length, self.mel.frame_shift, rounding_mode="floor") + 1
        fine_width = (audio.size(1) - self.mel.frame_length) // self.mel.frame_shift + 1
        fine = padding_mask_from_lens(fine_lens, fine_width, audio.device)
        coarse = padding_mask_from_lens(self.num_frames(audio_lens), self.num_frames(audio.size(1)), audio.device)
        return fine[:, :, None, None], coarse[:, :, None, None]


class _ResidualBlock(nn.Module):
    """x + a depthwise 7 x 7 convolution and a two-layer perceptron over channels (ConvNeXt, arXiv 2201.03545, without its norm)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.depthwise = DepthwiseConvolution2d(channels, 7)
        self.widen = nn.Conv2d(channels, hidden, 1)
        self.narrow = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, bands, C) -> the same."""
        assert self.widen.bias is not None and self.narrow.bias is not None
        weights = (self.widen.weight.flatten(1), self.widen.bias, self.narrow.weight.flatten(1), self.narrow.bias)
        return x + perceptron(self.depthwise(x).flatten(1, 2), *weights, swoosh_r).view_as(x)


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """(N, T, bands, C) -> the same with other sizes, by a convolution whose channels come last in memory, and SwooshR."""
    x = F.conv2d(x.permute(0, 3, 1, 2), as_matrix(conv.weight), conv.bias, conv.stride, conv.padding).permute(0, 2, 3, 1)
    return swoosh(x.flatten(1, 2), swoosh_r).view_as(x)


def _hidden_features(hidden: Tensor, width: int) -> Tensor:
    """(N, T) hidden frames -> (N, width) hidden features, of which there are two per frame and perhaps one less in all.

    The first of a frame has its very window; the second lies between this window and the next and is hidden with either.
    """
    between = hidden.clone()
    between[:, :-1] |= hidden[:, 1:]
    return torch.stack([hidden, between], 2).flatten(1)[:, :width]


def _initialise(module: nn.Module) -> None:
    # torch's default shrinks the signal at every layer until little but biases is left: on synthetic audio a new stack's frames vary
    # over time by 2 % of their total deviation, with this one by 42 %
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)
        assert module.bias is not None
        nn.init.zeros_(module.bias)


def _zero_padding(x: Tensor, padding: Tensor | None) -> Tensor:
    return x if padding is None else x.masked_fill(padding, 0)
