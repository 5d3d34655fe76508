"""Fit k-means centres to speech features, streamed straight from audio.

    python -m k2ssl.bin.fit_kmeans --cuts cuts_train.jsonl.gz --output kmeans.pt
    python -m k2ssl.bin.fit_kmeans conf/layer6.toml --features.checkpoint model.pt --kmeans.num-clusters 500
    torchrun --nproc-per-node 8 -m k2ssl.bin.fit_kmeans conf/layer6.toml --cuts cuts_train.jsonl.gz --output kmeans.pt

Writes OUTPUT and, beside it, the settings as OUTPUT.json. An interrupted run goes on where it was when the same command is given
again. Exit status: 0 done, 1 the run failed, 2 wrong usage or settings, 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from k2ssl import distributed
from k2ssl.atomic_file import atomic_file, writable_folder
from k2ssl.bin.cluster_features import (
    PATIENCE_MINUTES,
    Chained,
    CutLists,
    HiddenConfig,
    LoaderConfig,
    build_features,
    choose_device,
    list_skipped,
    peak_memory,
)
from k2ssl.bin.program import run_program
from k2ssl.bin.progress import AudioProgress
from k2ssl.config import dump
from k2ssl.labelling.assign import stream_frames
from k2ssl.labelling.features import MfccConfig
from k2ssl.labelling.kmeans import KMeansConfig, Progress, fit_kmeans

_log = logging.getLogger(__name__)

_FAILURES_SHOWN = 3  # the first ones; then only their number, at the end


@dataclass(frozen=True)
class FitKMeans:
    """Settings of the program.

    Attributes:
        cuts: manifests of the audio to learn from (.jsonl.gz).
        output: file for the centres.
        features: what to cluster.
        kmeans: how.
        loader: how audio is read.
        max_skipped: share of the cuts that may be left out because their audio cannot be read; they are listed beside OUTPUT. With
            more than that no centres are written.
        device: auto, cpu, cuda or cuda:NUMBER; auto takes the GPU if there is one.
        overwrite: replace OUTPUT if it exists.
        skip_finished: if OUTPUT exists and the same settings led to it, do nothing; other settings are refused.
        quiet: plain lines instead of a progress bar, for logs.
    """

    cuts: tuple[str, ...]
    output: str
    features: MfccConfig | HiddenConfig = field(default_factory=MfccConfig)
    kmeans: KMeansConfig = field(default_factory=KMeansConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    max_skipped: float = 0.01
    device: str = "auto"
    overwrite: bool = False
    skip_finished: bool = False
    quiet: bool = False


class FitProgress:
    """Shows the stages of `fit_kmeans` one after the other; a context manager that ends the last one."""

    def __init__(self, corpus_seconds: float | None, frame_rate: float, config: KMeansConfig, quiet: bool) -> None:
        self._batch_seconds = config.batch_frames / frame_rate
        sample = corpus_seconds
        if config.sample_batches is not None:
            enough = config.sample_batches * self._batch_seconds
            sample = enough if sample is None else min(sample, enough)
        self._totals = {"sample": sample, "updates": config.max_batches * self._batch_seconds}
        self._quiet = quiet
        self._stage = ""
        self._shown: AudioProgress | None = None
        self._seconds = 0.0  # of this stage that are shown already
        self._restarts = 0

    def __call__(self, now: Progress) -> None:
        seconds = now.batches * self._batch_seconds if now.stage == "updates" else 3600 * (now.hours or 0.0)
        if now.stage != self._stage:
            self._end()
            self._stage = now.stage
            if now.stage in self._totals:
                self._shown = AudioProgress(f"k-means {now.stage}", self._totals[now.stage], quiet=self._quiet)
            self._seconds = seconds if now.stage == "updates" else 0.0  # what an interrupted run did takes no time in this one
        if now.stage == "restarts" and now.inertia is not None and now.restarts_done > self._restarts:
            self._restarts = now.restarts_done
            _log.info("k-means start %d of %d: mean squared distance %.4g", now.restarts_done, now.num_restarts, now.inertia)
        if self._shown is not None:
            note = "" if now.inertia is None else f"batch {now.batches}, mean squared distance {now.inertia:.5g}"
            self._shown.add(seconds - self._seconds, note)
            self._seconds = seconds

    def _end(self) -> None:
        if self._shown is not None and self._shown.seconds > 0:  # a resumed run passes through stages without doing anything
            self._shown.close()
        self._shown = None

    def __enter__(self) -> FitProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()


def fit(job: FitKMeans) -> None:
    """Do the job on this rank."""
    from k2ssl.data.labels import cut_list_hash
    from k2ssl.data.loader import audio_loader

    output = Path(job.output)
    if output.exists() and not job.overwrite:
        if not job.skip_finished:
            raise ValueError(f"{output} exists; --overwrite True replaces it")
        check_finished(job, output)
        print(f"{output} is there already")
        return
    writable_folder(output.parent)
    started = time.monotonic()
    with distributed.set_up(choose_device(job.device), timeout_minutes=PATIENCE_MINUTES) as device:
        lists = CutLists(job.cuts)
        cuts = lists.open()
        features = build_features(job.features, device)
        skipped: dict[str, str] = {}

        def skip(cut_id: str, reason: str) -> None:
            if cut_id not in skipped and len(skipped) < _FAILURES_SHOWN:
                _log.warning("left out: cut %s: %s", cut_id, reason)
            skipped[cut_id] = reason

        cuts_hash = cut_list_hash(Chained(cuts))
        loader = audio_loader(
            Chained(cuts),
            max_duration=job.loader.max_duration,
            sample_rate=features.sample_rate,
            num_workers=job.loader.num_workers,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            seed=job.kmeans.seed,
            shuffle=True,
            on_error=skip,
        )

        def batches(epoch: int) -> Iterator[Tensor]:
            loader.set_epoch(epoch)
            return stream_frames(loader, features, device)

        checkpoint = output.with_name(output.name + ".progress")
        with FitProgress(lists.seconds(), features.frame_rate, job.kmeans, job.quiet) as progress:
            kmeans = fit_kmeans(
                batches,
                job.kmeans,
                device,
                checkpoint,
                progress if distributed.is_main() else None,
                frame_rate=features.frame_rate,
                description=features.description,
                stream={"cuts": cuts_hash, "max_duration": job.loader.max_duration},
            )
        list_skipped(output.with_name(f"{output.name}.skipped-{distributed.rank():05d}.tsv"), skipped)
        num_skipped = int(distributed.all_reduce_sum(torch.tensor([len(skipped)])).item())
        if num_skipped > job.max_skipped * int(cuts_hash.partition(":")[0]):
            raise ValueError(
                f"{num_skipped} cuts cannot be read, max_skipped is {job.max_skipped:.1%}: see {output}.skipped-*.tsv; remove {checkpoint}"
                " to begin anew when they can"
            )
        if not distributed.is_main():
            return
        with atomic_file(output.with_name(output.name + ".json")) as file:
            file.write(dump(job).encode())
        kmeans.save(output)
        for left in (checkpoint, checkpoint.with_name(checkpoint.name + ".sample")):
            left.unlink(missing_ok=True)
    print(f"{output}: {kmeans.num_clusters} centres of {kmeans.dim} dimensions, sha256 {kmeans.sha256[:16]}...")
    print(f"{time.monotonic() - started:.1f} s, {num_skipped} unreadable cuts left out, peak memory {peak_memory(device)}")


def check_finished(job: FitKMeans, output: Path) -> None:
    """Refuse centres that other settings or older manifests led to.

    Raises:
        ValueError: names the setting with both values, or the manifest.
    """
    settings = output.with_name(output.name + ".json")
    if not settings.is_file():
        raise ValueError(f"{output} exists without {settings.name}, so it is not known what led to it; --overwrite True replaces it")
    made, asked = json.loads(settings.read_text(encoding="utf-8")), json.loads(dump(job))
    for name in ("cuts", "features", "kmeans"):
        if made.get(name) != asked[name]:
            raise ValueError(f"{output} exists, made with {name} {made.get(name)}, now {asked[name]}; --overwrite True replaces it")
    inputs = [*job.cuts, *([job.features.checkpoint] if isinstance(job.features, HiddenConfig) else [])]
    for manifest in inputs:
        if Path(manifest).stat().st_mtime > output.stat().st_mtime:
            raise ValueError(f"{output} exists, but {manifest} is newer; --overwrite True replaces it")


def main(argv: list[str] | None = None) -> int:
    return run_program(fit, FitKMeans, sys.argv[1:] if argv is None else argv, "fit_kmeans", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
