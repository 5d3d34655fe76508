"""Label audio with k-means centres: one class for every frame of every cut.

    python -m k2ssl.bin.label --kmeans kmeans.pt --cuts cuts_train.jsonl.gz --output labels/train
    torchrun --nproc-per-node 8 -m k2ssl.bin.label --kmeans layer6.pt --checkpoint model.pt --cuts cuts_train.jsonl.gz --output labels/train

Features are computed as the k-means file says. Every process writes a shard; when all are there they become a label store, whose quality
is measured: a table is printed, and quality.json and quality.png lie in OUTPUT, with a line in ledger.jsonl of what it cost. An interrupted run goes on where it was when the
same command is given again, with as many processes; a finished one is only measured again. Exit status: 0 done, 1 the run failed, 2 wrong
usage or settings, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from k2ssl import __version__, distributed
from k2ssl.atomic_file import atomic_file, writable_folder
from k2ssl.bin.cluster_cuts import (
    PATIENCE_MINUTES,
    Chained,
    CutLists,
    LoaderConfig,
    SkippedCuts,
    Survey,
    check_files,
    check_job,
    cut_totals,
    on_main,
    read_skipped,
)
from k2ssl.bin.cluster_features import choose_device, features_of, peak_memory
from k2ssl.bin.program import run_program
from k2ssl.bin.progress import AudioProgress
from k2ssl.bin.quality_report import CompareConfig, Comparison, measure_store, open_comparison, write_report
from k2ssl.bin.refusal import refusing
from k2ssl.config import dump
from k2ssl.labelling.assign import LabelledBatch, label_batches
from k2ssl.labelling.features import FeatureFunction
from k2ssl.labelling.kmeans_model import KMeans
from k2ssl.train.ledger import LEDGER, Ledger

if TYPE_CHECKING:  # slow to import, and not needed to show --help
    from lhotse.cut import Cut

    from k2ssl.data.labels import LabelShardWriter, Lineage

_log = logging.getLogger(__name__)

_COMMIT_EVERY = 300.0  # seconds; the writer itself only knows how many labels there are, and a large model on a CPU is slow
_CONTRACT = "contract.json"
_OF_A_STORE = ("labels-*", "index.npy", "buckets.npy", "quality.json", "quality.png", "settings.json", "skipped-*.tsv")


@dataclass(frozen=True)
class Label:
    """Settings of the program.

    Attributes:
        kmeans: file that `k2ssl.bin.fit_kmeans` wrote.
        cuts: manifests of the audio to label (.jsonl.gz).
        output: folder for the labels; the name of the split, as a rule.
        checkpoint: model file, for centres of hidden states; the one they were fitted with.
        max_skipped: share of all cuts that may be left without labels because their audio cannot be read or is too short; they are
            listed in OUTPUT. With more than that the run ends, early if it is long, and goes on when it is repeated.
        compare: what the labels are held against when they are done.
        loader: how audio is read.
        device: auto, cpu, cuda or cuda:NUMBER; auto takes the GPU if there is one.
        overwrite: remove labels that are in OUTPUT already.
        quiet: plain lines instead of a progress bar, for logs.
    """

    kmeans: str
    cuts: tuple[str, ...]
    output: str
    checkpoint: str | None = None
    max_skipped: float = 0.01
    compare: CompareConfig = field(default_factory=CompareConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    device: str = "auto"
    overwrite: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        check_job(self)


def label(job: Label) -> None:
    """Do the job on this rank."""
    where = choose_device(job.device)
    check_files(kmeans=job.kmeans, cuts=job.cuts, checkpoint=job.checkpoint)
    with refusing():
        kmeans = KMeans.load(job.kmeans)
    output = Path(job.output)
    started = time.monotonic()
    with distributed.set_up(where, timeout_minutes=PATIENCE_MINUTES) as device:
        with refusing():
            features = features_of(kmeans, job.checkpoint, device, job.kmeans)
            cuts = Chained(CutLists(job.cuts).open())
        with refusing():
            if distributed.is_main():
                if job.overwrite and job.compare.previous and Path(job.compare.previous).resolve() == output.resolve():
                    raise ValueError(f"compare.previous is {job.compare.previous}, the very labels that overwrite would remove")
                compare = open_comparison(job.compare)  # before anything is removed
                _make_room(output, job.overwrite)
        with Ledger(output, "label", device, distributed.world_size()) as ledger:
            totals = on_main(lambda: count_cuts(cuts))
            label_shard(job, kmeans, features, device, cuts, totals, ledger)
            distributed.barrier()
            if distributed.is_main():
                finish(job, totals, compare)
                print(f"{time.monotonic() - started:.1f} s in all, peak memory {peak_memory(device)}")


def count_cuts(cuts: Chained) -> Survey:
    """Read the manifests through once.

    Raises:
        ValueError: an id that a label store cannot hold, or that occurs twice; better now than after hours of labelling.
    """
    from k2ssl.data.label_index import id_hash

    several = len(cuts.lists) > 1  # a single manifest has been searched for ids that occur twice when it was opened
    hashes = array("Q")

    def seen(cut: Cut) -> None:
        if any(character in cut.id for character in "\t\n\r"):
            raise ValueError(f"cut id {cut.id!r} has a tab or a line break; rename the file and make the manifest anew")
        if several:
            hashes.append(id_hash(cut.id))

    totals = cut_totals(cuts, seen)
    if several and len(np.unique(np.frombuffer(hashes, np.uint64))) < totals.num_cuts:
        raise ValueError("the manifests share cut ids: label them apart, or make manifests whose ids differ")
    return totals


def label_shard(
    job: Label, kmeans: KMeans, features: FeatureFunction, device: torch.device, cuts: Chained, totals: Survey, ledger: Ledger
) -> None:
    """Label this rank's cuts, and list in OUTPUT those that got no labels, with the reason.

    Cuts are dealt out by their number in the manifests, so that what is left after an interruption does not change hands. A shard is
    closed only when all ranks are done and no more than `max_skipped` of all cuts had to be skipped.

    Raises:
        ValueError: more had to; as soon as one rank alone has skipped more.
    """
    from k2ssl.data.labels import LabelShardWriter

    rank, ranks = distributed.rank(), distributed.world_size()
    listed = Path(job.output) / f"skipped-{rank:05d}-of-{ranks:05d}.tsv"
    with LabelShardWriter(
        job.output,
        rank,
        ranks,
        kmeans.num_clusters,
        features.frame_rate,
        lineage_of(kmeans, features, totals),
        sampling_rate=features.sample_rate,
    ) as writer:
        if writer.finished:
            _log.info("labels in %s are complete already", writer.folder / writer.stem)
        skipped = SkippedCuts(listed, totals.num_cuts, job.max_skipped, resume=writer.finished)  # skipped cuts are tried again
        if not writer.finished:
            label_rest(job, kmeans, features, device, cuts, totals, writer, skipped, ledger)
            writer.commit()  # what other ranks have to say may end this one
        skipped.check(int(distributed.all_reduce_sum(torch.tensor(len(skipped.reasons)))))


def label_rest(
    job: Label,
    kmeans: KMeans,
    features: FeatureFunction,
    device: torch.device,
    cuts: Chained,
    totals: Survey,
    writer: LabelShardWriter,
    skipped: SkippedCuts,
    ledger: Ledger,
) -> None:
    """Label those of this rank's cuts that the shard does not hold yet."""
    from k2ssl.data.loader import audio_loader

    rank, ranks = distributed.rank(), distributed.world_size()
    done = writer.done_ids()
    if len(done):
        _log.info("%d cuts are labelled already", len(done))
    loader = audio_loader(
        Chained(cuts.lists, rank, ranks, done),
        max_duration=job.loader.max_duration,
        sample_rate=features.sample_rate,
        num_workers=job.loader.num_workers,
        on_error=skipped,
    )
    left = max(0.0, 1 - len(done) * ranks / totals.num_cuts)
    with AudioProgress("label", totals.seconds * left, quiet=job.quiet, silent=not distributed.is_main()) as progress:

        def did(seconds: float) -> None:
            progress.add(seconds * ranks)  # the other ranks are as far as this one
            ledger.add(audio_seconds=seconds * ranks)

        _write(label_batches(loader, features, kmeans, device), writer, skipped, did, ledger)


