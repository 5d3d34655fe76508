"""Manifests of cuts on disk: read lazily and only if their ids are unique, written whole or not at all, with a summary beside them.

A manifest is lhotse's: one cut a line, JSON, usually compressed (`.jsonl.gz`). Beside `cuts_NAME.jsonl.gz` lies `summary_NAME.json`, which holds
the summary and a checksum of the manifest, so that a manifest that was checked when it was written need not be checked at every start.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from lhotse import CutSet
from lhotse.cut import Cut

from k2ssl.atomic_file import atomic_file, writable_folder
from k2ssl.data.cut_summary import CutSummary, SummaryCounter, summarize
from k2ssl.file_hash import file_sha256

__all__ = ["CutSummary", "read_cuts", "summarize", "write_cuts"]

SUFFIXES = (".jsonl.gz", ".jsonl")
COMPRESSION = 3  # of gzip's 9 levels: 13 % larger than level 6 and three times as fast; level 9 takes eight times as long


def read_cuts(path: str | Path) -> CutSet:
    """Open a manifest of cuts lazily: each pass over it reads the file again, and none of it is kept in memory.

    Unless the summary beside it has its checksum, the whole manifest is read through once (10 µs and 8 bytes of memory a cut).

    Raises:
        ValueError: there is no such file, or its suffix is not .jsonl or .jsonl.gz; it is damaged, empty or holds something other than cuts;
            or two cuts have the same id.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: a manifest of cuts ends in {' or '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    if not is_checked(path):
        check_manifest(path)
    return CutSet.from_jsonl_lazy(path)


def write_cuts(cuts: Iterable[Cut], path: str | Path) -> CutSummary:
    """Write a manifest, one cut after the other, and its summary; both appear under their names only when all is written and checked.

    Raises:
        ValueError: no cuts, two with the same id, one that cannot be stored (audio in memory), or the folder cannot be written to.
        OSError: the disk is full.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: a manifest of cuts ends in {' or '.join(SUFFIXES)}")
    writable_folder(path.parent)
    counter = SummaryCounter()

    def lines() -> Iterator[bytes]:
        for cut in cuts:
            counter.add(cut)
            yield cut_line(cut)

    with atomic_file(path) as file:
        if path.name.endswith(".gz"):
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=COMPRESSION, mtime=0) as compressed:
                compressed.writelines(lines())
        else:
            file.writelines(lines())
        file.flush()
        check_manifest(Path(file.name), called=path)
        summary = counter.summary()
        write_summary(path, Path(file.name), {"summary": summary.to_dict()})
    return summary


def cut_line(cut: Cut) -> bytes:
    """The line of a cut in a manifest."""
    try:
        return (json.dumps(cut.to_dict(), ensure_ascii=False) + "\n").encode()
    except (TypeError, UnicodeEncodeError) as error:
        raise ValueError(f"cut {cut.id!r} cannot be stored as JSON: {error}") from error


def summary_path(manifest: str | Path) -> Path:
    """Where the summary of a manifest lies: `summary_NAME.json` beside `cuts_NAME.jsonl.gz`."""
    manifest = Path(manifest)
    stem = next((manifest.name.removesuffix(suffix) for suffix in SUFFIXES if manifest.name.endswith(suffix)), manifest.name)
    return manifest.with_name(f"summary_{stem.removeprefix('cuts_')}.json")


def write_summary(manifest: Path, written_as: Path, content: Mapping[str, Any]) -> None:
    """Store `content` beside `manifest`, with the checksum of the file `written_as` that will get that name."""
    stamp = {"file": manifest.name, "bytes": written_as.stat().st_size, "sha256": file_sha256(written_as)}
    with atomic_file(summary_path(manifest)) as file:
        file.write((json.dumps({**content, "manifest": stamp}, indent=2, ensure_ascii=False) + "\n").encode())


def read_summary(manifest: str | Path) -> dict[str, Any]:
    """What `write_summary` stored; empty if there is nothing that can be read."""
    try:
        content = json.loads(summary_path(manifest).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_manifest(path: Path, called: Path | None = None) -> int:
    """Read a whole manifest through and return the number of its cuts.

    Args:
        path: the file; whether it is compressed is seen from its first bytes.
        called: its name in messages, where that is not the file's.

    Raises:
        ValueError: see `read_cuts`.
    """
    name = called or path
    hashes = array("Q")  # eight bytes a cut: 22 million ids as strings would take 3 GB
    for number, cut_id in _ids(path, name):
        del number
        hashes.append(_hash(cut_id))
    if not hashes:
        raise ValueError(f"{name}: holds no cuts")
    ordered = np.sort(np.frombuffer(hashes, dtype=np.uint64))
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if repeated:
        _refuse_repeated(path, name, repeated)
    return len(hashes)


def _refuse_repeated(path: Path, name: Path, hashes: set[int]) -> None:
    """Look again at the ids with these hashes, for two different ones may have the same (1 manifest of 22 million cuts in 70,000)."""
    first: dict[str, int] = {}
    repeated: list[str] = []
    for number, cut_id in _ids(path, name):
        if _hash(cut_id) not in hashes:
            continue
        if cut_id in first:
            repeated.append(f"{cut_id!r} in lines {first[cut_id]} and {number}")
        first.setdefault(cut_id, number)
    if repeated:
        more = f" and {len(repeated) - 3} more" if len(repeated) > 3 else ""
        raise ValueError(f"{name}: ids of cuts must be unique, but there is {', '.join(repeated[:3])}{more}")


def _ids(path: Path, name: Path) -> Iterator[tuple[int, str]]:
    """Line numbers, from 1, and ids of all cuts; ValueError for a line that is not a cut."""
    number = 0
    try:
        with open(path, "rb") as file, _decompressed(file) as lines:
            for number, line in enumerate(lines, start=1):
                yield number, _id_of(line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{name}: damaged after line {number} ({error})") from error
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ValueError(f"{name}: line {number} {error}") from error


def _decompressed(file: BinaryIO) -> BinaryIO:
    compressed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return cast(BinaryIO, gzip.GzipFile(fileobj=file)) if compressed else file


def _id_of(line: bytes) -> str:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(data, dict) or not isinstance(data.get("id"), str):
        raise ValueError("has no id")
    if ("tracks" not in data and not {"start", "duration"} <= data.keys()) or "recording_id" in data:
        kind = "a supervision" if "recording_id" in data else "a recording" if "sources" in data else "something else"
        raise ValueError(f"is {kind}, not a cut")
    try:
        data["id"].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"has the id {data['id']!r}, which is no text in Unicode") from error
    return data["id"]


def _hash(cut_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(cut_id.encode(), digest_size=8).digest(), "little")


def is_checked(manifest: Path) -> bool:
    """Whether the summary beside it belongs to this very file, byte for byte; then its ids were unique when it was written."""
    stamp = read_summary(manifest).get("manifest")
    if not isinstance(stamp, dict) or stamp.get("bytes") != manifest.stat().st_size:
        return False
    return stamp.get("sha256") == file_sha256(manifest)
