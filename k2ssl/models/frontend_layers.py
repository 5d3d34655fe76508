"""The layers of the waveform frontend: one after the other, and the whole stack on rows of frames."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2ssl.batch import padding_mask_from_lens
from k2ssl.nn.masked_norm import MaskedTimeNorm
from k2ssl.nn.precision import product_dtype
from k2ssl.nn.row_convolution import Norm, activate, convolve_activated, convolve_windows

EPS = 1e-5


class ConvLayer(nn.Module):
    """Convolution, normalisation, GELU: (N, C, T), (N,) or None -> the same after this layer's stride."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int, bias: bool, norm: nn.Module | None) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, channels, kernel, stride, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight)
        self.norm = norm

    def forward(self, x: Tensor, lens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = self.conv(x)
        if lens is not None:
            lens = _conv_lens(lens, self.conv)
        if isinstance(self.norm, MaskedTimeNorm):
            x = self.norm(x, None if lens is None else padding_mask_from_lens(lens, x.size(2), x.device))
        elif self.norm is not None:
            x = self.norm(x)
        return F.gelu(x), lens


class ChannelNorm(nn.Module):
    """Layer normalisation over C of (N, C, T), in float32 at least, returned in the input's dtype."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        normal = F.layer_norm(x.transpose(1, 2).to(wide), self.weight.shape, self.weight.to(wide), self.bias.to(wide), EPS)
        return normal.transpose(1, 2).to(x.dtype)


def frames_from_rows(layers: Sequence[ConvLayer], audio: Tensor, audio_lens: Tensor | None, num_frames: int) -> Tensor:
    """All of `layers`, two or more, with matrix products; no gradient for the audio.

    A normalisation over time after the first convolution costs no pass over that convolution's output: mean and variance of a channel
    follow from the mean and the covariance of the windows of audio, and the normalised convolution is one with other weights.

    Args:
        layers: the first has one input channel.
        audio: (N, S).
        audio_lens: (N,) int64 on the CPU, or None.
        num_frames: T, of the longest utterance possible.

    Returns:
        (N, T, C); frames that see padding are finite and mean nothing.
    """
    conv = layers[0].conv
    dtype, wide = product_dtype(conv.weight), torch.promote_types(conv.weight.dtype, torch.float32)
    with torch.autocast(audio.device.type, enabled=False):
        rate = math.prod(layer.conv.stride[0] for layer in layers[1:])
        windows = _windows(audio.to(wide), audio_lens, conv, rate, centred=isinstance(layers[0].norm, MaskedTimeNorm))
        lens = None if audio_lens is None else _conv_lens(audio_lens, conv)
        first = _first_matrix(layers[0], windows, lens, (audio.shape[1] - conv.kernel_size[0]) // conv.stride[0] + 1)
    rows: Tensor | None = None
    for before, layer in itertools.pairwise(layers):
        weight, bias, stride = layer.conv.weight, layer.conv.bias, layer.conv.stride[0]
        if rows is None:
            rows = convolve_windows(windows, first, _channel_norm(before), weight, bias, stride, dtype)
        else:
            rows = convolve_activated(rows, _channel_norm(before), weight, bias, stride)
    assert rows is not None
    return activate(rows.view(len(audio), -1, rows.shape[1])[:, :num_frames], _channel_norm(layers[-1]))


def _windows(audio: Tensor, audio_lens: Tensor | None, conv: nn.Conv1d, rate: int, centred: bool) -> Tensor:
    """(N, W, kernel + 1) windows of the first convolution, each followed by a one, where W is a multiple of `rate`."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    if centred:  # an offset of the audio is removed by the normalisation anyway; without it rounding errors are smaller
        if audio_lens is None:
            audio = audio - audio.mean(dim=1, keepdim=True)
        else:
            padding = padding_mask_from_lens(audio_lens, audio.shape[1], audio.device)
            count = (~padding).sum(dim=1, keepdim=True)
            audio = audio - audio.masked_fill(padding, 0.0).sum(dim=1, keepdim=True) / count
    width = math.ceil(((audio.shape[1] - kernel) // stride + 1) / rate) * rate
    samples = (width - 1) * stride + kernel
    windows = F.pad(audio, (0, samples - audio.shape[1])).unfold(1, kernel, stride)
    return torch.cat((windows, windows.new_ones(len(windows), width, 1)), dim=2)


def _first_matrix(layer: ConvLayer, windows: Tensor, lens: Tensor | None, longest: int) -> Tensor:
    """(N, kernel + 1, C): what turns windows into the first convolution's output, normalised over time if `layer` does so."""
    weight = layer.conv.weight.squeeze(1).t()  # (kernel, C)
    bias = weight.new_zeros(weight.shape[1]) if layer.conv.bias is None else layer.conv.bias
    if not isinstance(layer.norm, MaskedTimeNorm):
        matrix = torch.cat((weight, bias.unsqueeze(0)))
        return matrix.to(windows.dtype).expand(len(windows), -1, -1)
    valid = windows[:, :longest, :-1].double()
    count = valid.new_full((len(valid), 1), longest)
    if lens is not None:
        padding = padding_mask_from_lens(lens, longest, windows.device)
        valid = valid.masked_fill(padding.unsqueeze(2), 0.0)
        count = (~padding).sum(dim=1, keepdim=True).double()
    mean_window = valid.sum(dim=1) / count  # (N, kernel)
    moments = valid.transpose(1, 2) @ valid / count.unsqueeze(2)
    covariance = moments - mean_window.unsqueeze(2) * mean_window.unsqueeze(1)
    weight = weight.double()
    mean = mean_window @ weight  # (N, C), without the bias, which the normalisation removes
    variance = ((covariance @ weight) * weight).sum(dim=1).clamp(min=0.0)
    scale = layer.norm.weight.double() * (variance + layer.norm.eps).rsqrt()
    shift = layer.norm.bias.double() - mean * scale + 0.0 * bias.double()
    return torch.cat((weight * scale.unsqueeze(1), shift.unsqueeze(1)), dim=1).to(windows.dtype)


def _channel_norm(layer: ConvLayer) -> Norm | None:
    return (layer.norm.weight, layer.norm.bias) if isinstance(layer.norm, ChannelNorm) else None


def _conv_lens(lens: Tensor, conv: nn.Conv1d) -> Tensor:
    """Frames out of `lens` frames in."""
    return torch.div(lens - conv.kernel_size[0], conv.stride[0], rounding_mode="floor") + 1
