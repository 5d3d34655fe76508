"""Write the log-probabilities of a CTC head to a file, for searches in another environment, such as k2ssl.lattice.decode_scores.

    python -m k2ssl.bin.write_scores exp/ctc/checkpoints/step-000010000.pt --cuts cuts_test.jsonl.gz --output scores.npz

OUTPUT holds them for every utterance, with its name, its transcript and the tokenizer's symbols (k2ssl/lattice/score_file.py says how); it is
held in memory until it is written, 4 bytes a number: 20 MB for a minute of 50 frames a second and 2,000 tokens. Exit status: 0 done, 1 the
run failed, or audio could not be read, 2 wrong usage or settings, 130 interrupted, with nothing written.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch

from k2ssl.atomic_file import atomic_file
from k2ssl.bin.cluster_cuts import Chained, CutLists, cut_totals, id_checker
from k2ssl.bin.cluster_features import choose_device
from k2ssl.bin.decode import batches
from k2ssl.bin.decode_arguments import with_names
from k2ssl.bin.decode_model import TrainedModel
from k2ssl.bin.program import run_program
from k2ssl.bin.progress import AudioProgress
from k2ssl.bin.recognition_job import RecognitionJob
from k2ssl.bin.refusal import refusing
from k2ssl.lattice.score_file import Scores, write_scores
from k2ssl.train.ledger import Ledger

_LISTED = 5  # utterances that a message names


@dataclass(frozen=True, kw_only=True)
class WriteScores(RecognitionJob):
    """Settings of the program.

    Attributes:
        checkpoints: training checkpoints of k2ssl.bin.finetune, with a CTC head; the first arguments of the command line are these too. Of
            several the mean of the weights is taken.
        cuts: manifests of the utterances, with transcripts or without (.jsonl.gz).
        output: file to write (.npz).
    """


def run(job: WriteScores) -> None:
    """Do the job.

    Raises:
        ConfigError: OUTPUT exists; a checkpoint without a CTC head; two cuts with one id.
        ValueError: audio that cannot be read.
    """
    device = torch.device(choose_device(job.device))
    job.check_inputs()
    output = job.check_file_and_process("; give each a part of the manifests")
    with refusing():
        trained = job.load_ctc_model(device, "whose scores are written")
        cuts = Chained(CutLists(job.cuts).open())
        totals = cut_totals(cuts, id_checker("score"))
    with (
        Ledger(output.parent, "write_scores", device, 1) as ledger,
        AudioProgress("score", totals.seconds, quiet=job.quiet) as progress,
    ):
        scores = score_all(job, trained, cuts, progress)
        ledger.add(audio_seconds=progress.seconds)
        with atomic_file(output) as file:
            write_scores(file, scores)
    print(f"scores      {output}: {len(scores.ids):,} utterances, {len(scores.log_probs):,} frames of {len(scores.symbols)} tokens")


@torch.no_grad()
def score_all(job: WriteScores, trained: TrainedModel, cuts: Chained, progress: AudioProgress) -> Scores:
    """The scores of every utterance, in the order of the manifests.

    Raises:
        ValueError: audio that cannot be read; names it.
    """
    head, failures, found = trained.model.ctc, list[tuple[str, str]](), {}
    assert head is not None
    none = np.zeros((0, trained.tokenizer.vocab_size), dtype=np.float32)
    for batch in batches(job, trained, cuts, trained.device, failures):
        if trained.has_frame(int(batch.audio_lens.min())):
            output = trained.encode(batch.audio, batch.audio_lens)
            log_probs = head(output.frames).float().cpu().numpy()
            rows = [row[:length] for row, length in zip(log_probs, output.lens.tolist(), strict=True)]
        else:
            rows = [none] * len(batch.about)
        found.update({about.id: (about, row) for about, row in zip(batch.about, rows, strict=True)})
        progress.add(batch.seconds)
    if failures:
        named = "; ".join(f"{cut_id}: {reason}" for cut_id, reason in failures[:_LISTED])
        raise ValueError(f"{len(failures)} utterances cannot be read: {named}")
    ordered = [found[cut.id] for cut in cuts]
    about = [one for one, _ in ordered]
    tokenizer = trained.tokenizer
    return Scores(
        ids=np.array([one.id for one in about]),
        refs=np.array([one.ref or "" for one in about]),
        has_ref=np.array([one.ref is not None for one in about]),
        seconds=np.array([one.duration for one in about]),
        lens=np.array([len(row) for _, row in ordered], dtype=np.int64),
        log_probs=np.concatenate([row for _, row in ordered]),
        symbols=np.array(tokenizer.symbols),
        delimiter=trained.delimiter,
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = with_names(sys.argv[1:] if argv is None else argv, "checkpoints", "checkpoints")
    return run_program(run, WriteScores, arguments, "write_scores", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
