"""Random crops of audio with the labels of exactly that stretch.

Every crop of a batch has the same length, so that nothing is padded: at most `max_seconds`, at most the shortest utterance. With `crop_step`
there are only few lengths, so that kernels which are chosen or compiled for a length are so for few. A crop starts where all label sets
have a label starting, on the label grid: the least common multiple of their shifts in samples.

Source: HuBERT (arXiv 2106.07447); fairseq's hubert_dataset rounds the label position to the nearest label instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from lhotse.cut import Cut

from k2ssl.batch import PretrainBatch
from k2ssl.data.audio import AudioError, num_samples, read_samples, read_utterance
from k2ssl.data.audio_dataset import BatchDataset, Loaded, Request, as_pairs
from k2ssl.data.mixture import repetition
from k2ssl.data.stable_hash import stable_index

_MISMATCH_SECONDS = 0.1  # or three shifts: labels and audio that differ by more are not of the same utterance


class LabelSource(Protocol):
    """The part of `k2ssl.data.labels.LabelStore` that loading needs."""

    @property
    def identity(self) -> str:
        """Differs as soon as any label differs."""

    @property
    def contract(self) -> Any:
        """Has `frame_rate`, Hz."""

    def __contains__(self, cut_id: object) -> bool:
        """Whether there are labels of a cut; reads none."""

    def labels(self, cut_id: str) -> np.ndarray:
        """(L,) integers of one cut."""


class PretrainDataset(BatchDataset[PretrainBatch]):
    """Crops and their labels.

    A crop's position is a function of the seed, the epoch, the cut's id and how often it was drawn in this epoch: neither workers nor
    ranks nor an interruption change it.

    Args:
        stores: one per label set.
        sample_rate: of the audio, Hz.
        max_seconds: longest crop.
        crop_step: lengths of crops are `max_seconds` less a multiple of this, s, rounded to a whole number of samples; the rest of the
            shortest utterance is not used. Where less than one step would be left, and with 0, crops are as long as they can be.
        normalize: bring every *whole* utterance to zero mean and unit variance before it is cropped (upstream: do_normalize); whole
            utterances are then read for it.
        seed: of the crops.

    Raises:
        ValueError: no store, or one whose label shift is not a whole number of samples; max_seconds shorter than a label; crop_step out of
            range or shorter than a label.
    """

    def __init__(
        self,
        stores: Sequence[LabelSource],
        *,
        sample_rate: int = 16000,
        max_seconds: float = 15.625,
        crop_step: float = 0.0,
        normalize: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(normalize)
        if not stores:
            raise ValueError("PretrainDataset: stores is empty, at least one label store is needed")
        self.stores = tuple(stores)
        self.sample_rate = sample_rate
        self.max_samples = round(max_seconds * sample_rate)
        self.seed = seed
        self.shifts = tuple(_shift(i, store.contract.frame_rate, sample_rate) for i, store in enumerate(stores))
        self.grid = math.lcm(*self.shifts)
        if self.max_samples < self.grid:
            raise ValueError(f"PretrainDataset: max_seconds is {max_seconds}, at least {self.grid / sample_rate} (one label) is needed")
        allowed = 0 <= crop_step <= max_seconds
        self.step_samples = round(crop_step * sample_rate) if allowed else 0
        if not allowed or (crop_step > 0 and self.step_samples < self.grid):
            raise ValueError(
                f"PretrainDataset: crop_step is {crop_step}, allowed are 0 and {self.grid / sample_rate} (one label) to {max_seconds} (max_seconds)"
            )

    def __getitem__(self, request: Request) -> Loaded[PretrainBatch]:
        """One batch; utterances that cannot be read are left out of it and named.

        Raises:
            ValueError: a cut without labels, or with labels that do not fit its length.
        """
        labels = [[store.labels(cut.id) for store in self.stores] for cut in request.cuts]
        usable = [self.usable_samples(cut, [len(row) for row in rows]) for cut, rows in zip(request.cuts, labels, strict=True)]
        length = self.crop_length(min(usable))
        audio = np.empty((len(request.cuts), length), dtype=np.float32)
        crops: list[list[np.ndarray]] = []  # of every cut that could be read: its labels from the crop's start on
        ids: list[str] = []
        failures: list[AudioError] = []
        for cut, samples, rows in zip(request.cuts, usable, labels, strict=True):
            start = self.crop_start(cut, samples, length, request.epoch)
            try:
                self._read_crop(cut, start, audio[len(ids)])
            except AudioError as error:
                failures.append(error)
                continue
            ids.append(cut.id)
            crops.append([row[start // shift :] for row, shift in zip(rows, self.shifts, strict=True)])
        if not ids:
            return Loaded(None, as_pairs(failures))
        stacked = tuple(_stack(rows, length // shift) for rows, shift in zip(zip(*crops, strict=True), self.shifts, strict=True))
        return Loaded(PretrainBatch(torch.from_numpy(audio[: len(ids)]), stacked, ids=tuple(ids)), as_pairs(failures))

    def identity(self) -> dict[str, Any]:
        """See `BatchDataset`; `labels` holds the identity of each store, `crop_step_samples` None where lengths are not rounded, as states
        have it that were saved before there was such a setting."""
        labels = [store.identity for store in self.stores]
        return {**super().identity(), "labels": labels, "crop_step_samples": self.step_samples or None}

    def row_seconds(self, durations: Sequence[float]) -> float:
        """Seconds of the crops, as far as durations tell: labels may end a little before the audio."""
        return self.crop_length(round(min(durations) * self.sample_rate)) / self.sample_rate

    def crop_length(self, shortest: int) -> int:
        """Samples of every crop of a batch whose shortest utterance has so many usable ones."""
        length, step = min(self.max_samples, shortest), self.step_samples
        if step == 0:
            return length
        rounded = self.max_samples - -(-(self.max_samples - length) // step) * step
        return rounded if rounded >= step else length

    def crop_start(self, cut: Cut, usable: int, length: int, epoch: int) -> int:
        """First sample of the crop of `length` out of `usable` samples: every multiple of the label grid that fits is as likely."""
        return self.grid * stable_index((usable - length) // self.grid + 1, "crop", self.seed, epoch, repetition(cut), cut.id)

    def _read_crop(self, cut: Cut, start: int, out: np.ndarray) -> None:
        if self.normalize:
            out[:] = read_utterance(cut, normalize=True)[start : start + len(out)]
        else:
            read_samples(cut, start, out)

    def usable_samples(self, cut: Cut, num_labels: Sequence[int]) -> int:
        """Samples from the cut's start on for which every store has labels."""
        samples = usable = num_samples(cut, self.sample_rate)
        for i, (count, shift) in enumerate(zip(num_labels, self.shifts, strict=True)):
            if abs(samples - count * shift) > max(3 * shift, _MISMATCH_SECONDS * self.sample_rate):
                raise ValueError(
                    f"cut {cut.id}: {count} labels of label set {i} at {self.sample_rate / shift:g} Hz are "
                    f"{count * shift / self.sample_rate:g} s, the audio is {samples / self.sample_rate:g} s"
                )
            # The last window goes on after its label's shift (25 ms every 20 or 10 ms), so labels last for one more shift than they count.
            usable = min(usable, (count + 1) * shift)
        return usable


def _stack(rows: Sequence[np.ndarray], most: int) -> torch.Tensor:
    """(N, L) int64: as many labels as every row has, at most `most`, which start within the crop."""
    count = min(most, *(len(row) for row in rows))
    return torch.from_numpy(np.stack([row[:count] for row in rows]).astype(np.int64))


def _shift(label_set: int, frame_rate: float, sample_rate: int) -> int:
    """Samples between labels."""
    shift = round(sample_rate / frame_rate)
    if shift < 1 or abs(shift * frame_rate - sample_rate) > 1e-6 * sample_rate:
        raise ValueError(
            f"label set {label_set}: {frame_rate:g} labels/s at {sample_rate} Hz are {sample_rate / frame_rate:g} samples per label, a whole number is needed"
        )
    return shift
