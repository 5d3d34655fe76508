"""The label store: packed frame labels of a split, found by cut id, read by lhotse as an array in time.

    with LabelShardWriter(folder, rank, world_size, 500, 50.0, lineage, sampling_rate=16_000) as writer:
        for cut, labels in ...:                          # every rank its own cuts; `cut.id in writer.done_ids()` are done already
            writer.write(cut.id, labels)
    store = merge_shards(folder)                         # once, after all ranks
    cuts = cuts.map(store.attach)                        # lazily; afterwards cut.truncate(...).load_labels() crops the labels too

Eleven billion labels of twenty-two million cuts take 23 GB with their index; opening them costs a fraction of a second, and finding and
reading the labels of one cut touches three or four disk pages.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lhotse.array import Array, TemporalArray
from lhotse.cut import Cut
from lhotse.cut.data import DataCut
from lhotse.features.io import FeaturesReader, register_reader
from lhotse.utils import compute_num_samples

from k2ssl.data.label_format import (
    CONTRACT_FILE,
    FORMAT_VERSION,
    LabelContract,
    LabelSetup,
    Lineage,
    ShardInfo,
    ShardRecord,
    check_file,
    packed_dtype,
    read_record,
    shard_stem,
    write_record,
)
from k2ssl.data.label_index import IdListHash, LabelIndex, build_index, id_digest, id_list_hash, read_ids
from k2ssl.data.label_shards import DoneIds, LabelShardWriter

__all__ = [
    "DoneIds",
    "LabelContract",
    "LabelShardWriter",
    "LabelStore",
    "Lineage",
    "Place",
    "cut_digest",
    "cut_list_hash",
    "id_list_hash",
    "merge_shards",
    "samples_of",
]

_SHOWN = 5
_LABELS_PER_READ = 2**18  # when all labels are read in order
_EDGE = 0.2  # seconds by which labels may fall short of their audio: no frontend's windows lose more at the two ends

_open_stores: dict[str, LabelStore] = {}  # of this process, for lhotse, which makes a reader for every array that it loads


def cut_list_hash(cuts: Iterable[Cut]) -> str:
    """Hash of the ids and durations of cuts as "COUNT:HEX", the same in any order; reads the cuts one by one.

    Durations count as samples at the cut's own rate: take the hash of the cuts as they stand in the manifest, before any resampling.
    """
    result = IdListHash()
    for cut in cuts:
        result.add(cut_digest(cut))
    return str(result)


def cut_digest(cut: Cut) -> bytes:
    """One cut's part in `cut_list_hash`: its id and which samples of which channel it is, so that segments that moved are noticed."""
    start = compute_num_samples(getattr(cut, "start", 0.0), cut.sampling_rate)
    return id_digest(f"{cut.id}\t{start}\t{samples_of(cut, cut.sampling_rate)}\t{getattr(cut, 'channel', '')}")


def samples_of(cut: Cut, sampling_rate: int) -> int:
    """Samples that the cut has at a sampling rate, rounded as lhotse does."""
    return compute_num_samples(cut.duration, sampling_rate)


def merge_shards(folder: Path | str, expected_ids_hash: str | None = None, split: str | None = None) -> LabelStore:
    """Make the finished shards of a folder a store: write their index, then the contract. Labels are neither moved nor copied.

    One process calls this, after all shards were closed. On a finished store it changes nothing and opens it.

    Args:
        folder: of the store.
        expected_ids_hash: `id_list_hash` of the cuts that must be there, to find out whether some were forgotten.
        split: name under which the labels are known; the folder's name by default.

    Raises:
        ValueError: a shard is missing, unfinished, truncated or made with another set-up; a cut was labelled twice; there are no labels
            at all; the cuts are not those expected. Each names the file or the cuts.
    """
    folder = Path(folder)
    if not (folder / CONTRACT_FILE).exists():
        records = _finished_shards(folder)
        shards = [record.shard for record in records]
        for info in (file for shard in shards for file in (shard.labels, shard.ids)):
            check_file(folder, info)
        if not any(shard.num_labels for shard in shards):
            raise ValueError(f"{folder}: the {len(shards)} shards hold no labels at all")
        index, ids_hash = build_index(folder, [folder / shard.ids.name for shard in shards], [shard.num_cuts for shard in shards])
        _refuse_unexpected(folder, ids_hash, expected_ids_hash)
        contract = _contract(split or folder.absolute().name, records[0].setup, shards, ids_hash, index)
        write_record(folder / CONTRACT_FILE, contract)
    store = LabelStore.open(folder)
    _refuse_unexpected(folder, store.contract.ids_sha256, expected_ids_hash)
    return store


class Place(NamedTuple):
    """Where labels lie: shard, first label within the shard, number of labels."""

    shard: int
    offset: int
    num_labels: int


