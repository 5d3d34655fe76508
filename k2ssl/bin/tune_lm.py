"""Find the weights of a language model, and of the length of texts, that make the fewest word errors on a development set.

    python -m k2ssl.bin.tune_lm step-000010000.pt --cuts cuts_dev.jsonl.gz --method ctc-prefix-beam --search.lm tokens.arpa \\
        --lm-scales 0 0.2 0.4 0.6 --token-scores 0 0.5 1 --output best.json
    python -m k2ssl.bin.tune_lm step-000010000.pt --cuts cuts_dev.jsonl.gz --method ctc-prefix-beam --search.lm tokens.arpa \\
        --strategy random --num-trials 30 --lm-scales 0 1 --token-scores -1 2 --output best.json
    python -m k2ssl.bin.decode best.json step-000010000.pt --cuts cuts_test.jsonl.gz --output exp/test

The encoder runs once; its frames are kept in memory (about 400 MB for an hour of a Base model at 50 Hz) and searched with every combination
of the values given, or with combinations that are drawn. Language model and lexicon are read once. Prints a table, best first, and writes OUTPUT,
a file of settings for k2ssl.bin.decode. What was tried is kept in OUTPUT.trials.jsonl until then, so that an interrupted run need not try it
again. Exit status: 0 done, 1 the run failed, 2 wrong usage or settings, 130 interrupted.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from k2ssl.atomic_file import atomic_file
from k2ssl.bin.cluster_cuts import Chained, CutLists, cut_totals, id_checker
from k2ssl.bin.cluster_features import choose_device
from k2ssl.bin.decode_arguments import with_names
from k2ssl.bin.decode_methods import Method, SearchConfig, build_search, options_of, text_of
from k2ssl.bin.decode_model import TrainedModel
from k2ssl.bin.program import run_program
from k2ssl.bin.progress import AudioProgress
from k2ssl.bin.recognition_job import RecognitionJob
from k2ssl.bin.refusal import refusing
from k2ssl.bin.tuning_trials import Trial, TrialFile
from k2ssl.decode.wer import ErrorCounts, count_errors
from k2ssl.file_hash import file_sha256
from k2ssl.train.ledger import Ledger

if TYPE_CHECKING:
    from k2ssl.bin.decode_data import About
    from k2ssl.models.asr import AsrFrames

_VARIED = {"lm_scales": "lm_scale", "token_scores": "token_score", "word_scores": "word_score"}  # options, by setting
_NUM_TRIALS = 30
_DECIMALS = 3  # of drawn values


@dataclass(frozen=True, kw_only=True)
class TuneLm(RecognitionJob):
    """Settings of the program.

    Attributes:
        cuts: manifests of the development set, with transcripts (.jsonl.gz).
        output: file of settings to write, ending in .json.
        method: the search, as for k2ssl.bin.decode.
        search: its other options, such as the language model.
        strategy: grid, every combination of the values; random, values drawn evenly between the least and the most that are given.
        lm_scales: weights of the language model to try; for random the least and the most; none: that of search.
        token_scores: what is added for every token to try, nats; for random the least and the most; none: that of search.
        word_scores: what is added for every word to try, nats; for random the least and the most; none: that of search.
        num_trials: of random: how many combinations are drawn; none: 30.
        seed: of random: of the drawing; of the same seed the first combinations are the same however many are drawn.
    """

    method: Method
    search: SearchConfig = field(default_factory=SearchConfig)
    strategy: Literal["grid", "random"] = "grid"
    lm_scales: tuple[float, ...] = ()
    token_scores: tuple[float, ...] = ()
    word_scores: tuple[float, ...] = ()
    num_trials: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output.endswith(".json"):
            raise ValueError(f"TuneLm: output is {self.output!r}, a name that ends in .json is needed")
        if self.num_trials is not None and (self.strategy == "grid" or self.num_trials < 2):
            raise ValueError(f"TuneLm: num_trials is {self.num_trials}, allowed are whole numbers >= 2, with strategy random alone")
        for name, values in self.varied().items():
            if not all(map(math.isfinite, values)):
                raise ValueError(f"TuneLm: {name} is {' '.join(map(str, values))}, finite numbers are needed")
            if len(set(values)) < len(values):
                raise ValueError(f"TuneLm: {name} is {' '.join(map(str, values))}, every value is needed once")
            if self.strategy == "random" and not (len(values) == 2 and values[0] < values[1]):
                raise ValueError(f"TuneLm: {name} is {' '.join(map(str, values))}, with strategy random the least and the most are needed")
        if not self.varied() or len(self.candidates()) < 2:
            raise ValueError(f"TuneLm: there is nothing to choose from: give several values for one of {', '.join(_VARIED)}")
        for search in self.candidates():
            options_of(self.method, search)

    def varied(self) -> dict[str, tuple[float, ...]]:
        """The settings that are given to be varied."""
        return {name: getattr(self, name) for name in _VARIED if getattr(self, name)}

    def candidates(self) -> list[SearchConfig]:
        """The combinations to try: all, or those drawn."""
        names = [_VARIED[name] for name in self.varied()]
        given: list[dict[str, Any]] = [dict(zip(names, values, strict=True)) for values in self._values()]
        return [replace(self.search, **values) for values in given]

    def _values(self) -> list[tuple[float, ...]]:
        ranges = list(self.varied().values())
        if self.strategy == "grid":
            return list(product(*ranges))
        draw = random.Random(self.seed)
        return [tuple(round(draw.uniform(*between), _DECIMALS) for between in ranges) for _ in range(self.num_trials or _NUM_TRIALS)]


@dataclass(frozen=True)
class DevelopmentSet:
    """What every combination is searched over.

    Attributes:
        encoded: frames of all batches, on the CPU.
        refs: the transcripts of each batch.
        unheard: the errors in utterances without a frame, of which no search finds a word.
        seconds: of audio.
    """

    encoded: list[AsrFrames]
    refs: list[list[str]]
    unheard: ErrorCounts
    seconds: float


def tune(job: TuneLm) -> None:
    """Do the job.

    Raises:
        ConfigError: OUTPUT exists; a model without the head of the method; more audio than there is memory for.
        ValueError: a cut without transcript, or audio that cannot be read.
    """
    device = torch.device(choose_device(job.device))
    job.check_inputs(**job.search.files())
    output = job.check_file_and_process(**job.search.files())
    candidates, read = job.candidates(), dict[str, Any]()
    with refusing():
        trained = job.load_model(device)
        build_search(job.method, options_of(job.method, candidates[0]), trained, read)  # before hours of encoding
        cuts = Chained(CutLists(job.cuts).open())
        totals = cut_totals(cuts, id_checker("tune on"))
        check_memory(totals.seconds, trained)
        kept = TrialFile(output, what_of(job, trained, totals.cuts_sha256), job.overwrite)
    left = [search for search in candidates if search not in kept.trials]
    with Ledger(output.parent, "tune_lm", device, 1) as ledger:
        if left:
            found = encode_all(job, trained, cuts)
            ledger.add(audio_seconds=found.seconds)
            with AudioProgress("search", found.seconds * len(left), quiet=job.quiet) as progress:
                for search in left:
                    trial = Trial(search, errors_of(job.method, search, trained, found, read))
                    kept.add(trial)
                    progress.add(found.seconds, f"WER {trial.rate:.2%}")
    trials = sorted((kept.trials[search] for search in candidates), key=lambda trial: trial.counts.errors)  # of equal ones the first given
    with atomic_file(output) as file:
        file.write((json.dumps({"method": job.method, "search": trials[0].search.given()}, indent=2) + "\n").encode())
    kept.remove()
    print(table([_VARIED[name] for name in job.varied()], trials))
    print(f"best        {output}")


def what_of(job: TuneLm, trained: TrainedModel, cuts_sha256: str) -> dict[str, Any]:
    """That which makes trials comparable: all but the values that are tried."""
    return {
        "method": job.method,
        "search": job.search.given(),
        "files": {name: file_sha256(Path(path)) for name, path in job.search.files().items()},
        "weights": trained.weights,
        "checkpoints": list(trained.sha256.values()),
        "cuts": cuts_sha256,
        "precision": str(trained.precision).removeprefix("torch."),
    }


def check_memory(seconds: float, trained: TrainedModel) -> None:
    """Refuse audio whose frames do not fit into the memory of this machine.

    Raises:
        ValueError: says how much there is and how much is needed.
    """
    needed = seconds / trained.seconds_per_frame * trained.model.encoder.output_dim * 4
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"cuts: the frames of {seconds / 3600:,.1f} h take {needed / 2**30:,.1f} GiB of memory, this machine has {there / 2**30:,.1f} GiB; "
            "a development set of a few hours is enough"
        )


@torch.no_grad()
def encode_all(job: TuneLm, trained: TrainedModel, everything: Chained) -> DevelopmentSet:
    """The frames of all utterances.

    Raises:
        ValueError: audio that cannot be read, a cut without a transcript, or no word in any.
    """
    from k2ssl.bin.decode_data import UtteranceDataset, WithFrames, about, utterance_loader
    from k2ssl.models.asr import AsrFrames

    failures: list[str] = []
    text = trained.tokenizer.normalization
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
    return DevelopmentSet(encoded, refs, unheard, totals.seconds)


def _transcript(utterance: About) -> str:
    if utterance.ref is None:
        raise ValueError(f"cuts: {utterance.id!r} has no transcript, a development set needs one of every utterance")
    return utterance.ref


@torch.no_grad()
def errors_of(method: Method, search: SearchConfig, trained: TrainedModel, found: DevelopmentSet, read: dict[str, Any]) -> ErrorCounts:
    """Word errors of one combination over all utterances; `read` as for `build_search`."""
    from k2ssl.models.asr import AsrFrames

    run = build_search(method, options_of(method, search), trained, read)
    counts = found.unheard
    for output, texts in zip(found.encoded, found.refs, strict=True):
        heard = run(AsrFrames(output.frames.to(trained.device), output.lens))
        for text, hypotheses in zip(texts, heard, strict=True):
            counts += count_errors(text, text_of(hypotheses[0], trained.tokenizer) if hypotheses else "")
    return counts


def table(names: Sequence[str], trials: Sequence[Trial]) -> str:
    """All combinations, one a line, in the order of `trials`; the first is marked as the best."""
    rows = [[*names, "WER", "sub", "del", "ins"]]
    for trial in trials:
        counts: Mapping[str, int] = asdict(trial.counts)
        values = [f"{getattr(trial.search, name):g}" for name in names]
        rows.append([*values, f"{trial.rate:.2%}", *(str(counts[name]) for name in ("substitutions", "deletions", "insertions"))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines[1] += "  best"
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = with_names(sys.argv[1:] if argv is None else argv, "checkpoints", "checkpoints")
    return run_program(tune, TuneLm, arguments, "tune_lm", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
