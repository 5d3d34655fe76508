"""A small corpus that the tests of loading share: 83 cuts of one file of noise, with labels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording
from lhotse.cut import Cut, MonoCut

from k2ssl.batch import PretrainBatch
from k2ssl.data.batch_loader import BatchLoader
from k2ssl.data.labels import LabelShardWriter, LabelStore, Lineage, merge_shards
from k2ssl.data.loader import pretrain_loader

RATE = 16000


@dataclass(frozen=True)
class SmallCorpus:
    """A folder with cut.jsonl and its labels in labels/: the j-th label of a cut is j."""

    folder: Path

    def cuts(self) -> CutSet:
        return CutSet.from_jsonl_lazy(self.folder / "cut.jsonl")

    def store(self) -> LabelStore:
        return LabelStore.open(self.folder / "labels")

    def loader(self, **options: Any) -> BatchLoader[PretrainBatch]:
        options = {"cuts": self.cuts(), "stores": [self.store()], "max_duration": 20.0, "num_buckets": 3, "max_seconds": 5.0, **options}
        return pretrain_loader(**options)

    @staticmethod
    def label(folder: Path, cuts: Iterable[Cut], first: int = 0) -> LabelStore:
        """A store with labels first, first + 1, ... for every cut."""
        with LabelShardWriter(folder, 0, 1, 1000, 50.0, Lineage.unknown(), sampling_rate=RATE) as writer:
            for cut in cuts:
                writer.write(cut.id, first + np.arange((cut.num_samples - 80) // 320))
        return merge_shards(folder)

    @staticmethod
    def equal(ours: list[PretrainBatch], theirs: list[PretrainBatch]) -> bool:
        """Whether the batches have the same cuts and, bit by bit, the same audio and labels."""
        return [batch.ids for batch in ours] == [batch.ids for batch in theirs] and all(
            torch.equal(our.audio, their.audio) and all(map(torch.equal, our.labels, their.labels))
            for our, their in zip(ours, theirs, strict=True)
        )


def make_cuts(folder: Path, seed: int) -> CutSet:
    """A lazy manifest of stretches, of 0.3 to 9 s."""
    draw = np.random.default_rng(seed)
    path = folder / "noise.flac"
    soundfile.write(path, draw.integers(-9000, 9000, 12 * RATE).astype(np.int16), RATE)
    recording = Recording.from_file(path)
    cuts = [
        MonoCut(f"cut{i}", start=i / 100, duration=int(draw.integers(5000, 144000)) / RATE, channel=0, recording=recording)
        for i in range(83)
    ]
    CutSet.from_cuts(cuts).to_file(folder / "cut.jsonl")
    return CutSet.from_jsonl_lazy(folder / "cut.jsonl")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> SmallCorpus:
    folder = tmp_path_factory.mktemp("corpus")
    SmallCorpus.label(folder / "labels", make_cuts(folder, seed=0))
    return SmallCorpus(folder)


@pytest.fixture(scope="session")
def other_cuts(tmp_path_factory: pytest.TempPathFactory) -> CutSet:
    """Other stretches under the same ids as those of `corpus`."""
    return make_cuts(tmp_path_factory.mktemp("other"), seed=1)
