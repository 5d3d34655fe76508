"""The files in which a fit keeps what it has done, and whether they are of the run that finds them.

CHECKPOINT holds the centres as they move and CHECKPOINT.sample what they are made from; until these are there, CHECKPOINT.sampling-RANK holds
what each rank has of the sample.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from k2ssl import distributed
from k2ssl.labelling.features import Scalar
from k2ssl.labelling.kmeans_model import read_checked
from k2ssl.labelling.kmeans_settings import KMeansConfig

FORMAT, VERSION = "k2ssl-kmeans-progress", 2
SAMPLE_FORMAT, SAMPLE_VERSION = "k2ssl-kmeans-sample", 2
SAMPLING_FORMAT, SAMPLING_VERSION = "k2ssl-kmeans-sampling", 1

_MAY_CHANGE = ("max_batches", "max_no_improvement", "checkpoint_every")  # between an interruption and going on


def sample_path(checkpoint: Path) -> Path:
    """Of the sample that is drawn."""
    return checkpoint.with_name(checkpoint.name + ".sample")


def sampling_path(checkpoint: Path) -> Path:
    """Of what this rank has of the sample."""
    return checkpoint.with_name(f"{checkpoint.name}.sampling-{distributed.rank():05d}")


def progress_files(checkpoint: Path) -> list[Path]:
    """Those of all ranks that are there."""
    pattern = glob.escape(checkpoint.name)
    found = (path for end in ("", ".sample", ".sampling-*") for path in checkpoint.parent.glob(pattern + end))
    return sorted(path for path in found if path.is_file())


def identity(config: KMeansConfig, description: Mapping[str, Scalar], stream: Mapping[str, Scalar]) -> dict[str, Any]:
    """What must be the same where a run goes on."""
    settings = {name: value for name, value in asdict(config).items() if name not in _MAY_CHANGE}
    return {"config": settings, "description": dict(description), "stream": dict(stream), "ranks": distributed.world_size()}


def is_begun(checkpoint: Path) -> bool:
    """Whether rank 0 finds that the centres have begun to move; the same answer on every rank."""
    return bool(distributed.broadcast_object(checkpoint.exists()))


def check_progress(checkpoint: Path, identity: Mapping[str, Any], begun: bool) -> None:
    """Refuse to go on with what another run has kept, or with files that are damaged. Waits for no other rank.

    Args:
        checkpoint: its file of the centres; every rank looks at what it would go on with, at common files the first one alone.
        identity: of the run.
        begun: what `is_begun` says.

    Raises:
        ValueError: names the file, what differs with both values or what is wrong, and all files that are in the way.
    """
    path = checkpoint if begun else sampling_path(checkpoint)
    if not path.exists() or (begun and not distributed.is_main()):
        return
    kind, version = (FORMAT, VERSION) if begun else (SAMPLING_FORMAT, SAMPLING_VERSION)
    try:
        _check_same(path, read_checked(path, kind, version, tuple(identity)), identity)
        if begun:
            read_checked(sample_path(checkpoint), SAMPLE_FORMAT, SAMPLE_VERSION, ())
    except ValueError as error:
        files = " ".join(str(file) for file in progress_files(checkpoint))
        raise ValueError(f"{error}; remove {files} to begin anew, or name another file") from error


def _check_same(path: Path, content: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    for part, ours in identity.items():
        theirs = content[part]
        if theirs == ours:
            continue
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
            keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
            pairs = ", ".join(f"{part}.{key} is {ours.get(key)!r}, there {theirs.get(key)!r}" for key in keys)
        else:
            pairs = f"{part} is {ours!r}, there {theirs!r}"
        raise ValueError(f"{path}: holds the progress of another run: {pairs}")
