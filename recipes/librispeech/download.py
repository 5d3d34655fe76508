"""Fetch LibriSpeech from OpenSLR and unpack it: OUT/LibriSpeech/PART, and language models into OUT/lm.

    python recipes/librispeech/download.py --out data --parts train-clean-100 dev-clean test-clean
    python recipes/librispeech/download.py --out data --parts train-clean-5 dev-clean-2
    python recipes/librispeech/download.py --out data --lm 3-gram.pruned.1e-7

Parts are those of resource 12 (the corpus) and 31 (mini LibriSpeech), language models those of resource 11. An archive goes on where its transfer
was cut, other mirrors are tried in turn, and what was fetched is held against the checksum that torchaudio publishes (parts of resource 12) or that the
server lists in md5sum.txt. Where neither knows the file, only its length is checked, and archives are read to their end, whose own checksum is there.
A folder gets its name when it is complete; archives are removed then. What is there already is passed over.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted; the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from k2ssl.bin.prepare_options import exit_code
from k2ssl.data.download import UNPACKED, check_gzip, fetch, need_space, published_md5, unpack

MIRRORS = ("https://www.openslr.org/resources", "https://us.openslr.org/resources", "https://openslr.elda.org/resources")
CORPUS = "LibriSpeech"


@dataclass(frozen=True)
class Remote:
    """A file of OpenSLR.

    Attributes:
        resource: its number there.
        file: name.
        num_bytes: about; decides whether there is room, nothing else. Audio is compressed already, so unpacked it takes as much again.
        sha256: where it is published outside of OpenSLR.
    """

    resource: int
    file: str
    num_bytes: int
    sha256: str = ""


# Checksums: torchaudio 2.11, datasets/librispeech.py. Sizes: the pages of the resources.
PARTS: dict[str, Remote] = {
    name: Remote(12, f"{name}.tar.gz", num_bytes, sha256)
    for name, num_bytes, sha256 in (
        ("dev-clean", 337_926_286, "76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3"),
        ("dev-other", 314_305_928, "12661c48e8c3fe1de2c1caa4c3e135193bfb1811584f11f569dd12645aa84365"),
        ("test-clean", 346_663_984, "39fde525e59672dc6d1551919b1478f724438a95aa55f874b576be21967e6c23"),
        ("test-other", 328_757_843, "d09c181bba5cf717b3dee7d4d592af11a3ee3a09e08ae025c5506f6ebe961c29"),
        ("train-clean-100", 6_387_309_499, "d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2"),
        ("train-clean-360", 23_049_477_885, "146a56496217e96c14334a160df97fffedd6e0a04e66b9c5af0d40be3c792ecf"),
        ("train-other-500", 30_593_501_606, "ddb22f27f96ec163645d53215559df6aa36515f26e01dd70798188350adcb6d2"),
    )
} | {
    "dev-clean-2": Remote(31, "dev-clean-2.tar.gz", 127_000_000),
    "train-clean-5": Remote(31, "train-clean-5.tar.gz", 333_000_000),
}
LANGUAGE_MODELS: dict[str, Remote] = {
    "3-gram.pruned.1e-7": Remote(11, "3-gram.pruned.1e-7.arpa.gz", 36_000_000),
    "3-gram.pruned.3e-7": Remote(11, "3-gram.pruned.3e-7.arpa.gz", 14_000_000),
    "3-gram": Remote(11, "3-gram.arpa.gz", 796_000_000),
    "4-gram": Remote(11, "4-gram.arpa.gz", 1_400_000_000),
    "vocab": Remote(11, "librispeech-vocab.txt", 1_800_000),
    "lexicon": Remote(11, "librispeech-lexicon.txt", 5_700_000),
    "lm-norm": Remote(11, "librispeech-lm-norm.txt.gz", 1_510_000_000),
}


def download(out: Path, parts: Sequence[str], models: Sequence[str], bases: Sequence[str], *, keep_archives: bool, progress: bool) -> None:
    """Do the job.

    Raises:
        ValueError, OSError: see `fetch`, `unpack` and `need_space`.
    """
    wanted = [name for name in parts if not _is_there(out / CORPUS / name)]
    texts = [name for name in models if not (out / "lm" / LANGUAGE_MODELS[name].file).exists()]
    for name in sorted({*models} - {*texts}):
        print(f"{out / 'lm' / LANGUAGE_MODELS[name].file} is there already", flush=True)
    need_space(out, _room(out, wanted, texts, keep_archives), ", ".join([*wanted, *texts]))
    for name in wanted:
        archive = out / PARTS[name].file
        checked = _fetch(PARTS[name], archive, bases, progress)
        number = unpack(archive, f"{CORPUS}/{name}", out / CORPUS / name, progress=progress)
        if not keep_archives:
            archive.unlink()
        print(f"{out / CORPUS / name}: {number:,} files; archive {checked or 'without published checksum, read to its end'}", flush=True)
    for name in texts:
        path = out / "lm" / LANGUAGE_MODELS[name].file
        print(f"{path}: {_fetch_text(LANGUAGE_MODELS[name], path, bases, progress)}", flush=True)


def _fetch_text(remote: Remote, path: Path, bases: Sequence[str], progress: bool) -> str:
    """Fetch a language model or a list of words; says how it was checked. It gets its name when it was."""
    arrived = path.with_name(f"{path.name}.unchecked")
    checked = _fetch(remote, arrived, bases, progress)
    if not checked and path.suffix == ".gz":
        check_gzip(arrived)
        checked = "without published checksum, read to its end"
    arrived.rename(path)
    return checked or "without published checksum, has the length that the server tells"


def _fetch(remote: Remote, path: Path, bases: Sequence[str], progress: bool) -> str:
    """Fetch a file; says what it was held against, nothing if nothing is known."""
    places = [f"{base.rstrip('/')}/{remote.resource}" for base in bases]
    checksum = f"sha256:{remote.sha256}" if remote.sha256 else published_md5(places).get(remote.file)
    fetch([f"{place}/{remote.file}" for place in places], path, checksum=checksum, progress=progress)
    return "" if checksum is None else f"has the published {checksum.partition(':')[0]}"


def _is_there(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    ours = (folder / UNPACKED).exists()
    print(f"{folder} is there already" + ("" if ours else "; it was not unpacked by this program and is taken as it is"), flush=True)
    return True


def _room(out: Path, parts: Sequence[str], models: Sequence[str], keep_archives: bool) -> int:
    """Bytes that are needed at most: everything unpacked, and of the archives, less what is there, all that stay or else the largest."""
    archives = [_missing(out / PARTS[name].file, PARTS[name]) for name in parts]
    texts = sum(_missing(out / "lm" / f"{LANGUAGE_MODELS[name].file}.unchecked", LANGUAGE_MODELS[name]) for name in models)
    return sum(PARTS[name].num_bytes for name in parts) + (sum(archives) if keep_archives else max(archives, default=0)) + texts


def _missing(path: Path, remote: Remote) -> int:
    there = next((place.stat().st_size for place in (path, path.with_name(f"{path.name}.partial")) if place.exists()), 0)
    return max(0, remote.num_bytes - there)


def _names(known: Mapping[str, Remote]) -> str:
    return ", ".join(f"{name} ({remote.num_bytes / 1e6:,.0f} MB)" for name, remote in known.items())


def main(argv: list[str] | None = None) -> int:
    head, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=head, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for LibriSpeech/ and lm/")
    parser.add_argument("--parts", nargs="+", default=[], choices=PARTS, metavar="PART", help=_names(PARTS))
    parser.add_argument("--lm", nargs="+", default=[], choices=LANGUAGE_MODELS, metavar="NAME", help=_names(LANGUAGE_MODELS))
    parser.add_argument(
        "--base-url", nargs="+", default=MIRRORS, metavar="URL", help="where the resources lie, tried in turn (default: %(default)s)"
    )
    parser.add_argument("--keep-archives", action="store_true", help="do not remove archives that are unpacked")
    parser.add_argument("--quiet", action="store_true", help="no progress bar (there is none either where standard error is no terminal)")
    options = parser.parse_args(argv)
    if not options.parts and not options.lm:
        parser.error("nothing is asked for: give --parts, --lm or both")
    how = {"keep_archives": options.keep_archives, "progress": not options.quiet}
    return exit_code("download", lambda: download(options.out, options.parts, options.lm, options.base_url, **how))


if __name__ == "__main__":
    sys.exit(main())
