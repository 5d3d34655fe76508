"""Recognise the speech of manifests: every utterance, by the search that is asked for.

    python -m k2ssl.bin.decode exp/both/checkpoints/step-000010000.pt --cuts cuts_test.jsonl.gz --method modified-beam --output exp/test
    torchrun --nproc-per-node 8 -m k2ssl.bin.decode step-000010000.pt --weights average --after step-000008000.pt --cuts ...

The checkpoint, of k2ssl.bin.finetune, says what the model is and holds its tokenizer; of several checkpoints the mean of the weights is
taken. OUTPUT/hypotheses.jsonl holds one result a line in the order of the manifests, and OUTPUT/decode.json the settings, the error rate where
there are transcripts, speed and memory. An interrupted run goes on where it was when the same command is given again, on as many processes
as you like. Exit status: 0 done; 1 the run failed, or audio could not be read; 2 wrong usage or settings, nothing was touched; 130
interrupted. See docs/decoding.md.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from k2ssl import __version__, distributed
from k2ssl.bin.cluster_cuts import PATIENCE_MINUTES, Chained, CutLists, Survey, cut_totals, id_checker, on_main
from k2ssl.bin.decode_arguments import with_names
from k2ssl.bin.decode_folder import (
    HYPOTHESES,
    RECORD,
    PartWriter,
    opened,
    read_parts,
    read_record,
    remove_parts,
    write_hypotheses,
    write_record,
)
from k2ssl.bin.decode_methods import Method, Recognizer, SearchConfig, build_recognizer, options_of
from k2ssl.bin.decode_model import TrainedModel
from k2ssl.bin.program import run_program
from k2ssl.bin.progress import AudioProgress
from k2ssl.bin.recognition_job import RecognitionJob
from k2ssl.bin.refusal import refusing, say
from k2ssl.decode.hypotheses import Hypothesis
from k2ssl.decode.results import Alternative, Result
from k2ssl.decode.wer import error_report
from k2ssl.file_hash import file_sha256
from k2ssl.lattice.empty import EmptyLatticeError
from k2ssl.structure import to_dict
from k2ssl.train.ledger import Ledger

if TYPE_CHECKING:  # slow to import, and not needed to show --help
    from lhotse.cut import Cut

    from k2ssl.bin.decode_data import Utterances

_LISTED = 5  # utterances that a message names


@dataclass(frozen=True, kw_only=True)
class Decode(RecognitionJob):
    """Settings of the program.

    Attributes:
        cuts: manifests of the utterances (.jsonl.gz), with transcripts or without.
        output: folder for the results.
        method: the search; ctc-... need a CTC head, the others a transducer.
        search: its options.
        timestamps: write the time of every word.
        overwrite: remove results that are in OUTPUT already.
    """

    method: Method
    search: SearchConfig = field(default_factory=SearchConfig)
    timestamps: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        options_of(self.method, self.search)


def decode(job: Decode) -> None:
    """Do the job on this rank."""
    from k2ssl.bin.cluster_features import choose_device

    where = choose_device(job.device)
    job.check_inputs(**job.search.files())
    output = Path(job.output)
    with distributed.set_up(where, timeout_minutes=PATIENCE_MINUTES) as device:
        with refusing():
            trained = job.load_model(device)
            recognizer = build_recognizer(job.method, job.search, trained)
            cuts = Chained(CutLists(job.cuts).open())
        totals = on_main(lambda: cut_totals(cuts, id_checker("decode")))
        with opened(output, job.overwrite, record_of(job, recognizer, totals)) as finished:
            if finished:
                say(f"{output}: complete already", summary(finished))
                return
            with Ledger(output, "decode", device, distributed.world_size()) as ledger:
                speed = decode_rest(job, recognizer, cuts, totals, device, ledger)
                with distributed.failing_together():
                    if distributed.is_main():
                        finish(output, cuts, totals, speed, device)


def record_of(job: Decode, recognizer: Recognizer, totals: Survey) -> dict[str, Any]:
    """What `decode.json` holds before there are results; under "what" that which makes it this decoding and no other."""
    trained = recognizer.trained
    what = {
        "method": job.method,
        "search": dict(recognizer.options),
        "files": {name: file_sha256(Path(path)) for name, path in job.search.files().items()},
        "timestamps": job.timestamps,
        "weights": trained.weights,
        "checkpoints": list(trained.sha256.values()),
        "cuts": totals.cuts_sha256,
        "precision": str(trained.precision).removeprefix("torch."),
    }
    return {"k2ssl": __version__, "what": what, "settings": to_dict(job), "result": None}


def decode_rest(
    job: Decode, recognizer: Recognizer, cuts: Chained, totals: Survey, device: torch.device, ledger: Ledger
) -> dict[str, float]:
    """Decode what the parts of all ranks do not hold yet; every rank its share.

    Returns:
        Over all ranks: seconds of audio that were decoded here, and the seconds that this took.

    Raises:
        ValueError: audio that cannot be read, once everything else is done; names it.
    """
    output, rank, ranks = Path(job.output), distributed.rank(), distributed.world_size()
    done = read_parts(output)
    say(f"{len(done):,} of {totals.num_cuts:,} utterances are decoded already" if done else "")
    distributed.barrier()  # before anybody writes what others would find
    left = totals.seconds - sum(result.duration for result in done.values())
    share = Chained(cuts.lists, rank, ranks, done.keys())
    failures: list[tuple[str, str]] = []
    started = time.monotonic()
    with (
        PartWriter(output, rank) as part,
        AudioProgress("decode", left, quiet=job.quiet, silent=not distributed.is_main()) as progress,
    ):
        for batch in batches(job, recognizer.trained, share, device, failures):
            part.write(results_of(batch, recognizer, job.timestamps))
            did = batch.seconds * ranks  # the other ranks are as far as this one
            progress.add(did, f"real-time factor {(time.monotonic() - started) / (progress.seconds + did):.4f}")
            ledger.add(audio_seconds=did)
    audio = float(distributed.all_reduce_sum(torch.tensor(progress.seconds / ranks, dtype=torch.float64)))
    _refuse_unread(failures, output)
    return {"audio_seconds": audio, "seconds": time.monotonic() - started}


def batches(
    job: RecognitionJob, trained: TrainedModel, cuts: Iterable[Cut], device: torch.device, failures: list[tuple[str, str]]
) -> Iterator[Utterances]:
    """All cuts: first those too short for a frame, one by one and without their audio, then the others by length."""
    from k2ssl.bin.decode_data import UtteranceDataset, Utterances, WithFrames, about, utterance_loader

    text = trained.tokenizer.normalization
    for cut in WithFrames(cuts, trained.sample_rate, trained.has_frame, False):
        yield Utterances(torch.zeros(1, 0), torch.zeros(1, dtype=torch.int64), (about(cut, text),))
    yield from utterance_loader(
        WithFrames(cuts, trained.sample_rate, trained.has_frame, True),
        UtteranceDataset(trained.normalize, text),
        sample_rate=trained.sample_rate,
        max_duration=job.loader.max_duration,
        num_workers=job.loader.num_workers,
        pin_memory=device.type == "cuda",
        on_error=lambda cut_id, reason: failures.append((cut_id, reason)),
    )


def results_of(batch: Utterances, recognizer: Recognizer, timestamps: bool) -> Iterator[Result]:
    """What is found in a batch, best hypothesis and, if more were asked for, all."""
    try:
        heard = recognizer.hypotheses(batch.audio, batch.audio_lens)
    except EmptyLatticeError as error:
        raise error.named([utterance.id for utterance in batch.about]) from error
    for utterance, samples, found in zip(batch.about, batch.audio_lens.tolist(), heard, strict=True):
        best = found[0]
        nbest = alternatives(recognizer, found) if recognizer.options.get("nbest", 1) > 1 else ()
        words = recognizer.words(best, samples) if timestamps else ()
        yield utterance.result(recognizer.text(best), best.score, words=words, nbest=nbest)


def alternatives(recognizer: Recognizer, found: Sequence[Hypothesis]) -> tuple[Alternative, ...]:
    """The different texts of hypotheses, best first, each with the score of the best that reads so: tokens may differ where text does not."""
    scores: dict[str, float] = {}
    for hypothesis in found:
        scores.setdefault(recognizer.text(hypothesis), hypothesis.score)
    return tuple(Alternative(text, score) for text, score in scores.items())


def finish(output: Path, cuts: Chained, totals: Survey, speed: Mapping[str, float], device: torch.device) -> None:
    """Put the parts together, say and record what came out; on rank 0."""
    found = read_parts(output)
    write_hypotheses(output, (cut.id for cut in cuts), found)
    peak = {"peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}  # Linux counts in KiB
    if device.type == "cuda":
        peak["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(device)
    result = {
        "utterances": totals.num_cuts,
        "audio_seconds": totals.seconds,
        "empty": sum(not result.hyp for result in found.values()),
        "without_transcript": sum(result.ref is None for result in found.values()),
        **errors_in(found.values()),
        "decoded_seconds": speed["audio_seconds"],
        "wall_seconds": speed["seconds"],
        "real_time_factor": speed["seconds"] / speed["audio_seconds"] if speed["audio_seconds"] else None,
        "ranks": distributed.world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        **peak,
    }
    record = {**read_record(output), "result": result}
    write_record(output, record)
    remove_parts(output)
    say(summary(record), f"results     {output / HYPOTHESES}, {output / RECORD}")


def errors_in(results: Iterable[Result]) -> dict[str, Any]:
    """Word errors where there are transcripts; nothing where these have no words."""
    pairs = [(result.ref, result.hyp) for result in results if result.ref is not None]
    if not any(ref for ref, _ in pairs):
        return {}
    report = error_report(pairs)
    counts = {"errors": report.counts.errors, **asdict(report.counts)}
    return {"wer": report.rate, "wer_text": report.text(), "words": counts}


def summary(record: Mapping[str, Any]) -> str:
    """What a finished decoding was like, for people."""
    result = record["result"]
    lines = [f"{result['utterances']:,} utterances, {result['audio_seconds'] / 3600:.2f} h; {result['empty']:,} give no words"]
    if result["without_transcript"]:
        lines.append(f"{result['without_transcript']:,} have no transcript")
    lines += [result["wer_text"]] if "wer_text" in result else ["no transcript has words, so there is no error rate"]
    if result["real_time_factor"] is not None:
        factor = result["real_time_factor"]
        lines.append(f"real-time factor {factor:.4f} ({1 / factor:,.0f} x real time) on {result['ranks']} x {result['device']}")
    gpu = f", on the GPU {result['peak_gpu_bytes'] / 2**30:.2f} GiB" if "peak_gpu_bytes" in result else ""
    return "\n".join([*lines, f"peak memory {result['peak_host_bytes'] / 2**30:.2f} GiB{gpu}"])


def _refuse_unread(failures: list[tuple[str, str]], output: Path) -> None:
    """Every utterance counts, so results without some would be those of another test set."""
    every = distributed.gather_objects(failures)
    with distributed.failing_together():
        unread = [failure for of_rank in every or () for failure in of_rank]
        if unread:
            named = "; ".join(f"{cut_id}: {reason}" for cut_id, reason in unread[:_LISTED])
            more = f"; and {len(unread) - _LISTED:,} more" if len(unread) > _LISTED else ""
            raise ValueError(
                f"{len(unread)} utterances cannot be read: {named}{more}. All others are decoded and kept in {output}; mend these and give "
                "the same command again"
            )


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = with_names(sys.argv[1:] if argv is None else argv, "checkpoints", "checkpoints")
    return run_program(decode, Decode, arguments, "decode", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
