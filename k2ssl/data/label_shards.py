"""Writing labels: each rank writes one shard, which survives interruptions and gets its final name only when it is whole.

While a shard is being written its labels and ids are appended to files that end in `.partial`. At every commit the labels go to disk
before the lines that list them, so whatever whole lines there are after a crash describe labels that are there; the rest is cut off when
the shard is opened again. Nothing is copied at the end: closing a shard renames its two files and writes its record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import re
from collections.abc import Collection, Iterator
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from k2ssl.data.label_format import (
    CONTRACT_FILE,
    FileInfo,
    LabelSetup,
    Lineage,
    ShardInfo,
    ShardRecord,
    describe_file,
    packed_dtype,
    read_record,
    shard_stem,
    write_record,
)
from k2ssl.data.label_index import MOST_LABELS_OF_A_CUT, id_hash, read_ids

_STEM = re.compile(r"labels-(\d{5})-of-(\d{5})\.")
_CHUNK_BYTES = 8 * 1024 * 1024  # a multiple of every label's size
_LONGEST_LINE = 64 * 1024


class DoneIds:
    """The cuts that a shard holds already: `cut.id in done`, `len(done)`. Eight bytes per cut, so that it travels to loader workers."""

    def __init__(self, keys: np.ndarray[Any, np.dtype[np.uint64]]) -> None:
        self.keys = np.sort(keys)

    def __contains__(self, cut_id: object) -> bool:
        if not isinstance(cut_id, str):
            return False
        key = np.uint64(id_hash(cut_id))
        position = int(np.searchsorted(self.keys, key))
        return position < len(self.keys) and bool(self.keys[position] == key)

    def __len__(self) -> int:
        return len(self.keys)


def refuse_if_written(folder: Path) -> None:
    """
    Raises:
        ValueError: a process is writing a shard of the store.
    """
    for path in sorted(folder.glob("labels-*.lock")):
        with path.open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{path}: another process is writing this shard; let it end, or end it, first") from None


class LabelShardWriter:
    """Writes one shard of a label store; opened again after an interruption it goes on after the last commit.

    Args:
        folder: of the store, made if need be.
        shard: number of this shard, from 0; one process at a time writes it.
        num_shards: of the store, as a rule the number of ranks.
        num_classes: labels are 0 to num_classes - 1.
        frame_rate: labels per second, Hz.
        lineage: where the labels come from; `Lineage.unknown()` if nobody knows.
        sampling_rate: of the labelled audio, Hz.
        commit_labels, commit_cuts: labels or cuts after which a commit is due; what comes after the last commit is lost on a crash.

    Raises:
        ValueError: a bad argument; a folder that holds a finished store or shards of another number or set-up; a damaged shard; a shard
            that another process is writing.
    """

    def __init__(
        self,
        folder: Path | str,
        shard: int,
        num_shards: int,
        num_classes: int,
        frame_rate: float,
        lineage: Lineage,
        *,
        sampling_rate: int,
        commit_labels: int = 4_000_000,
        commit_cuts: int = 10_000,
    ) -> None:
        self.setup = LabelSetup(num_classes, float(frame_rate), sampling_rate, num_shards, lineage)
        if not 0 <= shard < num_shards:
            raise ValueError(f"labels: shard is {shard}, allowed are 0 to num_shards - 1 = {num_shards - 1}")
        if commit_labels < 1 or commit_cuts < 1:
            raise ValueError(f"labels: commit_labels is {commit_labels} and commit_cuts is {commit_cuts}, both must be >= 1")
        self.folder, self.shard = Path(folder), shard
        self.commit_labels, self.commit_cuts = commit_labels, commit_cuts
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stem = shard_stem(shard, num_shards)
        self._dtype = packed_dtype(self.setup.dtype)
        self._labels: list[np.ndarray[Any, np.dtype[Any]]] = []
        self._ids: dict[str, int] = {}
        self._waiting = 0
        self._keys: list[np.ndarray[Any, np.dtype[np.uint64]]] = []
        self._histogram = np.zeros(num_classes, np.int64)
        self._sha256 = {"bin": hashlib.sha256(), "ids": hashlib.sha256()}
        self._num_cuts, self._num_labels, self._ids_bytes = 0, 0, 0
        self._files: dict[str, FileIO] = {}
        self._refuse_other_stores()
        self._lock_file = None if self._path("json").exists() else self._lock()
        self.finished = self._path("json").exists()  # only now: whoever held the lock may just have finished
        try:
            if self.finished:
                self._open_finished()
            else:
                self._open_partial()
        finally:
            if not self._files:
                self._release()

    def __enter__(self) -> LabelShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._release()

    @property
    def num_cuts(self) -> int:
        """Cuts written so far, those of earlier runs included."""
        return self._num_cuts + len(self._ids)

    def done_ids(self) -> DoneIds:
        """The cuts written so far, those of earlier runs included."""
        waiting = np.fromiter((id_hash(cut_id) for cut_id in self._ids), np.uint64, len(self._ids))
        return DoneIds(np.concatenate([*self._keys, waiting]))

    def write(self, cut_id: str, labels: np.ndarray[Any, np.dtype[Any]]) -> None:
        """Add the labels of one cut.

        Args:
            cut_id: without tabs and line breaks; `merge_shards` refuses one that occurs twice.
            labels: (L,) integers, L >= 1.

        Raises:
            ValueError: an unusable id, no labels, or a label that is not one of the classes; names the cut.
            OSError: the disk is full or failing; what was committed is kept, and a new run goes on from there.
        """
        if not self._files:
            raise ValueError(f"{self.folder / self.stem}: the shard is closed, cut {cut_id!r} cannot be added")
        if not cut_id or len(cut_id) > 10_000 or any(character in cut_id for character in "\t\n\r"):
            raise ValueError(f"labels: cut id {cut_id!r} is empty, longer than 10000 characters, or has a tab or line break")
        if cut_id in self._ids:
            raise ValueError(f"labels: cut {cut_id!r} was written already")
        labels = np.asarray(labels)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(f"labels of cut {cut_id!r} have shape {labels.shape} and type {labels.dtype}, allowed are integers (L,)")
        if labels.size == 0:
            raise ValueError(f"labels of cut {cut_id!r} are empty; leave out audio that is too short for one label")
        if labels.size > MOST_LABELS_OF_A_CUT:
            raise ValueError(f"labels of cut {cut_id!r}: {labels.size}, allowed are at most {MOST_LABELS_OF_A_CUT}; split the recording")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.setup.num_classes:
            wrong = low if low < 0 else high
            raise ValueError(f"labels of cut {cut_id!r} contain {wrong}, allowed are 0 to {self.setup.num_classes - 1}")
        self._labels.append(labels.astype(self._dtype))
        self._ids[cut_id] = labels.size
        self._waiting += labels.size
        if self._waiting >= self.commit_labels or len(self._ids) >= self.commit_cuts:
            self.commit()

    def commit(self) -> None:
        """Bring all that was written to disk, so that it survives a crash.

        Raises:
            OSError: the disk is full or failing; the shard must be opened anew, it then goes on after the commit before.
        """
        if not self._ids:
            return
        packed = np.concatenate(self._labels).tobytes()
        lines = "".join(f"{count}\t{cut_id}\n" for cut_id, count in self._ids.items()).encode("utf-8")
        try:
            # what a commit that was interrupted (Ctrl-C) has left behind the last whole one
            self._files["bin"].truncate(self._num_labels * self._dtype.itemsize)
            self._files["ids"].truncate(self._ids_bytes)
            _append(self._files["bin"], packed)
            _append(self._files["ids"], lines)
        except OSError as error:
            self._give_up(error)
        self._account(packed, lines, self._ids)
        self._labels, self._ids, self._waiting = [], {}, 0

    def close(self) -> None:
        """Commit, give the shard its final name and write its record; does nothing when the shard is finished already.

        Raises:
            OSError: the disk is full or failing; the shard stays unfinished under its working names.
        """
        if self.finished:
            return
        if not self._files:
            raise ValueError(f"{self.folder / self.stem}: the shard was abandoned after an error, open it anew")
        self.commit()
        try:
            for kind in ("bin", "ids"):
                os.replace(self._path(f"{kind}.partial"), self._path(kind))  # its contents are on disk since the commit
            write_record(self._path("json"), ShardRecord(self.setup, self._info()))
        except OSError as error:
            self._back_to_partial()
            self._give_up(error)
        self.finished = True
        for leftover in ("setup.json", "lock"):
            self._path(leftover).unlink(missing_ok=True)
        self._release()

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.stem}.{suffix}"

    def _info(self) -> ShardInfo:
        files: dict[str, FileInfo] = {kind: describe_file(self._path(kind), self._sha256[kind].hexdigest()) for kind in ("bin", "ids")}
        histogram = tuple(int(count) for count in self._histogram)
        return ShardInfo(self.shard, self._num_cuts, self._num_labels, histogram, labels=files["bin"], ids=files["ids"])

    def _refuse_other_stores(self) -> None:
        for path in sorted(self.folder.glob("labels-*")):
            found = _STEM.match(path.name)
            if found and int(found[2]) != self.setup.num_shards:
                raise ValueError(
                    f"{path} belongs to a store of {int(found[2])} shards, this one is to have {self.setup.num_shards}: remove it"
                )
        if (self.folder / CONTRACT_FILE).exists() and not self._path("json").exists():
            raise ValueError(f"{self.folder} holds a finished label store without {self.stem}.json: use another folder")

    def _check_setup(self, before: LabelSetup, path: Path) -> None:
        if difference := before.difference(self.setup):
            raise ValueError(f"{path} was begun with another set-up: {difference}; remove {self.folder} to label anew")

    def _open_finished(self) -> None:
        record = read_record(ShardRecord, self._path("json"))
        # versions may have changed since: nothing more is written with the present ones
        lineage = dataclasses.replace(self.setup.lineage, versions=record.setup.lineage.versions)
        self.setup = dataclasses.replace(self.setup, lineage=lineage)
        self._check_setup(record.setup, self._path("json"))
        ids = (id_hash(cut_id) for cut_id, _ in read_ids(self._path("ids")))
        self._keys.append(np.fromiter(ids, np.uint64, record.shard.num_cuts))
        self._num_cuts, self._num_labels = record.shard.num_cuts, record.shard.num_labels

    def _open_partial(self) -> None:
        self._back_to_partial()
        if self._path("setup.json").exists():
            self._check_setup(read_record(LabelSetup, self._path("setup.json")), self._path("setup.json"))
        else:
            write_record(self._path("setup.json"), self.setup)
        files = {kind: self._path(f"{kind}.partial").open("a+b", buffering=0) for kind in ("bin", "ids")}
        try:
            self._recover(files)
        except BaseException:
            for file in files.values():
                file.close()
            raise
        self._files = files

    def _lock(self) -> FileIO:
        lock = self._path("lock").open("a+b", buffering=0)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ValueError(f"{self._path('lock')}: another process is writing this shard") from None
        return lock

    def _back_to_partial(self) -> None:
        """Undo the renaming of a shard whose record was never written."""
        for kind in ("bin", "ids"):
            if self._path(kind).exists():
                os.replace(self._path(kind), self._path(f"{kind}.partial"))

    def _recover(self, files: dict[str, FileIO]) -> None:
        """Take over what was committed: cut off what came after, count and hash the rest."""
        files["ids"].truncate(_end_of_last_line(files["ids"]))
        counts = [0]  # number of labels listed; a list, because the generator adds to it

        def keys() -> Iterator[int]:
            for cut_id, count in read_ids(self._path("ids.partial")):
                counts[0] += count
                yield id_hash(cut_id)

        committed = np.fromiter(keys(), np.uint64)
        listed, size = counts[0] * self._dtype.itemsize, self._path("bin.partial").stat().st_size
        if size < listed:
            raise ValueError(
                f"{self._path('bin.partial')} has {size} bytes, {self._path('ids.partial').name} lists labels of {listed}: "
                "it was truncated; remove both to label this shard anew"
            )
        files["bin"].truncate(listed)
        for packed in _chunks(self._path("bin.partial")):
            self._account(packed, b"", ())
        for lines in _chunks(self._path("ids.partial")):
            self._account(b"", lines, ())
        self._keys.append(committed)
        self._num_cuts = len(committed)

    def _account(self, packed: bytes, lines: bytes, ids: Collection[str]) -> None:
        """Count and hash what is on disk."""
        labels = np.frombuffer(packed, self._dtype)
        if labels.size and int(labels.max()) >= self.setup.num_classes:
            found = f"label {int(labels.max())}, allowed are 0 to {self.setup.num_classes - 1}"
            raise ValueError(f"{self._path('bin.partial')} contains {found}: it is damaged; remove it to label this shard anew")
        self._histogram += np.bincount(labels, minlength=self.setup.num_classes)
        self._sha256["bin"].update(packed)
        self._sha256["ids"].update(lines)
        self._keys.append(np.fromiter((id_hash(cut_id) for cut_id in ids), np.uint64, len(ids)))
        self._num_cuts += len(ids)
        self._num_labels += labels.size
        self._ids_bytes += len(lines)

    def _give_up(self, error: OSError) -> None:
        """Leave what was committed, free the rest, and say what to do."""
        with contextlib.suppress(OSError):
            self._files["bin"].truncate(self._num_labels * self._dtype.itemsize)
            self._files["ids"].truncate(self._ids_bytes)
        self._release()
        raise OSError(
            error.errno,
            f"{self.folder / self.stem}: writing labels failed ({error.strerror or error}); {self._num_cuts} cuts of this shard are safe, "
            "nothing has its final name; make room and run again to go on from there",
        ) from error

    def _release(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}
        self._labels, self._ids, self._waiting = [], {}, 0
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None


def _append(file: FileIO, data: bytes) -> None:
    """Write all of `data` and wait until it is on disk."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    os.fsync(file.fileno())


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _end_of_last_line(file: FileIO) -> int:
    """Where the last whole line ends; 0 when there is none."""
    size = file.seek(0, os.SEEK_END)
    start = file.seek(max(0, size - _LONGEST_LINE))
    return start + file.read().rfind(b"\n") + 1
