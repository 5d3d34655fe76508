"""From batches of audio to frames and labels: padding left out, short utterances empty, other features refused."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from k2ssl.batch import AudioBatch
from k2ssl.labelling.assign import LoadedFrames, check_same_features, label_batches
from k2ssl.labelling.features import MfccConfig, MfccFeatures
from k2ssl.labelling.kmeans_model import KMeans
from k2ssl.labelling.windows import windowed

MFCC = MfccFeatures()


def batch(*lens: int) -> AudioBatch:
    audio = torch.zeros(len(lens), max(lens))
    for row, length in zip(audio, lens, strict=True):
        row[:length] = 0.1 * torch.randn(length)
    return AudioBatch(audio, torch.tensor(lens), tuple(f"u{i}" for i in range(len(lens))))


def alone(of: AudioBatch, i: int) -> torch.Tensor:
    length = int(of.audio_lens[i])
    return MFCC(of.audio[i : i + 1, :length], torch.tensor([length]))[0][0]


class FakeLoader:
    """Hands out batches as a loader does, and remembers where it was told to start; the second one cannot be read, so it is not there."""

    def __init__(self, *batches: AudioBatch) -> None:
        self.batches, self.starts, self.done = batches, list[tuple[int, int]](), 0

    def start_at(self, epoch: int, batches: int) -> None:
        self.starts.append((epoch, batches))
        self.done = batches

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.done}

    def __iter__(self) -> Iterator[AudioBatch]:
        while self.done < len(self.batches):
            self.done += 1
            if self.done != 2:
                yield self.batches[self.done - 1]


def test_frames_of_padding_are_left_out_and_places_are_batches_of_the_loader() -> None:
    first, short, last = batch(8000, 4000), batch(100), batch(500)
    loader = FakeLoader(first, first, short, last)
    source = LoadedFrames(lambda epoch: loader, MFCC, "cpu")  # type: ignore[arg-type, return-value]
    streamed = list(source.start(3, 0))
    assert [place for place, _ in streamed] == [1, 3, 4]
    assert [len(frames) for _, frames in streamed] == [len(alone(first, 0)) + len(alone(first, 1)), 0, 1]
    assert torch.allclose(streamed[0][1], torch.cat([alone(first, 0), alone(first, 1)]), atol=1e-4)
    assert [place for place, _ in source.start(5, 3)] == [4]
    assert loader.starts == [(3, 0), (5, 3)]


def test_each_utterance_gets_its_own_labels_and_one_too_short_for_a_frame_none() -> None:
    audio = batch(8000, 100, 4000)
    kmeans = KMeans(torch.randn(6, 39) * 10, MFCC.description)
    (labelled,) = label_batches([audio], MFCC, kmeans, "cpu")
    assert labelled.ids == ("u0", "u1", "u2") and labelled.seconds == 12100 / 16000
    assert [len(labels) for labels in labelled.labels] == [48, 0, 23]
    for i in (0, 2):
        distances = (alone(audio, i).double().unsqueeze(1) - kmeans.centroids.double()).square().sum(2)
        assert np.array_equal(labelled.labels[i], distances.argmin(1).numpy())


def test_centres_of_other_features_are_refused_with_what_differs() -> None:
    other = MfccFeatures(MfccConfig(lifter=0.0, high_freq=7000.0))
    with pytest.raises(ValueError, match=re.escape("high_freq is 7000.0 there, 0.0 here, lifter is 0.0 there, 22.0 here")):
        next(iter(label_batches([batch(8000)], MFCC, KMeans(torch.randn(3, 39), other.description), "cpu")))
    with pytest.raises(ValueError, match=re.escape("have 7 dimensions, the features (mfcc) 39")):
        check_same_features(KMeans(torch.randn(3, 7), MFCC.description), MFCC)


def test_windows_may_differ_and_centres_without_a_description_are_taken() -> None:
    check_same_features(KMeans(torch.randn(3, 39), windowed(MFCC, 10.0, 1.0).description), windowed(MFCC, 20.0, 2.0))
    check_same_features(KMeans(torch.randn(3, 39)), MFCC)
