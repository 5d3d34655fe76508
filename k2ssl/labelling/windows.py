"""Features of recordings of any length: overlapping windows, the overlap discarded evenly, and per-recording normalisation before that."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from k2ssl.labelling.features import FeatureFunction, Scalar, check_lens


class _Wrapped:
    """A feature function around another one, alike in all that the caller may ask."""

    def __init__(self, function: FeatureFunction) -> None:
        self.function = function
        self.dim, self.sample_rate, self.stride = function.dim, function.sample_rate, function.stride
        self.num_frames = function.num_frames

    @property
    def frame_rate(self) -> float:
        return self.function.frame_rate

    @property
    def description(self) -> Mapping[str, Scalar]:
        return self.function.description


class Normalized(_Wrapped):
    """Gives the wrapped function audio of zero mean and unit variance per utterance, as models trained on such audio need it.

    Wrap `windowed` features in it, not the other way round: the statistics are those of the whole recording.
    """

    _EPSILON = 1e-5  # of the variance, as in torch's layer_norm, which upstream applies to the waveform

    @property
    def description(self) -> Mapping[str, Scalar]:
        return {**self.function.description, "normalize": True}

    @torch.no_grad()
    def __call__(self, audio: Tensor, audio_lens: Tensor) -> tuple[Tensor, Tensor]:
        """See `FeatureFunction`."""
        check_lens(audio, audio_lens)
        lens = audio_lens.to(audio.device, non_blocking=True).unsqueeze(1)
        inside = torch.arange(audio.shape[1], device=audio.device).unsqueeze(0) < lens
        count = lens.clamp(min=1)
        audio = audio.float().masked_fill(~inside, 0.0)
        centred = (audio - audio.sum(1, keepdim=True) / count).masked_fill(~inside, 0.0)
        variance = centred.square().sum(1, keepdim=True) / count
        return self.function(centred * (variance + self._EPSILON).rsqrt(), audio_lens)


class Windowed(_Wrapped):
    """Splits what is too long for the wrapped function at once; see `windowed`."""

    def __init__(
        self, function: FeatureFunction, max_seconds: float, overlap_seconds: float, align_frames: int = 1, windows_at_once: int = 1
    ) -> None:
        super().__init__(function)
        for name, value in (("align_frames", align_frames), ("windows_at_once", windows_at_once)):
            if value < 1:
                raise ValueError(f"windowed: {name} is {value}, an integer >= 1 is needed")
        if not 0 <= overlap_seconds < max_seconds < math.inf:
            raise ValueError(
                f"windowed: overlap_seconds is {overlap_seconds} and max_seconds {max_seconds}, 0 <= overlap < max < inf is needed"
            )
        self.max_seconds, self.overlap_seconds, self.windows_at_once = max_seconds, overlap_seconds, windows_at_once
        self.window = round(max_seconds * self.sample_rate)  # samples
        self.unit = self.stride * align_frames  # samples; windows start at multiples of it
        self.max_hop = (self.window - round(overlap_seconds * self.sample_rate)) // self.unit * self.unit
        seen = self.num_frames(self.window)
        if self.max_hop < self.unit or seen * self.stride < self.max_hop:
            raise ValueError(
                f"windowed: overlap_seconds is {overlap_seconds} and max_seconds {max_seconds}; windows of {self.window} samples that "
                f"start every {self.max_hop} samples (a multiple >= 1 of {self.unit}) and hold {seen} frames of {self.stride} "
                "samples each do not cover a recording without gaps"
            )

    @property
    def description(self) -> Mapping[str, Scalar]:
        settings = {"window_seconds": self.max_seconds, "window_overlap_seconds": self.overlap_seconds}
        return {**self.function.description, **settings, "window_align_frames": self.unit // self.stride}

    @torch.no_grad()
    def __call__(self, audio: Tensor, audio_lens: Tensor) -> tuple[Tensor, Tensor]:
        """See `FeatureFunction`.

        Raises:
            ValueError: see `FeatureFunction`; or a function whose frame counts do not follow its stride, so that windows cannot be joined.
        """
        lens = check_lens(audio, audio_lens)
        short = [position for position, samples in enumerate(lens) if samples <= self.window]
        if len(short) == len(lens):
            return self.function(audio, audio_lens)
        frame_lens = torch.tensor([self.num_frames(samples) for samples in lens])
        frames = audio.new_zeros(len(lens), int(frame_lens.max()), self.dim, dtype=torch.float32)
        if short:
            longest = max(lens[position] for position in short)
            part, _ = self.function(audio[short, :longest], audio_lens[short])
            frames[short, : part.shape[1]] = part
        for position, samples in enumerate(lens):
            if samples > self.window:
                frames[position, : int(frame_lens[position])] = self._stitched(audio[position, :samples])
        return frames, frame_lens

    def starts(self, num_samples: int) -> list[int]:
        """First samples of the windows of a recording longer than one window: spread evenly, so that all overlaps are alike."""
        distance = -(-(num_samples - self.window) // self.unit)  # from the first start to the last, in units
        hops = -(-distance * self.unit // self.max_hop)
        return [index * distance // hops * self.unit for index in range(hops + 1)]

    def _stitched(self, audio: Tensor) -> Tensor:
        """(S,) audio to (T, C) frames: of each overlap, the first half is the earlier window's and the second half the later one's."""
        starts, total = self.starts(len(audio)), self.num_frames(len(audio))
        windows = [audio[start : start + self.window] for start in starts]
        counts = [self.num_frames(len(window)) for window in windows]
        first = [start // self.stride for start in starts]
        if first[-1] + counts[-1] != total:
            raise ValueError(
                f"windowed: {total} frames in {len(audio)} samples, but {counts[-1]} in the last {len(windows[-1])} of them: frames are not "
                f"{self.stride} samples apart"
            )
        cuts = [(later + earlier + count) // 2 for earlier, count, later in zip(first, counts, first[1:], strict=False)]
        out = audio.new_zeros(total, self.dim, dtype=torch.float32)
        bounds = list(zip([0, *cuts], [*cuts, total], strict=True))
        for index in range(0, len(windows), self.windows_at_once):
            group = windows[index : index + self.windows_at_once]
            lens = torch.tensor([len(window) for window in group])
            frames, _ = self.function(torch.nn.utils.rnn.pad_sequence(group, batch_first=True), lens)
            for offset, (begin, end) in enumerate(bounds[index : index + len(group)]):
                out[begin:end] = frames[offset, begin - first[index + offset] : end - first[index + offset]]
        return out


def normalized(function: FeatureFunction) -> Normalized:
    """`function` on audio of zero mean and unit variance per utterance; see `Normalized`."""
    return Normalized(function)


def windowed(
    function: FeatureFunction, max_seconds: float, overlap_seconds: float, align_frames: int = 1, windows_at_once: int = 1
) -> Windowed:
    """`function` for recordings of any length; what is no longer than `max_seconds` passes through as it is.

    A longer recording is cut into windows of `max_seconds` that overlap by `overlap_seconds` or more and start on its frame grid. Of each
    overlap the first half is taken from the earlier window and the second from the later one, so every kept frame but those at the
    recording's ends has at least `overlap_seconds` / 2 of context on both sides, less one frame's length. As many frames come out as
    without windows.

    Args:
        function: whose frames must lie inside the audio, so that `num_frames(S + stride) == num_frames(S) + 1`.
        max_seconds: length of a window.
        overlap_seconds: the least overlap of neighbouring windows.
        align_frames: windows start at multiples of so many frames; for encoders with reduced frame rates inside, the largest reduction.
        windows_at_once: windows of a recording that go through the function together; bounds memory.

    Raises:
        ValueError: numbers out of range, or windows that would leave gaps.
    """
    return Windowed(function, max_seconds, overlap_seconds, align_frames, windows_at_once)
