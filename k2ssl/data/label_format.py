"""What a label store says about itself: the contract beside the labels, its lineage, and how its files are written.

A store is a folder, one per split:

    labels-00000-of-00008.bin     packed little-endian labels of shard 0, one cut after the other
    labels-00000-of-00008.ids     a line "COUNT<tab>ID" per cut of that shard, in the same order
    labels-00000-of-00008.json    that shard's counts, histogram and hashes; exists only when the shard is finished
    index.npy, buckets.npy        where each cut's labels lie (label_index.py)
    contract.json                 written last: a folder with this file is a finished store
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from k2ssl.atomic_file import atomic_file
from k2ssl.file_hash import file_sha256

FORMAT_VERSION = 1
CONTRACT_FILE = "contract.json"

LabelDtype = Literal["uint16", "int32"]
Scalar = str | int | float | bool | None
Record = TypeVar("Record")

_MOST_CLASSES = 2**24  # a histogram of all classes is kept in memory and in the contract
_FINGERPRINT_BYTES = 64 * 1024


@dataclass(frozen=True)
class Lineage:
    """Where labels come from. Empty strings and an empty `settings` mean that it is not known.

    Attributes:
        features: what was clustered: "mfcc", or for example "layer 6" of a checkpoint.
        settings: the features' settings by name (sample rate, coefficients, overlap, ...), plain values.
        kmeans_sha256: hash of the k-means model's file.
        checkpoint_sha256: hash of the checkpoint that gave the features, None for features that need none.
        cuts_sha256: `cut_list_hash` of the cut list that was labelled.
        versions: release of each library that takes part, by name.
    """

    features: str
    settings: Mapping[str, Scalar]
    kmeans_sha256: str
    checkpoint_sha256: str | None
    cuts_sha256: str
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.settings.items():
            if not isinstance(value, (str, int, float, bool, type(None))):
                raise ValueError(
                    f"Lineage: settings[{name!r}] is a {type(value).__name__}, allowed are text, numbers, true, false and none"
                )

    @classmethod
    def unknown(cls) -> Lineage:
        """The lineage of labels whose origin was not recorded."""
        return cls(features="", settings={}, kmeans_sha256="", checkpoint_sha256=None, cuts_sha256="")

    def missing(self) -> tuple[str, ...]:
        """Names of the fields that should say something and do not; a checkpoint is needed unless the features are "mfcc"."""
        absent = [name for name in ("features", "settings", "kmeans_sha256", "cuts_sha256") if not getattr(self, name)]
        if self.features and not self.features.lower().startswith("mfcc") and not self.checkpoint_sha256:
            absent.append("checkpoint_sha256")
        return tuple(absent)


@dataclass(frozen=True)
class LabelSetup:
    """What all shards of one store have in common, fixed before the first label is written.

    Attributes:
        num_classes: labels are 0 to num_classes - 1.
        frame_rate: labels per second, Hz.
        sampling_rate: of the audio that was labelled, Hz.
        num_shards: how many shards the store is written in.
        lineage: where the labels come from.
    """

    num_classes: int
    frame_rate: float
    sampling_rate: int
    num_shards: int
    lineage: Lineage

    def __post_init__(self) -> None:
        if not 1 <= self.num_classes <= _MOST_CLASSES:
            raise ValueError(f"labels: num_classes is {self.num_classes}, allowed are 1 to {_MOST_CLASSES}")
        if not (math.isfinite(self.frame_rate) and self.frame_rate > 0):
            raise ValueError(f"labels: frame_rate is {self.frame_rate}, allowed are rates > 0 Hz")
        if self.sampling_rate < 1:
            raise ValueError(f"labels: sampling_rate is {self.sampling_rate}, allowed are rates >= 1 Hz")
        if not 1 <= self.num_shards <= 65536:
            raise ValueError(f"labels: num_shards is {self.num_shards}, allowed are 1 to 65536")

    @property
    def dtype(self) -> LabelDtype:
        """The type labels are stored in: two bytes when all classes fit."""
        return "uint16" if self.num_classes <= 65535 else "int32"

    def difference(self, other: LabelSetup) -> str:
        """The first field in which two set-ups differ, with both values; empty when they are equal."""
        for name in ("num_classes", "frame_rate", "sampling_rate", "num_shards"):
            if getattr(self, name) != getattr(other, name):
                return f"{name} {getattr(self, name)} there, {getattr(other, name)} here"
        for item in fields(Lineage):
            there, here = getattr(self.lineage, item.name), getattr(other.lineage, item.name)
            if there != here:
                return f"lineage.{item.name} {there!r} there, {here!r} here"
        return ""


@dataclass(frozen=True)
class FileInfo:
    """Size and hashes of a finished file; `fingerprint` covers its first and last 64 KiB and is cheap to check at each opening."""

    name: str
    bytes: int
    sha256: str
    fingerprint: str


@dataclass(frozen=True)
class ShardInfo:
    """A finished shard.

    Attributes:
        shard: its number, from 0.
        num_cuts, num_labels: what it holds.
        histogram: how often each class occurs, num_classes entries.
        labels: the file of packed labels.
        ids: the file of cut ids.
    """

    shard: int
    num_cuts: int
    num_labels: int
    histogram: tuple[int, ...]
    labels: FileInfo
    ids: FileInfo


@dataclass(frozen=True)
class ShardRecord:
    """What a shard's JSON file holds: the set-up, which all shards share, and the shard itself."""

    setup: LabelSetup
    shard: ShardInfo


