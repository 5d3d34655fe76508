"""The batches of an epoch that need the most memory, found before anything is read."""

from __future__ import annotations

import copy
from itertools import islice
from typing import Any

from k2ssl.data.audio_dataset import Request
from k2ssl.data.batch_loader import BatchLoader
from k2ssl.data.sampler import collection_paused


def worst_requests(loader: BatchLoader[Any], most_batches: int = 2000) -> dict[str, Request]:
    """What the largest batches of this rank's epoch are made of, by the manifest alone; `loader.read` reads one.

    Args:
        loader: goes on afterwards as if nothing had happened.
        most_batches: how many batches from the beginning of the epoch are looked at (some 45 microseconds for each cut of all ranks).

    Returns:
        "longest audio": most seconds, padding included; "most utterances"; "longest utterance". The same batch may be several of these.

    Raises:
        ValueError: `most_batches` is less than 1, or the epoch has no batch; the loader's own message says which cuts are left out, and why.
    """
    if most_batches < 1:
        raise ValueError(f"worst_requests: most_batches is {most_batches}, allowed is >= 1")
    worst: dict[str, tuple[tuple[float, ...], Request]] = {}
    with collection_paused():
        for request in islice(loader.requests(), most_batches):
            num, longest = len(request.cuts), row_seconds(loader, request)
            sizes = {"longest audio": (num * longest, longest), "most utterances": (num, longest), "longest utterance": (longest, num)}
            for name, size in sizes.items():
                if name not in worst or size > worst[name][0]:
                    worst[name] = size, request
    if not worst:
        _let_loader_refuse(loader)
        raise ValueError(f"epoch {loader.epoch} has no batch for rank {loader.rank} of {loader.world_size}")
    return {name: request for name, (_, request) in worst.items()}


def _let_loader_refuse(loader: BatchLoader[Any]) -> None:
    """Iterate a loader without a batch, which raises if all ranks need one; nothing happens to `loader` itself."""
    alone = copy.copy(loader)
    alone.intake, alone.num_workers = loader.intake.copy(), 0
    alone.start_at(loader.epoch, 0)
    next(iter(alone), None)


def row_seconds(loader: BatchLoader[Any], request: Request) -> float:
    """Seconds of every row of the batch: all are cropped to the shortest cut, or all padded to the longest."""
    return loader.dataset.row_seconds([cut.duration for cut in request.cuts])
