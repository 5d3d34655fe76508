"""Loaders: batches for labelling, pre-training and recognition."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lhotse.cut import Cut

from k2ssl.batch import AsrBatch, AudioBatch, PretrainBatch
from k2ssl.data.asr_dataset import AsrDataset
from k2ssl.data.audio_dataset import AudioDataset
from k2ssl.data.batch_loader import BatchLoader, OnError, SamplingConfig
from k2ssl.data.intake import Intake
from k2ssl.data.mixture import Corpora
from k2ssl.data.pretrain_dataset import LabelSource, PretrainDataset

__all__ = ["BatchLoader", "Corpora", "OnError", "asr_loader", "audio_loader", "pretrain_loader"]


def audio_loader(
    cuts: Iterable[Cut],
    *,
    max_duration: float,
    sample_rate: int = 16000,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = False,
    normalize: bool = False,
    pin_memory: bool = False,
    on_error: OnError | None = None,
) -> BatchLoader[AudioBatch]:
    """Whole cuts for labelling: every cut exactly once over all ranks, zero-padded, batched by duration.

    A cut longer than half of `max_duration` is a batch alone. A rank may get one batch more than another, and none if there are few.

    Args:
        cuts: lazy or not; iterated once per epoch.
        max_duration: seconds of audio in a batch, padding included.
        normalize: bring every cut to zero mean and unit variance.
        on_error: told (cut id, reason) of every cut whose audio cannot be read, on the rank whose cut it is, and on rank 0 of every cut
            without a single sample; None raises on the former.
        sample_rate, num_workers, rank, world_size, seed, epoch, pin_memory: see `BatchLoader`.
    """
    intake = Intake(sample_rate, on_refusal=on_error if rank == 0 else None)
    sampling = SamplingConfig(max_duration, shuffle=shuffle, drop_incomplete=False)
    return BatchLoader(
        Corpora((cuts,)),
        intake,
        AudioDataset(normalize),
        sampling,
        crop_seconds=None,
        rank=rank,
        world_size=world_size,
        seed=seed,
        epoch=epoch,
        num_workers=num_workers,
        pin_memory=pin_memory,
        on_error=on_error,
    )


def pretrain_loader(
    cuts: Iterable[Cut] | Corpora,
    stores: Sequence[LabelSource],
    *,
    max_duration: float,
    quadratic_duration: float | None = None,
    num_buckets: int = 30,
    buffer_size: int = 20000,
    shuffle: bool = True,
    min_seconds: float = 2.0,
    max_seconds: float = 15.625,
    sample_rate: int = 16000,
    normalize: bool = False,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    epoch: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    on_error: OnError | None = None,
) -> BatchLoader[PretrainBatch]:
    """Random crops with labels; every rank gets the same number of batches.

    Args:
        cuts: a cut set, or several with weights.
        stores: one label store per label set.
        max_duration: seconds of audio in a batch of one rank. An utterance counts with what is left of it after the crop to `max_seconds`.
        min_seconds: shorter utterances are left out; longer ones than `max_seconds` are cropped, never left out.
        normalize: see `PretrainDataset`.
        quadratic_duration, num_buckets, buffer_size, shuffle: see `SamplingConfig`.
        sample_rate, rank, world_size, seed, epoch, num_workers, pin_memory, on_error: see `BatchLoader`.
    """
    sampling = SamplingConfig(max_duration, quadratic_duration, num_buckets, buffer_size, shuffle=shuffle)
    dataset = PretrainDataset(stores, sample_rate=sample_rate, max_seconds=max_seconds, normalize=normalize, seed=seed)
    return BatchLoader(
        cuts if isinstance(cuts, Corpora) else Corpora((cuts,)),
        Intake(sample_rate, min_seconds),
        dataset,
        sampling,
        crop_seconds=max_seconds,
        rank=rank,
        world_size=world_size,
        seed=seed,
        epoch=epoch,
        num_workers=num_workers,
        pin_memory=pin_memory,
        on_error=on_error,
    )


def asr_loader(
    cuts: Iterable[Cut] | Corpora,
    *,
    max_duration: float,
    quadratic_duration: float | None = None,
    num_buckets: int = 30,
    buffer_size: int = 20000,
    shuffle: bool = True,
    drop_incomplete: bool = True,
    min_seconds: float = 0.0,
    max_seconds: float | None = None,
    sample_rate: int = 16000,
    normalize: bool = False,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    epoch: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    on_error: OnError | None = None,
) -> BatchLoader[AsrBatch]:
    """Whole utterances with transcripts, zero-padded. Utterances with an empty transcript are left out and counted.

    Args:
        cuts: a cut set, or several with weights.
        max_duration: seconds of audio in a batch of one rank, padding included.
        drop_incomplete: True for training: every rank gets the same number of batches. False for decoding: every utterance exactly once.
        min_seconds, max_seconds: utterances outside are left out and counted; None: none is too long.
        normalize: see `AsrDataset`.
        quadratic_duration, num_buckets, buffer_size, shuffle: see `SamplingConfig`.
        sample_rate, rank, world_size, seed, epoch, num_workers, pin_memory, on_error: see `BatchLoader`.
    """
    sampling = SamplingConfig(max_duration, quadratic_duration, num_buckets, buffer_size, shuffle=shuffle, drop_incomplete=drop_incomplete)
    return BatchLoader(
        cuts if isinstance(cuts, Corpora) else Corpora((cuts,)),
        Intake(sample_rate, min_seconds, max_seconds, need_text=True),
        AsrDataset(normalize),
        sampling,
        crop_seconds=None,
        rank=rank,
        world_size=world_size,
        seed=seed,
        epoch=epoch,
        num_workers=num_workers,
        pin_memory=pin_memory,
        on_error=on_error,
    )
