"""What batches know of themselves."""

from __future__ import annotations

import torch

from k2ssl.batch import AsrBatch, AudioBatch, PretrainBatch


def test_samples_are_counted_without_padding() -> None:
    audio, lens = torch.zeros(2, 50), torch.tensor([50, 30])
    labels = (torch.zeros(2, 3, dtype=torch.int64),)
    assert PretrainBatch(audio, labels).num_samples == 100
    assert PretrainBatch(audio, labels, lens).num_samples == 80
    assert AsrBatch(audio, lens, ("a", "b"), ("1", "2")).num_samples == 80
    assert AudioBatch(audio, lens, ("1", "2")).num_samples == 80
