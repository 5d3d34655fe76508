"""Speech recognition: any of our frontends and encoders with CTC, the pruned transducer, or both.

The loss of a batch is a sum over utterances, simple_scale * simple + pruned_scale * pruned + ctc_scale * CTC, as published. `num_targets` is
the number of *tokens* of these utterances: gradients divided by it do not grow with the seconds per update, every token weighs the same
whatever the length of its utterance, and nats per token are a number that can be compared between corpora of different utterance lengths.
(Frames would change with the down-sampling, utterances with how the corpus was cut.) ScaledAdam does not see the divisor.

Loss scales and freezing go by optimizer *steps*, as published, not by the clock's adjusted batch count, which is seconds of audio: heads
that begin from nothing need so many updates, however much audio one of them takes. The trainer tells `step`.

Source: arXiv 2411.17100 and its fine-tuning recipe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from k2ssl.batch import AsrBatch, LossOutput
from k2ssl.models.ctc_head import CtcConfig, CtcHead
from k2ssl.models.frontend import FrontendConfig, WaveformConfig
from k2ssl.models.masking import MaskingConfig
from k2ssl.models.speech_encoder import EncoderConfig, SpeechEncoder
from k2ssl.models.transducer_head import TransducerConfig, TransducerHead
from k2ssl.models.zipformer import ZipformerConfig
from k2ssl.nn.keep_in_graph import keep_in_graph
from k2ssl.nn.resample import Downsample
from k2ssl.nn.schedule import Clock, Schedule, constant
from k2ssl.structure import check_types

BLANK = 0


@dataclass(frozen=True)
class AsrConfig:
    """Everything about the model; travels in its checkpoints. The defaults are the published fine-tuning of Zipformer Base.

    Attributes:
        vocab_size: number of tokens; token 0 is blank.
        heads: which losses are trained.
        frontend: waveform or log-mel.
        encoder: Zipformer or HuBERT's Transformer.
        masking: what is hidden in training; unlike in pre-training a probability of 0 hides nothing, whatever min_spans.
        ctc, transducer: see there.
        input_dropout: rate on the projected frames.
        output_downsampling: encoder frames that become one frame for the heads; 1: 50 Hz, as published; 2: 25 Hz.
        simple_scale: weight of the transducer's simple loss after the warm-up, during which it falls from 1.
        warmup_steps: optimizer steps in which the weight of the simple loss falls, and that of the pruned loss rises from 0.1 to 1.
        ctc_scale: weight of the CTC loss beside the transducer's; alone it has 1.
        freeze_frontend_steps: optimizer steps in which the frontend does not learn.
        freeze_encoder_steps: optimizer steps in which nothing below the heads learns, the frontend included.

    Raises:
        ValueError: a value out of range.
    """

    vocab_size: int
    heads: Literal["transducer", "ctc", "both"] = "transducer"
    frontend: FrontendConfig = field(default_factory=lambda: WaveformConfig(gradient_scale=0.1))
    encoder: EncoderConfig = field(default_factory=ZipformerConfig)
    masking: MaskingConfig = field(default_factory=lambda: MaskingConfig(probability=0.65))
    ctc: CtcConfig = field(default_factory=CtcConfig)
    transducer: TransducerConfig = field(default_factory=TransducerConfig)
    input_dropout: float = 0.1
    output_downsampling: int = 1
    simple_scale: float = 0.5
    warmup_steps: int = 2000
    ctc_scale: float = 0.2
    freeze_frontend_steps: int = 0
    freeze_encoder_steps: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        least = {"vocab_size": 2, "output_downsampling": 1, "warmup_steps": 0, "freeze_frontend_steps": 0, "freeze_encoder_steps": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"AsrConfig: {name} is {getattr(self, name)}, allowed are whole numbers >= {smallest}")
        for name in ("simple_scale", "ctc_scale"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"AsrConfig: {name} is {getattr(self, name)}, allowed is a finite number >= 0")
        if not 0.0 <= self.input_dropout < 1.0:
            raise ValueError(f"AsrConfig: input_dropout is {self.input_dropout}, allowed is 0 <= input_dropout < 1")

    @classmethod
    def tiny(cls, vocab_size: int, heads: Literal["transducer", "ctc", "both"] = "transducer") -> AsrConfig:
        """Under a million parameters, for tests and for a laptop core."""
        return cls(
            vocab_size,
            heads,
            frontend=WaveformConfig(channels=32),
            encoder=ZipformerConfig.tiny(),
            transducer=TransducerConfig(predictor_dim=64, joiner_dim=64),
            input_dropout=0.0,
        )


@dataclass(frozen=True)
class AsrFrames:
    """What the heads and the searches see.

    Attributes:
        frames: (N, T, C); values beyond an utterance's own frames are finite and carry no meaning.
        lens: (N,) int64 frame counts on the CPU.
    """

    frames: Tensor
    lens: Tensor


class AsrModel(SpeechEncoder):
    """An encoder with one head or two.

    The heads are `ctc` and `transducer`, None where there is none. `step`, the number of optimizer steps done, is set by whoever trains,
    before every step; it is no part of the weights, and evaluation does not ask for it. For a search, in evaluation mode:

        output = model.recognition_frames(audio, audio_lens)
        greedy_search(model.transducer.predictor, model.transducer.joiner, output.frames, output.lens)
    """

    def __init__(self, config: AsrConfig, clock: Clock | None = None) -> None:
        super().__init__(config.frontend, config.encoder, config.masking, config.input_dropout, clock)
        self.config = config
        self.step: int | None = None
        dim, vocab_size = self.encoder.output_dim, config.vocab_size
        self.downsample = Downsample(config.output_downsampling) if config.output_downsampling > 1 else None
        self.ctc = CtcHead(config.ctc, dim, vocab_size, self.clock) if config.heads != "transducer" else None
        self.transducer: TransducerHead | None = None
        if config.heads != "ctc":
            self.transducer = TransducerHead(config.transducer, dim, vocab_size, BLANK, self.clock)
        self._simple_scale = _from_to(1.0, config.simple_scale, config.warmup_steps)
        self._pruned_scale = _from_to(0.1, 1.0, config.warmup_steps)
        if not self._hides_frames:
            self.mask_embedding.requires_grad_(False)  # no loss depends on it, and data-parallel ranks would wait for its gradient

    def forward(self, batch: AsrBatch) -> LossOutput:
        """Loss of the transcripts of `batch`.

        Utterances with too few frames for their tokens (CTC: fewer than tokens and repetitions together; transducer: see
        `TransducerConfig.prune_range`) are left out of that head's sums and counted. In evaluation mode nothing is hidden and the weights of
        the losses are those after the warm-up, so that validation losses can be compared.

        Returns:
            The weighted sum of the losses over the tokens of the utterances that are in it. Metrics, all sums, of each loss X (`simple`,
            `pruned`, `ctc`): `loss_X` without its weight, and `num_X` tokens; of each head H: `count_too_long_H` utterances left out; and
            `count_utterances`.

        Raises:
            ValueError: see `check_batch`; or `step` was never set, in training.
        """
        self.check_batch(batch)
        assert batch.tokens is not None and batch.token_lens is not None
        output = self.recognition_frames(batch.audio, batch.audio_lens, self._draw_what_is_hidden(batch))
        return self._loss(output, batch.tokens, batch.token_lens)

    def recognition_frames(self, audio: Tensor, audio_lens: Tensor | None = None, mask: Tensor | None = None) -> AsrFrames:
        """Audio (N, S) to frames for the heads; `mask` (N, T) at the encoder's frame rate, True where frames are hidden.

        Raises:
            ValueError: see `encode`.
        """
        frozen = self.training and self._steps_done() < self.config.freeze_encoder_steps
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            encoded = self.encode(audio, audio_lens, mask)
        frames = encoded.output.frames
        if frozen and torch.is_grad_enabled():
            frames = keep_in_graph(frames, self.frozen_parameters())
        samples = torch.full((audio.shape[0],), audio.shape[1]) if audio_lens is None else audio_lens
        lens = self.frontend.num_frames(samples)
        if self.downsample is not None:
            frames = self.downsample(frames, encoded.padding_mask)
            lens = torch.div(lens + self.downsample.factor - 1, self.downsample.factor, rounding_mode="floor")
        return AsrFrames(frames, lens)

    def frozen_parameters(self) -> Iterator[nn.Parameter]:
        """What does not learn in the present `step`. The backward pass does not compute its gradients but gives zeros, so that ranks that train
        together find a gradient of every parameter.

        Whoever makes the step sets these gradients to None first: zeros would wear down an optimizer's second moments, and the first step
        after a long freeze would be 7 times as large as it should be (at beta2 = 0.98).
        """
        if self._steps_done() < self.config.freeze_encoder_steps:
            yield from (parameter for name, parameter in self.named_parameters() if not name.startswith(_HEADS))
        elif self._steps_done() < self.config.freeze_frontend_steps:
            yield from self.frontend.parameters()

    def check_batch(self, batch: AsrBatch) -> None:
        """Refuse a batch that does not fit the model.

        Token *values* are looked at only when they lie on the CPU, since reading them elsewhere would wait for the device; a training loop
        calls this before it moves a batch.

        Raises:
            ValueError: wrong shapes or types; utterances too short for a frame; no tokens at all, an empty transcript, or a token that is
                blank or outside the vocabulary, with the utterance's id.
        """
        self.frontend.check_lens(batch.audio, batch.audio_lens)
        check_tokens(batch, self.config.vocab_size)

    def _steps_done(self) -> int:
        if self.step is None:  # a step that nobody tells would stay 0: a warm-up without end
            raise ValueError("AsrModel: step is None, in training the number of optimizer steps done must be set before every step")
        return self.step

    @property
    def _hides_frames(self) -> bool:
        return self.masking.probability > 0

    def _features(self, audio: Tensor, audio_lens: Tensor | None, mask: Tensor | None) -> Tensor:
        frozen = self.training and self._steps_done() < self.config.freeze_frontend_steps
        if not (frozen and torch.is_grad_enabled()):
            return super()._features(audio, audio_lens, mask)
        with torch.no_grad():
            features = super()._features(audio, audio_lens, mask)
        return keep_in_graph(features, self.frozen_parameters())

    def _draw_what_is_hidden(self, batch: AsrBatch) -> Tensor | None:
        if not self.training or (not self._hides_frames and self.masking.channel_probability == 0):
            return None
        if self._hides_frames:
            return self.draw_mask(batch.audio, batch.audio_lens)
        n, samples = batch.audio.shape  # channels only
        return torch.zeros(n, self.frontend.num_frames(samples), dtype=torch.bool, device=batch.audio.device)

    def _loss(self, output: AsrFrames, tokens: Tensor, token_lens: Tensor) -> LossOutput:
        device = output.frames.device
        loss = output.frames.new_zeros((), dtype=torch.float32)
        num_targets = torch.zeros((), dtype=torch.int64, device=device)
        metrics = {"count_utterances": torch.full((), tokens.shape[0], device=device)}
        on_device = token_lens.to(device, non_blocking=True)
        if self.ctc is not None:
            ctc = self.ctc.loss(output.frames, output.lens, tokens, token_lens, BLANK)
            loss = loss + (self.config.ctc_scale if self.transducer is not None else 1.0) * ctc.loss
            num_targets = on_device.masked_fill(ctc.excluded, 0).sum()
            metrics |= {"num_ctc": num_targets, "loss_ctc": ctc.loss.detach(), "count_too_long_ctc": ctc.excluded.sum()}
        if self.transducer is not None:
            sums = self.transducer.loss(output.frames, output.lens, tokens, token_lens)
            simple_scale, pruned_scale = self.transducer_scales()
            loss = loss + simple_scale * sums.simple + pruned_scale * sums.pruned
            fits = sums.fits.to(device, non_blocking=True)
            num_targets = on_device.masked_fill(~fits, 0).sum()  # who has frames enough for CTC fits here too
            metrics |= {"num_simple": num_targets, "loss_simple": sums.simple.detach()}
            metrics |= {"num_pruned": num_targets, "loss_pruned": sums.pruned.detach(), "count_too_long_transducer": (~fits).sum()}
        return LossOutput(loss, num_targets, metrics)

    def transducer_scales(self) -> tuple[float, float]:
        """Weights of the simple and of the pruned loss in the present `step`; in evaluation mode those after the warm-up."""
        step = self._steps_done() if self.training else self.config.warmup_steps
        return self._simple_scale(step), self._pruned_scale(step)


_HEADS = ("ctc.", "transducer.", "downsample.")


def check_tokens(batch: AsrBatch, vocab_size: int) -> None:
    """ValueError unless the tokens of `batch` fit; see `AsrModel.check_batch`."""
    tokens, lens = batch.tokens, batch.token_lens
    if tokens is None or lens is None:
        raise ValueError("AsrBatch: tokens and token_lens are needed, not None; its data set makes them with a tokenizer")
    n = batch.audio.shape[0]
    if lens.dtype != torch.int64 or lens.shape != (n,) or lens.device.type != "cpu":
        raise ValueError(f"AsrBatch: token_lens is {lens.dtype} {tuple(lens.shape)} on {lens.device}, allowed is int64 ({n},) on the CPU")
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or tokens.shape[0] != n:
        raise ValueError(f"AsrBatch: tokens is {tokens.dtype} {tuple(tokens.shape)}, allowed is int64 ({n}, U)")
    for position, length in enumerate(lens.tolist()):
        if not 1 <= length <= tokens.shape[1]:
            what = "its transcript is empty" if length == 0 else f"token_lens is {length}, allowed are 1 to {tokens.shape[1]}"
            raise ValueError(f"AsrBatch: utterance {_name(batch, position)}: {what}")
    if tokens.device.type != "cpu":
        return
    wrong = (torch.arange(tokens.shape[1]) < lens.unsqueeze(1)) & ((tokens <= BLANK) | (tokens >= vocab_size))
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"AsrBatch: utterance {_name(batch, row)}: token {column} is {int(tokens[row, column])}, allowed are 1 to {vocab_size - 1} "
            f"(0 is blank); is the tokenizer that of the model?"
        )


def _name(batch: AsrBatch, position: int) -> str:
    return repr(batch.ids[position]) if batch.ids else str(position)


def _from_to(first: float, last: float, steps: int) -> Schedule:
    return Schedule((0, first), (steps, last)) if steps else constant(last)
