"""Mini-batch k-means over streamed features, on one or several ranks, resumable.

Three stages: a uniform sample is drawn while epoch 0 streams by; centres start from the best of several k-means++ restarts on it; epochs 1, 2,
... move them in mini-batches (Sculley, "Web-scale k-means clustering", 2010). No frame is kept but the sample, so memory does not
grow with the corpus. Where the sample is the whole corpus, Lloyd's algorithm on it takes the place of mini-batches: these would hold the same
frames again and again, so that the inertia falls by less and less without end, and every one would compute all features anew.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2ssl import distributed
from k2ssl.atomic_file import save_atomically
from k2ssl.labelling.features import Scalar
from k2ssl.labelling.frame_stream import CheckedFrames, FrameSource, FrameStream, Replayed, generator
from k2ssl.labelling.kmeans_init import best_start, draw_far_frames
from k2ssl.labelling.kmeans_model import KMeans, read_checked
from k2ssl.labelling.kmeans_progress import (
    FORMAT,
    SAMPLE_FORMAT,
    SAMPLE_VERSION,
    VERSION,
    check_progress,
    identity,
    is_begun,
    sample_path,
    sampling_path,
)
from k2ssl.labelling.kmeans_sample import draw_sample
from k2ssl.labelling.kmeans_settings import KMeansConfig, Progress
from k2ssl.labelling.nearest import Centres, sums_by_label

__all__ = ["KMeans", "KMeansConfig", "Progress", "fit_kmeans"]

# of the inertia, by a pass over all frames: 10 to 90 passes on MFCC, up to 0.4 % above scikit-learn's best of ten KMeans
_LEAST_GAIN = 1e-5
_FEW_BATCHES = 2  # so many of a corpus are kept where they are more than the sample: mini-batches come to an end where an epoch has three


@dataclass
class _State:
    """What changes with every mini-batch; the same on all ranks."""

    centroids: Tensor  # (K, D) float64
    counts: Tensor  # (K,) float64 frames behind each centre
    recent: Tensor  # (K,) float64 frames since the last look for dead clusters
    batches: int = 0
    smoothed: float | None = None
    lowest: float = math.inf
    no_improvement: int = 0
    reassigned: int = 0


@dataclass(frozen=True)
class _Sample:
    """What stays the same while mini-batches go by; the same on all ranks."""

    frames: Tensor  # (R, D) float32 that the centres start from and dead clusters are re-seeded from
    held_out: Tensor  # (V, D) float32
    start: Tensor  # (K, D) float64 centres before the first mini-batch
    start_inertia: float  # of the held-out frames
    whole: bool = False  # whether the two hold every frame of the corpus

    def all_frames(self) -> Tensor:
        """(R + V, D) with each frame once."""
        return self.frames if torch.equal(self.frames, self.held_out) else torch.cat([self.held_out, self.frames])


def fit_kmeans(
    batches: Callable[[int], Iterator[Tensor]] | FrameSource,
    config: KMeansConfig,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    *,
    frame_rate: float | None = None,
    description: Mapping[str, Scalar] | None = None,
    stream: Mapping[str, Scalar] | None = None,
    one_part: bool = False,
    sampled: Callable[[], object] | None = None,
) -> KMeans:
    """Fit centres to streamed features. On several ranks each one calls this with its own share of the features.

    The update is c += (x - c) / n with n the frames that the centre has seen, those of the sample included. Every `reassign_every`
    mini-batches, clusters that got less than `reassign_ratio` of the mean cluster's frames since the last time are re-seeded: moved to
    frames of the sample, drawn with probabilities proportional to the squared distance to the nearest centre, their counts set to 0.
    Mini-batches that come speaker by speaker can make things worse: should the held-out frames be nearer to the centres of the start than
    to the final ones, those are returned, with a warning.

    With `one_part`, a corpus that fits into the sample, or into two mini-batches, is read once and held in memory. Centres then move to the
    means of their frames, all ranks together, until a pass over the frames makes the inertia smaller by no more than a 100,000th.

    Args:
        batches: `batches(epoch)` yields (F, D) frames of any F, on any device; the same ones whenever called with the same epoch, best
            shuffled over the corpus. Epoch 0 is for the sample. A `FrameSource` may know a quicker way to a place in an epoch.
        config: settings.
        device: where distances are computed.
        checkpoint: file that progress is kept in, with `.sample` appended for the sample, and until that is there `.sampling-RANK` for
            what each rank has of it, saved every few minutes. What exists is continued. Interrupted and uninterrupted runs give the same
            bits.
        progress: called after every mini-batch and restart.
        frame_rate: Hz, for the hours in `Progress`.
        description: of the features, kept in the result.
        stream: what else determines the frames (which audio, in batches of what size); progress of another stream is refused.
        one_part: whether every epoch holds the same frames, all of the corpus, but for their order.
        sampled: called on every rank when the sample is drawn, before anything is fitted to it. It may raise, on all ranks alike, and the
            sample is kept then.

    Returns:
        The centres, the same on every rank. The same seed, features and number of ranks give the same bits.

    Raises:
        ValueError: features that are not finite or change their dimension, fewer (distinct) frames than clusters, or a checkpoint of
            other settings, features or ranks.
    """
    source = batches if isinstance(batches, FrameSource) else Replayed(batches)
    given = dict(description or {}), dict(stream or {})
    return _Fit(source, config, torch.device(device), checkpoint, progress, frame_rate, *given, one_part, sampled).run()


class _Fit:
    """One call of `fit_kmeans`."""

    def __init__(
        self,
        source: FrameSource,
        config: KMeansConfig,
        device: torch.device,
        checkpoint: Path | None,
        progress: Callable[[Progress], None] | None,
        frame_rate: float | None,
        description: dict[str, Scalar],
        stream: dict[str, Scalar],
        one_part: bool,
        sampled: Callable[[], object] | None,
    ) -> None:
        self.source, self.config, self.device = CheckedFrames(source, device), config, device
        self.checkpoint, self.tell, self.frame_rate, self.description = checkpoint, progress, frame_rate, description
        self.identity, self.one_part, self.sampled = identity(config, description, stream), one_part, sampled
        ranks = distributed.world_size()
        share = config.batch_frames * (distributed.rank() + 1) // ranks - config.batch_frames * distributed.rank() // ranks
        if config.batch_frames < ranks:
            raise ValueError(f"KMeansConfig: batch_frames is {config.batch_frames}, at least the number of ranks {ranks} is needed")
        self.share = share  # of a mini-batch
        self.progress = Progress("sample", config.max_batches, config.num_restarts)

    def run(self) -> KMeans:
        begun = self.checkpoint is not None and is_begun(self.checkpoint)
        if self.checkpoint is not None:
            with distributed.failing_together():
                check_progress(self.checkpoint, self.identity, begun)
        if self.checkpoint is not None and begun:
            state, sample, stream = self._resume(self.checkpoint)
        else:
            state, sample = self._start()
            stream = FrameStream(self.source, epoch=1)
            self._save(state, stream)
        if self.checkpoint is not None:
            sampling_path(self.checkpoint).unlink(missing_ok=True)
        if sample.whole:
            self._pass_over(sample.all_frames(), state, stream)
        else:
            self._move_in_batches(sample, state, stream)
        self._save(state, stream)
        return KMeans(self._better(state, sample), self.description)

    def _move_in_batches(self, sample: _Sample, state: _State, stream: FrameStream) -> None:
        config = self.config
        self._report(stage="updates", batches=state.batches, inertia=state.smoothed, reassigned=state.reassigned)
        while self._goes_on(state):
            with distributed.failing_together():
                frames = stream.take(self.share)
            if config.reassign_every and state.batches and state.batches % config.reassign_every == 0:
                self._reassign(state, sample.frames)  # just before an update, so that no centre is left where it was re-seeded
            self._update(state, frames)
            self._done_one(state, stream, state.batches * config.batch_frames)

    def _pass_over(self, frames: Tensor, state: _State, stream: FrameStream) -> None:
        """Lloyd's algorithm on (F, D), all frames of all ranks; each takes a share of them. A pass counts as a mini-batch."""
        self._report(stage="passes", batches=state.batches, inertia=state.smoothed, reassigned=state.reassigned)
        own = frames[distributed.rank() :: distributed.world_size()].contiguous()
        while self._goes_on(state):
            sums, counts, total = self._sums(state.centroids, own)
            used = counts > 0
            state.centroids = torch.where(used.unsqueeze(1), sums / counts.clamp(min=1).unsqueeze(1), state.centroids)
            state.counts = counts.clone()  # not to keep, and save, what they are a part of
            before, state.smoothed = state.smoothed, total / len(frames)
            state.lowest = min(state.lowest, state.smoothed)
            state.batches += 1
            state.no_improvement = 0
            if state.smoothed > 0 and not used.all():
                self._reseed(state, (~used).nonzero().squeeze(1), frames)
            elif before is not None and before - state.smoothed <= _LEAST_GAIN * before:
                # further passes would hardly change anything: they see the same frames
                state.no_improvement = self.config.max_no_improvement
            self._done_one(state, stream, state.batches * len(frames))

    def _goes_on(self, state: _State) -> bool:
        return state.batches < self.config.max_batches and state.no_improvement < self.config.max_no_improvement

    def _done_one(self, state: _State, stream: FrameStream, frames: int) -> None:
        if state.batches % self.config.checkpoint_every == 0:
            self._save(state, stream)
        self._report(batches=state.batches, frames=frames, epoch=stream.position[0], inertia=state.smoothed, reassigned=state.reassigned)

    def _start(self) -> tuple[_State, _Sample]:
        """The first centres, and what they were made from."""
        config = self.config
        frames, whole = self._sample()
        if self.sampled is not None:
            self.sampled()
        frames = frames.to(self.device)
        num_held_out = min(config.held_out_frames, len(frames) // 5, len(frames) - config.num_clusters)
        held_out, rest = frames[:num_held_out], frames[num_held_out:].contiguous()
        if not num_held_out:
            held_out = rest
        start = best_start(
            rest,
            held_out,
            config.num_clusters,
            config.num_restarts,
            config.lloyd_iterations,
            config.seed,
            lambda done, inertia: self._report(stage="restarts", restarts_done=done, inertia=inertia),
        )
        self._report(restarts_done=config.num_restarts, inertia=start.inertia)
        sample = _Sample(rest, held_out, start.centroids.clone(), start.inertia, whole)
        if self.checkpoint is not None and distributed.is_main():
            save_atomically(sample_path(self.checkpoint), {"format": SAMPLE_FORMAT, "version": SAMPLE_VERSION, **vars(sample)})
        return _State(start.centroids, start.counts, torch.zeros_like(start.counts)), sample

    def _better(self, state: _State, sample: _Sample) -> Tensor:
        """The final centres, or those of the start should the held-out frames be nearer to them."""
        if sample.whole:  # no pass makes it worse over all frames, which are what counts here
            self._report(stage="done", inertia=KMeans(state.centroids).inertia(sample.all_frames()))
            return state.centroids
        inertia = KMeans(state.centroids).inertia(sample.held_out)
        centroids = state.centroids
        if inertia > sample.start_inertia:
            warnings.warn(
                f"fit_kmeans: held-out frames have inertia {inertia:.6g} after {state.batches} mini-batches and had {sample.start_inertia:.6g} "
                "before them; the centres of before are taken. Are the features shuffled over the corpus?",
                stacklevel=4,
            )
            inertia, centroids = sample.start_inertia, sample.start
        self._report(stage="done", inertia=inertia)
        return centroids

    def _sample(self) -> tuple[Tensor, bool]:
        """(R, D) on the CPU, uniform over the frames of all ranks, in random order; and whether they are all of the corpus."""
        config, ranks = self.config, distributed.world_size()
        path = None if self.checkpoint is None else sampling_path(self.checkpoint)
        enough = config.sample_batches * self.share or math.inf

        def seen(frames: int, resumed: int) -> None:
            self._report(frames=frames * ranks, resumed=resumed * ranks)

        wanted = config.reservoir_frames + config.held_out_frames
        capacity = max(wanted, _FEW_BATCHES * config.batch_frames) if self.one_part else wanted
        sample, everything = draw_sample(self.source, capacity, config.seed, enough, self.device, path, self.identity, seen)
        if len(sample) < config.num_clusters:
            raise ValueError(f"KMeansConfig: num_clusters is {config.num_clusters}, but the features hold only {len(sample)} frames")
        whole = self.one_part and everything
        return (sample if whole else sample[:wanted]), whole

    def _update(self, state: _State, frames: Tensor) -> None:
        """One mini-batch: this rank's (share, D) frames."""
        config = self.config
        sums, counts, total = self._sums(state.centroids, frames)
        state.counts += counts
        state.recent += counts
        state.centroids += (sums - counts.unsqueeze(1) * state.centroids) / state.counts.clamp(min=1).unsqueeze(1)
        state.batches += 1
        mean = total / config.batch_frames
        newest = 2 / (1 + config.smoothing_batches)
        state.smoothed = mean if state.smoothed is None else (1 - newest) * state.smoothed + newest * mean
        state.no_improvement = 0 if state.smoothed < state.lowest else state.no_improvement + 1
        state.lowest = min(state.lowest, state.smoothed)

    def _sums(self, centroids: Tensor, frames: Tensor) -> tuple[Tensor, Tensor, float]:
        """Over all ranks' (F, D) frames: (K, D) sums and (K,) counts by nearest centre, both float64, and the sum of squared distances."""
        centres = Centres(centroids)
        labels = centres.nearest(frames)
        inertia = centres.squared_distances(frames, labels).double().sum()
        sums, counts = sums_by_label(frames, labels, len(centroids))
        packed = distributed.all_reduce_sum(torch.cat([sums.flatten(), counts, inertia.unsqueeze(0)]))
        return packed[: sums.numel()].view_as(sums), packed[sums.numel() : -1], packed[-1].item()

    def _reassign(self, state: _State, sample: Tensor) -> None:
        """Re-seed dead clusters: the same draw from the same sample on every rank."""
        dead = (state.recent < self.config.reassign_ratio * state.recent.mean()).nonzero().squeeze(1)[: len(sample)]
        state.recent.zero_()
        if len(dead):
            self._reseed(state, dead, sample)

    def _reseed(self, state: _State, clusters: Tensor, sample: Tensor) -> None:
        draw = generator(self.config.seed, 2, state.batches)
        state.centroids[clusters] = draw_far_frames(sample, Centres(state.centroids), len(clusters), draw).double()
        state.counts[clusters] = 0
        state.reassigned += len(clusters)

    def _save(self, state: _State, stream: FrameStream) -> None:
        positions = distributed.all_gather_rows(torch.tensor([stream.position]))
        if self.checkpoint is not None and distributed.is_main():
            save_atomically(self.checkpoint, {"format": FORMAT, "version": VERSION, **self.identity, **vars(state), "positions": positions})

    def _resume(self, path: Path) -> tuple[_State, _Sample, FrameStream]:
        with distributed.failing_together():
            names = [field.name for field in fields(_State)]
            content = read_checked(path, FORMAT, VERSION, ("positions", *names))
            parts = [field.name for field in fields(_Sample) if field.name != "whole"]
            kept = read_checked(sample_path(path), SAMPLE_FORMAT, SAMPLE_VERSION, tuple(parts))
            sample = _Sample(**{name: self._here(kept[name]) for name in parts})
            sample = replace(sample, whole=self.one_part and kept.get("whole", self._must_be_whole(sample)))
            state = _State(**{name: self._here(content[name]) for name in names})
            if sample.whole and "whole" not in kept:
                state.smoothed = None  # it is of mini-batches, with which a pass cannot be compared
            self.source.dim = state.centroids.shape[1]
            stream = FrameStream(self.source, *content["positions"][distributed.rank()].tolist())
        self._report(batches=state.batches, restarts_done=self.config.num_restarts)
        return state, sample, stream

    def _must_be_whole(self, sample: _Sample) -> bool:
        """Of a sample that was kept by a release which did not say so: it is smaller than it might have been."""
        config, size = self.config, len(sample.all_frames())
        seen_at_least = config.sample_batches * (config.batch_frames // distributed.world_size()) or math.inf
        return size < min(config.reservoir_frames + config.held_out_frames, seen_at_least)

    def _here(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value

    def _report(self, **changes: Any) -> None:
        before, progress = self.progress, replace(self.progress, **changes)
        if self.frame_rate is not None:
            progress = replace(progress, hours=progress.frames / self.frame_rate / 3600)
        self.progress = progress
        if self.tell is not None and progress != before:
            self.tell(progress)
