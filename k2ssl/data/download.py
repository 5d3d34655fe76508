"""Fetching large archives so that what is there under its name is whole: resumed, checked, unpacked beside its place, then renamed.

    fetch(["https://one.example/a.tar.gz", "https://two.example/a.tar.gz"], Path("data/a.tar.gz"), checksum="md5:0cc1...")
    unpack(Path("data/a.tar.gz"), "corpus/part", Path("data/corpus/part"))

Until it is whole and checked, a file is called NAME.partial and goes on where it was when the same call is made again; a folder is called
.NAME.partial and is unpacked from the beginning.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import http.client
import io
import os
import shutil
import ssl
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tqdm.auto import tqdm

UNPACKED = ".unpacked"  # in a folder that `unpack` made: the archive's name and the number of files

_CHUNK = 1 << 20
_TIMEOUT = 60.0  # seconds without a byte after which a connection counts as cut
_ATTEMPTS = 4  # for each address, as long as no byte comes; an attempt that brings some does not count
_GZIP = b"\x1f\x8b"
_END_OF_TAR = 1024  # bytes, all zero
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)
_CUT = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def fetch(urls: Sequence[str], path: Path, *, checksum: str | None = None, progress: bool = True, wait: float = 1.0) -> None:
    """Make `path` the file that lies at each of the addresses. One that is there already is only checked.

    Args:
        urls: of the same file in several places; the next one is tried where one fails.
        path: the file gets this name when it is complete and has the checksum.
        checksum: "sha256:HEX" or "md5:HEX"; None: only the length that the server tells is checked.
        progress: show a progress bar, if standard error is a terminal.
        wait: seconds before a second attempt, twice as many before the next.

    Raises:
        ValueError: no address gives the file, or what they give has another checksum; names each address and what was wrong with it.
        OSError: the disk is full or cannot be written to; what was fetched is kept.
    """
    if path.exists():
        if wrong := _difference(path, checksum):
            raise ValueError(f"{path} is there, but {wrong}: remove it, and it is fetched again")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    reasons: list[str] = []
    with _locked(partial) as file:
        for url in urls:
            reason = _from(url, file, path.name, progress, wait) or _difference(partial, checksum)
            if not reason:
                os.fsync(file.fileno())
                os.replace(partial, path)
                return
            reasons.append(f"{url}: {reason}")
            if reason.startswith("it has"):  # bytes of the wrong file are of no use to any other address
                file.truncate(0)
    raise ValueError(f"{path.name} could not be fetched; {'; '.join(reasons)}")


def published_md5(folders: Sequence[str]) -> dict[str, str]:
    """Checksums ("md5:HEX") by file name, from the first file md5sum.txt that lies in one of these places; empty if none does."""
    for folder in folders:
        try:
            with urllib.request.urlopen(f"{folder}/md5sum.txt", timeout=_TIMEOUT) as answer:
                lines = answer.read(_CHUNK).decode("utf-8", "replace").splitlines()
        except _CUT:
            continue
        pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
        sums = {pair[1].strip().lstrip("*./"): f"md5:{pair[0].lower()}" for pair in pairs if len(pair) == 2 and _is_md5(pair[0])}
        if sums:
            return sums
    return {}


def unpack(archive: Path, member: str, destination: Path, *, progress: bool = True) -> int:
    """Make `destination` the folder that the archive holds under the name `member`; returns the number of files in it.

    The archive (.tar or .tar.gz) is read to its end, so that one that is cut short or damaged is found even where no checksum is known.
    Members that would lie outside of the folder, links to outside and devices are refused (tarfile's filter "data").

    Raises:
        ValueError: the archive is damaged, has no such folder, or has members that are refused.
        OSError: the disk is full or cannot be written to; nothing is left of what was unpacked.
    """
    if not hasattr(tarfile, "data_filter"):
        raise ValueError("this release of Python cannot unpack archives safely; 3.10.12, 3.11.4 or a later one is needed")
    if destination.exists():
        raise ValueError(f"{destination} is there already; remove it to unpack {archive.name} again")
    temporary = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        number = _extract(archive, member.strip("/"), temporary, progress)
        made = temporary / member
        (made / UNPACKED).write_text(f"{archive.name} {number}\n", encoding="utf-8")
        os.sync()  # forcing each of thousands of files to disk would take far longer
        made.rename(destination)
    except _DAMAGE as error:
        raise ValueError(f"{archive} is damaged ({error}): remove it, and it is fetched again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return number


def check_gzip(path: Path) -> None:
    """Read a .gz file to its end, whose checksum is in it.

    Raises:
        ValueError: it is damaged or cut short.
    """
    try:
        with gzip.open(path) as file:
            while file.read(_CHUNK):
                pass
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and it is fetched again") from error


def need_space(folder: Path, num_bytes: int, what: str) -> None:
    """
    Args:
        folder: where it is to go; it need not be there yet.

    Raises:
        ValueError: the disk has not so many bytes free; names both numbers.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise ValueError(
            f"{folder}: {what} take {num_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; make room or name another folder"
        )


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """The file for reading and appending, to be written by this process alone."""
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another process is fetching this file") from None
        yield file


def _from(url: str, file: IO[bytes], name: str, progress: bool, wait: float) -> str:
    """Append what the file lacks, in as many attempts as it takes. Returns why it is not complete, or nothing."""
    most, failures = _size(file), 0
    while True:
        try:
            reason = _append(url, file, name, progress)
        except urllib.error.HTTPError as error:
            reason = f"HTTP status {error.code} {error.reason}"
            if 400 <= error.code < 500:
                return reason
        except _CUT as error:
            reason = str(getattr(error, "reason", "") or error) or type(error).__name__
        if not reason:
            return ""
        failures = 0 if _size(file) > most else failures + 1
        most = max(most, _size(file))
        if failures >= _ATTEMPTS:
            return reason
        if failures:
            time.sleep(wait * 2 ** (failures - 1))


def _append(url: str, file: IO[bytes], name: str, progress: bool) -> str:
    """One attempt: ask for what comes after the bytes that are there. Returns why it is not complete, or nothing."""
    begin = _size(file)
    request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-"} if begin else {})
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not begin:  # the range begins at the end of the file, or beyond
            raise
        if str(error.headers.get("Content-Range", "")).endswith(f"/{begin}"):
            return ""
        file.truncate(0)
        return "it has fewer bytes than were fetched before"
    with answer:
        if begin and answer.status != 206:  # this server knows no ranges
            file.truncate(0)
            begin = 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else begin + int(length)
        with tqdm(total=total, initial=begin, unit="B", unit_scale=True, desc=name, disable=None if progress else True) as bar:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        file.flush()
    if total is not None and _size(file) < total:
        return f"the connection was cut after {_size(file):,} of {total:,} bytes"
    return ""


def _size(file: IO[bytes]) -> int:
    file.flush()
    return os.fstat(file.fileno()).st_size


def _difference(path: Path, checksum: str | None) -> str:
    """What is wrong with a file, or nothing."""
    if checksum is None:
        return ""
    kind, _, expected = checksum.partition(":")
    with open(path, "rb") as file:
        digest = hashlib.new(kind, usedforsecurity=False)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    found = digest.hexdigest()
    return "" if found == expected else f"it has {kind} {found}, {expected} is published"


def _is_md5(text: str) -> bool:
    return len(text) == 32 and all(character in "0123456789abcdefABCDEF" for character in text)


def _extract(archive: Path, member: str, folder: Path, progress: bool) -> int:
    """Unpack the members below `member`; returns how many files there are."""
    number = 0
    with open(archive, "rb") as file, tarfile.open(fileobj=(stream := _Watched(file)), mode="r|") as tar:
        with tqdm(total=archive.stat().st_size, unit="B", unit_scale=True, desc=member, disable=None if progress else True) as bar:
            for info in tar:
                name = info.name.removeprefix("./")
                if name == member or name.startswith(f"{member}/"):
                    tar.extract(info, folder, filter="data")
                    number += info.isfile()
                bar.update(file.tell() - bar.n)
        while stream.read(_CHUNK):  # checksums come at the end
            pass
        if stream.tail != bytes(_END_OF_TAR):
            raise tarfile.ReadError("it ends early")
    if not number:
        raise ValueError(f"{archive} holds no files below {member}/")
    return number


class _Watched(io.RawIOBase):
    """What a file holds, decompressed if need be, and the last bytes of it that were read."""

    def __init__(self, file: IO[bytes]) -> None:
        compressed = file.read(2) == _GZIP
        file.seek(0)
        self._stream: Any = gzip.GzipFile(fileobj=file) if compressed else file
        self.tail = b""

    def read(self, size: int = -1) -> bytes:
        some: bytes = self._stream.read(size)
        self.tail = (self.tail + some)[-_END_OF_TAR:]
        return some