def _write(
    batches: Iterator[LabelledBatch], writer: LabelShardWriter, skipped: SkippedCuts, did: Callable[[float], None], ledger: Ledger
) -> None:
    """Write the labels of all batches, and see to it that little is lost when the program is interrupted."""
    committed = time.monotonic()
    try:
        for batch in batches:
            for cut_id, labels in zip(batch.ids, batch.labels, strict=True):
                if len(labels):
                    writer.write(cut_id, labels)
                else:
                    skipped(cut_id, "too short for a label")
            did(batch.seconds)
            if time.monotonic() - committed > _COMMIT_EVERY:
                writer.commit()
                ledger.write()
                committed = time.monotonic()
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk is what may have brought us here
            writer.commit()
        raise


def lineage_of(kmeans: KMeans, features: FeatureFunction, totals: Survey) -> Lineage:
    """Where the labels come from."""
    from k2ssl.data.labels import Lineage

    settings = dict(features.description)
    checkpoint_sha256 = settings.pop("checkpoint_sha256", None)
    return Lineage(
        features=str(settings.pop("features")),
        settings={**settings, "num_clusters": kmeans.num_clusters},
        kmeans_sha256=kmeans.sha256,
        checkpoint_sha256=None if checkpoint_sha256 is None else str(checkpoint_sha256),
        cuts_sha256=totals.cuts_sha256,
        versions={
            "k2ssl": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "lhotse", "numpy")},
        },
    )


