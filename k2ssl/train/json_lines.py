"""Files of one JSON object a line that grow by appending and survive being torn."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class JsonLines:
    """Appends records to a file; each is with the operating system when `append` returns, so a killed process loses none.

    Several processes may append to one file. What an earlier one left half-written (the machine went down, the disk was full) stays a
    line of its own, which `read_json_lines` passes over.
    """

    def __init__(self, path: str | Path, *, sync: bool = False) -> None:
        """
        Args:
            path: made if it does not exist; its folder must.
            sync: force every record to disk, so that it also outlives the machine; takes milliseconds.

        Raises:
            OSError: the file cannot be written to.
        """
        self._sync = sync
        # without a buffer, which would try once more to write what did not fit on the disk, when it is closed
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115, it stays open
        if self._file.tell() > 0:
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record; numbers that JSON does not know (NaN, infinities) become null.

        Raises:
            OSError: the disk is full; names the file.
            TypeError: a value is not plain.
        """
        line = json.dumps({key: _known_to_json(value) for key, value in record.items()}, allow_nan=False).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
            if self._sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            error.filename = error.filename or self._file.name
            raise

    def close(self) -> None:
        """Nothing can be appended any more."""
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def read_json_lines(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a file, and how many lines are none: torn, or not an object.

    Raises:
        OSError: the file cannot be read.
    """
    records, damaged = [], 0
    for line in Path(path).read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            damaged += 1
    return records, damaged


def _known_to_json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
