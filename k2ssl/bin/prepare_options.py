"""What the scripts of the recipes share: options of the `prepare_cuts.py` scripts, what they print, exit codes.

Exit codes: 0 all splits are there (unreadable files are listed, and do not change it), 1 something was refused, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from k2ssl.bin.program import one_line

if TYPE_CHECKING:  # slow to import, and not needed by scripts that make no cuts
    from k2ssl.data.audio_scan import ScanSettings
    from k2ssl.data.prepare_cuts import Prepared

_RESUMING = """\
A split whose cuts_SPLIT.jsonl.gz exists is finished and skipped. An interrupted run is continued by the same command: what was read
lies in OUT/cuts_SPLIT.parts/. Exit status: 0 done, 1 refused, 2 wrong usage, 130 interrupted."""


class Common(TypedDict):
    """Arguments of `prepare_split` that every script takes from the command line."""

    settings: ScanSettings
    num_jobs: int
    overwrite: bool
    progress: bool


def parser(description: str, *, min_duration: float = 0.0, max_duration: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have.

    Args:
        description: the script's docstring.
        min_duration: default of `--min-duration`, in seconds.
        max_duration: whether there is a `--max-duration`.
    """
    from k2ssl.data.prepare_cuts import cores

    head, _, details = description.partition("\n\n")
    result = argparse.ArgumentParser(
        description=head, epilog=f"{details.strip()}\n\n{_RESUMING}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for cuts_SPLIT.jsonl.gz, summary_SPLIT.json and unreadable_SPLIT.tsv; made if need be",
    )
    result.add_argument(
        "--min-duration",
        type=float,
        default=min_duration,
        metavar="SECONDS",
        help="leave out cuts shorter than this; they are counted (default: %(default)g)",
    )
    if max_duration:
        result.add_argument(
            "--max-duration", type=float, metavar="SECONDS", help="leave out cuts longer than this; they are counted (default: no limit)"
        )
    result.add_argument(
        "--sampling-rate",
        type=int,
        default=16000,
        metavar="HZ",
        help="audio at another rate is resampled each time it is loaded (default: %(default)d)",
    )
    result.add_argument(
        "--channel",
        type=int,
        default=0,
        metavar="NUMBER",
        help="channel to take of files that have several, counted from 0 (default: %(default)d)",
    )
    result.add_argument(
        "--verify", action="store_true", help="decode every file to its end, to find damaged ones; otherwise only headers are read"
    )
    result.add_argument(
        "--num-jobs", type=int, default=cores(), metavar="N", help="processes that read audio headers (default: cores, here %(default)d)"
    )
    result.add_argument("--overwrite", action="store_true", help="make splits that exist again, from the beginning")
    result.add_argument(
        "--quiet", action="store_true", help="no progress bar (there is none either where standard error is not a terminal)"
    )
    return result


def common(options: argparse.Namespace, **settings: Any) -> Common:
    """The arguments that the options of `parser` stand for.

    Raises:
        ValueError: one of them is out of range.
    """
    from k2ssl.data.audio_scan import ScanSettings

    return Common(
        settings=ScanSettings(
            min_duration=options.min_duration,
            max_duration=getattr(options, "max_duration", None),
            sampling_rate=options.sampling_rate,
            channel=options.channel,
            verify=options.verify,
            **settings,
        ),
        num_jobs=options.num_jobs,
        overwrite=options.overwrite,
        progress=not options.quiet,
    )


def run(script: str, work: Callable[[], Iterable[Prepared]]) -> int:
    """Prepare splits one after the other, print the table of each when it is there and a last line for all. Returns the exit code."""

    def prepare() -> None:
        done: list[Prepared] = []
        for prepared in work():
            done.append(prepared)
            print(prepared, flush=True)
        hours = sum(prepared.summary.hours for prepared in done)
        cuts = sum(prepared.summary.cuts for prepared in done)
        skipped = sum(prepared.unreadable for prepared in done)
        print(f"done: {len(done)} split(s), {cuts:,} cuts, {hours:,.3f} h; {skipped:,} unreadable or unusable files skipped and listed")

    return exit_code(script, prepare)


def exit_code(script: str, work: Callable[[], None]) -> int:
    """Do the work of a script; an error for people (`ValueError`, `OSError`) becomes one line on standard error. Returns the exit code."""
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"{script}: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{script}: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def choose(found: Iterable[str], asked: list[str] | None, where: Path) -> list[str]:
    """The splits to prepare: those asked for, or all that were found.

    Raises:
        ValueError: one that was asked for was not found.
    """
    names = list(found)
    missing = [name for name in asked or () if name not in names]
    if missing:
        raise ValueError(f"{where}: there is no part {', '.join(missing)}; parts found: {', '.join(names)}")
    return asked or names
