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

_FORMAT = "k2ssl-kmeans-sampling"
_VERSION = 1
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
) -> Tensor:
    """(at most capacity, D) on the CPU: a uniform sample of the frames that epoch 0 of `source` holds on all ranks, in random order.

    Args:
        source: its `dim` is known afterwards.
        capacity: frames of the sample.
        seed: of the draws.
        enough: frames of this rank after which the rest of the epoch is not looked at.
        device: that tensors travel between ranks from.
        path: file of this rank for what it has so far, continued if it exists; None keeps none. It is left where it is.
        identity: of the run; a file with another one is refused.
        seen: called with the number of this rank's frames seen so far, and how many of them before an interruption.

    Raises:
        ValueError: no frame on this rank, frames that are refused, or a file of another run.
    """
    reservoir, begin, finished = Reservoir(capacity, (seed, 0)), 0, False
    with distributed.failing_together():
        if path is not None and path.exists():
            begin, finished = _load(reservoir, path, identity)
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
    return reservoir.gather(device)


def _save(reservoir: Reservoir, path: Path, identity: Mapping[str, Any], place: int, finished: bool) -> None:
    content = {"format": _FORMAT, "version": _VERSION, **identity, "place": place, "finished": finished}
    save_atomically(path, {**content, "reservoir": reservoir.state_dict()})


def _load(reservoir: Reservoir, path: Path, identity: Mapping[str, Any]) -> tuple[int, bool]:
    content = read_checked(path, _FORMAT, _VERSION, (*identity, "place", "finished", "reservoir"))
    check_same(path, content, identity)
    reservoir.load_state_dict(content["reservoir"])
    return content["place"], content["finished"]


def check_same(path: Path, content: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse what another run has written.

    Raises:
        ValueError: names the file and what differs, with both values.
    """
    for part, ours in identity.items():
        theirs = content[part]
        if theirs == ours:
            continue
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
            keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
            pairs = ", ".join(f"{part}.{key} is {ours.get(key)!r}, there {theirs.get(key)!r}" for key in keys)
        else:
            pairs = f"{part} is {ours!r}, there {theirs!r}"
        raise ValueError(f"{path}: holds the progress of another run: {pairs}; delete it to start anew, or name another file")
