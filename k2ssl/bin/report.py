"""Tables and pictures of word error rate and cost, of everything that lies below some folders.

    python -m k2ssl.bin.report exp/mine --output exp/mine/report
    python -m k2ssl.bin.report exp/zipformer exp/hubert --baseline hubert/ctc --references reference_results.toml --output tables

Looks for training runs (settings.json, ledger.jsonl), decodings (decode.json) and scores (wer.json), finds out which belong together, and
follows every run back to the model it began with, its labels, and what these were made from. Prints the tables and writes into OUTPUT report.md,
report.html (one file with its pictures), tables.tex, wer.csv, cost.csv, loss_curves.png and wer_by_hours.png; card.json in the folder of each
run gets its error rates. Exit status: 0 done, 1 the run failed, 2 wrong usage or settings, 130 interrupted. See docs/results.md.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from k2ssl.atomic_file import atomic_file
from k2ssl.bin.decode_arguments import with_names
from k2ssl.bin.output_file import check_folder, refuse_existing
from k2ssl.bin.program import run_program
from k2ssl.config import ConfigError

if TYPE_CHECKING:  # slow to import, and not needed to show --help
    from k2ssl.report.content import Report
    from k2ssl.report.experiments import Experiments
    from k2ssl.report.references import Reference

REPORT = "report.md"
_WIDTH = 140  # characters, where the output is no terminal

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MakeReport:
    """Settings of the program.

    Attributes:
        experiments: folders to look through; may also be named before all options.
        output: folder for the report.
        baseline: names of systems, as the tables have them, that all others are compared with, one after the other.
        title: what the report is headed with.
        references: TOML file with rows of the literature, shown apart and marked; docs/results.md says what it holds.
        cards: complete card.json in the folders of the runs; False only reads there.
        overwrite: replace the report that is in OUTPUT already.
    """

    experiments: tuple[str, ...]
    output: str
    baseline: tuple[str, ...] = ()
    title: str = "Results"
    references: str | None = None
    cards: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.experiments:
            raise ValueError("MakeReport: experiments names no folder, at least one is needed")


def report(job: MakeReport) -> None:
    """Do the job."""
    from k2ssl.report.content import build, terminal
    from k2ssl.report.experiments import find

    refuse_existing(Path(job.output) / REPORT, job.overwrite)
    try:
        experiments = find(job.experiments, interval)
        made = build(experiments, _references(job.references), job.title, job.baseline, job.experiments)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for remark in experiments.remarks:
        _log.warning("warning: %s", remark)
    write(check_folder(job.output), made)
    if job.cards:
        complete_cards(experiments)
    print(terminal(made, shutil.get_terminal_size((_WIDTH, 24)).columns))
    print(f"report in {Path(job.output) / REPORT} and report.html")


def write(folder: Path, made: Report) -> None:
    """All files of a report; report.md, by which a finished one is known, last.

    Raises:
        OSError: the disk is full.
    """
    for name, content in [*made.pictures.items(), *((name, text.encode()) for name, text in made.texts.items())]:
        with atomic_file(folder / name) as file:
            file.write(content)


def complete_cards(experiments: Experiments) -> None:
    """Put the error rates into the cards; a folder that cannot be written to is named, and left."""
    from k2ssl.report.card import write_card

    for run in experiments.runs.values():
        try:
            write_card(run.folder, run.card)
        except OSError as error:
            _log.warning("warning: %s: the card is not written: %s", run.folder, error.strerror or error)


def interval(hypotheses: Path) -> tuple[float, float]:
    """95 % interval of the word error rate of a decoding, as k2ssl.bin.decode tells it.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    from k2ssl.decode.results import iterate_results
    from k2ssl.decode.wer import error_report

    found = error_report((result.ref, result.hyp) for result in iterate_results(str(hypotheses)) if result.ref is not None)
    return found.low, found.high


def _references(path: str | None) -> tuple[Reference, ...]:
    from k2ssl.report.references import read_references

    return () if path is None else read_references(Path(path))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = with_names(sys.argv[1:] if argv is None else argv, "experiments", "experiments")
    return run_program(report, MakeReport, arguments, "report", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
