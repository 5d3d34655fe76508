"""Settings of k-means fitting, and what it tells while it goes on."""

from __future__ import annotations

from dataclasses import asdict, dataclass

# What is beyond is a slip of the pen, or does not fit into any memory.
_ALLOWED = {
    "num_clusters": (1, 10**6),
    "batch_frames": (1, 10**7),
    "reservoir_frames": (1, 10**7),
    "held_out_frames": (0, 10**7),
    "num_restarts": (1, 10**4),
    "lloyd_iterations": (0, 10**4),
    "sample_batches": (0, 10**9),
    "reassign_every": (0, 10**9),
    "seed": (0, 2**63 - 1),
}


@dataclass(frozen=True)
class KMeansConfig:
    """How many centres, and how they are found.

    Attributes:
        num_clusters: number of centres, and so of classes.
        batch_frames: frames of a mini-batch, over all ranks.
        max_batches: mini-batches after which the centres are taken as they are. Where a small corpus is held in memory, a pass over all of
            it counts as one.
        max_no_improvement: mini-batches without a new lowest smoothed inertia after which fitting ends earlier.
        smoothing_batches: the inertia is smoothed exponentially with weight 2 / (1 + this) for the newest mini-batch.
        reservoir_frames: frames of the sample that centres start from; `held_out_frames` are sampled besides.
        held_out_frames: frames of the sample that restarts are scored on, at most a fifth of all that are sampled.
        sample_batches: mini-batches of epoch 0 that the sample is drawn from, at most; 0 for the whole epoch. The program `fit_kmeans`
            deals the whole corpus by hash into parts of at most about this size, of which every epoch reads one.
        num_restarts: k-means++ initialisations, of which the best is taken.
        lloyd_iterations: full k-means iterations on the sample that each restart is refined with.
        reassign_every: mini-batches between looks for dead clusters; 0 never looks.
        reassign_ratio: a cluster is dead if it got fewer frames since the last look than this share of the mean cluster.
        checkpoint_every: mini-batches between checkpoints.
        seed: of the sample, the restarts and the order of the data.
    """

    num_clusters: int = 100
    batch_frames: int = 10_000
    max_batches: int = 10_000
    max_no_improvement: int = 100
    smoothing_batches: int = 50
    reservoir_frames: int = 50_000
    held_out_frames: int = 20_000
    sample_batches: int = 2_000
    num_restarts: int = 10
    lloyd_iterations: int = 10
    reassign_every: int = 10
    reassign_ratio: float = 0.01
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least, most = _ALLOWED.get(name, (1, 10**9))
            if name != "reassign_ratio" and not least <= value <= most:
                raise ValueError(f"KMeansConfig: {name} is {value}, allowed are integers from {least} to {most}")
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
        stage: "sample", "restarts", "updates" (or "passes", where all frames are held in memory) or "done".
        batches: mini-batches done, of at most `max_batches`.
        frames: frames seen in this stage over all ranks; in the stage "sample" taken to be as many on every rank as on this one.
        resumed: of these frames, those of the sample that an interrupted run had seen.
        epoch: of the features, on this rank.
        hours: of audio in `frames`; None if the frame rate is not known.
        inertia: mean squared distance per frame: of held-out frames (restarts: the best so far; done: of the result), smoothed over
            mini-batches (updates), or of all frames (passes, and done after them).
        restarts_done: of `num_restarts`.
        reassigned: dead clusters re-seeded so far.
    """

    stage: str
    max_batches: int
    num_restarts: int
    batches: int = 0
    frames: int = 0
    resumed: int = 0
    epoch: int = 0
    hours: float | None = None
    inertia: float | None = None
    restarts_done: int = 0
    reassigned: int = 0
