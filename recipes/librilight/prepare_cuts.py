"""Make manifests of cuts from Libri-Light: one cut per segment of speech that the corpus's voice activity detection found.

    python recipes/librilight/prepare_cuts.py --corpus-dir librilight --out data/cuts
    python recipes/librilight/prepare_cuts.py --corpus-dir librilight --parts small --out data/cuts

The corpus is as it is unpacked: small/, medium/, large/, and in them SPEAKER/BOOK/CHAPTER.flac, each beside a CHAPTER.json with the speaker and
the segments. A folder without these parts is taken as one split of the folder's name. The audio is not copied: a cut points at its segment.

Long segments are kept, to be cropped when they are loaded, so there is no upper limit. Segments under 2 s are left out unless --min-duration
says otherwise, as in the published recipe. Ids are those of lhotse: path below the corpus folder without suffix, and the segment's number.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from lhotse.recipes.librilight import LIBRILIGHT

from k2ssl.bin.prepare_options import choose, common, parser, run
from k2ssl.data.audio_layouts import segmented_items, what_is_in
from k2ssl.data.prepare_cuts import Prepared, prepare_split

FILES_PER_PART = 100  # an hour of speech each, some hundred segments


def prepare(options: argparse.Namespace) -> Iterator[Prepared]:
    root: Path = options.corpus_dir
    shared = common(options, language="English")
    if not root.is_dir():
        raise ValueError(f"{root}: expected the folder of the corpus; {what_is_in(root)}")
    known = {name: root / name for name in LIBRILIGHT if (root / name).is_dir()}
    asked = {name: root / name for name in options.parts or () if (root / name).is_dir()}
    whole = {root.resolve().name: root}
    if not known and not asked and set(options.parts or ()) - whole.keys():
        raise ValueError(f"{root}: expected the folders {', '.join(options.parts)}; {what_is_in(root)}")
    splits = {**known, **asked} or whole
    for name in choose(splits, options.parts, root):
        folder = splits[name]
        expected = f"{folder}: expected SPEAKER/BOOK/CHAPTER.flac, each beside CHAPTER.json; {what_is_in(folder)}"
        yield prepare_split(
            lambda folder=folder: segmented_items(folder, id_root=root),  # type: ignore[misc]
            options.out,
            name,
            source=folder,
            expected=expected,
            files_per_part=FILES_PER_PART,
            **shared,
        )


def main(argv: list[str] | None = None) -> int:
    options_of = parser(__doc__ or "", min_duration=2.0, max_duration=False)
    options_of.add_argument("--corpus-dir", type=Path, required=True, help="folder of the corpus, with small/, medium/ or large/ in it")
    options_of.add_argument(
        "--parts", nargs="+", metavar="PART", help="subfolders to prepare, such as small (default: all of these that are there)"
    )
    options = options_of.parse_args(argv)
    return run("prepare_cuts", lambda: prepare(options))


if __name__ == "__main__":
    sys.exit(main())
