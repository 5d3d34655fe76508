"""What the decoding programs know of a checkpoint: the recognition model with its weights or their average, the tokenizer, how audio is brought in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from k2ssl.bin.cluster_cuts import what_is_there
from k2ssl.bin.model_averages import ModelFile, mean_of_models, mean_over_steps, open_model
from k2ssl.config import ConfigError
from k2ssl.data.tokenizer import LetterTokenizer, Tokenizer, tokenizer_from_dict
from k2ssl.file_hash import file_sha256
from k2ssl.models.asr import AsrFrames, AsrModel
from k2ssl.models.load import Weights
from k2ssl.train.checkpoint import check_records
from k2ssl.train.precision import autocast


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode and what belongs to it.

    Attributes:
        model: on its device.
        tokenizer: of its tokens.
        normalize: whether it was trained on utterances at zero mean and unit variance.
        weights: in words, which weights these are.
        sha256: of every checkpoint file, by path as given.
        precision: number format of the encoder.
    """

    model: AsrModel
    tokenizer: Tokenizer
    normalize: bool
    weights: str
    sha256: Mapping[str, str]
    precision: torch.dtype

    @property
    def sample_rate(self) -> int:
        """Of the audio, Hz."""
        return self.model.frontend.sample_rate

    @property
    def seconds_per_frame(self) -> float:
        """Between the beginnings of neighbouring frames of the heads, s."""
        return self.model.frontend.stride * self.model.config.output_downsampling / self.sample_rate

    @property
    def delimiter(self) -> str:
        """The token between words, "" where tokens hold the mark of a word."""
        return self.tokenizer.delimiter if isinstance(self.tokenizer, LetterTokenizer) else ""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.mask_embedding.device

    def num_frames(self, num_samples: int) -> int:
        """Frames for the heads that so much audio gives."""
        return -(-self.model.frontend.num_frames(num_samples) // self.model.config.output_downsampling)

    def has_frame(self, num_samples: int) -> bool:
        """Whether so much audio gives a frame; with less there is nothing to search."""
        return self.num_frames(num_samples) > 0

    @torch.no_grad()
    def encode(self, audio: Tensor, audio_lens: Tensor) -> AsrFrames:
        """Frames for the heads, float32, of audio (N, S) with sample counts (N,) on the CPU, each enough for a frame."""
        with autocast(self.precision, self.device):
            output = self.model.recognition_frames(audio.to(self.device, non_blocking=True), audio_lens)
        return AsrFrames(output.frames.float(), output.lens)


def load_trained(
    checkpoints: tuple[str, ...], weights: Weights, after: str | None, device: torch.device, precision: torch.dtype
) -> TrainedModel:
    """The model of one checkpoint, or the average of several.

    Args:
        checkpoints: training checkpoints of fine-tuning, or averages of k2ssl.bin.average; of several the plain mean of the weights is taken.
        weights: "raw", as the optimizer left them, or "average", the running average over all steps.
        after: with averaged weights of one checkpoint: the checkpoint after which the mean over steps begins.
        device: where the model shall be.
        precision: number format of the encoder.

    Raises:
        ValueError: a file that is damaged or no recognition model with a tokenizer, or models that do not belong together.
    """
    paths = (*checkpoints, *([after] if after else []))
    for path in paths:
        check_records(path)
    first = open_model(checkpoints[0], weights, AsrModel)
    model = first.model
    assert isinstance(model, AsrModel)
    tokenizer = _tokenizer(first)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{first.path}: its model has {model.config.vocab_size} tokens, its tokenizer {tokenizer.vocab_size}: they do not belong together"
        )
    said = first.content.get("weights")  # of a file of k2ssl.bin.average
    what = said if isinstance(said, str) else "raw weights"
    if len(checkpoints) > 1:
        model.load_state_dict(mean_of_models(first, checkpoints[1:]))
        what = f"mean of the {weights} weights of {len(checkpoints)} checkpoints"
    elif weights == "average":
        mean, what = mean_over_steps(after, first)
        model.load_state_dict(mean)
    if broken := [name for name, parameter in model.named_parameters() if not bool(parameter.isfinite().all())]:
        raise ValueError(f"{checkpoints[0]}: {broken[0]} holds numbers that are not finite; has its training diverged?")
    sha256 = {path: file_sha256(Path(path)) for path in paths}
    return TrainedModel(model.to(device).eval().requires_grad_(False), tokenizer, bool(first.normalizes), what, sha256, precision)


def check_checkpoints(checkpoints: tuple[str, ...], weights: Weights, after: str | None) -> None:
    """Refuse checkpoints that are not there, and settings that contradict each other.

    Raises:
        ConfigError: names the setting.
    """
    if not checkpoints:
        raise ConfigError("checkpoints: at least one is needed, as first argument or after --checkpoints")
    for name, path in (*(("checkpoints", path) for path in checkpoints), *([("after", after)] if after else [])):
        if not Path(path).is_file():
            raise ConfigError(f"{name}: {path}: {what_is_there(path)}")
    if after is not None and (weights != "average" or len(checkpoints) != 1):
        raise ConfigError(
            f"after is {after}, which goes with --weights average and one checkpoint; weights is {weights}, there are {len(checkpoints)}"
        )
    if len({Path(path).resolve() for path in checkpoints}) < len(checkpoints):
        raise ConfigError("checkpoints: one is given twice, different ones are needed")


def _tokenizer(file: ModelFile) -> Tokenizer:
    if "tokenizer" not in file.content:
        raise ValueError(f"{file.path}: holds no tokenizer; a checkpoint of k2ssl.bin.finetune, or an average of such, is needed")
    return tokenizer_from_dict(file.content["tokenizer"], f"{file.path}: tokenizer")
