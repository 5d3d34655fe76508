"""What the clustering programs share: which features, on which device."""

from __future__ import annotations

import re
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from k2ssl.bin.cluster_cuts import CutLists as CutLists
from k2ssl.bin.cluster_cuts import check_device
from k2ssl.config import ConfigError
from k2ssl.file_hash import file_sha256
from k2ssl.labelling.assign import check_same_features
from k2ssl.labelling.features import FeatureFunction, HiddenFeatures, MfccConfig, MfccFeatures, Scalar
from k2ssl.labelling.kmeans_model import KMeans
from k2ssl.labelling.windows import normalized, windowed
from k2ssl.structure import from_dict

if TYPE_CHECKING:  # slow to import, and not needed to show --help
    from k2ssl.models.hubert import HubertModel

_MFCC_WINDOW, _MFCC_OVERLAP = 600.0, 1.0  # seconds; only bounds memory, since a frame sees 65 ms


@dataclass(frozen=True)
class HiddenConfig:
    """Hidden states of a model: of one layer, or of one stack of a Zipformer.

    Attributes:
        checkpoint: model file, or training checkpoint.
        weights: raw, as the last step of the training left them, or average, the running average that a training checkpoint holds.
        layer: number of the layer, from 1, as in the HuBERT paper.
        stack: number of the Zipformer stack, from 1, instead of a layer.
        window_seconds: longer recordings are encoded in windows of this length, s.
        overlap_seconds: by so much neighbouring windows overlap, s; half of it is discarded on either side.
    """

    checkpoint: str
    weights: Literal["raw", "average"] = "raw"
    layer: int | None = None
    stack: int | None = None
    window_seconds: float = 60.0
    overlap_seconds: float = 8.0

    def __post_init__(self) -> None:
        if (self.layer is None) == (self.stack is None):
            raise ValueError(f"HiddenConfig: layer is {self.layer} and stack is {self.stack}, exactly one of the two is needed")
        if (self.layer or self.stack or 0) < 1:
            raise ValueError(f"HiddenConfig: layer is {self.layer} and stack is {self.stack}, they count from 1")
        if not 0 <= self.overlap_seconds < self.window_seconds <= 10**6:
            raise ValueError(
                f"HiddenConfig: overlap_seconds is {self.overlap_seconds} and window_seconds {self.window_seconds}, "
                "allowed is 0 <= overlap < window <= 1,000,000"
            )

    @property
    def name(self) -> str:
        """ "layer 6" or "stack 3"."""
        return f"stack {self.stack}" if self.layer is None else f"layer {self.layer}"


