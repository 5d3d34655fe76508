"""Drawing the sample that k-means starts from, so that an interruption costs minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2ssl import distributed
from k2ssl.atomic_file import save_atomically
from k2ssl.labelling.frame_stream import CheckedFrames, Reservoir
from k2ssl.labelling.kmeans_model import read_checked
from k2ssl.labelling.kmeans_progress import SAMPLING_FORMAT, SAMPLING_VERSION

_SAVE_EVERY = 180.0  # seconds; a reservoir of wide frames takes 200 MB, and saving changes no bit of the sample


def draw_sample(
    source: CheckedFrames,
    capacity: int,
    seed: int,
    enough: float,
    device: torch.device,
    path: Path | None,
    identity: Mapping[str, Any],
    seen: Callable[[int, int], None],
) -> tuple[Tensor, bool]:
    """(at most capacity, D) on the CPU: a uniform sample of the frames that epoch 0 of `source` holds on all ranks, in random order, and
    whether these are all of them. The first rows are the sample of a smaller capacity.

    Args:
        source: its `dim` is known afterwards.
        capacity: frames of the sample.
        seed: of the draws.
        enough: frames of this rank after which the rest of the epoch is not looked at.
        device: that tensors travel between ranks from.
        path: file of this rank for what it has so far, continued if it exists, see `check_progress`; None keeps none. It is left where it is.
        identity: of the run, kept in the file.
        seen: called with the number of this rank's frames seen so far, and how many of them before an interruption.

    Raises:
        ValueError: no frame on this rank, or frames that are refused.
    """
    reservoir, begin, finished = Reservoir(capacity, (seed, 0)), 0, False
    with distributed.failing_together():
        if path is not None and path.exists():
            begin, finished = _load(reservoir, path)
            source.dim = reservoir.dim
            seen(reservoir.num_shown, reservoir.num_shown)
        resumed, saved = reservoir.num_shown, time.monotonic()
        place = begin
        for place, frames in () if finished else source.start(0, begin):
            reservoir.show(frames)
            seen(reservoir.num_shown, resumed)
            if reservoir.num_shown >= enough:
                break
            if path is not None and time.monotonic() - saved >= _SAVE_EVERY:
                _save(reservoir, path, identity, place, False)
                saved = time.monotonic()
        if not reservoir.num_shown:
            raise ValueError(f"features: epoch 0 holds no frame for rank {distributed.rank()}, at least 1 is needed")
        if path is not None and not finished:
            _save(reservoir, path, identity, place, True)
    sample = reservoir.gather(device)
    (to_its_end,) = distributed.agree(int(reservoir.num_shown < enough))
    num_shown = int(distributed.all_reduce_sum(torch.tensor(reservoir.num_shown)))
    return sample, bool(to_its_end) and len(sample) == num_shown


def _save(reservoir: Reservoir, path: Path, identity: Mapping[str, Any], place: int, finished: bool) -> None:
    content = {"format": SAMPLING_FORMAT, "version": SAMPLING_VERSION, **identity, "place": place, "finished": finished}
    save_atomically(path, {**content, "reservoir": reservoir.state_dict()})


def _load(reservoir: Reservoir, path: Path) -> tuple[int, bool]:
    content = read_checked(path, SAMPLING_FORMAT, SAMPLING_VERSION, ("place", "finished", "reservoir"))
    reservoir.load_state_dict(content["reservoir"])
    return content["place"], content["finished"]
