"""From a cut's id to where its labels lie: a sorted table of hashes on disk, opened by memory map.

`index.npy` holds one row of 16 bytes per cut, sorted by a 64-bit hash of the id: the hash, and in the other 64 bits where the labels
begin, counted over all shards, and how many they are. `buckets.npy` holds where the rows of each prefix of the hash begin, so that a
look-up reads one entry of it and one stretch of about 64 rows (1 kB): one or two disk pages instead of the twenty-five that a binary
search over 22 million rows would touch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from k2ssl.atomic_file import atomic_file
from k2ssl.data.label_format import FileInfo, check_file, describe_file

INDEX_FILE = "index.npy"
BUCKETS_FILE = "buckets.npy"
ROW = np.dtype([("hash", "<u8"), ("place", "<u8")])
COUNT_BITS = 24
MOST_LABELS_OF_A_CUT = 2**COUNT_BITS - 1  # 93 hours at 50 Hz
MOST_LABELS = 2 ** (64 - COUNT_BITS) - 1  # 6 million hours at 50 Hz

_ROWS_PER_BUCKET = 64
_SHOWN = 5


def id_digest(cut_id: str) -> bytes:
    """32 bytes of BLAKE2b of an id; the first eight are its key in the index."""
    return hashlib.blake2b(cut_id.encode("utf-8"), digest_size=32).digest()


def id_hash(cut_id: str) -> int:
    """The 64-bit key of an id in the index."""
    return int.from_bytes(id_digest(cut_id)[:8], "little")


class IdListHash:
    """Order-independent hash of a list of ids: their digests added modulo 2^256, and how many they are."""

    def __init__(self) -> None:
        self.total = 0
        self.count = 0

    def add(self, digest: bytes) -> None:
        """Count in one 32-byte digest."""
        self.total += int.from_bytes(digest, "little")
        self.count += 1

    def __str__(self) -> str:
        return f"{self.count}:{self.total % 2**256:064x}"


def id_list_hash(ids: Iterable[str]) -> str:
    """Hash of cut ids as "COUNT:HEX", the same in any order."""
    result = IdListHash()
    for cut_id in ids:
        result.add(id_digest(cut_id))
    return str(result)


def read_ids(path: Path) -> Iterator[tuple[str, int]]:
    """(cut id, number of labels) of each line of an ids file."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            count, tab, cut_id = line.rstrip("\n").partition("\t")
            if not tab or not count.isdecimal() or not cut_id:
                raise ValueError(f"{path}: line {number} is {line!r}, not a count, a tab and a cut id")
            yield cut_id, int(count)


def build_index(folder: Path, ids_files: list[Path], num_cuts: list[int]) -> tuple[tuple[FileInfo, ...], str]:
    """Write the index of a store whose shards are described by `ids_files`.

    Args:
        folder: of the store.
        ids_files: one per shard, in order.
        num_cuts: how many lines each has.

    Returns:
        The index files and the `id_list_hash` of all ids.

    Raises:
        ValueError: an id that occurs twice, two ids with one hash, or an ids file with another number of lines.
    """
    rows = np.zeros(sum(num_cuts), ROW)
    ids_hash = IdListHash()
    start, num_labels = 0, 0
    for path, count in zip(ids_files, num_cuts, strict=True):
        num_labels += _fill_rows(rows[start : start + count], num_labels, path, ids_hash)
        start += count
    if num_labels > MOST_LABELS:
        raise ValueError(f"{folder}: {num_labels} labels, a store holds at most {MOST_LABELS}")
    rows = rows[np.argsort(rows["hash"], kind="stable")]
    hashes = np.ascontiguousarray(rows["hash"])
    _refuse_repeated(hashes, ids_files)
    _save(folder / INDEX_FILE, rows)
    _save(folder / BUCKETS_FILE, _bucket_starts(hashes))
    return tuple(describe_file(folder / name) for name in (INDEX_FILE, BUCKETS_FILE)), str(ids_hash)


