"""Align transcripts with their audio by a CTC head: when every word, or every token, was said.

    python -m k2ssl.bin.align exp/ctc/checkpoints/step-000010000.pt --cuts cuts_train.jsonl.gz --output words.ctm
    python -m k2ssl.bin.align step-000010000.pt --weights average --cuts cuts_train.jsonl.gz --unit token --output letters.ctm

OUTPUT has a line for each word, `utterance 1 begin duration word confidence`: seconds from the beginning of the utterance, and the mean
probability of its tokens. Other programs read it, among them k2ssl.bin.label_report (--compare.alignments). Utterances that cannot be aligned
are named in OUTPUT.unaligned.tsv with the reason: no transcript, characters that the tokenizer does not have, or fewer frames than their tokens
take. A head emits a token somewhere within its sound, so that times are near the truth and no more; see
k2ssl/decode/word_times.py for where a word ends. Exit status: 0 done, 1 the run failed, or nothing could be aligned, 2 wrong usage or
settings, 130 interrupted, with nothing written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from k2ssl.atomic_file import atomic_file
from k2ssl.bin.cluster_cuts import Chained, CutLists, cut_totals, id_checker
from k2ssl.bin.cluster_features import choose_device
from k2ssl.bin.decode_arguments import with_names
from k2ssl.bin.decode_model import TrainedModel
from k2ssl.bin.program import run_program
from k2ssl.bin.progress import AudioProgress
from k2ssl.bin.recognition_job import RecognitionJob
from k2ssl.bin.refusal import refusing
from k2ssl.decode.alignment import Alignment, align
from k2ssl.decode.results import Word
from k2ssl.decode.word_times import word_times
from k2ssl.train.ledger import Ledger

if TYPE_CHECKING:  # slow to import, and not needed to show --help
    from lhotse.cut import Cut

    from k2ssl.bin.decode_data import About, Utterances

_CHANNEL = 1
_LISTED = 5  # utterances that the summary names

Unaligned = dict[str, str]  # why, by utterance


@dataclass(frozen=True, kw_only=True)
class Align(RecognitionJob):
    """Settings of the program.

    Attributes:
        checkpoints: training checkpoints of k2ssl.bin.finetune, with a CTC head; the first arguments of the command line are these too. Of
            several the mean of the weights is taken.
        cuts: manifests of the utterances with their transcripts (.jsonl.gz).
        output: CTM file to write; a list of what could not be aligned lies beside it.
        unit: what a line is: a word, or a token of the checkpoint's tokenizer.
    """

    unit: Literal["word", "token"] = "word"


def run_alignment(job: Align) -> None:
    """Do the job.

    Raises:
        ConfigError: OUTPUT exists; a checkpoint without a CTC head; ids that a CTM file cannot hold.
        ValueError: nothing could be aligned.
    """
    device = torch.device(choose_device(job.device))
    job.check_inputs()
    output = job.check_file_and_process("; give each a part of the manifests")
    with refusing():
        trained = job.load_ctc_model(device, "which alignment takes")
        cuts = Chained(CutLists(job.cuts).open())
        totals = cut_totals(cuts, _id_checker())
    unaligned: Unaligned = {}
    lines = 0
    with Ledger(output.parent, "align", device, 1) as ledger, atomic_file(output) as file:
        with AudioProgress("align", totals.seconds, quiet=job.quiet) as progress:
            for batch in batches(job, trained, cuts, unaligned):
                for about, words in aligned(batch, trained, job.unit, unaligned):
                    file.write("".join(ctm_line(about.id, word, confidence) for word, confidence in words).encode())
                    lines += len(words)
                progress.add(batch.seconds)
                ledger.add(audio_seconds=batch.seconds)
        if not lines:
            raise ValueError(f"none of {totals.num_cuts:,} utterances could be aligned: {_reasons(unaligned)}")
    listed = write_unaligned(output, unaligned)
    print(f"{output}: {lines:,} {job.unit}s of {totals.num_cuts - len(unaligned):,} utterances")
    if unaligned:
        print(f"{len(unaligned):,} utterances could not be aligned, see {listed}: {_reasons(unaligned)}")


def batches(job: Align, trained: TrainedModel, cuts: Iterable[Cut], unaligned: Unaligned) -> Iterator[Utterances]:
    """All cuts that have a frame, by length; the others, and those that cannot be read, go to `unaligned`."""
    from k2ssl.bin.decode_data import UtteranceDataset, WithFrames, utterance_loader

    for cut in WithFrames(cuts, trained.sample_rate, trained.has_frame, False):
        unaligned[cut.id] = "its audio is too short for a frame"
    yield from utterance_loader(
        WithFrames(cuts, trained.sample_rate, trained.has_frame, True),
        UtteranceDataset(trained.normalize, trained.tokenizer.normalization),
        sample_rate=trained.sample_rate,
        max_duration=job.loader.max_duration,
        num_workers=job.loader.num_workers,
        pin_memory=trained.device.type == "cuda",
        on_error=unaligned.__setitem__,
    )


def aligned(batch: Utterances, trained: TrainedModel, unit: str, unaligned: Unaligned) -> Iterator[tuple[About, list[tuple[Word, float]]]]:
    """Words, or tokens, and their confidences, of the utterances of a batch that can be aligned; the others go to `unaligned`."""
    tokens: list[list[int]] = []
    for about in batch.about:
        try:
            tokens.append(trained.tokenizer.encode(about.ref or ""))
        except ValueError as error:
            unaligned[about.id] = str(error) if about.ref else "it has no transcript"
            tokens.append([])
    if not any(tokens):
        return
    lens = torch.tensor([len(row) for row in tokens])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.int64) for row in tokens], batch_first=True)
    for n, (about, found) in enumerate(zip(batch.about, _align_audio(batch, trained, padded, lens), strict=True)):
        if found is None:
            frames = trained.num_frames(int(batch.audio_lens[n]))
            unaligned[about.id] = f"its {frames} frames are too few for its {len(tokens[n])} tokens"
        elif tokens[n]:
            yield about, timed(found, trained, int(batch.audio_lens[n]), unit)


@torch.no_grad()
def _align_audio(batch: Utterances, trained: TrainedModel, tokens: Tensor, token_lens: Tensor) -> list[Alignment | None]:
    head = trained.model.ctc
    assert head is not None
    output = trained.encode(batch.audio, batch.audio_lens)
    return align(head(output.frames), output.lens, tokens, token_lens, trained.tokenizer.blank)


def timed(found: Alignment, trained: TrainedModel, num_samples: int, unit: str) -> list[tuple[Word, float]]:
    """The words or tokens of an alignment; a word's confidence is the mean over all frames of its tokens."""
    tokenizer = trained.tokenizer
    if unit == "word":
        texts, numbers = tokenizer.decode(found.tokens).split(), tokenizer.word_numbers(found.tokens)
    else:
        texts, numbers = [tokenizer.symbols[token] for token in found.tokens], list(range(len(found.tokens)))
    num_frames, seconds = trained.num_frames(num_samples), num_samples / trained.sample_rate
    words = word_times(texts, numbers, found.begins, trained.seconds_per_frame, num_frames, found.ends, seconds=seconds)
    sums, frames = [0.0] * len(texts), [0] * len(texts)
    for number, begin, end, confidence in zip(numbers, found.begins, found.ends, found.confidences, strict=True):
        if number >= 0:
            sums[number] += confidence * (end - begin)
            frames[number] += end - begin
    return [(word, total / count) for word, total, count in zip(words, sums, frames, strict=True)]


