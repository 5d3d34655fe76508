"""The folder of `k2ssl.bin.decode`: results of utterances as they come, in one part for each rank, until all are there.

`decode.json` says from the beginning which decoding this is, so that no other is mixed into it; when it holds a result, `hypotheses.jsonl` is
whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from k2ssl import distributed
from k2ssl.atomic_file import atomic_file
from k2ssl.bin.folder_lock import alone_in
from k2ssl.bin.refusal import refusing
from k2ssl.decode.results import Result, from_line, to_line
from k2ssl.train.differences import differences
from k2ssl.train.ledger import LEDGER

RECORD = "decode.json"
HYPOTHESES = "hypotheses.jsonl"
PARTS = "part-*.jsonl"


@contextmanager
def opened(output: Path, overwrite: bool, record: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
    """Hold the folder, ready for results, on rank 0; gives every rank the record of a decoding that is finished, or None.

    Args:
        output: made if need be.
        overwrite: remove what another decoding has left in it.
        record: of this one; under "what" that which makes it this decoding and no other.

    Raises:
        ConfigError: there is something else in it.
    """
    with ExitStack() as held:
        finished = None
        with refusing():
            if distributed.is_main():
                _check_folder(output, overwrite, record["what"])
                held.enter_context(alone_in(output))
                finished = _begin(output, overwrite, record)
        yield distributed.broadcast_object(finished)


def _check_folder(output: Path, overwrite: bool, what: Mapping[str, Any]) -> None:
    """ValueError unless `output` is empty, or holds this very decoding or one that may be removed."""
    if not (output / RECORD).exists():
        if output.is_dir() and any(path.name not in (LEDGER, ".lock") and path.suffix != ".part" for path in output.iterdir()):
            raise ValueError(f"{output} holds other files and no {RECORD}: name a folder for this decoding alone")
        return
    try:
        there = read_record(output)["what"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{output / RECORD}: not a record of this program; choose another output folder") from error
    if not overwrite and (found := differences(there, json.loads(json.dumps(what)))):
        raise ValueError(f"{output}: holds another decoding: {'; '.join(found)}. Choose another output folder, or --overwrite True")


def read_record(output: Path) -> dict[str, Any]:
    """What `write_record` wrote."""
    content: dict[str, Any] = json.loads((output / RECORD).read_text(encoding="utf-8"))
    return content


def _begin(output: Path, overwrite: bool, record: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a finished decoding, or None when there is something left to do."""
    if overwrite:
        for name in (RECORD, HYPOTHESES):
            (output / name).unlink(missing_ok=True)
        remove_parts(output)
    if (output / RECORD).exists():
        there = read_record(output)
        if there["result"] is not None and (output / HYPOTHESES).exists():
            remove_parts(output)
            return there
    write_record(output, record)
    return None


def write_record(output: Path, record: Mapping[str, Any]) -> None:
    """`decode.json`.

    Raises:
        OSError: the disk is full.
    """
    with atomic_file(output / RECORD) as file:
        file.write((json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())


class PartWriter:
    """Appends results to the part of one rank; each batch is with the operating system when `write` returns.

    Raises:
        OSError: the file cannot be written to.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._file = open(folder / PARTS.replace("*", f"{rank:05d}"), "ab")  # noqa: SIM115, it stays open
        if self._file.tell():
            self._file.write(b"\n")  # what a kill may have torn stays a line of its own

    def write(self, results: Iterable[Result]) -> None:
        """
        Raises:
            OSError: the disk is full.
        """
        self._file.write("".join(f"{to_line(result)}\n" for result in results).encode())
        self._file.flush()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._file.close()


def read_parts(folder: Path) -> dict[str, Result]:
    """What all ranks of all attempts have found so far, by id; lines that a kill has torn are passed over."""
    found: dict[str, Result] = {}
    for path in sorted(folder.glob(PARTS)):
        for line in path.read_bytes().split(b"\n"):
            try:
                result = from_line(line.decode())
            except ValueError:
                continue
            found.setdefault(result.id, result)
    return found


def write_hypotheses(folder: Path, ids: Iterable[str], found: Mapping[str, Result]) -> None:
    """`hypotheses.jsonl`, in the order of `ids`.

    Raises:
        OSError: the disk is full; nothing is written then.
    """
    with atomic_file(folder / HYPOTHESES) as file:
        for name in ids:
            file.write(f"{to_line(found[name])}\n".encode())


def remove_parts(folder: Path) -> None:
    """What `hypotheses.jsonl` holds need not lie there twice."""
    for path in folder.glob(PARTS):
        path.unlink()
