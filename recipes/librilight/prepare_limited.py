"""Make manifests of cuts from Libri-Light's sets with little supervision: 10 hours, 1 hour and 10 minutes of LibriSpeech, with transcripts.

    python recipes/librilight/prepare_limited.py --corpus-dir librispeech_finetuning --out data/cuts
    python recipes/librilight/prepare_limited.py --corpus-dir librispeech_finetuning --sets 10min 1h --out data/cuts

The corpus is as librispeech_finetuning.tgz is unpacked: 1h/0 to 1h/5 and 9h, and in each of them clean/ and other/, which hold SPEAKER/CHAPTER/
with *.flac and *.trans.txt. The set 1h is the six folders below 1h, 10min the first of them, 10h is 1h and 9h together. Each becomes a split of
its name. Ids are those of LibriSpeech, such as 19-198-0000.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from k2ssl.bin.prepare_options import common, parser, run
from k2ssl.data.audio_layouts import Listing, chapter_items, what_is_in
from k2ssl.data.prepare_cuts import Prepared, prepare_split

# Source: torchaudio's LibriLightLimited, which takes 1h/0, 1h/* and 1h/* with 9h; lhotse has no recipe for these sets.
SETS = {"10min": ("1h/0",), "1h": ("1h",), "10h": ("1h", "9h")}
TEN_MINUTES = tuple(f"1h/{number}" for number in range(6))


def prepare(options: argparse.Namespace) -> Iterator[Prepared]:
    root: Path = options.corpus_dir
    shared = common(options, language="English")
    asked = {folder for name in options.sets for folder in SETS[name]}
    needed = sorted(asked - {"1h"} | (set(TEN_MINUTES) if "1h" in asked else set()))
    missing = [folder for folder in needed if not (root / folder).is_dir()]
    if missing:
        raise ValueError(
            f"{root}: expected {', '.join(needed)}, as in librispeech_finetuning.tgz, but there is no {', '.join(missing)}; {what_is_in(root)}"
        )
    for name in options.sets:
        folders = [root / folder for folder in SETS[name]]
        expected = f"{' and '.join(map(str, folders))}: expected clean/ and other/ with SPEAKER/CHAPTER/*.flac; {what_is_in(folders[0])}"
        yield prepare_split(lambda folders=folders: _items(folders), options.out, name, source=root, expected=expected, **shared)  # type: ignore[misc]


def _items(folders: list[Path]) -> Listing:
    for folder in folders:
        yield from chapter_items(folder)


def main(argv: list[str] | None = None) -> int:
    options_of = parser(__doc__ or "")
    options_of.add_argument("--corpus-dir", type=Path, required=True, help="the folder librispeech_finetuning, with 1h/ and 9h/ in it")
    options_of.add_argument("--sets", nargs="+", choices=tuple(SETS), default=list(SETS), help="sets to prepare (default: all three)")
    options = options_of.parse_args(argv)
    return run("prepare_limited", lambda: prepare(options))


if __name__ == "__main__":
    sys.exit(main())