def choose_device(name: str) -> str:
    """`name`, or for "auto" the GPU if there is one. Its convolutions in float32 are computed in float32 from then on, as its products are:
    torch's default for them is TF32, with 10 bits of mantissa.

    Raises:
        ConfigError: there is no such kind of device, or none of it here.
    """
    try:
        check_device(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    here = torch.cuda.device_count() if name.startswith("cuda") else 1
    if here <= int(name.partition(":")[2] or 0):
        raise ConfigError(f"device is {name!r}, but there are {here} CUDA devices here")
    return name


def build_features(config: MfccConfig | HiddenConfig, device: torch.device | str) -> FeatureFunction:
    """The feature function that `config` describes, ready on `device`, for recordings of any length.

    Raises:
        ValueError: a checkpoint that cannot be read or lacks that layer.
    """
    if isinstance(config, MfccConfig):
        return windowed(MfccFeatures(config).to(device), _MFCC_WINDOW, _MFCC_OVERLAP)
    from k2ssl.models.frontend import WaveformFrontend
    from k2ssl.models.load import load_model

    model = load_model(config.checkpoint, device, weights=config.weights).eval().requires_grad_(False)
    dim, last = _check_layer(model, config)
    normalizes = isinstance(model.frontend, WaveformFrontend) and model.frontend.normalizes_audio
    if isinstance(model.frontend, WaveformFrontend):
        model.frontend.normalizes_audio = False  # done below, over whole recordings instead of windows

    def encode(audio: Tensor, audio_lens: Tensor) -> Tensor:
        if config.stack is None:
            return model.encode(audio, audio_lens, stop_after=last).output.frames
        return model.encode(audio, audio_lens, return_hidden=True, stop_after=last).output.stacks[config.stack - 1]

    features = HiddenFeatures(
        encode,
        dim=dim,
        sample_rate=model.frontend.sample_rate,
        stride=model.frontend.stride,
        num_frames=model.frontend.num_frames,
        description={
            "features": config.name,
            "checkpoint_sha256": file_sha256(Path(config.checkpoint)),
            "weights": config.weights,
            "sample_rate": model.frontend.sample_rate,
        },
    )
    align = max(getattr(model.config.encoder, "downsampling", (1,)))  # so that all windows see the same low-rate frames
    whole = windowed(features, config.window_seconds, config.overlap_seconds, align_frames=align)
    return normalized(whole) if normalizes else whole


def features_of(kmeans: KMeans, checkpoint: str | None, device: torch.device | str, name: str = "the k-means file") -> FeatureFunction:
    """The features that the centres were fitted to, as their description says.

    Args:
        kmeans: the centres.
        checkpoint: model file, for centres of hidden states.
        device: where to compute.
        name: of the k-means file, for messages.

    Raises:
        ConfigError: a checkpoint is missing, or superfluous.
        ValueError: it is not the one that was clustered; a description that says too little.
    """
    there = kmeans.description
    kind = str(there.get("features", ""))
    config: MfccConfig | HiddenConfig
    if kind == "mfcc":
        if checkpoint is not None:
            raise ConfigError(f"checkpoint is {checkpoint}, but {name} was fitted to MFCC, which need none")
        config = from_dict(MfccConfig, _settings(there))
    elif match := re.fullmatch(r"(layer|stack) (\d+)", kind):
        if checkpoint is None:
            raise ConfigError(f"checkpoint is missing: {name} was fitted to {kind} of a model; --checkpoint FILE names it")
        if (sha256 := file_sha256(Path(checkpoint))) != there.get("checkpoint_sha256"):
            raise ValueError(
                f"{checkpoint} is not the checkpoint that {name} was fitted to: its sha256 is {sha256}, there {there.get('checkpoint_sha256')}"
            )
        windows = {key: there[f"window_{given}"] for key, given in _WINDOW_SETTINGS.items() if f"window_{given}" in there}
        weights = {"weights": there["weights"]} if "weights" in there else {}
        config = from_dict(HiddenConfig, {"checkpoint": checkpoint, **weights, match[1]: int(match[2]), **windows})
    else:
        raise ValueError(f"{name} was fitted to {kind or 'features that it does not name'}, which cannot be computed here")
    features = build_features(config, device)
    check_same_features(kmeans, features)
    return features


_WINDOW_SETTINGS = {"window_seconds": "seconds", "overlap_seconds": "overlap_seconds"}


def _settings(description: Mapping[str, Scalar]) -> dict[str, Scalar]:
    return {key: value for key, value in description.items() if key != "features" and not key.startswith("window")}


def _check_layer(model: HubertModel, config: HiddenConfig) -> tuple[int, int]:
    """Width of the layer or stack, and the number of the layer that it ends with; ValueError if the model has none of that number."""
    probe = torch.zeros(1, model.frontend.receptive_field, device=model.mask_embedding.device)
    with torch.no_grad():
        output = model.encode(probe, return_hidden=True).output
    number, found = (config.stack, output.stacks) if config.layer is None else (config.layer, output.hidden)
    if number is None or number > len(found):
        has = f"has {config.name.split()[0]}s 1 to {len(found)}" if found else "has no stacks, being a Transformer"
        raise ValueError(f"{config.checkpoint}: {config.name} was asked for, the model {has}")
    if config.layer is not None:
        return found[number - 1].shape[-1], number
    layers_of_stacks: tuple[int, ...] = model.config.encoder.num_layers  # type: ignore[assignment]
    return found[number - 1].shape[-1], sum(layers_of_stacks[:number])


def peak_memory(device: torch.device) -> str:
    """Largest memory of this process so far, for people; loader workers not counted."""
    text = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"  # Linux counts in KiB
    if device.type == "cuda":
        text += f", on the GPU {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
    return text
