"""From batches of audio to frames and labels: padding left out, short utterances empty, other features refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from k2ssl.batch import AudioBatch
from k2ssl.labelling.assign import check_same_features, label_batches, stream_frames
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


def test_frames_of_padding_are_left_out_and_empty_batches_too() -> None:
    first, short = batch(8000, 4000), batch(100)
    streamed = list(stream_frames([first, short], MFCC, "cpu"))
    assert len(streamed) == 1
    assert torch.allclose(streamed[0], torch.cat([alone(first, 0), alone(first, 1)]), atol=1e-4)


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