class LabelStore:
    """The labels of one split, read-only; safe to use in forked processes, and pickled as its path.

    `LabelStore.open` makes one; `contract` says what it holds.
    """

    def __init__(self, folder: Path, contract: LabelContract, index: LabelIndex) -> None:
        self.folder = folder
        self.contract = contract
        self.identity = _identity(contract)
        self._index = index
        self._dtype = packed_dtype(contract.dtype)
        self._starts = list(itertools.accumulate((shard.num_labels for shard in contract.shards[:-1]), initial=0))
        self._descriptors: dict[int, int] = {}
        weakref.finalize(self, _close_all, self._descriptors)

    @classmethod
    def open(cls, folder: Path | str) -> LabelStore:
        """Open a finished store; reads the contract, and of the other files only the size and both ends.

        Raises:
            ValueError: no finished store there, or a file that is missing, truncated, altered or of another store; names it.
        """
        folder = Path(folder).absolute()
        if not folder.is_dir():
            raise ValueError(f"{folder}: there is no such folder of labels")
        if not (folder / CONTRACT_FILE).is_file():
            stores = sorted(path.parent.name for path in folder.glob(f"*/{CONTRACT_FILE}"))
            hint = f"; it holds the stores {', '.join(stores)}: name one of them" if stores else ""
            raise ValueError(f"{folder} is no finished label store: it has no {CONTRACT_FILE}, which is written last{hint}")
        contract = read_record(LabelContract, folder / CONTRACT_FILE)
        for shard in contract.shards:
            check_file(folder, shard.labels)
            check_file(folder, shard.ids)
        index = LabelIndex(folder, contract.index)
        if len(index) != contract.num_cuts:
            raise ValueError(f"{folder}: the index has {len(index)} cuts, {CONTRACT_FILE} says {contract.num_cuts}")
        store = cls(folder, contract, index)
        _open_stores[str(folder)] = store
        return store

    def __reduce__(self) -> tuple[Callable[[str], LabelStore], tuple[str]]:
        return LabelStore.open, (str(self.folder),)

    def __len__(self) -> int:
        return self.contract.num_cuts

    def __contains__(self, cut_id: object) -> bool:
        return isinstance(cut_id, str) and self._index.find(cut_id) is not None

    def lookup(self, cut_id: str) -> Place:
        """(shard, offset, num_labels) of a cut's labels.

        Raises:
            ValueError: the store has no labels for this cut.
        """
        found = self._index.find(cut_id)
        if found is None:
            raise ValueError(f"labels in {self.folder}: none for cut {cut_id!r}, the store holds {len(self)} other cuts")
        shard = bisect.bisect_right(self._starts, found[0]) - 1  # of empty shards and the one after them, the last begins there
        return Place(shard, found[0] - self._starts[shard], found[1])

    def num_labels(self, cut_id: str) -> int:
        """How many labels a cut has."""
        return self.lookup(cut_id).num_labels

    def labels(self, cut_id: str) -> np.ndarray[Any, np.dtype[Any]]:
        """(L,) labels of a cut, uint16 or int32 as they are stored."""
        shard, offset, count = self.lookup(cut_id)
        return self._read(shard, offset, offset + count)

    def items(self) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[Any]]]]:
        """(cut id, labels) of all cuts, in the order in which they lie on disk."""
        for shard in self.contract.shards:
            offset = 0
            for some in _in_batches(read_ids(self.folder / shard.ids.name)):
                ends = list(itertools.accumulate(count for _, count in some))
                labels = self._read(shard.shard, offset, offset + ends[-1])
                offset += ends[-1]
                yield from ((cut_id, labels[end - count : end]) for (cut_id, count), end in zip(some, ends, strict=True))

    def attach(self, cut: Cut, name: str = "labels") -> Cut:
        """The cut with its labels as a custom array, so that `cut.load_labels()` reads them, cropped as the cut is cropped later.

        Args:
            cut: a whole cut as it was labelled, not yet truncated, padded or mixed.
            name: of the array; `cut.load_NAME()` reads it as (L,) int64.

        Raises:
            ValueError: the store has no labels for this cut, or they do not span it.
        """
        if not isinstance(cut, DataCut):
            raise ValueError(f"cut {cut.id!r} is a {type(cut).__name__}; labels are attached before cuts are padded or mixed")
        place = self.lookup(cut.id)
        shift = self.contract.frame_shift
        if abs(place.num_labels * shift - cut.duration) > _EDGE + shift:
            raise ValueError(
                f"labels in {self.folder}: cut {cut.id!r} has {place.num_labels} labels = {place.num_labels * shift:.3f} s, "
                f"the cut lasts {cut.duration:.3f} s; attach labels to whole cuts, of the list that was labelled"
            )
        key = f"{place.shard}:{place.offset}:{place.num_labels}:{self.identity}"
        array = _LabelArray(storage_type=LabelReader.name, storage_path=str(self.folder), storage_key=key, shape=[place.num_labels])
        return cut.with_custom(name, TemporalArray(array, temporal_dim=0, frame_shift=shift, start=cut.start))

    def verify(self) -> None:
        """Read every file of the store and compare it with the hash in the contract.

        Raises:
            ValueError: a file that differs; names it.
        """
        for info in (*(file for shard in self.contract.shards for file in (shard.labels, shard.ids)), *self.contract.index):
            check_file(self.folder, info, full=True)

    def _read(self, shard: int, start: int, stop: int) -> np.ndarray[Any, np.dtype[Any]]:
        """Labels `start` to `stop` of a shard.

        A positioned read, not a memory map: pages touched through a map count as the process's own until the system wants them back,
        which over an epoch would be the whole store. It moves no file position either, so forked processes may share the descriptor.
        """
        labels = np.empty(max(stop - start, 0), self._dtype)
        if labels.size and os.preadv(self._descriptor(shard), [labels.data.cast("B")], start * labels.itemsize) != labels.nbytes:
            raise ValueError(f"{self.contract.shards[shard].labels.name} in {self.folder} ends before label {stop}: it was truncated")
        return labels

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            self._descriptors[shard] = os.open(self.folder / self.contract.shards[shard].labels.name, os.O_RDONLY)
        return self._descriptors[shard]


