"""The contracts between rooms: what a batch holds and what a model's forward returns.

Legend of shape letters, used everywhere:
    N  utterances in a batch          S  audio samples of the longest utterance
    T  frames                         C  channels (features, model width)
    H  attention heads                K  classes of a label set
    L  labels of the longest utterance in one label set, on that set's own time grid
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PretrainBatch:
    """Audio with frame labels.

    Attributes:
        audio: (N, S) float waveforms at the frontend's sample rate, zero-padded at the end.
        labels: one (N, L) integer tensor per label set, on that set's own time grid.
        audio_lens: (N,) int64 sample counts, always on the CPU so that checking them never waits for a device;
            None means that nothing is padded.
        ids: N utterance ids, for messages; empty where nobody keeps them.
    """

    audio: Tensor
    labels: tuple[Tensor, ...]
    audio_lens: Tensor | None = None
    ids: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        """Samples of audio in the batch, padding not counted."""
        return _num_samples(self.audio, self.audio_lens)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PretrainBatch:
        """The same batch on another device; `audio_lens` stays on the CPU."""
        return replace(
            self,
            audio=self.audio.to(device, non_blocking=non_blocking),
            labels=tuple(labels.to(device, non_blocking=non_blocking) for labels in self.labels),
        )

    def pin_memory(self) -> PretrainBatch:
        """The same batch in page-locked memory, from which `to` copies without waiting."""
        return replace(self, audio=self.audio.pin_memory(), labels=tuple(labels.pin_memory() for labels in self.labels))


@dataclass(frozen=True)
class AsrBatch:
    """Audio with transcripts.

    Attributes:
        audio: (N, S) float32 waveforms at the frontend's sample rate, zero-padded at the end.
        audio_lens: (N,) int64 sample counts on the CPU; None means that nothing is padded.
        texts: N transcripts, as they are in the manifest.
        ids: N utterance ids.
        tokens: (N, U) int64 token ids of the transcripts, U the longest, anything at padding; None where there is no tokenizer.
        token_lens: (N,) int64 token counts, always on the CPU; None with `tokens`.
    """

    audio: Tensor
    audio_lens: Tensor | None
    texts: tuple[str, ...]
    ids: tuple[str, ...]
    tokens: Tensor | None = None
    token_lens: Tensor | None = None

    @property
    def num_samples(self) -> int:
        """Samples of audio in the batch, padding not counted."""
        return _num_samples(self.audio, self.audio_lens)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> AsrBatch:
        """The same batch on another device; `audio_lens` and `token_lens` stay on the CPU."""
        tokens = None if self.tokens is None else self.tokens.to(device, non_blocking=non_blocking)
        return replace(self, audio=self.audio.to(device, non_blocking=non_blocking), tokens=tokens)

    def pin_memory(self) -> AsrBatch:
        """The same batch in page-locked memory, from which `to` copies without waiting."""
        tokens = None if self.tokens is None else self.tokens.pin_memory()
        return replace(self, audio=self.audio.pin_memory(), tokens=tokens)


@dataclass(frozen=True)
class AudioBatch:
    """Audio of whole utterances, nothing else: what features are computed from and labels are made for.

    Attributes:
        audio: (N, S) float32 waveforms, zero-padded at the end.
        audio_lens: (N,) int64 sample counts on the CPU.
        ids: N utterance ids.
    """

    audio: Tensor
    audio_lens: Tensor
    ids: tuple[str, ...]

    @property
    def num_samples(self) -> int:
        """Samples of audio in the batch, padding not counted."""
        return _num_samples(self.audio, self.audio_lens)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> AudioBatch:
        """The same batch on another device; `audio_lens` stays on the CPU."""
        return replace(self, audio=self.audio.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> AudioBatch:
        """The same batch in page-locked memory, from which `to` copies without waiting."""
        return replace(self, audio=self.audio.pin_memory())


@dataclass(frozen=True)
class LossOutput:
    """What `forward(batch)` of every model returns; only the trainer divides.

    Attributes:
        loss: scalar, a *sum* over targets.
        num_targets: scalar int64, how many targets the sum runs over.
        metrics: detached device-side sums (or histograms of counts), to be added over batches and ranks.
    """

    loss: Tensor
    num_targets: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


def _num_samples(audio: Tensor, audio_lens: Tensor | None) -> int:
    return audio.numel() if audio_lens is None else int(audio_lens.sum())


def padding_mask_from_lens(lens: Tensor, max_len: int, device: torch.device) -> Tensor:
    """(N, max_len) bool, True at padding, for (N,) lengths."""
    lens = lens.to(device, non_blocking=True)
    return torch.arange(max_len, device=device).unsqueeze(0) >= lens.unsqueeze(1)