@dataclass(frozen=True)
class LabelContract:
    """What a finished store promises; `check_labels_fit` holds it against a model and a cut list.

    Attributes:
        format_version: of the files.
        split: the name under which the labels were made.
        num_classes: labels are 0 to num_classes - 1.
        frame_rate: labels per second, Hz.
        frame_shift: seconds per label.
        sampling_rate: of the labelled audio, Hz.
        dtype: type of the packed labels.
        num_cuts, num_labels: what the store holds.
        histogram: how often each class occurs, num_classes entries.
        ids_sha256: `id_list_hash` of the labelled cuts.
        lineage: where the labels come from.
        shards, index: the files, in order.
    """

    format_version: int
    split: str
    num_classes: int
    frame_rate: float
    frame_shift: float
    sampling_rate: int
    dtype: LabelDtype
    num_cuts: int
    num_labels: int
    histogram: tuple[int, ...]
    ids_sha256: str
    lineage: Lineage
    shards: tuple[ShardInfo, ...]
    index: tuple[FileInfo, ...]

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"labels: format_version is {self.format_version}, this release reads {FORMAT_VERSION}")
        if len(self.histogram) != self.num_classes:
            raise ValueError(f"labels: histogram has {len(self.histogram)} classes, num_classes is {self.num_classes}")
        if self.num_cuts < 1 or self.num_labels < 1:
            raise ValueError(f"labels: {self.num_cuts} cuts with {self.num_labels} labels; an empty store is of no use")
        if sum(self.histogram) != self.num_labels or sum(shard.num_labels for shard in self.shards) != self.num_labels:
            raise ValueError(f"labels: num_labels is {self.num_labels}, histogram and shards add up to something else")


def shard_stem(shard: int, num_shards: int) -> str:
    """The name that the files of a shard share."""
    return f"labels-{shard:05d}-of-{num_shards:05d}"


def packed_dtype(dtype: LabelDtype) -> np.dtype[Any]:
    """The numpy type of packed labels: little-endian on every machine."""
    return np.dtype("<u2" if dtype == "uint16" else "<i4")


def write_record(path: Path, record: Any) -> None:
    """Write a dataclass as JSON, atomically.

    Raises:
        OSError: the disk is full or failing; names the file.
    """
    try:
        with atomic_file(path) as file:
            file.write((json.dumps(_plain(asdict(record)), indent=1) + "\n").encode("utf-8"))
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror or error}") from error


def read_record(cls: type[Record], path: Path) -> Record:
    """Read a dataclass of this module back.

    Raises:
        ValueError: not JSON, unknown or missing keys, or values that the dataclass refuses; names the file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return _build(cls, data)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged or of another format: {error}") from error


def describe_file(path: Path, sha256: str | None = None, name: str | None = None) -> FileInfo:
    """Size and hashes of a file; `sha256` when it is known already."""
    return FileInfo(name or path.name, path.stat().st_size, sha256 or file_sha256(path), fingerprint(path))


def fingerprint(path: Path) -> str:
    """Hash of a file's first and last 64 KiB: finds a swapped file of the same size without reading it all."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_FINGERPRINT_BYTES))
        file.seek(max(0, size - _FINGERPRINT_BYTES))
        digest.update(file.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()


def check_file(folder: Path, info: FileInfo, full: bool = False) -> None:
    """Compare a file with what the store's record says about it.

    Args:
        full: hash the whole file instead of its two ends.

    Raises:
        ValueError: the file is missing, truncated or altered; names it.
    """
    path = folder / info.name
    if not path.is_file():
        raise ValueError(f"{path} is missing; the store's record lists it with {info.bytes} bytes")
    size = path.stat().st_size
    if size != info.bytes:
        raise ValueError(f"{path} has {size} bytes, the store's record says {info.bytes}: it was truncated or replaced")
    if fingerprint(path) != info.fingerprint or (full and file_sha256(path) != info.sha256):
        raise ValueError(f"{path} differs from what was written: it was altered or comes from another store")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _build(cls: type[Record], data: Any) -> Record:
    names = [item.name for item in fields(cls)]  # type: ignore[arg-type]
    if not isinstance(data, dict) or sorted(data) != sorted(names):
        raise ValueError(f"{cls.__name__} needs exactly the keys {', '.join(names)}")
    nested: dict[str, Any] = {"lineage": Lineage, "labels": FileInfo, "ids": FileInfo, "setup": LabelSetup}
    if cls is ShardRecord:
        nested["shard"] = ShardInfo
    values = dict(data)
    for name, item in data.items():
        if name in nested:
            values[name] = _build(nested[name], item)
        elif name in ("shards", "index"):
            values[name] = tuple(_build(ShardInfo if name == "shards" else FileInfo, entry) for entry in item)
        elif name == "histogram":
            values[name] = tuple(int(count) for count in item)
    return cls(**values)
