"""What the data of all training programs have in common: which settings are allowed, how manifests are mixed, how audio is read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from k2ssl import distributed
from k2ssl.train.plan import BatchPlan

if TYPE_CHECKING:  # slow to import, and not needed to show --help
    from lhotse.cut import Cut

    from k2ssl.data.loader import Corpora

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What the data of all training programs is told by; each program has more of its own.

    Attributes:
        cuts: manifests to train on (.jsonl.gz).
        weights: how often a manifest is drawn from, relative numbers of cuts, one for each; none given: every cut once an epoch.
        valid_cuts: manifests to validate on; none: no validation.
        normalize: bring every whole utterance to zero mean and unit variance, before anything is cropped, as published for Large.
        quadratic_duration: count an utterance of d seconds as d + d^2 / quadratic_duration; none: as d.
        num_buckets: groups of similar duration, from one of which a batch is drawn.
        buffer_size: cuts that are held at a time; the larger, the better the shuffling.
        num_workers: processes of each rank that read audio; 0 reads in the training process.
        max_check: cuts of each manifest that are held against the model before training; 0: all.
    """

    cuts: tuple[str, ...]
    weights: tuple[float, ...] = ()
    valid_cuts: tuple[str, ...] = ()
    min_seconds: float  # of these two each program has its own default, and its own idea of what becomes of other utterances
    max_seconds: float
    normalize: bool = False
    quadratic_duration: float | None = None
    num_buckets: int = 30
    buffer_size: int = 20000
    num_workers: int = 4
    max_check: int = 300000

    def __init_subclass__(cls) -> None:
        """Programs make --help from the docstring of one class: that of a subclass tells of what it inherits, too."""
        shared = (TrainingData.__doc__ or "").partition("Attributes:\n")[2]
        cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}\n{shared}"

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not self.cuts:
            raise ValueError(f"{name}: cuts is empty, at least one manifest is needed")
        if self.weights and len(self.weights) != len(self.cuts):
            raise ValueError(f"{name}: weights has {len(self.weights)} entries for {len(self.cuts)} cuts; one each, or none at all")
        if not 0 <= self.min_seconds <= self.max_seconds:
            raise ValueError(
                f"{name}: min_seconds is {self.min_seconds} and max_seconds {self.max_seconds}, allowed is 0 <= min_seconds <= max_seconds"
            )
        for field, least in (("num_buckets", 1), ("buffer_size", 1), ("num_workers", 0), ("max_check", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"{name}: {field} is {getattr(self, field)}, a whole number >= {least} is needed")
        if self.num_workers > 256:
            raise ValueError(f"{name}: num_workers is {self.num_workers}, at most 256 processes per rank are allowed")


def most_to_check(config: TrainingData, at_most: int) -> int | None:
    """How many cuts of each manifest are looked at before training, `at_most` of them unless that is 0; None: all."""
    given = [number for number in (config.max_check, at_most) if number]
    return min(given) if given else None


def corpora_of(manifests: Sequence[Iterable[Cut]], weights: tuple[float, ...] = ()) -> Corpora:
    """Manifests mixed by weights; without them every cut comes once: sets that are used up drop out."""
    from k2ssl.data.loader import Corpora

    return Corpora(tuple(manifests), weights or tuple(1.0 for _ in manifests), repeat=bool(weights))


def reading_options(config: TrainingData, plan: BatchPlan, sample_rate: int, seed: int, device: torch.device) -> dict[str, Any]:
    """Options of the loaders for this rank."""
    return {
        "max_duration": plan.micro_batch_seconds,
        "quadratic_duration": config.quadratic_duration,
        "num_buckets": config.num_buckets,
        "buffer_size": config.buffer_size,
        "sample_rate": sample_rate,
        "normalize": config.normalize,
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
        "seed": seed,
        "num_workers": config.num_workers,
        "pin_memory": device.type == "cuda",
        "on_error": _say_unreadable,
    }


def _say_unreadable(cut_id: str, reason: str) -> None:
    rank = f"rank {distributed.rank()}: " if distributed.world_size() > 1 else ""
    _log.error("%scut %s is left out: %s", rank, cut_id, reason)  # an error, since ranks other than 0 tell of nothing less
