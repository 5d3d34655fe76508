"""How good are these labels? Usage of classes, runs, agreement with other labels, phone purity and PNMI.

    python -m k2ssl.bin.label_report --labels labels/train --output quality.json
    python -m k2ssl.bin.label_report --labels labels/train --output quality.json --compare.previous labels-mfcc/train \
        --compare.alignments alignments/

Prints a table and writes OUTPUT (JSON) and, beside it, a picture with the suffix .png. Exit status: 0 done, 1 the run failed, 2 wrong
usage or settings, 130 interrupted.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from k2ssl.bin.output_file import check_output, refuse_existing
from k2ssl.bin.program import run_program
from k2ssl.bin.quality_report import CompareConfig, measure_store, open_comparison, picture_path, write_report
from k2ssl.bin.refusal import refusing
from k2ssl.config import ConfigError


@dataclass(frozen=True)
class LabelReport:
    """Settings of the program.

    Attributes:
        labels: folder of the labels, as `k2ssl.bin.label` writes it.
        output: file for the report, ending in .json.
        compare: what the labels are held against.
        overwrite: replace OUTPUT if it exists.
        quiet: plain lines instead of a progress bar, for logs.
    """

    labels: str
    output: str
    compare: CompareConfig = field(default_factory=CompareConfig)
    overwrite: bool = False
    quiet: bool = False


def report(job: LabelReport) -> None:
    """Do the job."""
    from k2ssl.data.labels import LabelStore

    output = Path(job.output)
    if output.suffix != ".json":
        raise ConfigError(f"output is {output}, a name that ends in .json is needed")
    refuse_existing(picture_path(output), job.overwrite)
    check_output(output, job.overwrite)
    with refusing():
        store = LabelStore.open(job.labels)
        compare = open_comparison(job.compare)
    store.verify()  # opening looks at the ends of files only
    quality = measure_store(store, compare, job.quiet)
    write_report(quality, store, job.compare, output)
    print(quality.table())
    print(f"report      {output} and {picture_path(output).name}")


def main(argv: list[str] | None = None) -> int:
    return run_program(report, LabelReport, sys.argv[1:] if argv is None else argv, "label_report", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
