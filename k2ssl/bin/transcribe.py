"""Write down what is said in audio files.

    python -m k2ssl.bin.transcribe exp/both/checkpoints/step-000010000.pt talk.flac other.mp3
    python -m k2ssl.bin.transcribe checkpoint.pt talk.flac --format srt --output talk.srt
    cat talk.wav | python -m k2ssl.bin.transcribe checkpoint.pt - > talk.txt

Files of any rate, length and number of channels that libsndfile, torchaudio or ffmpeg reads. The transcript goes to standard output or
to --output, everything else to standard error. A file that cannot be read is named, and the others are done. Exit status: 0 done; 1 a file
could not be read, or the run failed; 2 wrong usage or settings; 130 interrupted. See docs/decoding.md.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

from k2ssl.atomic_file import atomic_file
from k2ssl.bin.cluster_cuts import check_device, check_files
from k2ssl.bin.decode_arguments import with_names
from k2ssl.bin.decode_methods import Method, Recognizer, SearchConfig, build_recognizer, options_of
from k2ssl.bin.decode_model import TrainedModel, check_checkpoints, load_trained
from k2ssl.bin.output_file import check_output
from k2ssl.bin.program import run_program
from k2ssl.bin.progress import AudioProgress
from k2ssl.bin.refusal import refusing
from k2ssl.bin.transcribe_audio import STDIN, AudioReader, check_windows, recognize
from k2ssl.bin.transcribe_formats import Format, Transcript, formatted, name_of
from k2ssl.models.load import Weights
from k2ssl.train.precision import Precision, choose_precision

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Transcribe:
    """Settings of the program.

    Attributes:
        checkpoint: training checkpoint of k2ssl.bin.finetune; the first argument of the command line is this too.
        audio: the files; - is standard input. The arguments after the first are these too.
        format: text, a line for each file; json, a line for each file with the times of all words; srt, subtitles, of one file; ctm, a line
            for each word.
        output: file to write to; none: standard output.
        overwrite: replace OUTPUT if it exists.
        method: the search, as for k2ssl.bin.decode; auto: modified-beam if there is a transducer, else ctc-greedy.
        search: its options.
        weights: raw, as the last optimizer step left them, or average, the mean over all steps that a training checkpoint holds.
        window_seconds: longer recordings are recognised in windows of this length, s.
        overlap_seconds: by so much neighbouring windows overlap, s.
        batch_windows: windows of a recording that are recognised at a time.
        precision: number format of the encoder; auto is bfloat16 on GPUs that have it.
        device: auto, cpu, cuda or cuda:NUMBER; auto takes the GPU if there is one.
    """

    checkpoint: str
    audio: tuple[str, ...]
    format: Format = "text"
    output: str | None = None
    overwrite: bool = False
    method: Literal["auto", Method] = "auto"
    search: SearchConfig = field(default_factory=SearchConfig)
    weights: Weights = "raw"
    window_seconds: float = 30.0
    overlap_seconds: float = 2.0
    batch_windows: int = 4
    precision: Precision = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.audio:
            raise ValueError("Transcribe: audio names no file, at least one is needed")
        if self.format == "srt" and len(self.audio) > 1:
            raise ValueError(f"Transcribe: format is 'srt', which is for one file, and audio names {len(self.audio)}")
        names = [name_of(path) for path in self.audio]
        if self.format == "ctm" and (twice := [name for name in names if names.count(name) > 1]):
            raise ValueError(f"Transcribe: format is 'ctm', in which two files of audio would have the name {twice[0]!r}; do them apart")
        if self.audio.count(STDIN) > 1:
            raise ValueError("Transcribe: audio names standard input (-) more than once")
        if not (0 < self.overlap_seconds <= self.window_seconds / 2 and self.window_seconds <= 10**5):
            raise ValueError(
                f"Transcribe: window_seconds is {self.window_seconds} and overlap_seconds {self.overlap_seconds}, allowed are windows of at "
                "most 100,000 s and overlaps > 0 and at most half of them"
            )
        if self.batch_windows < 1:
            raise ValueError(f"Transcribe: batch_windows is {self.batch_windows}, allowed are whole numbers >= 1")
        if self.search.nbest is not None:
            raise ValueError(
                f"Transcribe: search.nbest is {self.search.nbest}, which has no effect here; k2ssl.bin.decode writes n-best lists"
            )
        if self.method != "auto":
            options_of(self.method, self.search)
        check_device(self.device, "Transcribe: ")


def transcribe(job: Transcribe) -> None:
    """Do the job.

    Raises:
        ValueError: some files could not be read; the others are transcribed.
    """
    from k2ssl.bin.cluster_features import choose_device

    device = torch.device(choose_device(job.device))
    check_checkpoints((job.checkpoint,), job.weights, None)
    check_files(**job.search.files())
    if job.output is not None:
        files = tuple(path for path in job.audio if path != STDIN)
        check_output(job.output, job.overwrite, checkpoint=job.checkpoint, audio=files, **job.search.files())
    with refusing():
        trained = load_trained((job.checkpoint,), job.weights, None, device, choose_precision(job.precision, device))
        recognizer = build_recognizer(_method(job, trained), job.search, trained)
        check_windows(trained, job.window_seconds, job.overlap_seconds)
    unread = 0
    with _sink(job.output) as write, AudioProgress("transcribe", None) as progress:
        reader = AudioReader(trained.sample_rate, trained.normalize)
        for path in job.audio:
            try:
                audio = reader.read(path)
            except ValueError as error:
                _log.error("transcribe: %s", error)
                unread += 1
                if job.format == "text":
                    write("\n")  # lines are those of the files
                continue
            transcript = _transcript(path, audio, recognizer, job)
            write(formatted(transcript, job.format))
            progress.add(transcript.seconds, path)
        if unread == len(job.audio) and job.output is not None:  # a file without anything from them gets no name
            raise ValueError(f"none of {len(job.audio)} files could be read, see above; {job.output} is not written")
    if unread:
        raise ValueError(f"{unread} of {len(job.audio)} files could not be read, see above")


def _method(job: Transcribe, trained: TrainedModel) -> Method:
    if job.method != "auto":
        return job.method
    return "ctc-greedy" if trained.model.transducer is None else "modified-beam"


def _transcript(path: str, audio: torch.Tensor, recognizer: Recognizer, job: Transcribe) -> Transcript:
    heard = recognize(audio, recognizer, job.window_seconds, job.overlap_seconds, job.batch_windows)
    words = recognizer.words(heard, len(audio))
    return Transcript(path, len(audio) / recognizer.trained.sample_rate, words)


@contextmanager
def _sink(output: str | None) -> Iterator[Callable[[str], object]]:
    """Where transcripts go: a file that gets its name when all is written, or standard output at once."""
    if output is None:
        yield lambda text: print(text, end="", flush=True)
        return
    with atomic_file(output) as file:
        yield lambda text: file.write(text.encode())


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = with_names(sys.argv[1:] if argv is None else argv, "checkpoint", "audio")
    return run_program(transcribe, Transcribe, arguments, "transcribe", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
