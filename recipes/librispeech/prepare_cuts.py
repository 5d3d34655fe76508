"""Make manifests of cuts from LibriSpeech: one cut per utterance, with speaker and transcript.

    python recipes/librispeech/prepare_cuts.py --corpus-dir LibriSpeech --out data/cuts
    python recipes/librispeech/prepare_cuts.py --corpus-dir LibriSpeech --parts train-clean-100 dev-clean --out data/cuts
    python recipes/librispeech/prepare_cuts.py --corpus-dir excerpt --held-out-speakers 26 27 --out data/cuts

The corpus is as it is unpacked: PART/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac, with *.trans.txt beside the audio. An excerpt will do, and so
will a folder that holds SPEAKER/CHAPTER directly; it becomes one split of the folder's name. Ids are those of the corpus, such as 19-198-0000.

For an excerpt without test sets, --held-out-speakers takes what these speakers said out of the parts and makes two splits of it, held-out-dev and
held-out-test: their chapters are dealt to one and the other in turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from k2ssl.bin.prepare_options import choose, common, parser, run
from k2ssl.data.audio_layouts import Listing, chapter_items, chapter_splits, what_is_in
from k2ssl.data.audio_scan import AudioItem, Unreadable
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
    names = choose(splits, options.parts, root)
    held_out: list[str] = sorted(set(options.held_out_speakers))
    dealt = deal_chapters([splits[name] for name in names], held_out)
    without = f" without speakers {', '.join(held_out)}" if held_out else ""
    for name in names:
        folder = splits[name]
        expected = f"{folder}{without}: expected SPEAKER/CHAPTER/*.flac; {what_is_in(folder)}"
        listing = listed([folder], lambda speaker, _: speaker not in held_out)
        yield prepare_split(listing, options.out, name, source=f"{folder}{without}", expected=expected, **shared)
    for name, chapters in dealt.items():
        listing = listed([splits[part] for part in names], lambda speaker, chapter, mine=chapters: (speaker, chapter) in mine)
        source = f"{root}: {', '.join(names)}; chapters {', '.join('-'.join(chapter) for chapter in chapters)}"
        yield prepare_split(listing, options.out, name, source=source, expected=f"{source}: no audio there", **shared)


def listed(folders: Sequence[Path], wanted: Callable[[str, str], bool]) -> Callable[[], Listing]:
    """What lies in these folders of the speakers and chapters that are wanted, as `prepare_split` takes it."""

    def listing() -> Listing:
        for folder in folders:
            yield from (item for item in chapter_items(folder) if wanted(*chapter_of(item)))

    return listing


def chapter_of(item: AudioItem | Unreadable) -> tuple[str, str]:
    """Speaker and chapter, the folders that the file lies in."""
    folder = Path(item.path).parent
    return folder.parent.name, folder.name


def deal_chapters(folders: Sequence[Path], speakers: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """The chapters of these speakers for held-out-dev and held-out-test; nothing if there are no speakers.

    Raises:
        ValueError: a speaker is not there, or there are too few chapters for two splits.
    """
    if not speakers:
        return {}
    chapters = sorted({chapter_of(item) for folder in folders for item in chapter_items(folder)})
    there = sorted({speaker for speaker, _ in chapters})
    if missing := [speaker for speaker in speakers if speaker not in there]:
        known = ", ".join(there[:10]) + (f" and {len(there) - 10} more" if len(there) > 10 else "")
        raise ValueError(f"--held-out-speakers: there is no {', '.join(missing)}; speakers found: {known}")
    held_out = [chapter for chapter in chapters if chapter[0] in speakers]
    if len(held_out) < 2:
        raise ValueError(f"--held-out-speakers: speakers {', '.join(speakers)} have one chapter, two splits need two; name another speaker")
    return {"held-out-dev": held_out[::2], "held-out-test": held_out[1::2]}


def main(argv: list[str] | None = None) -> int:
    options_of = parser(__doc__ or "")
    options_of.add_argument("--corpus-dir", type=Path, required=True, help="folder of the corpus, or of one part or an excerpt of it")
    options_of.add_argument(
        "--parts", nargs="+", metavar="PART", help="parts to prepare, such as train-clean-100 (default: all that are there)"
    )
    options_of.add_argument(
        "--held-out-speakers", nargs="+", default=[], metavar="SPEAKER", help="speakers for held-out-dev and held-out-test, such as 26 27"
    )
    options = options_of.parse_args(argv)
    return run("prepare_cuts", lambda: prepare(options))


if __name__ == "__main__":
    sys.exit(main())
