"""Make manifests of cuts from CMU AN4 with its official split: cuts_train.jsonl.gz and cuts_test.jsonl.gz.

    python recipes/an4/prepare_cuts.py --corpus-dir an4 --out data/cuts

The corpus holds etc/an4_train.fileids, etc/an4_train.transcription and the same for test; the audio lies below flac/ or wav/, as FLAC or WAV files
(the original Sphere files must be converted first: `sox x.sph x.flac`). Ids are those of the corpus, such as an251-fash-b; the speaker is the
name of the folder that the file lies in.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from k2ssl.bin.prepare_options import choose, common, parser, run
from k2ssl.data.audio_layouts import listed_items, what_is_in
from k2ssl.data.prepare_cuts import Prepared, prepare_split


def prepare(options: argparse.Namespace) -> Iterator[Prepared]:
    root: Path = options.corpus_dir
    shared = common(options, language="English")
    lists = {split: root / "etc" / f"an4_{split}.fileids" for split in ("train", "test")}
    audio_dir = next((root / name for name in ("flac", "wav") if (root / name).is_dir()), None)
    if audio_dir is None or not all(path.is_file() for path in lists.values()):
        raise ValueError(f"{root}: expected etc/an4_train.fileids, etc/an4_test.fileids and audio below flac/ or wav/; {what_is_in(root)}")
    for name in choose(lists, options.parts, root):
        file_ids = lists[name]
        texts = file_ids.with_suffix(".transcription")
        yield prepare_split(
            lambda file_ids=file_ids, texts=texts: listed_items(file_ids, texts, audio_dir),  # type: ignore[misc]
            options.out,
            name,
            source=audio_dir,
            expected=f"{file_ids}: expected one path a line, it is empty",
            **shared,
        )


def main(argv: list[str] | None = None) -> int:
    options_of = parser(__doc__ or "")
    options_of.add_argument("--corpus-dir", type=Path, required=True, help="folder of the corpus, with etc/ in it")
    options_of.add_argument("--parts", nargs="+", metavar="PART", help="train or test (default: both)")
    options = options_of.parse_args(argv)
    return run("prepare_cuts", lambda: prepare(options))


if __name__ == "__main__":
    sys.exit(main())
