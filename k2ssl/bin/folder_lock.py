"""One process at a time in the folder that a program fills."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from k2ssl.atomic_file import writable_folder
from k2ssl.train.ledger import LEDGER

CHECKPOINTS = "checkpoints"

_LOCK = ".lock"

_log = logging.getLogger(__name__)

# Locks that this process holds. A lock is that of the open file, which a forked process would keep open beyond our end.
_held: set[IO[str]] = set()


def _let_go_in_child() -> None:
    for lock in _held:
        lock.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Hold the folder, on rank 0: a second process that would work in it is refused. The system lets go of it when we end, however.

    A folder in which nothing was written meanwhile is left as it was found, which may be not at all.

    Raises:
        ValueError: another process holds it.
    """
    made = [path for path in (output, *output.parents) if not path.exists()]
    with _locked(writable_folder(output) / _LOCK):
        try:
            yield
        finally:
            if _is_unused(output):
                (output / LEDGER).unlink(missing_ok=True)
                (output / _LOCK).unlink(missing_ok=True)
                for path in [output / CHECKPOINTS, *made]:
                    with suppress(OSError):  # not there, or somebody else's by now
                        path.rmdir()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    while True:
        with open(path, "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"{path.parent}: another process works in this folder; wait for it, or choose another output folder"
                ) from error
            except OSError:
                _log.warning("%s: this file system has no locks, so nothing keeps a second process out of it", path.parent)
            if _is_at(path, lock):
                _held.add(lock)
                try:
                    yield
                finally:
                    _held.discard(lock)
                return


def _is_at(path: Path, file: IO[str]) -> bool:
    """Whether the open file still has its name; a process that ended may have removed it after we opened it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _is_unused(output: Path) -> bool:
    """Nothing but what is there before the first byte is written."""
    there = {path.name for path in output.iterdir()}
    ledger, checkpoints = output / LEDGER, output / CHECKPOINTS
    return (
        there <= {_LOCK, LEDGER, CHECKPOINTS}
        and (not ledger.exists() or ledger.stat().st_size == 0)
        and (not checkpoints.exists() or not any(checkpoints.iterdir()))
    )
