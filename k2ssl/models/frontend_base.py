"""What every frontend is: audio in, frames out, and the one owner of the arithmetic between the two."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import overload

import torch
from torch import Tensor, nn

from k2ssl.nn.gradient_scale import scale_gradient


class Frontend(nn.Module, ABC):
    """Turns audio into frames at a lower rate. Everything else asks it for rates and lengths.

    A frame's window is `receptive_field` samples long and windows start every `stride` samples; an utterance has as many frames as
    whole windows fit into it, and its frames do not depend on how far it is padded or on what it is batched with.

    Args:
        output_dim: C, channels of a frame.
        sample_rate: of the audio, Hz.
        receptive_field: samples in a frame's window; also the shortest utterance allowed.
        stride: samples between the starts of neighbouring windows.
        gradient_scale: factor on the gradient that enters the frontend. 1 leaves it alone; 0 freezes the parameters (they stop
            requiring gradients) and runs without a graph. Upstream: feature_grad_mult.
    """

    def __init__(self, output_dim: int, sample_rate: int, receptive_field: int, stride: int, gradient_scale: float) -> None:
        super().__init__()
        self.output_dim = output_dim
        self.sample_rate = sample_rate
        self.receptive_field = receptive_field
        self.stride = stride
        self.gradient_scale = gradient_scale

    @property
    def frame_rate(self) -> float:
        """Frames per second, Hz."""
        return self.sample_rate / self.stride

    @overload
    def num_frames(self, num_samples: int) -> int: ...

    @overload
    def num_frames(self, num_samples: Tensor) -> Tensor: ...

    def num_frames(self, num_samples: int | Tensor) -> int | Tensor:
        """Frames that `num_samples` samples give, 0 where too few: for an int or, on any device, for an integer tensor of any shape."""
        return _num_windows(num_samples, self.receptive_field, self.stride)

    def check_lens(self, audio: Tensor, audio_lens: Tensor | None = None) -> list[int]:
        """Refuse a batch that cannot be processed; looks at shapes and at host memory only, so it never waits for a device.

        Args:
            audio: (N, S) floating point.
            audio_lens: (N,) int64 on the CPU, or None if nothing is padded.

        Returns:
            Samples of each utterance.

        Raises:
            ValueError: a wrong shape, dtype or device, or an utterance shorter than one frame or longer than S.
        """
        if audio.dim() != 2 or audio.size(0) == 0:
            raise ValueError(f"audio has shape {tuple(audio.shape)}, (utterances, samples) with at least one utterance is needed")
        if not audio.is_floating_point():
            raise ValueError(f"audio is {audio.dtype}, a floating point waveform in [-1, 1] is needed")
        num_utterances, width = audio.shape
        lens = [width] * num_utterances if audio_lens is None else _lens_on_host(audio_lens, num_utterances)
        for position, samples in enumerate(lens):
            if samples < self.receptive_field:
                raise ValueError(f"utterance {position} has {samples} samples, at least {self.receptive_field} (one frame) are needed")
            if samples > width:
                raise ValueError(f"utterance {position} has audio_lens {samples}, at most {width} (the width of audio) is allowed")
        return lens

    def forward(self, audio: Tensor, audio_lens: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """Frames of a batch.

        Args:
            audio: (N, S) waveforms at `sample_rate`, of any floating dtype.
            audio_lens: (N,) int64 on the CPU, or None if nothing is padded (which is faster).
            hidden: (N, T) bool, True at frames that are to be masked afterwards: the other frames then know no more of the audio than
                their own windows hold (and statistics of the whole utterance, where a frontend normalises by these). What comes out at
                hidden frames themselves is unspecified.

        Returns:
            (N, T, C) with T = `num_frames(S)`; frames beyond an utterance's own `num_frames` hold unspecified finite values.

        Raises:
            ValueError: see `check_lens` and `check_mask`.
        """
        if min(self.check_lens(audio, audio_lens)) == audio.size(1):
            audio_lens = None
        if hidden is not None:
            check_mask(f"{type(self).__name__}: hidden", hidden, len(audio), self.num_frames(audio.size(1)))
        with torch.no_grad() if self.gradient_scale == 0 else nullcontext():
            frames = self._frames(audio, audio_lens, hidden)
        return scale_gradient(frames, self.gradient_scale) if self.gradient_scale else frames

    @abstractmethod
    def _frames(self, audio: Tensor, audio_lens: Tensor | None, hidden: Tensor | None) -> Tensor:
        """`forward` for checked arguments; `audio_lens` is None whenever nothing is padded."""

    def _freeze_if_unscaled(self) -> None:
        """Called at the end of a concrete frontend's construction."""
        if self.gradient_scale == 0:
            self.requires_grad_(False)


def check_mask(name: str, mask: Tensor, num_utterances: int, num_frames: int) -> None:
    """ValueError unless `mask`, called `name`, is (num_utterances, num_frames) bool."""
    if mask.shape != (num_utterances, num_frames) or mask.dtype != torch.bool:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)} and type {mask.dtype}, allowed is {(num_utterances, num_frames)} and torch.bool"
        )


def check_gradient_scale(owner: str, gradient_scale: float) -> None:
    """ValueError unless `gradient_scale` is a finite number >= 0; `owner` is the configuration class to name."""
    if not (math.isfinite(gradient_scale) and gradient_scale >= 0):
        raise ValueError(f"{owner}: gradient_scale is {gradient_scale}, a finite number >= 0 is needed")


def _num_windows(num_samples: int | Tensor, window: int, stride: int) -> int | Tensor:
    if isinstance(num_samples, Tensor):
        return (torch.div(num_samples - window, stride, rounding_mode="floor") + 1).clamp(min=0)
    return max(0, (num_samples - window) // stride + 1)


def _lens_on_host(audio_lens: Tensor, num_utterances: int) -> list[int]:
    if not isinstance(audio_lens, Tensor):
        raise ValueError(f"audio_lens is a {type(audio_lens).__name__}, an int64 tensor or None is needed")
    if audio_lens.shape != (num_utterances,):
        raise ValueError(f"audio_lens has shape {tuple(audio_lens.shape)}, ({num_utterances},) is needed: one length per utterance")
    if audio_lens.dtype != torch.int64 or audio_lens.device.type != "cpu":
        raise ValueError(f"audio_lens is {audio_lens.dtype} on {audio_lens.device}, torch.int64 on the CPU is needed")
    return audio_lens.tolist()
