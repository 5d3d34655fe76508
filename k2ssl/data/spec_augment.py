"""Masks on log-mel features: bands and stretches of time that are hidden from the model in training.

SpecAugment (arXiv 1904.08779) without its time warping. lhotse's goes over utterances one by one and draws from the process's own
generators, which a resumed or repeated step would not find as they were; here the masks of a batch are drawn at once, where the features
lie, from the generator of the step. Widths and positions have the same distributions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SpecAugmentConfig:
    """What is hidden of log-mel features in training; by default nothing, as published. The waveform frontend has no such features.

    Attributes:
        band_masks: groups of neighbouring bands hidden in every utterance; 0: none.
        band_width: each of these groups has fewer bands than this.
        time_masks: stretches of time hidden in every utterance, at most; 0: none.
        time_width: each of these stretches is shorter than this, s.
        time_share: most of an utterance that all its stretches of time hide together.
    """

    band_masks: int = 0
    band_width: int = 27
    time_masks: int = 0
    time_width: float = 1.0
    time_share: float = 0.15

    def __post_init__(self) -> None:
        for name, least in (("band_masks", 0), ("band_width", 1), ("time_masks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"SpecAugmentConfig: {name} is {getattr(self, name)}, a whole number >= {least} is needed")
        if not (math.isfinite(self.time_width) and self.time_width > 0):
            raise ValueError(f"SpecAugmentConfig: time_width is {self.time_width}, a finite number of seconds > 0 is needed")
        if not 0.0 < self.time_share <= 1.0:
            raise ValueError(f"SpecAugmentConfig: time_share is {self.time_share}, allowed is 0 < time_share <= 1")

    @property
    def hides(self) -> bool:
        """Whether anything is hidden at all."""
        return self.band_masks > 0 or self.time_masks > 0


class SpecAugment:
    """Draws the masks.

    Args:
        config: see there.
        frame_rate: of the features, Hz.
    """

    def __init__(self, config: SpecAugmentConfig, frame_rate: float) -> None:
        self.config = config
        self.frames_per_mask = max(1, round(config.time_width * frame_rate))

    def hidden(self, lens: Tensor, num_frames: int, num_bands: int, generator: torch.Generator) -> Tensor:
        """Draw masks.

        Args:
            lens: (N,) int64 frames of each utterance, on the CPU, so that nothing waits for a device.
            num_frames, num_bands: of the features.
            generator: on the features' device.

        Returns:
            (N, num_frames, num_bands) bool on that device, True where hidden.
        """
        config, device = self.config, generator.device
        hidden = torch.zeros(len(lens), num_frames, num_bands, dtype=torch.bool, device=device)
        if config.band_masks:
            bands = torch.full((len(lens), config.band_masks), num_bands, device=device)
            widths = torch.full_like(bands, min(config.band_width, num_bands))
            hidden |= _stretches(bands, widths, num_bands, generator).unsqueeze(1)
        if config.time_masks:
            most = config.time_share * lens
            num = torch.ceil(most / self.frames_per_mask).clamp(max=config.time_masks)
            widths = torch.floor(most / num.clamp(min=1)).clamp(max=self.frames_per_mask).long()
            acts = torch.arange(config.time_masks) < num.unsqueeze(1)
            widths = torch.where(acts, widths.unsqueeze(1), 0).to(device, non_blocking=True)
            frames = lens.unsqueeze(1).expand_as(acts).to(device, non_blocking=True)
            hidden |= _stretches(frames, widths, num_frames, generator).unsqueeze(2)
        return hidden

    def attach(self, frontend: Any, generator: Callable[[torch.device], torch.Generator]) -> None:
        """Hide parts of what `frontend.mel` gives, from now on, whenever it is in training mode.

        What is hidden gets the value that `frontend` subtracts, `mel_mean`: it sees 0 there.

        Args:
            frontend: log-mel, called with audio (N, S) and lengths (N,) or None.
            generator: gives the generator of the present step for a device.
        """
        hiding = _Hiding(self, frontend, generator)
        frontend.register_forward_pre_hook(hiding.begin, with_kwargs=True)
        frontend.mel.register_forward_hook(hiding.hide)
        frontend.register_forward_hook(hiding.end, always_call=True)


class _Hiding:
    """What `SpecAugment.attach` hooks into a frontend. Its methods are copied and pickled with the model, and are those of the copy then."""

    def __init__(self, masks: SpecAugment, frontend: Any, generator: Callable[[torch.device], torch.Generator]) -> None:
        self.masks, self.frontend, self.generator = masks, frontend, generator
        self.lens: Tensor | None = None  # of the batch that the frontend works on; the filterbank is not told

    def begin(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        audio, audio_lens = _audio_and_lens(*arguments, **keywords)
        samples = torch.full((audio.shape[0],), audio.shape[1]) if audio_lens is None else audio_lens
        mel = self.frontend.mel
        self.lens = torch.div(samples - mel.frame_length, mel.frame_shift, rounding_mode="floor") + 1

    def hide(self, module: nn.Module, arguments: tuple[Any, ...], features: Tensor) -> Tensor:
        if self.lens is None or not self.frontend.training:
            return features
        _, num_frames, num_bands = features.shape
        hidden = self.masks.hidden(self.lens, num_frames, num_bands, self.generator(features.device))
        return features.masked_fill(hidden, self.frontend.mel_mean)

    def end(self, *_: Any) -> None:
        self.lens = None


def _audio_and_lens(audio: Tensor, audio_lens: Tensor | None = None, hidden: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    return audio, audio_lens


def _stretches(lens: Tensor, widths: Tensor, max_len: int, generator: torch.Generator) -> Tensor:
    """(N, max_len) bool: for each of the (N, M) entries a stretch of 0 to `widths` - 1 somewhere within `lens`; all M together."""
    draws = torch.rand((2, *lens.shape), generator=generator, device=lens.device)
    width = (draws[0] * widths).floor()
    start = (draws[1] * (lens - width)).floor()
    columns = torch.arange(max_len, device=lens.device)
    start, end = start.unsqueeze(2), (start + width).unsqueeze(2)
    return ((columns >= start) & (columns < end)).any(dim=1)
