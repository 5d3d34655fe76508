"""Fit k-means centres to speech features, streamed straight from audio.

    python -m k2ssl.bin.fit_kmeans --cuts cuts_train.jsonl.gz --output kmeans.pt
    python -m k2ssl.bin.fit_kmeans conf/layer6.toml --features.checkpoint model.pt --kmeans.num-clusters 500
    torchrun --nproc-per-node 8 -m k2ssl.bin.fit_kmeans conf/layer6.toml --cuts cuts_train.jsonl.gz --output kmeans.pt

Writes OUTPUT and, beside it, the settings as OUTPUT.json and a line in ledger.jsonl of what it cost. The cuts of
a large corpus are dealt by hash into parts as large as --kmeans.sample-batches says, of which every epoch reads one. An interrupted run goes on where it was when the same command is
given again. Exit status: 0 done, 1 the run failed, 2 wrong usage or settings, 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from k2ssl import distributed
from k2ssl.atomic_file import atomic_file
from k2ssl.bin.cluster_cuts import (
    PATIENCE_MINUTES,
    Chained,
    CorpusPart,
    CutLists,
    LoaderConfig,
    SkippedCuts,
    Survey,
    check_files,
    check_job,
    cut_totals,
    on_main,
)
from k2ssl.bin.cluster_features import HiddenConfig, build_features, choose_device, peak_memory
from k2ssl.bin.output_file import check_output
from k2ssl.bin.program import run_program
from k2ssl.bin.progress import AudioProgress
from k2ssl.bin.refusal import refusing
from k2ssl.config import ConfigError, dump
from k2ssl.labelling.assign import LoadedFrames
from k2ssl.labelling.corpus_parts import PartCounter
from k2ssl.labelling.features import FeatureFunction, MfccConfig, Scalar
from k2ssl.labelling.kmeans import KMeans, KMeansConfig, Progress, fit_kmeans
from k2ssl.labelling.kmeans_progress import check_progress, identity, is_begun, progress_files
from k2ssl.train.differences import differences
from k2ssl.train.ledger import Ledger

if TYPE_CHECKING:  # slow to import, and not needed to show --help
    from lhotse.cut import Cut

    from k2ssl.batch import AudioBatch
    from k2ssl.data.batch_loader import BatchLoader

_log = logging.getLogger(__name__)

_LEDGER_EVERY = 300.0  # seconds
_LINE_EVERY = 30.0  # seconds


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
            more than that the run ends, before anything is fitted if all audio has been read by then, and no centres are written.
        device: auto, cpu, cuda or cuda:NUMBER; auto takes the GPU if there is one.
        overwrite: replace OUTPUT if it exists, and begin anew where there is progress of another run; what this run has done is gone on with.
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

    def __post_init__(self) -> None:
        check_job(self)


class FitProgress:
    """Shows the stages of `fit_kmeans` one after the other; a context manager that ends the last one.

    Args:
        part_seconds: of audio in an epoch.
        frame_rate: of the features, Hz.
        config: of the fit.
        quiet: plain lines instead of a progress bar.
        ledger: that the audio is added to.
    """

    def __init__(self, part_seconds: float, frame_rate: float, config: KMeansConfig, quiet: bool, ledger: Ledger) -> None:
        self._batch_seconds = config.batch_frames / frame_rate
        most = config.sample_batches * self._batch_seconds or math.inf
        self._totals = {"sample": min(part_seconds, most), "updates": config.max_batches * self._batch_seconds}
        self._quiet, self._ledger = quiet, ledger
        self._stage = ""
        self._shown: AudioProgress | None = None
        self._seconds = 0.0  # of this stage that are shown already
        self._restarts = 0
        self._written = self._told = time.monotonic()

    def __call__(self, now: Progress) -> None:
        seconds = now.batches * self._batch_seconds if now.stage == "updates" else 3600 * (now.hours or 0.0)
        self._tell_passes(now)
        if now.stage != self._stage:
            self._end()
            self._stage = now.stage
            # what an interrupted run did takes no time in this one
            self._seconds = seconds if now.stage == "updates" else seconds * now.resumed / max(now.frames, 1)
            if now.stage in self._totals:
                name = "k-means updates, at most" if now.stage == "updates" else f"k-means {now.stage}"  # they end when nothing improves
                self._shown = AudioProgress(name, max(0.0, self._totals[now.stage] - self._seconds), quiet=self._quiet)
        if now.stage == "restarts" and now.inertia is not None and now.restarts_done > self._restarts:
            self._restarts = now.restarts_done
            _log.info("k-means start %d of %d: mean squared distance %.4g", now.restarts_done, now.num_restarts, now.inertia)
        if self._shown is not None:
            note = "" if now.inertia is None else f"batch {now.batches}, mean squared distance {now.inertia:.5g}"
            self._shown.add(seconds - self._seconds, note)
            self._ledger.add(audio_seconds=seconds - self._seconds)
            self._seconds = seconds
        if time.monotonic() - self._written > _LEDGER_EVERY:
            self._ledger.write()
            self._written = time.monotonic()

    def _tell_passes(self, now: Progress) -> None:
        """No audio is read any more, and nobody knows how many passes are to come: a line now and then, and one at the end."""
        ended = now.stage == "done" and self._stage == "passes"
        if ended or (now.stage == "passes" and time.monotonic() - self._told > _LINE_EVERY):
            self._told = time.monotonic()
            _log.info("k-means passes over all frames in memory: %d, mean squared distance %.5g", now.batches, now.inertia or 0.0)

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
    output, where = Path(job.output), choose_device(job.device)
    checkpoint = job.features.checkpoint if isinstance(job.features, HiddenConfig) else None
    check_files(cuts=job.cuts, checkpoint=checkpoint)
    if job.skip_finished and output.is_file() and not job.overwrite:
        check_finished(job, output)
        print(f"{output} is there already")
        return
    check_output(output, job.overwrite, cuts=job.cuts, checkpoint=checkpoint)
    started = time.monotonic()
    with distributed.set_up(where, timeout_minutes=PATIENCE_MINUTES) as device:
        with refusing():
            features = build_features(job.features, device)
            cuts = Chained(CutLists(job.cuts).open())
        reading = time.monotonic()
        whole = on_main(lambda: survey(cuts, job, features.frame_rate))
        begun = find_progress(job, features, whole)
        with Ledger(output.parent, "fit_kmeans", device, distributed.world_size(), since=reading) as ledger:
            kmeans, num_skipped = fit_features(job, features, cuts, whole, begun, device, ledger)
            if not distributed.is_main():
                return
            with atomic_file(output.with_name(output.name + ".json")) as file:
                file.write(dump(job).encode())
            kmeans.save(output)
            for left in progress_files(progress_of(job)):
                left.unlink()
    print(f"{output}: {kmeans.num_clusters} centres of {kmeans.dim} dimensions, sha256 {kmeans.sha256[:16]}...")
    print(f"{time.monotonic() - started:.1f} s, {num_skipped} unreadable cuts left out, peak memory {peak_memory(device)}")


def progress_of(job: FitKMeans) -> Path:
    """The file in which the centres are kept as they move."""
    output = Path(job.output)
    return output.with_name(output.name + ".progress")


def stream_of(job: FitKMeans, whole: Survey) -> dict[str, Scalar]:
    """What decides, beside the features, which frames come."""
    return {"cuts": whole.cuts_sha256, "max_duration": job.loader.max_duration, "parts": whole.num_parts}


def find_progress(job: FitKMeans, features: FeatureFunction, whole: Survey) -> bool:
    """Whether there is progress of this run to go on with; `overwrite` removes that of another one, and damaged files.

    Raises:
        ConfigError: there is such progress and `overwrite` is False; names the files.
    """
    checkpoint, wrong = progress_of(job), None
    begun = is_begun(checkpoint)
    try:
        check_progress(checkpoint, identity(job.kmeans, features.description, stream_of(job, whole)), begun)
    except ValueError as error:
        wrong = str(error)
    everywhere = distributed.gather_objects(wrong)
    with refusing():
        if everywhere is not None and (found := [text for text in everywhere if text is not None]):
            if not job.overwrite:
                raise ValueError(f"{found[0]}; --overwrite True removes them")
            for file in progress_files(checkpoint):
                file.unlink()
            _log.info("%s: the progress of another run is removed", checkpoint)
    return bool(distributed.broadcast_object(bool(progress_files(checkpoint))))


def fit_features(
    job: FitKMeans, features: FeatureFunction, cuts: Chained, whole: Survey, begun: bool, device: torch.device, ledger: Ledger
) -> tuple[KMeans, int]:
    """The centres, and on rank 0 how many cuts were left out.

    Raises:
        ValueError: more than may be; see also `fit_kmeans`.
    """
    output, rank, checkpoint = Path(job.output), distributed.rank(), progress_of(job)
    skipped = SkippedCuts(
        output.with_name(f"{output.name}.skipped-{rank:05d}.tsv"),
        whole.num_cuts,
        job.max_skipped,
        resume=begun,
        advice=f"; where they have been mended, remove {checkpoint}* to begin anew",
    )
    if begun:
        skipped.check_together(of_all=True)
    loader_of = epoch_loaders(job, cuts, whole, features.sample_rate, skipped)
    with FitProgress(whole.seconds / whole.num_parts, features.frame_rate, job.kmeans, job.quiet, ledger) as progress:
        kmeans = fit_kmeans(
            LoadedFrames(loader_of, features, device),
            job.kmeans,
            device,
            checkpoint,
            progress if distributed.is_main() else None,
            frame_rate=features.frame_rate,
            description=features.description,
            stream=stream_of(job, whole),
            one_part=whole.num_parts == 1,
            sampled=lambda: skipped.check_together(of_all=True),
        )
    return kmeans, skipped.check_together()


def survey(cuts: Iterable[Cut], job: FitKMeans, frame_rate: float) -> Survey:
    """Read the manifests through once, and decide into how many parts they are dealt.

    An epoch reads one part, which comes from all over the corpus; epoch after epoch all of it is read. Two batches for every rank is the
    least that a part must have, lest a rank be left without a frame.
    """
    counter = PartCounter(job.kmeans.seed, job.loader.max_duration)
    found = cut_totals(cuts, lambda cut: counter.add(cut.id, cut.duration))
    if not job.kmeans.sample_batches:
        return found
    part_seconds = job.kmeans.sample_batches * job.kmeans.batch_frames / frame_rate
    return replace(found, num_parts=counter.num_parts(part_seconds, 2 * distributed.world_size()))


def epoch_loaders(
    job: FitKMeans, cuts: Iterable[Cut], whole: Survey, sample_rate: int, skipped: SkippedCuts
) -> Callable[[int], BatchLoader[AudioBatch]]:
    """A function that gives the loader of an epoch, which reads one part of the cuts."""
    from k2ssl.data.loader import audio_loader

    loaders: dict[int, BatchLoader[AudioBatch]] = {}

    def loader_of(epoch: int) -> BatchLoader[AudioBatch]:
        part = epoch % whole.num_parts
        skipped.share = min(1.0, (epoch + 1) / whole.num_parts)
        if part not in loaders:
            loaders[part] = audio_loader(
                CorpusPart(cuts, part, whole.num_parts, job.kmeans.seed),
                max_duration=job.loader.max_duration,
                sample_rate=sample_rate,
                num_workers=job.loader.num_workers,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
                seed=job.kmeans.seed,
                shuffle=True,
                on_error=skipped,
            )
        return loaders[part]

    return loader_of


def check_finished(job: FitKMeans, output: Path) -> None:
    """Refuse centres that other settings or older manifests led to.

    Raises:
        ConfigError: names the setting with both values, or the manifest.
    """
    settings = output.with_name(output.name + ".json")
    if not settings.is_file():
        raise ConfigError(f"{output} exists without {settings.name}, so it is not known what led to it; --overwrite True replaces it")
    before, now = (_what_decides(json.loads(text)) for text in (settings.read_text(encoding="utf-8"), dump(job)))
    if changed := differences(before, now):
        raise ConfigError(f"{output} exists, made with other settings: {'; '.join(changed)}; --overwrite True replaces it")
    inputs = [*job.cuts, *([job.features.checkpoint] if isinstance(job.features, HiddenConfig) else [])]
    for manifest in inputs:
        if Path(manifest).stat().st_mtime > output.stat().st_mtime:
            raise ConfigError(f"{output} exists, but {manifest} is newer; --overwrite True replaces it")


def _what_decides(settings: dict[str, Any]) -> dict[str, Any]:
    """Those on which the centres depend."""
    loader = {"max_duration": settings.get("loader", {}).get("max_duration")}
    return {"loader": loader, **{name: settings.get(name) for name in ("cuts", "features", "kmeans")}}


def main(argv: list[str] | None = None) -> int:
    return run_program(fit, FitKMeans, sys.argv[1:] if argv is None else argv, "fit_kmeans", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
