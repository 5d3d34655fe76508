"""What the clustering programs share: which features, from which audio, on which device."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k2ssl.atomic_file import atomic_file
from k2ssl.data.label_format import file_sha256
from k2ssl.labelling.assign import check_same_features
from k2ssl.labelling.features import FeatureFunction, MfccConfig, MfccFeatures, Scalar, hidden_features
from k2ssl.labelling.kmeans_model import KMeans
from k2ssl.labelling.windows import normalized, windowed
from k2ssl.structure import from_dict

if TYPE_CHECKING:  # slow to import, and not needed to show --help
    from lhotse.cut import Cut

    from k2ssl.models.hubert import HubertModel

_MFCC_WINDOW, _MFCC_OVERLAP = 600.0, 1.0  # seconds; only bounds memory, since a frame sees 65 ms


@dataclass(frozen=True)
class HiddenConfig:
    """Hidden states of a model: of one layer, or of one stack of a Zipformer.

    Attributes:
        checkpoint: model file, or training checkpoint.
        layer: number of the layer, from 1, as in the HuBERT paper.
        stack: number of the Zipformer stack, from 1, instead of a layer.
        window_seconds: longer recordings are encoded in windows of this length, s.
        overlap_seconds: of neighbouring windows, s; half of it is discarded on either side.
    """

    checkpoint: str
    layer: int | None = None
    stack: int | None = None
    window_seconds: float = 60.0
    overlap_seconds: float = 8.0

    def __post_init__(self) -> None:
        if (self.layer is None) == (self.stack is None):
            raise ValueError(f"HiddenConfig: layer is {self.layer} and stack is {self.stack}, exactly one of the two is needed")
        if (self.layer or self.stack or 0) < 1:
            raise ValueError(f"HiddenConfig: layer is {self.layer} and stack is {self.stack}, they count from 1")

    @property
    def name(self) -> str:
        """ "layer 6" or "stack 3"."""
        return f"stack {self.stack}" if self.layer is None else f"layer {self.layer}"


@dataclass(frozen=True)
class LoaderConfig:
    """How audio is read.

    Attributes:
        max_duration: audio in a batch, s, padding included; a GPU is busier with more.
        num_workers: processes that decode audio; 0 decodes in the program itself.
    """

    max_duration: float = 200.0
    num_workers: int = 2

    def __post_init__(self) -> None:
        if not self.max_duration > 0:
            raise ValueError(f"LoaderConfig: max_duration is {self.max_duration}, allowed is > 0 seconds")
        if self.num_workers < 0:
            raise ValueError(f"LoaderConfig: num_workers is {self.num_workers}, allowed is >= 0")


@dataclass(frozen=True)
class CutLists:
    """Manifests one after the other, read lazily each time they are iterated over."""

    paths: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("cuts: no manifest is given, at least one is needed")

    def open(self) -> list[Iterable[Cut]]:
        """One lazy list for each manifest, checked as `read_cuts` does."""
        from k2ssl.data.cuts import read_cuts

        return [read_cuts(path) for path in self.paths]

    def seconds(self) -> float | None:
        """Of audio, as the summaries beside the manifests say; None if one has none."""
        from k2ssl.data.cuts import read_summary

        summaries = [read_summary(path).get("summary") for path in self.paths]
        hours = [summary.get("hours") if isinstance(summary, Mapping) else None for summary in summaries]
        return None if None in hours else 3600 * sum(hours)  # type: ignore[arg-type]


# How long one process waits for another. Their shares of a long labelling end hours apart; one that died is noticed by its launcher.
PATIENCE_MINUTES = 7 * 24 * 60.0


@dataclass(frozen=True)
class Chained:
    """Several lists as one, which can be iterated over again; of them every `num_parts`-th cut from cut `part` on that is not `done`."""

    lists: list[Iterable[Cut]]
    part: int = 0
    num_parts: int = 1
    done: object = ()

    def __iter__(self) -> Iterator[Cut]:
        cuts = (cut for cuts in self.lists for cut in cuts)
        for number, cut in enumerate(cuts):
            if number % self.num_parts == self.part and cut.id not in self.done:  # type: ignore[operator]
                yield cut


def choose_device(name: str) -> str:
    """`name`, or for "auto" the GPU if there is one.

    Raises:
        ValueError: there is no such kind of device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}, allowed are auto, cpu, cuda and cuda:NUMBER") from error
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}, allowed are auto, cpu, cuda and cuda:NUMBER")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but there is no CUDA device here")
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

    model = load_model(config.checkpoint, device).eval().requires_grad_(False)
    dim = _check_layer(model, config)
    normalizes = isinstance(model.frontend, WaveformFrontend) and model.frontend.normalizes_audio
    if isinstance(model.frontend, WaveformFrontend):
        model.frontend.normalizes_audio = False  # done below, over whole recordings instead of windows

    def encode(audio: Tensor, audio_lens: Tensor) -> Tensor:
        output = model.encode(audio, audio_lens, return_hidden=True).output
        return output.stacks[config.stack - 1] if config.stack is not None else output.hidden[(config.layer or 0) - 1]

    features = hidden_features(
        encode,
        dim=dim,
        sample_rate=model.frontend.sample_rate,
        stride=model.frontend.stride,
        num_frames=model.frontend.num_frames,
        description={
            "features": config.name,
            "checkpoint_sha256": file_sha256(Path(config.checkpoint)),
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
        ValueError: a checkpoint that is missing, superfluous or not the one that was clustered; a description that says too little.
    """
    there = kmeans.description
    kind = str(there.get("features", ""))
    config: MfccConfig | HiddenConfig
    if kind == "mfcc":
        if checkpoint is not None:
            raise ValueError(f"checkpoint is {checkpoint}, but {name} was fitted to MFCC, which need none")
        config = from_dict(MfccConfig, _settings(there))
    elif match := re.fullmatch(r"(layer|stack) (\d+)", kind):
        if checkpoint is None:
            raise ValueError(f"checkpoint is missing: {name} was fitted to {kind} of a model; --checkpoint FILE names it")
        if not Path(checkpoint).is_file():
            raise ValueError(f"checkpoint {checkpoint}: there is no such file")
        if (sha256 := file_sha256(Path(checkpoint))) != there.get("checkpoint_sha256"):
            raise ValueError(
                f"{checkpoint} is not the checkpoint that {name} was fitted to: its sha256 is {sha256}, there {there.get('checkpoint_sha256')}"
            )
        windows = {key: there[f"window_{given}"] for key, given in _WINDOW_SETTINGS.items() if f"window_{given}" in there}
        config = from_dict(HiddenConfig, {"checkpoint": checkpoint, match[1]: int(match[2]), **windows})
    else:
        raise ValueError(f"{name} was fitted to {kind or 'features that it does not name'}, which cannot be computed here")
    features = build_features(config, device)
    check_same_features(kmeans, features)
    return features


_WINDOW_SETTINGS = {"window_seconds": "seconds", "overlap_seconds": "overlap_seconds"}


def _settings(description: Mapping[str, Scalar]) -> dict[str, Scalar]:
    return {key: value for key, value in description.items() if key != "features" and not key.startswith("window")}


def _check_layer(model: HubertModel, config: HiddenConfig) -> int:
    """Width of the layer or stack; ValueError if the model has none of that number."""
    probe = torch.zeros(1, model.frontend.receptive_field, device=model.mask_embedding.device)
    with torch.no_grad():
        output = model.encode(probe, return_hidden=True).output
    number, found = (config.stack, output.stacks) if config.layer is None else (config.layer, output.hidden)
    if number is None or number > len(found):
        has = f"has {config.name.split()[0]}s 1 to {len(found)}" if found else "has no stacks, being a Transformer"
        raise ValueError(f"{config.checkpoint}: {config.name} was asked for, the model {has}")
    return found[number - 1].shape[-1]


def list_skipped(path: Path, skipped: Mapping[str, str]) -> None:
    """Write cut ids with the reasons why they were left out; without any, no file remains."""
    if skipped:
        with atomic_file(path) as file:
            file.writelines(f"{cut_id}\t{' '.join(reason.split())}\n".encode() for cut_id, reason in skipped.items())
    else:
        path.unlink(missing_ok=True)  # what could not be read before an interruption now could


def peak_memory(device: torch.device) -> str:
    """Largest memory of this process so far, for people; loader workers not counted."""
    text = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"  # Linux counts in KiB
    if device.type == "cuda":
        text += f", on the GPU {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
    return text