class LabelIndex:
    """The index of a store, mapped read-only; a look-up costs microseconds and no memory of its own.

    Args:
        folder: of the store.
        files: what the contract says about the index files.

    Raises:
        ValueError: a file is missing, truncated, or not the one the contract was written for.
    """

    def __init__(self, folder: Path, files: tuple[FileInfo, ...]) -> None:
        for info in files:
            check_file(folder, info)
        # plain arrays over the maps: numpy.memmap itself makes every slice several times slower
        self.rows: np.ndarray[Any, np.dtype[Any]] = np.asarray(np.load(folder / INDEX_FILE, mmap_mode="r", allow_pickle=False))
        self.buckets: np.ndarray[Any, np.dtype[Any]] = np.asarray(np.load(folder / BUCKETS_FILE, mmap_mode="r", allow_pickle=False))
        self._keys = self.rows["hash"]
        self._shift = np.uint64(64 - (len(self.buckets) - 1).bit_length() + 1)

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, cut_id: str) -> tuple[int, int] | None:
        """(first label counted over all shards, number of labels) of a cut, None for an id that is not in the index."""
        key = np.uint64(id_hash(cut_id))
        bucket = int(key >> self._shift) if len(self.buckets) > 2 else 0
        start, stop = int(self.buckets[bucket]), int(self.buckets[bucket + 1])
        keys = self._keys[start:stop]
        position = int(np.searchsorted(keys, key))
        if position == stop - start or keys[position] != key:
            return None
        place = int(self.rows[start + position]["place"])
        return place >> COUNT_BITS, place & MOST_LABELS_OF_A_CUT


def _fill_rows(rows: np.ndarray[Any, np.dtype[Any]], first: int, path: Path, ids_hash: IdListHash) -> int:
    """Fill in the rows of one shard whose first label is number `first`; returns how many labels it has."""
    keys, counts = np.zeros(len(rows), "<u8"), np.zeros(len(rows), "<u8")
    filled = 0
    for cut_id, count in read_ids(path):
        if filled == len(rows):
            raise ValueError(f"{path} lists more than the {len(rows)} cuts that the shard's record says")
        digest = id_digest(cut_id)
        ids_hash.add(digest)
        keys[filled], counts[filled] = int.from_bytes(digest[:8], "little"), count
        filled += 1
    if filled != len(rows):
        raise ValueError(f"{path} lists {filled} cuts, the shard's record says {len(rows)}")
    offsets = np.cumsum(counts) - counts + np.uint64(first)
    rows["hash"], rows["place"] = keys, offsets << np.uint64(COUNT_BITS) | counts
    return int(counts.sum())


def _bucket_starts(hashes: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    """Row at which each prefix of the hash begins, and the number of rows; a power of two of buckets."""
    bits = max(0, (len(hashes) // _ROWS_PER_BUCKET).bit_length() - 1)
    if bits == 0:
        return np.array([0, len(hashes)], "<u8")
    first = np.arange(2**bits, dtype=np.uint64) << np.uint64(64 - bits)
    return np.append(np.searchsorted(hashes, first), len(hashes)).astype("<u8")


def _refuse_repeated(hashes: np.ndarray[Any, np.dtype[Any]], ids_files: list[Path]) -> None:
    repeated = {int(key) for key in hashes[1:][hashes[1:] == hashes[:-1]]}
    if not repeated:
        return
    of_key: dict[int, list[str]] = {}
    for path in ids_files:
        for cut_id, _ in read_ids(path):
            if (key := id_hash(cut_id)) in repeated:
                of_key.setdefault(key, []).append(cut_id)
    twice = sorted({cut_id for ids in of_key.values() for cut_id in ids if ids.count(cut_id) > 1})
    if twice:
        raise ValueError(f"{ids_files[0].parent}: {len(twice)} cuts were labelled more than once: {', '.join(twice[:_SHOWN])}")
    pair = next(iter(of_key.values()))
    raise ValueError(f"{ids_files[0].parent}: the cut ids {' and '.join(map(repr, pair))} have the same 64-bit hash; rename one of them")


def _save(path: Path, array: np.ndarray[Any, np.dtype[Any]]) -> None:
    with atomic_file(path) as file:
        np.save(file, array, allow_pickle=False)
