"""Make a label store of published frame labels, so that pre-training can use them in place of labels of our own.

    python recipes/librispeech/import_labels.py --labels published/ --cuts cuts_train-clean-100.jsonl.gz --num-classes 500 \\
        --output exp/imported/labels/train-clean-100

What is read: manifests of cuts whose custom field `kmeans` holds the labels as numbers with spaces between them (.jsonl, .jsonl.gz; icefall), and
pairs NAME.tsv, NAME.km (fairseq: a folder and then a path with its number of samples in every line; as many lines of labels). --labels names one such
file, or a folder of them. Labels belong to a cut of --cuts if the supervision, the recording or the published cut has its id, or the path that name.

Refused are labels outside of the classes, two different lists of labels for one cut, and labels that do not last as long as the cut does (within 0.22 s);
more than --max-missing of all cuts without labels too. The few that have none are listed in OUTPUT/skipped-00000-of-00001.tsv. Training holds the
store against the model as it does with labels of our own. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted; the same command goes on.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from k2ssl.atomic_file import atomic_file
from k2ssl.bin.prepare_options import exit_code
from k2ssl.data.cuts import read_cuts
from k2ssl.data.labels import LabelShardWriter, LabelStore, Lineage, cut_list_hash, merge_shards
from k2ssl.file_hash import file_sha256

SKIPPED = "skipped-00000-of-00001.tsv"
_SUFFIXES = (".jsonl", ".jsonl.gz", ".km")
_EDGE = 0.2  # seconds by which labels may fall short of their audio
_SHOWN = 3

Labels = np.ndarray


def import_labels(source: Path, cuts: Path, output: Path, *, num_classes: int, frame_rate: float, origin: str, max_missing: float) -> str:
    """Do the job; returns what there is to say.

    Raises:
        ValueError: see above; names the file and the cut.
        OSError: a file cannot be read, or the disk is full.
    """
    manifest = read_cuts(cuts)
    durations = {cut.id: cut.duration for cut in manifest}
    files = label_files(source)
    lineage = lineage_of(files, origin, cut_list_hash(manifest))
    rate = next(iter(manifest)).sampling_rate
    with LabelShardWriter(output, 0, 1, num_classes, frame_rate, lineage, sampling_rate=rate) as writer:
        if not writer.finished:
            write_all(files, durations, writer, frame_rate)
            missing = [name for name in durations if name not in writer.done_ids()]
            if len(missing) > max_missing * len(durations):
                shown = ", ".join(missing[:_SHOWN])
                raise ValueError(f"{source}: no labels for {len(missing):,} of {len(durations):,} cuts of {cuts}, such as {shown}")
            with atomic_file(output / SKIPPED) as file:
                file.writelines(f"{name}\tthe published labels have none\n".encode() for name in missing)
    store = merge_shards(output)
    return report(store, len(durations))


def label_files(source: Path) -> list[Path]:
    """The files of labels that a path names.

    Raises:
        ValueError: there are none.
    """
    found = sorted(path for path in source.iterdir() if path.name.endswith(_SUFFIXES)) if source.is_dir() else [source]
    if not found or not found[0].is_file() or not found[0].name.endswith(_SUFFIXES):
        raise ValueError(f"{source}: expected a file of labels, or a folder of them, whose names end in {', '.join(_SUFFIXES)}")
    return found


def lineage_of(files: Sequence[Path], origin: str, cuts_hash: str) -> Lineage:
    """What is known of the labels: which files they were published in. Centres and checkpoint are told apart by the name of the origin alone."""
    return Lineage(
        features=f"imported: {origin}",
        settings={f"sha256 of {path.name}": file_sha256(path) for path in files},
        kmeans_sha256=f"unknown, of {origin}",
        checkpoint_sha256=f"unknown, of {origin}",
        cuts_sha256=cuts_hash,
    )


def write_all(files: Sequence[Path], durations: dict[str, float], writer: LabelShardWriter, frame_rate: float) -> None:
    """Write the labels of these cuts; those of others are passed over."""
    done = writer.done_ids()
    seen: dict[str, bytes] = {}
    for path in files:
        for names, labels in read_labels(path):
            name = next((name for name in names if name in durations), None)
            if name is None or name in done:
                continue
            content = hashlib.sha256(labels.tobytes()).digest()
            if name in seen:
                if seen[name] != content:
                    raise ValueError(f"{path}: other labels for {name} than before, in this file or one before it")
                continue
            seen[name] = content
            difference = abs(len(labels) / frame_rate - durations[name])
            if difference > _EDGE + 1 / frame_rate:
                raise ValueError(
                    f"{path}: {len(labels)} labels of {name} last {len(labels) / frame_rate:.2f} s at {frame_rate:g} a second, the cut "
                    f"{durations[name]:.2f} s; is --frame-rate right?"
                )
            writer.write(name, labels)


def read_labels(path: Path) -> Iterator[tuple[list[str], Labels]]:
    """The labels of a file, each with the names that their cut may have, the likeliest first.

    Raises:
        ValueError: it is damaged or holds something else; names file and line.
    """
    try:
        yield from _of_km(path) if path.suffix == ".km" else _of_manifest(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error


def _of_manifest(path: Path) -> Iterator[tuple[list[str], Labels]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                cut = json.loads(line)
                text = cut["custom"]["kmeans"]
                names = [*(one["id"] for one in cut.get("supervisions", ())), cut.get("recording", {}).get("id", ""), cut["id"]]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}: line {number} is no cut with custom.kmeans ({error!r})") from error
            yield names, _numbers(path, number, text)


def _of_km(path: Path) -> Iterator[tuple[list[str], Labels]]:
    table = path.with_suffix(".tsv")
    if not table.is_file():
        raise ValueError(f"{path}: there is no {table.name} beside it, which says whose labels these are")
    with open(path, encoding="utf-8") as labels, open(table, encoding="utf-8") as names:
        next(names, None)  # the folder
        for number, name in enumerate(names, start=1):
            line = next(labels, None)
            if line is None:
                raise ValueError(f"{path} has {number - 1} lines, {table.name} names more files")
            yield [Path(name.split("\t")[0]).stem], _numbers(path, number, line)
        if next(labels, None) is not None:
            raise ValueError(f"{path} has more lines than {table.name} names files")


def _numbers(path: Path, number: int, text: str) -> Labels:
    try:
        return np.array(text.split(), dtype=np.int64)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: line {number} holds something else than numbers with spaces between them ({error})") from error


def report(store: LabelStore, num_cuts: int) -> str:
    """What there is in a finished store."""
    contract = store.contract
    unused = contract.histogram.count(0)
    return (
        f"{store.folder}: {contract.num_labels:,} labels of {len(store):,} of {num_cuts:,} cuts, {contract.frame_rate:g} a second, "
        f"{contract.num_classes} classes ({unused} unused)"
    )


def main(argv: list[str] | None = None) -> int:
    head, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=head, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, required=True, help="file of labels, or a folder of them")
    parser.add_argument("--cuts", type=Path, required=True, help="manifest of the cuts that get labels")
    parser.add_argument("--output", type=Path, required=True, help="folder for the label store")
    parser.add_argument("--num-classes", type=int, required=True, help="labels are 0 to this number less 1")
    parser.add_argument("--frame-rate", type=float, default=50.0, help="labels a second (default: %(default)g)")
    parser.add_argument(
        "--origin", help="name of the label set; sets of one name count as of the same centres (default: the name of --labels)"
    )
    parser.add_argument("--max-missing", type=float, default=0.01, help="share of the cuts that may have no labels (default: %(default)g)")
    options = parser.parse_args(argv)

    def work() -> None:
        said = import_labels(
            options.labels,
            options.cuts,
            options.output,
            num_classes=options.num_classes,
            frame_rate=options.frame_rate,
            origin=options.origin or options.labels.resolve().name,
            max_missing=options.max_missing,
        )
        print(said)

    return exit_code("import_labels", work)


if __name__ == "__main__":
    sys.exit(main())
