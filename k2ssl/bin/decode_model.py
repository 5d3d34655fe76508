"""What the decoding programs know of a checkpoint: the recognition model with its weights or their average, the tokenizer, how audio is brought in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2ssl.config import ConfigError
from k2ssl.data.label_format import file_sha256
from k2ssl.data.tokenizer import Tokenizer, tokenizer_from_dict
from k2ssl.models.asr import AsrFrames, AsrModel
from k2ssl.models.load import Weights, config_to_dict, model_from, read_content, weights_in
from k2ssl.train.averaging import average_of, average_over_range
from k2ssl.train.checkpoint import check_records
from k2ssl.train.precision import autocast
from k2ssl.train.state import differences


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
        checkpoints: training checkpoints of fine-tuning; of several the plain mean of the weights is taken.
        weights: "raw", as the optimizer left them, or "average", the running average over all steps.
        after: with averaged weights of one checkpoint: the checkpoint after which the mean over steps begins.
        device: where the model shall be.
        precision: number format of the encoder.

    Raises:
        ValueError: a file that is damaged or no recognition model with a tokenizer, or models that do not belong together.
    """
    for path in (*checkpoints, *([after] if after else [])):
        check_records(path)
    first = read_content(checkpoints[0])
    model = model_from(first, checkpoints[0], weights, of=AsrModel)
    tokenizer = _tokenizer(first, checkpoints[0])
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{checkpoints[0]}: its model has {model.config.vocab_size} tokens, its tokenizer {tokenizer.vocab_size}: they do not belong together"
        )
    what = "raw weights" if weights == "raw" else f"mean over steps 1 to {first['average']['step']}"
    if after is not None:
        mean, what = _over_range(after, checkpoints[0], first, model, tokenizer)
        model.load_state_dict(mean)
    elif len(checkpoints) > 1:
        model.load_state_dict(_mean(checkpoints, weights, first, model, tokenizer))
        what = f"mean of the {weights} weights of {len(checkpoints)} checkpoints"
    paths = (*checkpoints, *([after] if after else []))
    sha256 = {path: file_sha256(Path(path)) for path in paths}
    return TrainedModel(model.to(device).eval().requires_grad_(False), tokenizer, _normalizes(first), what, sha256, precision)


def check_checkpoints(checkpoints: tuple[str, ...], weights: Weights, after: str | None) -> None:
    """Refuse checkpoints that are not there, and settings that contradict each other.

    Raises:
        ConfigError: names the setting.
    """
    if not checkpoints:
        raise ConfigError("checkpoints: at least one is needed, as first argument or after --checkpoints")
    for name, path in (*(("checkpoints", path) for path in checkpoints), *([("after", after)] if after else [])):
        if not Path(path).is_file():
            raise ConfigError(f"{name}: {path}: {'this is a folder, not a file' if Path(path).is_dir() else 'there is no such file'}")
    if after is not None and (weights != "average" or len(checkpoints) != 1):
        raise ConfigError(
            f"after is {after}, which goes with --weights average and one checkpoint; weights is {weights}, there are {len(checkpoints)}"
        )
    if len({Path(path).resolve() for path in checkpoints}) < len(checkpoints):
        raise ConfigError("checkpoints: one is given twice, different ones are needed")


def _tokenizer(content: Mapping[str, Any], path: str) -> Tokenizer:
    if "tokenizer" not in content:
        raise ValueError(f"{path}: holds no tokenizer; a checkpoint of k2ssl.bin.finetune is needed")
    return tokenizer_from_dict(content["tokenizer"], f"{path}: tokenizer")


def _normalizes(content: Mapping[str, Any]) -> bool:
    """Whether the run that wrote the checkpoint normalised its audio."""
    job = content.get("job")
    data = job.get("data") if isinstance(job, Mapping) else None
    return bool(data.get("normalize", False)) if isinstance(data, Mapping) else False


def _over_range(after: str, end: str, content: Mapping[str, Any], model: AsrModel, tokenizer: Tokenizer) -> tuple[dict[str, Tensor], str]:
    """The weights, and in words which these are."""
    start = read_content(after)
    _check_same(after, start, model_from(start, after, "average", of=AsrModel), end, model, tokenizer)
    try:
        return average_over_range(start, content), f"mean over steps {start['average']['step'] + 1} to {content['average']['step']}"
    except ValueError as error:
        raise ValueError(f"after {after}, checkpoint {end}: {error}") from error


def _mean(paths: tuple[str, ...], weights: Weights, first: Mapping[str, Any], model: AsrModel, tokenizer: Tokenizer) -> dict[str, Tensor]:
    def states() -> Iterator[Mapping[str, Tensor]]:
        yield weights_in(first, paths[0], weights)[1]
        for path in paths[1:]:  # one file is read after the other, so that memory does not grow with their number
            content = read_content(path)
            _check_same(path, content, model_from(content, path, weights, of=AsrModel), paths[0], model, tokenizer)
            yield weights_in(content, path, weights)[1]

    return average_of(states())


def _check_same(one: str, content: Mapping[str, Any], left: AsrModel, two: str, right: AsrModel, tokenizer: Tokenizer) -> None:
    if found := differences(config_to_dict(left.config), config_to_dict(right.config), "config"):
        raise ValueError(f"{one} and {two} cannot be averaged: {found[0]}")
    if _tokenizer(content, one).sha256 != tokenizer.sha256:
        raise ValueError(f"{one} and {two} cannot be averaged: their tokenizers differ")
