"""From batches of audio to frames, and to labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from k2ssl.batch import AudioBatch
from k2ssl.labelling.features import FeatureFunction
from k2ssl.labelling.kmeans_model import KMeans


@dataclass(frozen=True)
class LabelledBatch:
    """Labels of the utterances of a batch.

    Attributes:
        ids: of the utterances.
        labels: (L,) int64 of each; empty where an utterance is too short for a frame.
        seconds: of audio in the batch, padding not counted.
    """

    ids: tuple[str, ...]
    labels: tuple[npt.NDArray[Any], ...]
    seconds: float


def stream_frames(batches: Iterable[AudioBatch], features: FeatureFunction, device: torch.device | str) -> Iterator[Tensor]:
    """(F, C) float32 frames of one batch after the other, on `device`, without those of padding; batches without a frame are left out."""
    for batch in batches:
        frames, _ = _frames(batch, features, device)
        if len(frames):
            yield frames


def label_batches(
    batches: Iterable[AudioBatch], features: FeatureFunction, kmeans: KMeans, device: torch.device | str
) -> Iterator[LabelledBatch]:
    """The number of the nearest centre for every frame.

    Raises:
        ValueError: features of another dimension than the centres, or of another description where the centres have one.
    """
    check_same_features(kmeans, features)
    for batch in batches:
        frames, counts = _frames(batch, features, device)
        labels = kmeans.assign(frames).cpu().numpy()
        parts = np.split(labels, np.cumsum(counts)[:-1])
        yield LabelledBatch(batch.ids, tuple(parts), int(batch.audio_lens.sum()) / features.sample_rate)


def check_same_features(kmeans: KMeans, features: FeatureFunction) -> None:
    """Refuse centres that were fitted to other features; how long recordings are cut into windows (`window_...`) may differ.

    Raises:
        ValueError: names what differs, on both sides.
    """
    if kmeans.dim != features.dim:
        raise ValueError(
            f"k-means centres have {kmeans.dim} dimensions, the features ({features.description.get('features')}) {features.dim}"
        )
    there, here = kmeans.description, features.description
    names = [name for name in {**there, **here} if not name.startswith("window") and there.get(name) != here.get(name)]
    if there and names:
        pairs = ", ".join(f"{name} is {there.get(name)!r} there, {here.get(name)!r} here" for name in names)
        raise ValueError(f"k-means centres were fitted to other features: {pairs}")


def _frames(batch: AudioBatch, features: FeatureFunction, device: torch.device | str) -> tuple[Tensor, list[int]]:
    """(F, C) frames of all utterances one after the other, and how many each has."""
    frames, lens = features(batch.audio.to(device, non_blocking=True), batch.audio_lens)
    counts: list[int] = lens.tolist()
    return torch.cat([utterance[:count] for utterance, count in zip(frames, counts, strict=True)]), counts
