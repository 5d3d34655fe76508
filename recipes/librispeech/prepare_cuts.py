"""Make manifests of cuts from LibriSpeech: one cut per utterance, with speaker and transcript.

    python recipes/librispeech/prepare_cuts.py --corpus-dir LibriSpeech --out data/cuts
    python recipes/librispeech/prepare_cuts.py --corpus-dir LibriSpeech --parts train-clean-100 dev-clean --out data/cuts

The corpus is as it is unpacked: PART/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac, with *.trans.txt beside the audio. An excerpt will do, and so
will a folder that holds SPEAKER/CHAPTER directly; it becomes one split of the folder's name. Ids are those of the corpus, such as 19-198-0000.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from k2ssl.bin.prepare_options import choose, common, parser, run
from k2ssl.data.audio_layouts import chapter_items, chapter_splits, what_is_in
from k2ssl.data.prepare_cuts import Prepared, prepare_split


def prepare(options: argparse.Namespace) -> Iterator[Prepared]:
    root: Path = options.corpus_dir
    shared = common(options, language="English")
    splits = chapter_splits(root) if root.is_dir() else {}
    if not splits:
        raise ValueError(
            f"{root}: expected PART/SPEAKER/CHAPTER/ or SPEAKER/CHAPTER/ with *.trans.txt and *.flac, such as "
            f"train-clean-100/19/198/19-198.trans.txt; {what_is_in(root)}"
        )
    for name in choose(splits, options.parts, root):
        folder = splits[name]
        expected = f"{folder}: expected SPEAKER/CHAPTER/*.flac; {what_is_in(folder)}"
        yield prepare_split(lambda folder=folder: chapter_items(folder), options.out, name, source=folder, expected=expected, **shared)  # type: ignore[misc]


def main(argv: list[str] | None = None) -> int:
    options_of = parser(__doc__ or "")
    options_of.add_argument("--corpus-dir", type=Path, required=True, help="folder of the corpus, or of one part or an excerpt of it")
    options_of.add_argument(
        "--parts", nargs="+", metavar="PART", help="parts to prepare, such as train-clean-100 (default: all that are there)"
    )
    options = options_of.parse_args(argv)
    return run("prepare_cuts", lambda: prepare(options))


if __name__ == "__main__":
    sys.exit(main())
