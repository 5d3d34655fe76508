"""What programs that write one file, in one process, refuse before they do anything."""

from __future__ import annotations

import os
from pathlib import Path

from k2ssl.atomic_file import writable_folder
from k2ssl.config import ConfigError


def check_output(path: str | Path, overwrite: bool, **inputs: str | tuple[str, ...] | None) -> Path:
    """The file that a program is to write; its folder is made.

    Args:
        path: where.
        overwrite: whether what is there is replaced.
        inputs: the files that the program reads, by setting; they are never replaced.

    Raises:
        ConfigError: it is read, it exists and `overwrite` is False, it is a folder, or its folder cannot be written to.
    """
    path = Path(path)
    refuse_inputs(path, **inputs)
    if path.is_dir():
        raise ConfigError(f"output is {path}, which is a folder; a file is needed")
    refuse_existing(path, overwrite)
    check_folder(path.parent)
    return path


def refuse_inputs(path: Path, **inputs: str | tuple[str, ...] | None) -> None:
    """Keep what is read, under whatever name: through links, too.

    Raises:
        ConfigError: names the setting that the file is read for.
    """
    for name, given in inputs.items():
        for other in (given,) if isinstance(given, str) else given or ():
            if path.exists() and Path(other).exists() and path.samefile(other):
                raise ConfigError(f"output is {path}, which is read ({name}: {other}); another file is needed")


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Keep what is there.

    Raises:
        ConfigError: the file exists and `overwrite` is False.
    """
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; --overwrite True replaces it")


def check_folder(path: str | Path) -> Path:
    """The folder, made if need be.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        return writable_folder(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_one_process(advice: str = "") -> None:
    """Refuse to run several times at once, under torchrun.

    Args:
        advice: added to the message.

    Raises:
        ConfigError: names the number of processes.
    """
    if (number := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(f"{number} processes were started, this program runs in one{advice}")
