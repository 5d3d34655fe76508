"""What `k2ssl.bin.tune_lm` has tried, kept in a file beside its output so that an interrupted run need not try it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from k2ssl.bin.decode_methods import SearchConfig
from k2ssl.decode.wer import ErrorCounts
from k2ssl.structure import from_dict
from k2ssl.train.differences import differences


@dataclass(frozen=True)
class Trial:
    """What one combination makes of the development set."""

    search: SearchConfig
    counts: ErrorCounts

    @property
    def rate(self) -> float:
        """Errors per word."""
        return self.counts.errors / self.counts.reference


class TrialFile:
    """OUTPUT.trials.jsonl: a line that says which tuning this is, then a line for each trial.

    Args:
        output: of the program.
        what: that which makes this tuning and no other.
        begin_anew: remove what another tuning has left, or whatever it is. Trials of this one are kept all the same: again they would be
            the same.

    Attributes:
        trials: by what was tried.

    Raises:
        ValueError: the file is of another tuning, or no such file, unless `begin_anew`.
    """

    def __init__(self, output: Path, what: Mapping[str, Any], begin_anew: bool) -> None:
        self.path = output.with_name(f"{output.name}.trials.jsonl")
        self.trials: dict[SearchConfig, Trial] = {}
        self._what = what
        if self.path.exists():
            try:
                self._read(json.loads(json.dumps(what)))
            except ValueError:
                if not begin_anew:
                    raise
                self.path.unlink()

    def add(self, trial: Trial) -> None:
        """One more; it is with the operating system when this returns.

        Raises:
            OSError: the disk is full.
        """
        if not self.path.exists():
            self._append({"what": self._what})
        self.trials[trial.search] = trial
        self._append({"search": trial.search.given(), "counts": asdict(trial.counts)})

    def remove(self) -> None:
        """When OUTPUT is written."""
        self.path.unlink(missing_ok=True)

    def _read(self, what: Mapping[str, Any]) -> None:
        first, *lines = self.path.read_bytes().split(b"\n")
        try:
            there = json.loads(first)["what"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: not a file of this program; choose another output, or --overwrite True") from error
        if found := differences(there, what):
            raise ValueError(f"{self.path}: of another tuning: {'; '.join(found)}. Choose another output, or --overwrite True")
        trials: dict[SearchConfig, Trial] = {}
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # a kill may have torn a line, which `_append` has ended since
                continue
            try:
                search = from_dict(SearchConfig, row["search"])
                trials[search] = Trial(search, from_dict(ErrorCounts, row["counts"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}: a trial that cannot be read: {error}; choose another output, or --overwrite True"
                ) from error
        self.trials = trials

    def _append(self, content: Mapping[str, Any]) -> None:
        with open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                torn = file.read(1) != b"\n"
                file.write(b"\n" * torn)
            file.write(f"{json.dumps(content)}\n".encode())
