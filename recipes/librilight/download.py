"""Fetch Libri-Light and its sets with little supervision, and unpack them: OUT/librilight/PART and OUT/librispeech_finetuning.

    python recipes/librilight/download.py --out data --parts small
    python recipes/librilight/download.py --out data --parts limited

small has 577 hours in 35 GB, medium 5,193 hours in 321 GB, large 51,934 hours in 3.05 TB; limited are the 10 hours with transcripts. An archive goes on
where its transfer was cut. That of limited is held against the checksum that torchaudio publishes; of the others none is published, so that their
length is checked and that they unpack to the end of the archive. `prepare_cuts.py --verify` reads every file of audio.
A folder gets its name when it is complete; its archive is removed then. What is there already is passed over.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted; the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k2ssl.bin.prepare_options import exit_code
from k2ssl.data.download import fetch, need_space, unpack

BASE_URL = "https://dl.fbaipublicfiles.com/librilight/data"


@dataclass(frozen=True)
class Archive:
    """An archive that is published.

    Attributes:
        file: its name.
        folder: what it holds.
        place: where that goes, below the output folder.
        num_bytes: about; decides whether there is room, nothing else. Audio is compressed already, so unpacked it takes as much again.
        checksum: as `fetch` takes it.
    """

    file: str
    folder: str
    place: str
    num_bytes: int
    checksum: str | None = None


# Addresses: lhotse.recipes.librilight; of `limited`, and its checksum: torchaudio.datasets.LibriLightLimited. Sizes: arXiv 1912.07875's page.
PARTS = {
    "small": Archive("small.tar", "small", "librilight/small", 35_000_000_000),
    "medium": Archive("medium.tar", "medium", "librilight/medium", 321_000_000_000),
    "large": Archive("large.tar", "large", "librilight/large", 3_050_000_000_000),
    "limited": Archive(
        "librispeech_finetuning.tgz",
        "librispeech_finetuning",
        "librispeech_finetuning",
        700_000_000,
        "sha256:5d1efdc777b548194d7e09ba89126e2188026df9fd57aa57eb14408d2b2342af",
    ),
}


def download(out: Path, parts: Sequence[str], base_url: str, *, progress: bool) -> None:
    """Do the job.

    Raises:
        ValueError, OSError: see `fetch`, `unpack` and `need_space`.
    """
    wanted = [name for name in parts if not _is_there(out / PARTS[name].place)]
    # everything unpacked, and the largest archive beside it
    sizes = [PARTS[name].num_bytes for name in wanted]
    need_space(out, sum(sizes) + max((_missing(out, PARTS[name]) for name in wanted), default=0), ", ".join(wanted))
    for name in wanted:
        part = PARTS[name]
        archive = out / part.file
        fetch([f"{base_url.rstrip('/')}/{part.file}"], archive, checksum=part.checksum, progress=progress)
        number = unpack(archive, part.folder, out / part.place, progress=progress)
        archive.unlink()
        print(f"{out / part.place}: {number:,} files; {'has' if part.checksum else 'there is no'} published checksum", flush=True)


def _is_there(folder: Path) -> bool:
    if folder.is_dir():
        print(f"{folder} is there already", flush=True)
    return folder.is_dir()


def _missing(out: Path, part: Archive) -> int:
    """Bytes of an archive that are not there yet."""
    there = next((path.stat().st_size for path in (out / part.file, out / f"{part.file}.partial") if path.exists()), 0)
    return max(0, part.num_bytes - there)


def main(argv: list[str] | None = None) -> int:
    head, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=head, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for librilight/ and librispeech_finetuning/")
    parser.add_argument("--parts", nargs="+", required=True, choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--base-url", default=BASE_URL, metavar="URL", help="where the archives lie (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar (there is none either where standard error is no terminal)")
    options = parser.parse_args(argv)
    return exit_code("download", lambda: download(options.out, options.parts, options.base_url, progress=not options.quiet))


if __name__ == "__main__":
    sys.exit(main())
