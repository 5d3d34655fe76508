"""Mini-batch k-means over streamed features, on one or several ranks, resumable.

Three stages: a uniform sample is drawn while epoch 0 streams by; centres start from the best of several k-means++ restarts on it; epochs 1, 2,
... move them in mini-batches (Sculley, "Web-scale k-means clustering", 2010). No frame is kept but the sample, so memory does not
grow with the corpus.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2ssl import distributed
from k2ssl.atomic_file import save_atomically
from k2ssl.labelling.features import Scalar
from k2ssl.labelling.frame_stream import FrameStream, Reservoir, generator
from k2ssl.labelling.kmeans_init import best_start, draw_far_frames
from k2ssl.labelling.kmeans_model import KMeans, check_finite, read_checked
from k2ssl.labelling.nearest import Centres, sums_by_label

__all__ = ["KMeans", "KMeansConfig", "Progress", "fit_kmeans"]

_FORMAT = "k2ssl-kmeans-progress"
_SAMPLE_FORMAT = "k2ssl-kmeans-sample"
_VERSION = 1
_MAY_CHANGE = ("max_batches", "max_no_improvement", "checkpoint_every")  # between an interruption and going on


@dataclass(frozen=True)
class KMeansConfig:
    """Settings of `fit_kmeans`.

    Attributes:
        num_clusters: K.
        batch_frames: frames of a mini-batch, over all ranks.
        max_batches: mini-batches after which the centres are taken as they are.
        max_no_improvement: mini-batches without a new lowest smoothed inertia after which fitting ends earlier.
        smoothing_batches: the inertia is smoothed exponentially with weight 2 / (1 + this) for the newest mini-batch.
        reservoir_frames: frames of the sample that centres start from.
        held_out_frames: further frames of the sample that restarts are scored on; no more than a fifth of all frames.
        sample_batches: mini-batches of epoch 0 to draw the sample from; None for the whole epoch.
        num_restarts: k-means++ initialisations, of which the best is taken.
        lloyd_iterations: full k-means iterations on the sample that each restart is refined with.
        reassign_every: mini-batches between looks for dead clusters; 0 never looks.
        reassign_ratio: a cluster is dead if it got fewer frames since the last look than this share of the mean cluster.
        checkpoint_every: mini-batches between checkpoints.
        seed: of all draws.
    """

    num_clusters: int = 100
    batch_frames: int = 10_000
    max_batches: int = 10_000
    max_no_improvement: int = 100
    smoothing_batches: int = 50
    reservoir_frames: int = 50_000
    held_out_frames: int = 20_000
    sample_batches: int | None = None
    num_restarts: int = 10
    lloyd_iterations: int = 10
    reassign_every: int = 10
    reassign_ratio: float = 0.01
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"held_out_frames": 0, "lloyd_iterations": 0, "reassign_every": 0, "seed": 0}
        for name, value in asdict(self).items():
            if name in ("reassign_ratio", "sample_batches") and value is None:
                continue
            if name != "reassign_ratio" and value < least.get(name, 1):
                raise ValueError(f"KMeansConfig: {name} is {value}, an integer >= {least.get(name, 1)} is needed")
        if not 0 <= self.reassign_ratio < 1:
            raise ValueError(f"KMeansConfig: reassign_ratio is {self.reassign_ratio}, at least 0 and less than 1 is needed")
        if self.reservoir_frames < self.num_clusters:
            raise ValueError(
                f"KMeansConfig: reservoir_frames is {self.reservoir_frames}, at least num_clusters {self.num_clusters} is needed"
            )


@dataclass(frozen=True)
class Progress:
    """How far fitting has come.

    Attributes:
        stage: "sample", "restarts", "updates" or "done".
        batches: mini-batches done, of at most `max_batches`.
        frames: frames seen in this stage over all ranks; in the stage "sample" taken to be as many on every rank as on this one.
        epoch: of the features, on this rank.
        hours: of audio in `frames`; None if the frame rate is not known.
        inertia: mean squared distance per frame: of held-out frames (restarts: the best so far; done: of the result) or smoothed over
            mini-batches (updates).
        restarts_done: of `num_restarts`.
        reassigned: dead clusters re-seeded so far.
    """

    stage: str
    max_batches: int
    num_restarts: int
    batches: int = 0
    frames: int = 0
    epoch: int = 0
    hours: float | None = None
    inertia: float | None = None
    restarts_done: int = 0
    reassigned: int = 0


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


def fit_kmeans(
    batches: Callable[[int], Iterator[Tensor]],
    config: KMeansConfig,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    *,
    frame_rate: float | None = None,
    description: Mapping[str, Scalar] | None = None,
    stream: Mapping[str, Scalar] | None = None,
) -> KMeans:
    """Fit centres to streamed features. On several ranks each one calls this with its own share of the features.

    The update is c += (x - c) / n with n the frames that the centre has seen, those of the sample included. Every `reassign_every`
    mini-batches, clusters that got less than `reassign_ratio` of the mean cluster's frames since the last time are re-seeded: moved to
    frames of the sample, drawn with probabilities proportional to the squared distance to the nearest centre, their counts set to 0.
    Mini-batches that come speaker by speaker can make things worse: should the held-out frames be nearer to the centres of the start than
    to the final ones, those are returned, with a warning.

    Args:
        batches: `batches(epoch)` yields (F, D) frames of any F, on any device; the same ones whenever called with the same epoch, best
            shuffled over the corpus. Epoch 0 is for the sample.
        config: settings.
        device: where distances are computed.
        checkpoint: file that progress is kept in, with `.sample` appended for the sample; an existing one is continued, whereby the
            features of the interrupted epoch are streamed again up to where it was. Interrupted and uninterrupted runs give the same bits.
        progress: called after every mini-batch and restart.
        frame_rate: Hz, for the hours in `Progress`.
        description: of the features, kept in the result.
        stream: what else determines the frames (which audio, in batches of what size); progress of another stream is refused.

    Returns:
        The centres, the same on every rank. The same seed, features and number of ranks give the same bits.

    Raises:
        ValueError: features that are not finite or change their dimension, fewer (distinct) frames than clusters, or a checkpoint of
            other settings, features or ranks.
    """
    return _Fit(batches, config, torch.device(device), checkpoint, progress, frame_rate, dict(description or {}), dict(stream or {})).run()


class _Fit:
    """One call of `fit_kmeans`."""

    def __init__(
        self,
        batches: Callable[[int], Iterator[Tensor]],
        config: KMeansConfig,
        device: torch.device,
        checkpoint: Path | None,
        progress: Callable[[Progress], None] | None,
        frame_rate: float | None,
        description: dict[str, Scalar],
        stream: dict[str, Scalar],
    ) -> None:
        self.batches, self.config, self.device = batches, config, device
        self.checkpoint, self.tell, self.frame_rate, self.description = checkpoint, progress, frame_rate, description
        self.stream = stream
        ranks = distributed.world_size()
        share = config.batch_frames * (distributed.rank() + 1) // ranks - config.batch_frames * distributed.rank() // ranks
        if config.batch_frames < ranks:
            raise ValueError(f"KMeansConfig: batch_frames is {config.batch_frames}, at least the number of ranks {ranks} is needed")
        self.share = share  # of a mini-batch
        self.dim = 0  # of the features, 0 until the first frames have come
        self.progress = Progress("sample", config.max_batches, config.num_restarts)

    def run(self) -> KMeans:
        config = self.config
        if self.checkpoint is not None and _main_says(self.checkpoint.exists()):
            state, sample, stream = self._resume(self.checkpoint)
        else:
            state, sample = self._start()
            stream = FrameStream(self._checked, epoch=1)
            self._save(state, stream)
        self._report(stage="updates", batches=state.batches, inertia=state.smoothed, reassigned=state.reassigned)
        while state.batches < config.max_batches and state.no_improvement < config.max_no_improvement:
            with distributed.failing_together():
                frames = stream.take(self.share)
            if config.reassign_every and state.batches and state.batches % config.reassign_every == 0:
                self._reassign(state, sample.frames)  # just before an update, so that no centre is left where it was re-seeded
            self._update(state, frames)
            if state.batches % config.checkpoint_every == 0:
                self._save(state, stream)
            self._report(
                batches=state.batches,
                frames=state.batches * config.batch_frames,
                epoch=stream.position[0],
                inertia=state.smoothed,
                reassigned=state.reassigned,
            )
        self._save(state, stream)
        return KMeans(self._better(state, sample), self.description)

    def _start(self) -> tuple[_State, _Sample]:
        """The first centres, and what they were made from."""
        config = self.config
        frames = self._sample().to(self.device)
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
        sample = _Sample(rest, held_out, start.centroids.clone(), start.inertia)
        if self.checkpoint is not None and distributed.is_main():
            save_atomically(_sample_path(self.checkpoint), {"format": _SAMPLE_FORMAT, "version": _VERSION, **vars(sample)})
        return _State(start.centroids, start.counts, torch.zeros_like(start.counts)), sample

    def _better(self, state: _State, sample: _Sample) -> Tensor:
        """The final centres, or those of the start should the held-out frames be nearer to them."""
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

    def _sample(self) -> Tensor:
        """(R, D) on the CPU, uniform over the frames of all ranks, in random order."""
        config = self.config
        reservoir = Reservoir(config.reservoir_frames + config.held_out_frames, (config.seed, 0))
        enough = math.inf if config.sample_batches is None else config.sample_batches * self.share
        with distributed.failing_together():
            for frames in self._checked(0):
                reservoir.show(frames)
                self._report(frames=reservoir.num_shown * distributed.world_size())
                if reservoir.num_shown >= enough:
                    break
            if not reservoir.num_shown:
                raise ValueError(f"features: epoch 0 holds no frame for rank {distributed.rank()}, at least 1 is needed")
        sample = reservoir.gather(self.device)
        if len(sample) < config.num_clusters:
            raise ValueError(f"KMeansConfig: num_clusters is {config.num_clusters}, but the features hold only {len(sample)} frames")
        return sample

    def _checked(self, epoch: int) -> Iterator[Tensor]:
        """The features of an epoch as float32 on the device, refused where they are not finite or not (F, D) with one D."""
        for number, frames in enumerate(self.batches(epoch)):
            what = f"features of epoch {epoch}, batch {number}"
            if frames.dim() != 2 or not frames.is_floating_point() or frames.shape[1] != (self.dim or frames.shape[1]):
                raise ValueError(
                    f"{what}: {frames.dtype} of shape {tuple(frames.shape)}, floating point (frames, {self.dim or 'dimensions'}) is needed"
                )
            check_finite(frames, what)
            self.dim = frames.shape[1]
            yield frames.detach().to(self.device, torch.float32)

    def _update(self, state: _State, frames: Tensor) -> None:
        """One mini-batch: this rank's (share, D) frames."""
        config = self.config
        centres = Centres(state.centroids)
        labels = centres.nearest(frames)
        inertia = centres.squared_distances(frames, labels).double().sum()
        sums, counts = sums_by_label(frames, labels, config.num_clusters)
        packed = distributed.all_reduce_sum(torch.cat([sums.flatten(), counts, inertia.unsqueeze(0)]))
        sums, counts = packed[: sums.numel()].view_as(sums), packed[sums.numel() : -1]
        state.counts += counts
        state.recent += counts
        state.centroids += (sums - counts.unsqueeze(1) * state.centroids) / state.counts.clamp(min=1).unsqueeze(1)
        state.batches += 1
        mean = packed[-1].item() / config.batch_frames
        newest = 2 / (1 + config.smoothing_batches)
        state.smoothed = mean if state.smoothed is None else (1 - newest) * state.smoothed + newest * mean
        state.no_improvement = 0 if state.smoothed < state.lowest else state.no_improvement + 1
        state.lowest = min(state.lowest, state.smoothed)

    def _reassign(self, state: _State, sample: Tensor) -> None:
        """Re-seed dead clusters: the same draw from the same sample on every rank."""
        dead = (state.recent < self.config.reassign_ratio * state.recent.mean()).nonzero().squeeze(1)[: len(sample)]
        state.recent.zero_()
        if len(dead):
            draw = generator(self.config.seed, 2, state.batches)
            state.centroids[dead] = draw_far_frames(sample, Centres(state.centroids), len(dead), draw).double()
            state.counts[dead] = 0
            state.reassigned += len(dead)

    def _save(self, state: _State, stream: FrameStream) -> None:
        positions = distributed.all_gather_rows(torch.tensor([stream.position]))
        if self.checkpoint is not None and distributed.is_main():
            save_atomically(self.checkpoint, {**self._identity(), **vars(state), "positions": positions})

    def _identity(self) -> dict[str, Any]:
        config = {name: value for name, value in asdict(self.config).items() if name not in _MAY_CHANGE}
        ranks = distributed.world_size()
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "config": config,
            "description": self.description,
            "stream": self.stream,
            "ranks": ranks,
        }

    def _resume(self, path: Path) -> tuple[_State, _Sample, FrameStream]:
        with distributed.failing_together():
            names = [field.name for field in fields(_State)]
            content = read_checked(path, _FORMAT, _VERSION, ("config", "description", "stream", "ranks", "positions", *names))
            for part in ("config", "description", "stream", "ranks"):
                _check_same(path, part, content[part], self._identity()[part])
            parts = [field.name for field in fields(_Sample)]
            kept = read_checked(_sample_path(path), _SAMPLE_FORMAT, _VERSION, tuple(parts))
            sample = _Sample(**{name: self._here(kept[name]) for name in parts})
            state = _State(**{name: self._here(content[name]) for name in names})
            self.dim = state.centroids.shape[1]
            stream = FrameStream(self._checked, *content["positions"][distributed.rank()].tolist())
        self._report(batches=state.batches, restarts_done=self.config.num_restarts)
        return state, sample, stream

    def _here(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value

    def _report(self, **changes: Any) -> None:
        before, progress = self.progress, replace(self.progress, **changes)
        if self.frame_rate is not None:
            progress = replace(progress, hours=progress.frames / self.frame_rate / 3600)
        self.progress = progress
        if self.tell is not None and progress != before:
            self.tell(progress)


def _main_says(answer: bool) -> bool:
    """Rank 0's answer, on every rank."""
    return bool(distributed.broadcast(torch.tensor(int(answer))).item())


def _sample_path(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".sample")


def _check_same(path: Path, part: str, theirs: Any, ours: Any) -> None:
    if theirs == ours:
        return
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        pairs = ", ".join(f"{part}.{key} is {ours.get(key)!r}, there {theirs.get(key)!r}" for key in keys)
    else:
        pairs = f"{part} is {ours!r}, there {theirs!r}"
    raise ValueError(f"{path}: holds the progress of another run: {pairs}; delete it to start anew, or name another file")
