"""What the data of all training programs have in common: which settings are allowed, how manifests are mixed, how audio is read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from k2ssl import distributed
from k2ssl.train.plan import BatchPlan

if TYPE_CHECKING:  # slow to import, and not needed to show --help
    from lhotse.cut import Cut

    from k2ssl.data.loader import Corpora

_log = logging.getLogger(__name__)


def check_reading(config: Any) -> None:
    """
    Raises:
        ValueError: manifests, weights, lengths or numbers that are not allowed.
    """
    name = type(config).__name__
    if not config.cuts:
        raise ValueError(f"{name}: cuts is empty, at least one manifest is needed")
    if config.weights and len(config.weights) != len(config.cuts):
        raise ValueError(f"{name}: weights has {len(config.weights)} entries for {len(config.cuts)} cuts; one each, or none at all")
    if not 0 <= config.min_seconds <= config.max_seconds:
        raise ValueError(
            f"{name}: min_seconds is {config.min_seconds} and max_seconds {config.max_seconds}, allowed is 0 <= min_seconds <= max_seconds"
        )
    for field, least in (("num_buckets", 1), ("buffer_size", 1), ("num_workers", 0), ("max_check", 0)):
        if getattr(config, field) < least:
            raise ValueError(f"{name}: {field} is {getattr(config, field)}, a whole number >= {least} is needed")
    if config.num_workers > 256:
        raise ValueError(f"{name}: num_workers is {config.num_workers}, at most 256 processes per rank are allowed")


def most_to_check(config: Any, at_most: int) -> int | None:
    """How many cuts of each manifest are looked at before training, `at_most` of them unless that is 0; None: all."""
    given = [number for number in (config.max_check, at_most) if number]
    return min(given) if given else None


def corpora_of(manifests: Sequence[Iterable[Cut]], weights: tuple[float, ...] = ()) -> Corpora:
    """Manifests mixed by weights; without them every cut comes once: sets that are used up drop out."""
    from k2ssl.data.loader import Corpora

    return Corpora(tuple(manifests), weights or tuple(1.0 for _ in manifests), repeat=bool(weights))


def reading_options(config: Any, plan: BatchPlan, sample_rate: int, seed: int, device: torch.device) -> dict[str, Any]:
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
    _log.warning("cut %s is left out: %s", cut_id, reason)