def finish(job: Label, totals: Survey, compare: Comparison) -> None:
    """Make the shards a store, measure it and print what it is like.

    Raises:
        ValueError: see `merge_shards`; or some cuts have neither labels nor a reason.
    """
    from k2ssl.data.labels import merge_shards

    output = Path(job.output)
    store = merge_shards(output)
    skipped = sum(len(read_skipped(path)) for path in output.glob("skipped-*.tsv"))
    if len(store) + skipped != totals.num_cuts:
        raise ValueError(
            f"{output}: of {totals.num_cuts} cuts {len(store)} are labelled and {skipped} skipped; label anew with --overwrite True"
        )
    with atomic_file(output / "settings.json") as file:
        file.write(dump(job).encode())
    quality = measure_store(store, compare, job.quiet)
    write_report(quality, store, job.compare, output / "quality.json")
    print(quality.table())
    print(f"report      {output / 'quality.json'} and quality.png")
    if skipped:
        print(f"{skipped} of {totals.num_cuts} cuts have no labels: see {output}/skipped-*.tsv")


def _make_room(output: Path, overwrite: bool) -> None:
    """Make the folder; with `overwrite` without labels in it, the contract being removed first.

    Raises:
        ValueError: it holds something other than labels, or cannot be written to; or labels that another process is writing.
    """
    ours = [path for pattern in (_CONTRACT, *_OF_A_STORE) for path in sorted(output.glob(pattern))]
    if overwrite:
        ours += [path for pattern in (".*.part", "*.partial") for path in sorted(output.glob(pattern)) if path not in ours]
    if output.is_dir() and not ours and any(path.name != LEDGER and not path.name.endswith(".part") for path in output.iterdir()):
        raise ValueError(f"{output} holds other files and no labels: name a folder for labels alone")
    if overwrite:
        from k2ssl.data.label_shards import refuse_if_written

        refuse_if_written(output)
    for path in ours if overwrite else ():
        path.unlink()
    writable_folder(output)


def main(argv: list[str] | None = None) -> int:
    return run_program(label, Label, sys.argv[1:] if argv is None else argv, "label", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
