"""From batches of audio to frames, and to labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from k2ssl.batch import AudioBatch
from k2ssl.labelling.features import FeatureFunction
from k2ssl.labelling.frame_stream import FrameSource
from k2ssl.labelling.kmeans_model import KMeans

if TYPE_CHECKING:  # slow to import, and not needed to show --help
    from k2ssl.data.batch_loader import BatchLoader


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


class LoadedFrames(FrameSource):
    """Frames of audio as loaders read it; places are numbers of batches, and what lies before a place is not read again.

    Args:
        loader_of: the loader of an epoch; the same batches for the same epoch.
        features: of the audio.
        device: where to compute them.
    """

    def __init__(self, loader_of: Callable[[int], BatchLoader[AudioBatch]], features: FeatureFunction, device: torch.device | str) -> None:
        self.loader_of, self.features, self.device = loader_of, features, device

    def start(self, epoch: int, place: int) -> Iterator[tuple[int, Tensor]]:
        """See `FrameSource`; frames lie on the device, without those of padding."""
        loader = self.loader_of(epoch)
        loader.start_at(epoch, place)
        for batch in loader:
            frames, _ = _frames(batch, self.features, self.device)
            yield loader.state_dict()["batches"], frames


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
