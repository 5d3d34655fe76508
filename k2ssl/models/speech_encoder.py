"""From audio to encoder frames: what pre-training and recognition have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from k2ssl.batch import padding_mask_from_lens
from k2ssl.models.encoder_output import EncoderOutput
from k2ssl.models.frontend import FrontendConfig, build_frontend
from k2ssl.models.frontend_base import check_mask
from k2ssl.models.masking import MaskingConfig, draw_span_mask
from k2ssl.models.transformer import TransformerConfig, TransformerEncoder
from k2ssl.models.zipformer import Zipformer, ZipformerConfig
from k2ssl.nn.dropout import Dropout
from k2ssl.nn.schedule import Clock

EncoderConfig = ZipformerConfig | TransformerConfig


@dataclass(frozen=True)
class Encoded:
    """Encoded audio.

    Attributes:
        output: what the encoder returned.
        padding_mask: (N, T) bool, True at padding; None when nothing is padded.
        features: (N, T, C) of the frontend, before normalisation.
    """

    output: EncoderOutput
    padding_mask: Tensor | None
    features: Tensor


class SpeechEncoder(nn.Module):
    """Frontend, normalisation, projection, mask, encoder. Models add their heads by inheritance: the same weights then have the same names in
    all of them, whatever they are trained for.

    `clock` is the one handle for training: call `clock.advance(adjusted batch count)` before every step and `clock.seed(...)`, with
    integers that name the micro-batch, before every forward pass; see `Clock`. A step is replayed by restoring the clock's
    `state_dict` of before these calls.

    Args:
        frontend, encoder, masking: see there.
        input_dropout: rate on the projected frames.
        clock: made here when None.
    """

    def __init__(
        self, frontend: FrontendConfig, encoder: EncoderConfig, masking: MaskingConfig, input_dropout: float, clock: Clock | None = None
    ) -> None:
        super().__init__()
        self.clock = Clock() if clock is None else clock
        self.masking = masking
        self.frontend = build_frontend(frontend)
        self.encoder = build_encoder(encoder, self.clock)
        self.feature_norm = nn.LayerNorm(self.frontend.output_dim)
        same_width = self.frontend.output_dim == self.encoder.input_dim
        self.projection = nn.Identity() if same_width else nn.Linear(self.frontend.output_dim, self.encoder.input_dim)
        self.input_dropout = Dropout(input_dropout, self.clock)
        self.mask_embedding = nn.Parameter(torch.rand(self.encoder.input_dim))

    def encode(
        self,
        audio: Tensor,
        audio_lens: Tensor | None = None,
        mask: Tensor | None = None,
        return_hidden: bool = False,
        stop_after: int | None = None,
    ) -> Encoded:
        """Audio (N, S) to encoder frames; `mask` (N, T) True where frames are hidden, None hides nothing.

        For `return_hidden` and `stop_after` see the encoder: `encode(audio, lens, stop_after=6).output.frames` are the features of
        layer 6, for which no later layer is computed.

        Raises:
            ValueError: see `Frontend.check_lens`; a `mask` of another shape or type; no such layer.
        """
        lens = self.frontend.check_lens(audio, audio_lens)
        num_frames = self.frontend.num_frames(audio.shape[1])
        if mask is not None:
            check_mask(f"{type(self).__name__}: mask", mask, len(lens), num_frames)
        features = self._features(audio, audio_lens, mask)
        padding_mask = None
        if audio_lens is not None and self.frontend.num_frames(min(lens)) < num_frames:
            padding_mask = padding_mask_from_lens(self.frontend.num_frames(audio_lens), num_frames, features.device)
        x = self.input_dropout(self.projection(self.feature_norm(features)))
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), self.mask_embedding.to(x.dtype), x)
            x = self._mask_channels(x)
        return Encoded(self.encoder(x, padding_mask, return_hidden, stop_after), padding_mask, features)

    def draw_mask(self, audio: Tensor, audio_lens: Tensor | None = None) -> Tensor:
        """(N, T) bool, True where frames are to be hidden, drawn on the audio's device from the clock's generator."""
        frame_lens = torch.full((audio.shape[0],), self.frontend.num_frames(audio.shape[1]), device=audio.device)
        if audio_lens is not None:
            frame_lens = self.frontend.num_frames(audio_lens).to(audio.device, non_blocking=True)
        return draw_span_mask(
            frame_lens,
            self.frontend.num_frames(audio.shape[1]),
            self.masking.probability,
            self.masking.length,
            self.masking.min_spans,
            self.clock.generator(audio.device),
            self.masking.equal_counts,
        )

    def _features(self, audio: Tensor, audio_lens: Tensor | None, mask: Tensor | None) -> Tensor:
        """(N, T, C) of the frontend."""
        features: Tensor = self.frontend(audio, audio_lens, mask)
        return features

    def _mask_channels(self, x: Tensor) -> Tensor:
        masking = self.masking
        if masking.channel_probability == 0.0:
            return x
        n, _, channels = x.shape
        lens = torch.full((n,), channels, device=x.device)
        generator = self.clock.generator(x.device)
        hidden = draw_span_mask(lens, channels, masking.channel_probability, masking.channel_length, 0, generator, masking.equal_counts)
        return x.masked_fill(hidden.unsqueeze(1), 0.0)


def build_encoder(config: EncoderConfig, clock: Clock) -> Zipformer | TransformerEncoder:
    """The encoder that `config` describes."""
    return Zipformer(config, clock) if isinstance(config, ZipformerConfig) else TransformerEncoder(config, clock)