@register_reader
class LabelReader(FeaturesReader):
    """How lhotse reads an array that `LabelStore.attach` made; known to lhotse once this module is imported.

    Args:
        storage_path: folder of the store.
    """

    name = "k2ssl_labels"

    def __init__(self, storage_path: str) -> None:
        self.storage_path = storage_path

    def read(self, key: str, left_offset_frames: int = 0, right_offset_frames: int | None = None) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Labels `left_offset_frames` to `right_offset_frames` of the cut that `key` ("SHARD:OFFSET:COUNT:IDENTITY") points to, int64.

        Raises:
            ValueError: the store was made anew after the labels were attached.
        """
        shard, offset, count, identity = key.split(":")
        store = _open_stores.get(self.storage_path)
        if store is None or store.identity != identity:
            store = LabelStore.open(self.storage_path)
        if store.identity != identity:
            raise ValueError(f"labels in {self.storage_path} were made anew since they were attached to this cut: attach them again")
        stop = int(count) if right_offset_frames is None else min(right_offset_frames, int(count))
        return store._read(int(shard), int(offset) + min(left_offset_frames, stop), int(offset) + stop).astype(np.int64)


class _LabelArray(Array):
    """A plain array, except that unpickling it imports this module: lhotse in a spawned process then knows the reader."""


def _in_batches(ids: Iterator[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    """Cuts in batches whose labels are worth one read."""
    batch: list[tuple[str, int]] = []
    num_labels = 0
    for cut_id, count in ids:
        batch.append((cut_id, count))
        num_labels += count
        if num_labels >= _LABELS_PER_READ:
            yield batch
            batch, num_labels = [], 0
    if batch:
        yield batch


def _finished_shards(folder: Path) -> list[ShardRecord]:
    found = {int(path.name[16:21]) for path in folder.glob("labels-?????-of-?????.*")} if folder.is_dir() else set()
    if not found:
        raise ValueError(f"{folder}: no shard of labels is there")
    if len(found) > 1:
        raise ValueError(f"{folder} mixes shards of stores in {' and '.join(map(str, sorted(found)))} shards: remove the wrong ones")
    num_shards = found.pop()
    stems = [shard_stem(shard, num_shards) for shard in range(num_shards)]
    missing = [stem for stem in stems if not (folder / f"{stem}.json").exists()]
    if missing:
        states = [f"{stem} ({'begun' if (folder / f'{stem}.setup.json').exists() else 'not begun'})" for stem in missing[:_SHOWN]]
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise ValueError(
            f"{folder}: {len(missing)} of {num_shards} shards are not finished: {', '.join(states)}{more}; run those ranks again"
        )
    records = [read_record(ShardRecord, folder / f"{stem}.json") for stem in stems]
    for stem, record in zip(stems, records, strict=True):
        if difference := records[0].setup.difference(record.setup):
            raise ValueError(f"{folder}: {stems[0]} and {stem} were made with different set-ups: {difference}")
    return records


def _contract(split: str, setup: LabelSetup, shards: list[ShardInfo], ids_hash: str, index: tuple[Any, ...]) -> LabelContract:
    histogram = np.sum([np.array(shard.histogram, np.int64) for shard in shards], axis=0)
    return LabelContract(
        format_version=FORMAT_VERSION,
        split=split,
        num_classes=setup.num_classes,
        frame_rate=setup.frame_rate,
        frame_shift=1.0 / setup.frame_rate,
        sampling_rate=setup.sampling_rate,
        dtype=setup.dtype,
        num_cuts=sum(shard.num_cuts for shard in shards),
        num_labels=sum(shard.num_labels for shard in shards),
        histogram=tuple(int(count) for count in histogram),
        ids_sha256=ids_hash,
        lineage=setup.lineage,
        shards=tuple(shards),
        index=index,
    )


def _refuse_unexpected(folder: Path, found: str, expected: str | None) -> None:
    if expected is not None and found != expected:
        raise ValueError(f"{folder}: the labelled cuts are not those expected: {found} (count:hash of ids) labelled, {expected} expected")


def _identity(contract: LabelContract) -> str:
    """Differs as soon as any label or its place differs."""
    hashes = [shard.labels.sha256 for shard in contract.shards] + [info.sha256 for info in contract.index]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def _close_all(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
