"""Make a manifest of cuts from any folder of audio: WAV, FLAC, MP3, OGG or Opus files, however deep, one cut per file.

    python recipes/folder/prepare_cuts.py --audio-dir recordings --out data/cuts
    python recipes/folder/prepare_cuts.py --audio-dir recordings --split train --speaker top-folder --table train.tsv --out data/cuts

The id of a cut is its path below the audio folder without suffix, so it stays the same wherever the folder is moved; a.wav and a.flac in one
folder would have the same id, and the second is listed as unusable. Hidden files are left aside, links are followed.

Transcripts are optional: a .txt file beside the audio (a.wav, a.txt), or a table with tabs between path and text and, if there is a third column,
speaker. Paths in the table are relative to the audio folder, with or without suffix; a first line `path<TAB>text<TAB>speaker` may name the columns in
another order. The table wins over files beside the audio. White space around a transcript is removed, nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from k2ssl.bin.prepare_options import common, parser, run
from k2ssl.data.prepare_cuts import Prepared, prepare_folder


def prepare(options: argparse.Namespace) -> Iterator[Prepared]:
    yield prepare_folder(
        options.audio_dir,
        options.out,
        split=options.split,
        speaker=options.speaker,
        text_suffix=None if options.text_suffix == "none" else options.text_suffix,
        table=options.table,
        **common(options, language=options.language),
    )


def main(argv: list[str] | None = None) -> int:
    options_of = parser(__doc__ or "")
    options_of.add_argument("--audio-dir", type=Path, required=True, help="folder with the audio")
    options_of.add_argument(
        "--split", default="all", metavar="NAME", help="name of the split, part of the names of the files (default: %(default)s)"
    )
    options_of.add_argument(
        "--speaker",
        choices=("none", "folder", "top-folder", "name"),
        default="none",
        help="whose speech it is: not known (none, the default), the name of the folder that the file lies in, of the topmost folder below the "
        "audio folder, or the file's name up to its first - or _",
    )
    options_of.add_argument(
        "--text-suffix",
        default=".txt",
        metavar="SUFFIX",
        help="suffix of transcripts beside the audio (default: %(default)s), or none to ignore them",
    )
    options_of.add_argument(
        "--table", type=Path, metavar="FILE", help="transcripts: path, text and perhaps speaker, with tabs between them"
    )
    options_of.add_argument("--language", metavar="NAME", help="language to write into the manifest")
    options = options_of.parse_args(argv)
    return run("prepare_cuts", lambda: prepare(options))


if __name__ == "__main__":
    sys.exit(main())
