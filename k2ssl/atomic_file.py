"""Files that are whole or absent: written under a temporary name, forced to disk, renamed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to that gets the name `path`, replacing an older one, only when the block ends without an exception.

    Until then it is called `.NAME.PID.part`, in the same folder; after an exception nothing is left of it.

    Raises:
        OSError: the folder does not exist or cannot be written to, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            error.filename = str(path)  # what "No space left on device" is about
        raise
    _sync_folder(path.parent)


def save_atomically(path: str | Path, content: Mapping[str, Any], check: Callable[[BinaryIO], None] | None = None) -> None:
    """`torch.save` of plain values and tensors, so that `path` is whole or as it was before.

    Args:
        path: what to write.
        content: what `torch.load` is to give back.
        check: looks at the temporary file, which is complete, and raises if it must not get its name.

    Raises:
        OSError: the folder does not exist or cannot be written to, or the disk is full; names the file.
    """
    import torch  # slow to import, and programs that show their --help come by here

    try:
        with atomic_file(path) as file:
            torch.save(dict(content), file)
            if check is not None:
                check(file)
    except RuntimeError as error:
        # torch hides what the system said behind a RuntimeError about its own position in the file
        if isinstance(error.__context__, OSError):
            raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from error
        raise


def writable_folder(path: str | Path) -> Path:
    """Make the folder if need be and try to write into it, so that hours of work do not end in a refusal.

    Raises:
        ValueError: it cannot be made or written to.
    """
    path = Path(path)
    trial = path / f".trial.{os.getpid()}.part"
    try:
        path.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(f"{path}: cannot write into this folder ({error.strerror or error})") from error
    return path


def _sync_folder(folder: Path) -> None:
    """Force the renaming itself to disk; some network file systems refuse this, and lose nothing that we could save."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(number)
    except OSError:
        return
    finally:
        os.close(number)
