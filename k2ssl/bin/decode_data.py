"""Batches to decode: every cut of a manifest, whatever its length, with or without a transcript."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lhotse.cut import Cut
from torch import Tensor

from k2ssl.data.audio import num_samples, read_padded
from k2ssl.data.audio_dataset import BatchDataset, Loaded, Request, as_pairs
from k2ssl.data.batch_loader import BatchLoader, SamplingConfig
from k2ssl.data.intake import Intake, transcript
from k2ssl.data.loader import Corpora
from k2ssl.data.tokenizer import NormalizationConfig
from k2ssl.decode.results import Result


@dataclass(frozen=True)
class About:
    """What the manifest says of an utterance, its transcript normalised as its tokenizer does it; None where it says nothing."""

    id: str
    duration: float
    ref: str | None
    speaker: str | None

    def result(self, hyp: str = "", score: float = 0.0, **found: Any) -> Result:
        """What decoding found in it."""
        return Result(self.id, hyp, score, self.duration, self.ref, self.speaker, **found)


@dataclass(frozen=True)
class Utterances:
    """A batch to decode.

    Attributes:
        audio: (N, S) float32 waveforms, zero-padded at the end.
        audio_lens: (N,) int64 sample counts on the CPU.
        about: the N utterances.
    """

    audio: Tensor
    audio_lens: Tensor
    about: tuple[About, ...]

    @property
    def seconds(self) -> float:
        """Of audio, padding not counted."""
        return sum(about.duration for about in self.about)

    def pin_memory(self) -> Utterances:
        """The same batch in page-locked memory."""
        return replace(self, audio=self.audio.pin_memory())


class UtteranceDataset(BatchDataset[Utterances]):
    """Whole cuts, with or without transcripts.

    Args:
        normalize: bring every utterance to zero mean and unit variance.
        text: how transcripts are normalised.
    """

    def __init__(self, normalize: bool, text: NormalizationConfig) -> None:
        super().__init__(normalize)
        self.text = text

    def __getitem__(self, request: Request) -> Loaded[Utterances]:
        audio, lens, read, failures = read_padded(request.cuts, self.normalize)
        batch = Utterances(audio, lens, tuple(about(cut, self.text) for cut in read)) if read else None
        return Loaded(batch, as_pairs(failures))


def about(cut: Cut, text: NormalizationConfig) -> About:
    """What the manifest says of a cut. A supervision without text does not say that nothing was spoken; one with an empty text does."""
    known = any(supervision.text is not None for supervision in cut.supervisions)
    speakers = {supervision.speaker for supervision in cut.supervisions}
    return About(cut.id, cut.duration, text(transcript(cut)) if known else None, speakers.pop() if len(speakers) == 1 else None)


def utterance_loader(
    cuts: Iterable[Cut],
    dataset: UtteranceDataset,
    *,
    sample_rate: int,
    max_duration: float,
    num_workers: int,
    pin_memory: bool,
    on_error: Callable[[str, str], None],
) -> BatchLoader[Utterances]:
    """Every cut once, in batches of similar lengths; a cut longer than half of `max_duration` is a batch alone.

    Args:
        cuts: each with audio enough for a sample.
        dataset: reads them.
        sample_rate: Hz; other audio is resampled, which is said once.
        max_duration: seconds of audio in a batch, padding included.
        num_workers, pin_memory, on_error: see `LoaderOptions`.
    """
    sampling = SamplingConfig(max_duration, shuffle=False, drop_incomplete=False)
    options = {"num_workers": num_workers, "pin_memory": pin_memory, "on_error": on_error}
    return BatchLoader(Corpora((cuts,)), Intake(sample_rate), dataset, sampling, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class WithFrames:
    """The cuts of a list that have a frame, or those that have none; can be iterated over again."""

    cuts: Iterable[Cut]
    sample_rate: int
    has_frame: Callable[[int], bool]
    wanted: bool

    def __iter__(self) -> Iterator[Cut]:
        return (cut for cut in self.cuts if self.has_frame(num_samples(cut, self.sample_rate)) is self.wanted)
