"""Loaders: batches for labelling, pre-training and recognition."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lhotse.cut import Cut

from k2ssl.batch import AsrBatch, AudioBatch, PretrainBatch
from k2ssl.data.asr_dataset import AsrDataset
from k2ssl.data.audio_dataset import AudioDataset
from k2ssl.data.batch_loader import BatchLoader, LoaderOptions, OnError, SamplingConfig
from k2ssl.data.intake import Intake
from k2ssl.data.mixture import Corpora
from k2ssl.data.pretrain_dataset import LabelSource, PretrainDataset
from k2ssl.data.speed import ChangedSpeed

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from k2ssl.data.tokenizer import Tokenizer, Unknown

__all__ = ["BatchLoader", "Corpora", "LoaderOptions", "OnError", "asr_loader", "audio_loader", "pretrain_loader"]


def audio_loader(
    cuts: Iterable[Cut],
    *,
    max_duration: float,
    shuffle: bool = False,
    sample_rate: int = 16000,
    normalize: bool = False,
    **options: Unpack[LoaderOptions],
) -> BatchLoader[AudioBatch]:
    """Whole cuts for labelling: every cut exactly once over all ranks, zero-padded, batched by duration.

    A cut longer than half of `max_duration` is a batch alone. A rank may get one batch more than another, and none if there are few.

    Args:
        cuts: lazy or not; iterated once per epoch.
        max_duration: seconds of audio in a batch, padding included.
        shuffle: see `SamplingConfig`.
        sample_rate: of the batches, Hz; other audio is resampled.
        normalize: bring every cut to zero mean and unit variance.
        options: see `LoaderOptions`. `on_error` is also told of every cut without a single sample, on rank 0.
    """
    intake = Intake(sample_rate, on_refusal=options.get("on_error") if options.get("rank", 0) == 0 else None)
    sampling = SamplingConfig(max_duration, shuffle=shuffle, drop_incomplete=False)
    return BatchLoader(Corpora((cuts,)), intake, AudioDataset(normalize), sampling, **options)


def pretrain_loader(
    cuts: Iterable[Cut] | Corpora,
    stores: Sequence[LabelSource],
    *,
    max_duration: float,
    quadratic_duration: float | None = None,
    num_buckets: int = 30,
    buffer_size: int = 20000,
    shuffle: bool = True,
    drop_incomplete: bool = True,
    min_seconds: float = 2.0,
    max_seconds: float = 15.625,
    crop_step: float = 0.0,
    sample_rate: int = 16000,
    normalize: bool = False,
    **options: Unpack[LoaderOptions],
) -> BatchLoader[PretrainBatch]:
    """Random crops with labels.

    Utterances that any of the stores has no labels for are left out and counted: labelling leaves out what it cannot read.

    Args:
        cuts: a cut set, or several with weights.
        stores: one label store per label set.
        max_duration: seconds of audio in a batch of one rank. An utterance counts with what is left of it after the crop to `max_seconds`.
        quadratic_duration, num_buckets, buffer_size, shuffle: see `SamplingConfig`.
        drop_incomplete: True for training: every rank gets the same number of batches. False for validation: every utterance exactly once.
        min_seconds: shorter utterances are left out; longer ones than `max_seconds` are cropped, never left out.
        sample_rate: of the batches, Hz; other audio is resampled.
        crop_step, normalize: see `PretrainDataset`.
        options: see `LoaderOptions`.
    """
    seed = options.get("seed", 0)
    dataset = PretrainDataset(stores, sample_rate=sample_rate, max_seconds=max_seconds, crop_step=crop_step, normalize=normalize, seed=seed)
    intake = Intake(sample_rate, min_seconds, labelled=stores)
    sampling = SamplingConfig(max_duration, quadratic_duration, num_buckets, buffer_size, shuffle=shuffle, drop_incomplete=drop_incomplete)
    return BatchLoader(_corpora(cuts), intake, dataset, sampling, crop_seconds=max_seconds, **options)


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
    speeds: tuple[float, ...] = (),
    sample_rate: int = 16000,
    normalize: bool = False,
    tokenizer: Tokenizer | None = None,
    unknown: Unknown = "refuse",
    **options: Unpack[LoaderOptions],
) -> BatchLoader[AsrBatch]:
    """Whole utterances with transcripts, zero-padded. Utterances with an empty transcript are left out and counted.

    Args:
        cuts: a cut set, or several with weights.
        max_duration: seconds of audio in a batch of one rank, padding included.
        quadratic_duration, num_buckets, buffer_size, shuffle: see `SamplingConfig`.
        drop_incomplete: True for training: every rank gets the same number of batches. False for decoding: every utterance exactly once.
        min_seconds, max_seconds: utterances outside, as long as they are heard, are left out and counted; None: none is too long.
        speeds: see `ChangedSpeed`.
        sample_rate: of the batches, Hz; other audio is resampled.
        normalize, tokenizer, unknown: see `AsrDataset`. Iterating raises a `ValueError` for a transcript that is refused.
        options: see `LoaderOptions`.
    """
    intake = Intake(sample_rate, min_seconds, max_seconds, need_text=True)
    sampling = SamplingConfig(max_duration, quadratic_duration, num_buckets, buffer_size, shuffle=shuffle, drop_incomplete=drop_incomplete)
    mixed = _corpora(cuts)
    corpora = ChangedSpeed(mixed.sets, mixed.weights, mixed.repeat, speeds)
    return BatchLoader(corpora, intake, AsrDataset(normalize, tokenizer, unknown), sampling, **options)


def _corpora(cuts: Iterable[Cut] | Corpora) -> Corpora:
    return cuts if isinstance(cuts, Corpora) else Corpora((cuts,))
