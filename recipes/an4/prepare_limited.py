"""Draw a set with little supervision from a manifest of cuts, evenly from its speakers.

    python recipes/an4/prepare_limited.py --cuts data/cuts/cuts_train.jsonl.gz --minutes 10 --output data/cuts/cuts_train_10min.jsonl.gz

Any manifest of cuts will do. Speakers give one cut after the other, in turns, until the next one would be too long. Which cuts are drawn depends
on their ids and on --seed alone, and of two sets with one seed the smaller lies within the larger. Exit status: 0 done, 1 refused, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from k2ssl.bin.prepare_options import exit_code
from k2ssl.data.cuts import read_cuts, write_cuts
from k2ssl.data.limited import draw_limited


def prepare(options: argparse.Namespace) -> None:
    if options.output.exists() and not options.overwrite:
        raise ValueError(f"{options.output}: there is something of that name already; --overwrite replaces it")
    try:
        drawn = draw_limited(read_cuts(options.cuts), 60 * options.minutes, options.seed)
    except ValueError as error:
        raise ValueError(f"{options.cuts}, --minutes {options.minutes:g}: {error}") from error
    print(write_cuts(drawn, options.output).table(str(options.output)))


def main(argv: list[str] | None = None) -> int:
    head, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=head, epilog=details.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=Path, required=True, metavar="FILE", help="manifest to draw from")
    parser.add_argument("--minutes", type=float, required=True, help="minutes of audio to draw, at most")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="manifest to write, .jsonl.gz or .jsonl; its summary lies beside it"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="NUMBER", help="of the draw (default: %(default)d)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT")
    options = parser.parse_args(argv)
    return exit_code("prepare_limited", lambda: prepare(options))


if __name__ == "__main__":
    sys.exit(main())