def ctm_line(utterance: str, word: Word, confidence: float) -> str:
    """One line of a CTM file."""
    return f"{utterance} {_CHANNEL} {word.begin:.3f} {word.end - word.begin:.3f} {word.text} {confidence:.3f}\n"


def write_unaligned(output: Path, unaligned: Unaligned) -> Path:
    """OUTPUT.unaligned.tsv, utterance and reason; none, and an old one removed, if all could be aligned."""
    path = output.with_name(f"{output.name}.unaligned.tsv")
    if not unaligned:
        path.unlink(missing_ok=True)
        return path
    with atomic_file(path) as file:
        file.write("".join(f"{name}\t{' '.join(reason.split())}\n" for name, reason in sorted(unaligned.items())).encode())
    return path


def _reasons(unaligned: Unaligned) -> str:
    named = "; ".join(f"{name}: {reason}" for name, reason in list(unaligned.items())[:_LISTED])
    return named + (f"; and {len(unaligned) - _LISTED:,} more" if len(unaligned) > _LISTED else "")


def _id_checker() -> Callable[[Cut], None]:
    """A function that refuses cuts whose id a CTM file cannot hold, or that another cut has."""
    distinct = id_checker("align")

    def check(cut: Cut) -> None:
        if cut.id.split() != [cut.id] or ";;" in cut.id:
            raise ValueError(
                f"cut id {cut.id!r}: a CTM file cannot hold white space or ';;' in a name; rename the file, make the manifest anew"
            )
        distinct(cut)

    return check


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = with_names(sys.argv[1:] if argv is None else argv, "checkpoints", "checkpoints")
    return run_program(run_alignment, Align, arguments, "align", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
