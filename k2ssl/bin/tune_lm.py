"""Find the weights of a language model, and of the length of texts, that make the fewest word errors on a development set.

    python -m k2ssl.bin.tune_lm step-000010000.pt --cuts cuts_dev.jsonl.gz --method ctc-prefix-beam --search.lm tokens.arpa \\
        --lm-scales 0 0.2 0.4 0.6 --token-scores 0 0.5 1 --output best.json
    python -m k2ssl.bin.decode best.json step-000010000.pt --cuts cuts_test.jsonl.gz --output exp/test

The encoder runs once; its frames are kept in memory (about 400 MB for an hour of a Base model at 50 Hz) and searched with every combination
of the values given. Prints a table, best first, and writes OUTPUT, a file of settings for k2ssl.bin.decode. Exit status: 0 done, 1 the run
failed, 2 wrong usage or settings, 130 interrupted, with nothing written.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from k2ssl.atomic_file import atomic_file, writable_folder
from k2ssl.bin.cluster_cuts import Chained, CutLists, LoaderConfig, check_device, check_files, cut_totals
from k2ssl.bin.cluster_features import choose_device
from k2ssl.bin.decode_arguments import with_names
from k2ssl.bin.decode_methods import Method, SearchConfig, build_search, options_of
from k2ssl.bin.decode_model import TrainedModel, check_checkpoints, load_trained
from k2ssl.bin.program import run_program
from k2ssl.bin.progress import AudioProgress
from k2ssl.config import ConfigError
from k2ssl.decode.wer import ErrorCounts, count_errors
from k2ssl.models.load import Weights
from k2ssl.train.ledger import Ledger
from k2ssl.train.precision import Precision, choose_precision

if TYPE_CHECKING:
    from k2ssl.bin.decode_data import About
    from k2ssl.models.asr import AsrFrames

_GRID = {"lm_scales": "lm_scale", "token_scores": "token_score", "word_scores": "word_score"}  # what is varied, by setting


@dataclass(frozen=True)
class TuneLm:
    """Settings of the program.

    Attributes:
        checkpoints: training checkpoints of k2ssl.bin.finetune; the first arguments of the command line are these too. Of several the mean
            of the weights is taken.
        cuts: manifests of the development set, with transcripts (.jsonl.gz).
        output: file of settings to write, ending in .json.
        method: the search, as for k2ssl.bin.decode.
        search: its other options, such as the language model.
        lm_scales: weights of the language model to try; none: that of search.
        token_scores: what is added for every token, to try; none: that of search.
        word_scores: what is added for every word, to try; none: that of search.
        weights: raw, as the last optimizer step left them, or average, the mean over all steps that a training checkpoint holds.
        after: with averaged weights of one checkpoint: the checkpoint after which the range of steps begins.
        loader: how audio is read.
        precision: number format of the encoder.
        device: auto, cpu, cuda or cuda:NUMBER; auto takes the GPU if there is one.
        overwrite: replace OUTPUT if it exists.
        quiet: plain lines instead of a progress bar, for logs.
    """

    cuts: tuple[str, ...]
    output: str
    method: Method
    checkpoints: tuple[str, ...] = ()
    search: SearchConfig = field(default_factory=SearchConfig)
    lm_scales: tuple[float, ...] = ()
    token_scores: tuple[float, ...] = ()
    word_scores: tuple[float, ...] = ()
    weights: Weights = "raw"
    after: str | None = None
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    precision: Precision = "float32"
    device: str = "auto"
    overwrite: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        check_device(self.device, "TuneLm: ")
        if not self.cuts:
            raise ValueError("TuneLm: cuts names no manifest, at least one is needed")
        if not self.output.endswith(".json"):
            raise ValueError(f"TuneLm: output is {self.output!r}, a name that ends in .json is needed")
        if len(self.candidates()) < 2:
            raise ValueError(f"TuneLm: there is nothing to choose from: give several values for one of {', '.join(_GRID)}")
        for search in self.candidates():
            options_of(self.method, search)

    def candidates(self) -> list[SearchConfig]:
        """Every combination of the values."""
        given = {option: getattr(self, name) for name, option in _GRID.items() if getattr(self, name)}
        return [replace(self.search, **dict(zip(given, values, strict=True))) for values in product(*given.values())]


@dataclass(frozen=True)
class Trial:
    """What one combination makes of the development set."""

    search: SearchConfig
    counts: ErrorCounts

    @property
    def rate(self) -> float:
        """Errors per word."""
        return self.counts.errors / self.counts.reference


def tune(job: TuneLm) -> None:
    """Do the job.

    Raises:
        ValueError: OUTPUT exists; a cut without transcript, or audio that cannot be read; a model without the head of the method.
    """
    device = torch.device(choose_device(job.device))
    check_checkpoints(job.checkpoints, job.weights, job.after)
    check_files(cuts=job.cuts, **job.search.files())
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(f"{os.environ['WORLD_SIZE']} processes were started, this program runs in one")
    output = Path(job.output)
    if output.is_dir():
        raise ConfigError(f"output is {output}, which is a folder; a file is needed")
    if output.exists() and not job.overwrite:
        raise ConfigError(f"{output} exists; --overwrite True replaces it")
    writable_folder(output.parent)
    trained = load_trained(job.checkpoints, job.weights, job.after, device, choose_precision(job.precision, device))
    build_search(job.method, options_of(job.method, job.candidates()[0]), trained)  # before hours of encoding
    with Ledger(output.parent, "tune_lm", device, 1) as ledger:
        encoded, refs, unheard, seconds = encode_all(job, trained)
        ledger.add(audio_seconds=seconds)
        trials = []
        with AudioProgress("search", seconds * len(job.candidates()), quiet=job.quiet) as progress:
            for search in job.candidates():
                trials.append(Trial(search, unheard + errors_of(job.method, search, trained, encoded, refs)))
                progress.add(seconds, f"WER {trials[-1].rate:.2%}")
    trials.sort(key=lambda trial: trial.counts.errors)  # stable: of equal ones the first given
    print(table(job, trials))
    with atomic_file(output) as file:
        file.write((json.dumps({"method": job.method, "search": trials[0].search.given()}, indent=2) + "\n").encode())
    print(f"best        {output}")


@torch.no_grad()
def encode_all(job: TuneLm, trained: TrainedModel) -> tuple[list[AsrFrames], list[list[str]], ErrorCounts, float]:
    """Frames of all batches on the CPU, the transcripts of each, the errors in utterances without a frame, of which no search finds a word,
    and seconds of audio."""
    from k2ssl.bin.decode_data import UtteranceDataset, WithFrames, about, utterance_loader
    from k2ssl.models.asr import AsrFrames

    failures: list[str] = []
    everything, text = Chained(CutLists(job.cuts).open()), trained.tokenizer.normalization
    unheard = ErrorCounts()
    for cut in WithFrames(everything, trained.sample_rate, trained.has_frame, False):
        unheard += count_errors(_transcript(about(cut, text)), "")
    cuts = WithFrames(everything, trained.sample_rate, trained.has_frame, True)
    totals = cut_totals(cuts, lambda cut: None)
    loader = utterance_loader(
        cuts,
        UtteranceDataset(trained.normalize, text),
        sample_rate=trained.sample_rate,
        max_duration=job.loader.max_duration,
        num_workers=job.loader.num_workers,
        pin_memory=trained.device.type == "cuda",
        on_error=lambda cut_id, reason: failures.append(f"{cut_id}: {reason}"),
    )
    encoded: list[AsrFrames] = []
    refs: list[list[str]] = []
    with AudioProgress("encode", totals.seconds, quiet=job.quiet) as progress:
        for batch in loader:
            refs.append([_transcript(utterance) for utterance in batch.about])
            output = trained.encode(batch.audio, batch.audio_lens)
            encoded.append(AsrFrames(output.frames.cpu(), output.lens))
            progress.add(batch.seconds)
    if failures:
        raise ValueError(f"{len(failures)} utterances cannot be read: {'; '.join(failures[:5])}")
    if not any(ref for row in refs for ref in row):
        raise ValueError("cuts: the transcripts have no words, so that there are no errors to count")
    return encoded, refs, unheard, totals.seconds


def _transcript(utterance: About) -> str:
    if utterance.ref is None:
        raise ValueError(f"cuts: {utterance.id!r} has no transcript, a development set needs one of every utterance")
    return utterance.ref


@torch.no_grad()
def errors_of(
    method: Method, search: SearchConfig, trained: TrainedModel, encoded: Sequence[AsrFrames], refs: Sequence[Sequence[str]]
) -> ErrorCounts:
    """Word errors of one combination over all batches."""
    from k2ssl.models.asr import AsrFrames

    run = build_search(method, options_of(method, search), trained)
    counts = ErrorCounts()
    for output, texts in zip(encoded, refs, strict=True):
        found = run(AsrFrames(output.frames.to(trained.device), output.lens))
        for text, hypotheses in zip(texts, found, strict=True):
            counts += count_errors(text, trained.tokenizer.decode(hypotheses[0].tokens) if hypotheses else "")
    return counts


def table(job: TuneLm, trials: Sequence[Trial]) -> str:
    """All combinations, one a line, in the order of `trials`."""
    names = [option for name, option in _GRID.items() if getattr(job, name)]
    rows = [[*names, "WER", "sub", "del", "ins"]]
    for trial in trials:
        counts = trial.counts
        values: list[Any] = [f"{getattr(trial.search, name):g}" for name in names]
        rows.append([*values, f"{trial.rate:.2%}", str(counts.substitutions), str(counts.deletions), str(counts.insertions)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = with_names(sys.argv[1:] if argv is None else argv, "checkpoints", "checkpoints")
    return run_program(tune, TuneLm, arguments, "tune_lm", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
