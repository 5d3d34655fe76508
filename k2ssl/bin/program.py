"""What all programs share: settings in, one clear line when something is wrong, an exit status that scripts can trust.

Exit status: 0 done; 1 the run failed; 2 refused: wrong usage or settings, output that exists, or input that is missing or does not fit, so
that no work was begun and nothing was touched; 130 interrupted.

A program looks at everything it can before its work begins, and what it finds there is a `ConfigError`, whoever raised it
(`k2ssl.bin.refusal.refusing`). What only the work itself can find, such as a damaged line in the middle of a text, has status 1.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from k2ssl.bin.interruption import interruptible
from k2ssl.config import ConfigError, load

Config = TypeVar("Config")

# Errors of libraries and of other ranks whose messages are for people, by name: importing their owners would slow --help down.
_FOR_PEOPLE = (
    "AudioLoadingError",
    "DurationMismatchError",
    "LibsndfileError",
    "NonFiniteError",
    "OtherRankError",
)


def run_program(main: Callable[[Config], None], cls: type[Config], argv: Sequence[str], program: str, description: str) -> int:
    """Load settings of dataclass `cls`, call `main` with them; returns the exit status.

    An error for people (`ValueError`, `OSError`, unreadable audio, no memory left) becomes one line on standard error. Any other
    is a mistake of ours: it passes, with its traceback. A package that is not installed becomes one line, too.
    """
    _log_to_stderr()
    rank = f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    try:
        with interruptible():
            main(load(cls, argv, program=f"python -m k2ssl.bin.{program}", description=description))
    except ConfigError as error:
        print(f"{program}{rank}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}{rank}: interrupted; the same command goes on, or begins again where nothing was kept", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "k2ssl":
            raise
        print(
            f"{program}{rank}: the package {error.name} is not installed; python -m k2ssl.bin.doctor says what is lacking", file=sys.stderr
        )
        return 1
    except Exception as error:
        text = _for_people(error)
        if text is None:
            raise
        print(f"{program}{rank}: {text}", file=sys.stderr)
        return 1
    return 0


def _for_people(error: Exception) -> str | None:
    """What people are told of an error that is no mistake of ours; None if it is one."""
    if isinstance(error, ValueError | OSError | MemoryError) or type(error).__name__ in _FOR_PEOPLE:
        return one_line(error)
    if "torch" not in sys.modules:  # then nothing of it has failed
        return None
    from k2ssl.distributed import is_lost_connection
    from k2ssl.train.memory import is_out_of_memory

    if is_lost_connection(error):
        return f"another rank does not answer, most likely it has ended, see its message ({one_line(error)})"
    if str(error).startswith("DataLoader worker"):
        return (
            f"{one_line(error)} A process that reads data was ended from outside, as systems do that run out of memory; lower num_workers"
        )
    return one_line(error) if is_out_of_memory(error) else None


def _log_to_stderr() -> None:
    """Remarks of the library as plain lines, once for all ranks; in a terminal they take the place of a progress bar's line."""
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(level=level, format=f"{clear}%(message)s", stream=sys.stderr)


def one_line(error: BaseException) -> str:
    """The message of an error in one line, without the traceback that a loader's worker process packs into it."""
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        hint = "; make room and run the same command again" if error.errno == errno.ENOSPC else ""
        return f"{place}{error.strerror}{hint}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "Original Traceback (most recent call last):" in lines:
        return lines[-1].partition(": ")[2] or lines[-1]
    return " ".join(lines) or repr(error)
