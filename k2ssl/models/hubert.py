"""HuBERT: predict the codes of hidden frames, with any of our frontends and encoders.

Source: arXiv 2106.07447 (HuBERT), arXiv 2411.17100 (k2SSL: Zipformer encoder, linear head).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from k2ssl.batch import LossOutput, PretrainBatch
from k2ssl.losses.masked_prediction import FrameSums, prediction_sums
from k2ssl.models.frontend import FrontendConfig, WaveformConfig
from k2ssl.models.masking import MaskingConfig, most_hidden, select_true
from k2ssl.models.prediction_head import HeadConfig, build_head
from k2ssl.models.speech_encoder import Encoded, EncoderConfig, SpeechEncoder
from k2ssl.models.transformer import TransformerConfig
from k2ssl.models.zipformer import ZipformerConfig
from k2ssl.nn.schedule import Clock
from k2ssl.structure import check_types

_LABEL_TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class HubertConfig:
    """Everything about the model; travels in its checkpoints. The defaults are the published Zipformer Base.

    Attributes:
        frontend: waveform or log-mel.
        encoder: Zipformer or HuBERT's Transformer.
        masking, head: see there.
        label_rate: labels per second of each label set, Hz; empty: all at the frontend's frame rate.
        input_dropout: rate on the projected frames.
        masked_weight: weight of the loss over hidden frames.
        unmasked_weight: weight of the loss over visible frames.
        feature_penalty: weight of the mean square of the frontend's output.
    """

    frontend: FrontendConfig = field(default_factory=lambda: WaveformConfig(gradient_scale=0.1))
    encoder: EncoderConfig = field(default_factory=ZipformerConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    label_rate: tuple[float, ...] = ()
    input_dropout: float = 0.1
    masked_weight: float = 1.0
    unmasked_weight: float = 0.0
    feature_penalty: float = 10.0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("masked_weight", "unmasked_weight", "feature_penalty"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"HubertConfig: {name} is {getattr(self, name)}, allowed is a finite number >= 0")
        if not 0.0 <= self.input_dropout < 1.0:
            raise ValueError(f"HubertConfig: input_dropout is {self.input_dropout}, allowed is 0 <= input_dropout < 1")
        if self.masked_weight == self.unmasked_weight == 0:
            raise ValueError("HubertConfig: masked_weight and unmasked_weight are both 0, at least one must be > 0")
        if self.label_rate and len(self.label_rate) != len(self.head.num_classes):
            raise ValueError(
                f"HubertConfig: label_rate has {len(self.label_rate)} entries, head.num_classes has {len(self.head.num_classes)}; "
                "one rate per label set is needed, or none at all"
            )
        if any(not (math.isfinite(rate) and rate > 0) for rate in self.label_rate):
            raise ValueError(f"HubertConfig: label_rate is {self.label_rate}, allowed are rates > 0 Hz")

    @classmethod
    def zipformer_base(cls) -> HubertConfig:
        """94.56 M parameters."""
        return cls()

    @classmethod
    def zipformer_large(cls) -> HubertConfig:
        """305.9 M parameters."""
        return cls(frontend=WaveformConfig(norm="layer"), encoder=ZipformerConfig.large(), input_dropout=0.0)

    @classmethod
    def hubert_base(cls) -> HubertConfig:
        """94.7 M parameters; the second iteration of arXiv 2106.07447."""
        return cls(encoder=TransformerConfig.base(), head=HeadConfig(similarity="cosine", code_dim=256))

    @classmethod
    def hubert_large(cls) -> HubertConfig:
        """316.6 M parameters."""
        return cls(
            frontend=WaveformConfig(norm="layer"),
            encoder=TransformerConfig.large(),
            head=HeadConfig(similarity="cosine", code_dim=768),
            input_dropout=0.0,
        )

    @classmethod
    def tiny(cls) -> HubertConfig:
        """Under a million parameters, for tests and for a laptop core."""
        return cls(
            frontend=WaveformConfig(channels=32), encoder=ZipformerConfig.tiny(), head=HeadConfig(num_classes=(16,)), input_dropout=0.0
        )


class HubertModel(SpeechEncoder):
    """An encoder with one head per label set."""

    def __init__(self, config: HubertConfig, clock: Clock | None = None) -> None:
        super().__init__(config.frontend, config.encoder, config.masking, config.input_dropout, clock)
        self.config = config
        self.heads = nn.ModuleList(build_head(config.head, self.encoder.output_dim, k) for k in config.head.num_classes)
        self.label_rate = config.label_rate or (self.frontend.frame_rate,) * len(self.heads)

    def forward(self, batch: PretrainBatch, mask: Tensor | None = None) -> LossOutput:
        """Loss of predicting the codes of `batch`.

        Args:
            batch: audio and labels.
            mask: (N, T) bool, True where frames are hidden; drawn from the clock's generator when None.

        Returns:
            The sum of cross-entropies over weighted frames and label sets, plus the feature penalty times the number of targets.
            Metrics, all sums: `num_masked`, `loss_masked`, `correct_masked`, and the histogram `predicted` (K,) of predicted codes of
            hidden frames; with an unmasked weight also `num_unmasked`, `loss_unmasked`, `correct_unmasked`; for label sets after the
            first the same names ending in `_1`, `_2`, ...; and `feature_penalty` times the number of targets.

        Raises:
            ValueError: see `check_batch`; or a `mask` of another shape or type.
        """
        self.check_batch(batch)
        num_frames = self.frontend.num_frames(batch.audio.shape[1])
        most_masked = num_frames
        if mask is None:
            mask = self.draw_mask(batch.audio, batch.audio_lens)
            masking = self.masking
            most_masked = most_hidden(num_frames, masking.probability, masking.length, masking.min_spans)
        encoded = self.encode(batch.audio, batch.audio_lens, mask)
        return self._loss(encoded, batch.labels, mask, most_masked)

    def check_batch(self, batch: PretrainBatch) -> None:
        """Refuse a batch that does not fit the model.

        Label *values* are looked at only when the labels lie on the CPU, since reading them elsewhere would wait for the device;
        a training loop calls this before it moves a batch. A label of -1 stands for padding, beyond an utterance's own labels.

        Raises:
            ValueError: wrong shapes or types; utterances too short for a frame; a number of label sets other than the number of heads;
                an utterance whose number of labels differs from its number of frames by more than one (more labels are right where the
                frontend's window is longer than two frames, since crops have labels to their end); a label outside the classes.
        """
        self.frontend.check_lens(batch.audio, batch.audio_lens)
        if len(batch.labels) != len(self.heads):
            raise ValueError(f"PretrainBatch: labels holds {len(batch.labels)} label sets, the model has {len(self.heads)} heads")
        n, samples = batch.audio.shape
        lens = [samples] * n if batch.audio_lens is None else batch.audio_lens.tolist()
        frame_lens = [self.frontend.num_frames(length) for length in lens]
        for i, labels in enumerate(batch.labels):
            name, classes = f"PretrainBatch: labels[{i}]", self.config.head.num_classes[i]
            check_labels(name, labels, frame_lens, self._ratio(i), classes, self.frontend.receptive_field / self.frontend.stride)

    def _ratio(self, label_set: int) -> float:
        """Labels per frame."""
        return self.label_rate[label_set] / self.frontend.frame_rate

    def _loss(self, encoded: Encoded, labels: tuple[Tensor, ...], mask: Tensor, most_masked: int) -> LossOutput:
        weights = torch.where(mask, self.config.masked_weight, self.config.unmasked_weight)
        if encoded.padding_mask is not None:
            weights = weights.masked_fill(encoded.padding_mask, 0.0)
        targets = [labels_of_frames(labels[i], mask.shape[1], self._ratio(i)) for i in range(len(self.heads))]
        weights = weights.masked_fill(torch.stack(targets).amin(dim=0) < 0, 0.0)  # frames beyond the last label

        positions, valid = select_true(weights != 0, self._num_selected(weights, most_masked))
        x = encoded.output.frames.flatten(0, 1).index_select(0, positions)
        masked = mask.flatten().index_select(0, positions)
        weights = torch.where(valid, weights.flatten().index_select(0, positions), 0.0)
        num_targets = (weights != 0).sum()
        penalty = mean_square(encoded.features, encoded.padding_mask) * num_targets
        loss = self.config.feature_penalty * penalty
        metrics = {"feature_penalty": penalty.detach()}
        for i, head in enumerate(self.heads):
            sums = prediction_sums(head(x), targets[i].flatten().index_select(0, positions).clamp(min=0), weights, masked)
            suffix = f"_{i}" if i else ""
            loss = loss + sums.loss
            metrics |= {f"predicted{suffix}": sums.predicted, **_frame_metrics(f"masked{suffix}", sums.masked)}
            if self.config.unmasked_weight > 0:
                metrics |= _frame_metrics(f"unmasked{suffix}", sums.unmasked)
        return LossOutput(loss, num_targets, metrics)

    def _num_selected(self, weights: Tensor, most_masked: int) -> int:
        """How many frames logits are computed for: exactly those of non-zero weight on the CPU; elsewhere, where counting would wait
        for the device, a bound known on the host (80 % of the frames for the published mask, of which 57 % have weight)."""
        if weights.device.type == "cpu":
            return int((weights != 0).sum())
        return weights.numel() if self.config.unmasked_weight > 0 else weights.shape[0] * most_masked


def mean_square(features: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Mean of the squares of (N, T, C) over valid frames, in float32 at least."""
    square = features.to(torch.promote_types(features.dtype, torch.float32)).square()
    if padding_mask is None:
        return square.mean()
    return square.masked_fill(padding_mask.unsqueeze(-1), 0.0).sum() / ((~padding_mask).sum() * features.shape[-1])


def labels_of_frames(labels: Tensor, num_frames: int, ratio: float) -> Tensor:
    """(N, L) labels at `ratio` labels per frame -> (N, num_frames) int64: frame t has label floor(t * ratio), or -1 beyond the last."""
    # in float64, with a little added, so that rounding does not make 59.999999 of 60
    index = (torch.arange(num_frames, dtype=torch.float64, device=labels.device) * ratio + 1e-6).long()
    of_frames = labels.index_select(1, index.clamp(max=labels.shape[1] - 1)).long()
    return of_frames.masked_fill(index >= labels.shape[1], -1)


def check_labels(name: str, labels: Tensor, frame_lens: list[int], ratio: float, num_classes: int, window: float) -> None:
    """ValueError unless `labels` (N, L) fit utterances of `frame_lens` frames at `ratio` labels per frame, each of which sees a window as
    long as so many frames; see `check_batch`."""
    n = len(frame_lens)
    if labels.ndim != 2 or labels.shape[0] != n or labels.shape[1] == 0 or labels.dtype not in _LABEL_TYPES:
        types = ", ".join(str(kind).removeprefix("torch.") for kind in _LABEL_TYPES)
        raise ValueError(f"{name} has shape {tuple(labels.shape)} and type {labels.dtype}, allowed are ({n}, L >= 1) and {types}")
    fewest, most = -max(ratio, 1.0), max(ratio, 1.0) + max(0, math.ceil(window) - 2) * ratio
    if labels.device.type != "cpu":
        _check_label_count(f"{name}, longest utterance", labels.shape[1], max(frame_lens), ratio, fewest, most)
        return
    low, high = labels.amin(dim=1).tolist(), labels.amax(dim=1).tolist()
    is_label = labels >= 0
    counts = is_label.sum(dim=1).tolist()
    lasts = (is_label * torch.arange(1, labels.shape[1] + 1)).amax(dim=1).tolist()
    for i in range(n):
        if high[i] >= num_classes or low[i] < -1:
            found = high[i] if high[i] >= num_classes else low[i]
            raise ValueError(f"{name}, utterance {i}: label {found} is outside the classes, allowed are 0 to {num_classes - 1} (-1 pads)")
        if lasts[i] != counts[i]:
            raise ValueError(f"{name}, utterance {i}: -1 stands before the last label, allowed is padding at the end only")
        _check_label_count(f"{name}, utterance {i}", counts[i], frame_lens[i], ratio, fewest, most)


def _check_label_count(name: str, count: int, num_frames: int, ratio: float, fewest: float, most: float) -> None:
    expected = num_frames * ratio
    if not fewest <= count - expected <= most:
        allowed = f"{expected:g} +- {most:g}" if most == -fewest else f"{expected + fewest:g} to {expected + most:g}"
        raise ValueError(f"{name}: {count} labels for {num_frames} frames at {ratio:g} labels per frame, allowed are {allowed}")


def _frame_metrics(group: str, sums: FrameSums) -> dict[str, Tensor]:
    return {f"num_{group}": sums.count, f"loss_{group}": sums.loss, f"correct_{group}": sums.correct}
