"""Training checkpoints: whole or absent, verified, in a folder whose size is bounded.

A checkpoint is a `torch.save` of plain values and tensors, called `step-000001200.pt`: {"format": "k2ssl-checkpoint", "version": 1,
"step": 1200, ...}. With "config" and "model" among its other keys it can be read as a model (`k2ssl.models.load.load_model`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from k2ssl import distributed
from k2ssl.atomic_file import atomic_file, save_atomically, writable_folder
from k2ssl.train.plain_copy import plain_copy

FORMAT = "k2ssl-checkpoint"
VERSION = 1

_SCORES = "scores.json"
_NAME = re.compile(r"step-(\d{9,})\.pt")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeepConfig:
    """When checkpoints are written and which of them stay.

    Attributes:
        save_every: optimizer steps from one checkpoint to the next; one that validation finds among the best is written besides.
        keep_last: how many of the newest checkpoints are kept.
        keep_every: checkpoints at multiples of so many optimizer steps are kept for good; 0 keeps none for good.
        keep_best: how many of those that validation found best (by their loss, or word error rate in fine-tuning) are kept; 0: none.
    """

    save_every: int = 1000
    keep_last: int = 2
    keep_every: int = 0
    keep_best: int = 1

    def __post_init__(self) -> None:
        for name, least in (("save_every", 1), ("keep_last", 1), ("keep_every", 0), ("keep_best", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"KeepConfig: {name} is {value!r}, allowed is a whole number >= {least}")
        if self.keep_every % self.save_every:
            raise ValueError(
                f"KeepConfig: keep_every is {self.keep_every}, allowed is a multiple of save_every, which is {self.save_every}"
            )


class DamagedError(ValueError):
    """A file that was a checkpoint once, or part of one."""


class CheckpointFolder:
    """Writes checkpoints of one training run into a folder, and removes those that the policy does not keep.

    Beside them lies `scores.json`, the validation losses of those that have one. What a killed process left unfinished is removed when
    rank 0 opens the folder again.

    Args:
        folder: made if need be.
        keep: the policy.
        background: write in a thread while training goes on. Until that thread is done, the content lies twice in the host's memory.

    Raises:
        ValueError: the folder cannot be written to, or `scores.json` cannot be read.
    """

    def __init__(self, folder: Path, keep: KeepConfig, *, background: bool = True) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self._background = background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if distributed.is_main():
            writable_folder(self.folder)
            self._read_scores()
        self._cleaned = False

    def save(self, step: int, content: Mapping[str, Any], score: float | None = None) -> Path:
        """Write one checkpoint; on rank 0 only.

        The caller is held until `content` has been copied to the host's memory, and before that until the checkpoint before this one is
        on disk; where that one could not be written, until this one is. Then the file is written, forced to disk, read back and compared
        with its checksums, and renamed; only then are older ones removed. "format", "version" and "step" are added.

        Args:
            step: optimizer steps done.
            content: nested mappings, lists and tuples of str, int, float, bool, None and tensors on any device.
            score: validation loss, lower is better; None or a number that is not finite is never among the best. A step that is saved
                again without one keeps the one it had.

        Returns:
            The name that the file gets.

        Raises:
            ValueError: `content` holds something that could not be loaded with `weights_only=True` (named by its keys), `step` is
                negative, or a later checkpoint is there: `drop_after` says that it is not wanted any more. (A damaged one, passed over
                by `latest`, is in nobody's way and is removed when this one is on disk.)
            Exception: what went wrong while this checkpoint was written, after the one before it could not be written either.
        """
        self._join()
        if type(step) is not int or step < 0:
            raise ValueError(f"CheckpointFolder.save: step is {step!r}, allowed is a whole number >= 0")
        added = {"format": FORMAT, "version": VERSION, "step": step}
        if taken := sorted(added.keys() & content.keys()):
            raise ValueError(f"CheckpointFolder.save: content has the keys {taken}, which are added here")
        later = [path.name for path in self._later_than(step) if not _is_damaged(path)]
        if later:
            raise ValueError(f"{self.folder}: step {step} cannot be saved, the folder holds {', '.join(later)} of a later step")
        self._clean_up()
        path = self._path(step)
        snapshot = plain_copy({**added, **content}, "content")
        before, self._error = self._error, None
        if self._background and before is None:
            # not a daemon: a program that ends waits for it
            self._thread = threading.Thread(target=self._write_aside, args=(path, snapshot, score), name=f"checkpoint {step}")
            self._thread.start()
        else:
            self._write(path, snapshot, score)
        return path

    def rate(self, step: int, score: float) -> None:
        """Give the checkpoint of a step the validation loss that it was saved without; see `save`. On rank 0 only; waits until that is on disk.

        Raises:
            OSError: the disk is full.
        """
        self._join()
        self._write_scores(self._path(step), score)
        self._prune()

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            Exception: what went wrong while it was written; raised once.
        """
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def latest(self, before: int | None = None) -> Path | None:
        """The newest checkpoint that can be read, of a step below `before` if that is given; None if there is none at all. Damaged ones
        are passed over with a warning. Reads the file.

        Raises:
            ValueError: all are damaged (to begin anew from there would be no resume), or the newest whole one is no training checkpoint or
                was written by a later version.
            OSError: a file cannot be opened.
        """
        self._join()
        paths = [path for path in self.paths() if before is None or step_of(path) < before]
        for path in reversed(paths):
            try:
                check_records(path)
            except DamagedError as error:
                _log.warning("%s; passed over", error)
                continue
            open_checkpoint(path)
            return path
        if paths:
            raise ValueError(f"{self.folder}: holds {len(paths)} checkpoints, all of them damaged")
        return None

    def is_among_best(self, score: float) -> bool:
        """Whether a checkpoint of this score would be kept for it; on rank 0 only. Waits for the one that is being written."""
        self._join()
        scores = self._read_scores()
        as_good = sum(scores.get(path.name, math.inf) <= score for path in self.paths())
        return math.isfinite(score) and as_good < self.keep.keep_best

    def has_score(self, step: int) -> bool:
        """Whether a score of the checkpoint of this step is known: the run may have died in the validation. On rank 0 only; waits as above."""
        self._join()
        scores = self._read_scores()
        return any(step_of(path) == step and path.name in scores for path in self.paths())

    def told(self) -> list[str]:
        """Which checkpoint is the last one and which the best, for people; on rank 0 only."""
        self._join()
        paths, scores = self.paths(), self._read_scores()
        lines = [f"last checkpoint: {paths[-1]}"] if paths else []
        best = min((path for path in paths if scores.get(path.name, math.inf) < math.inf), key=lambda path: scores[path.name], default=None)
        return lines if best is None else [*lines, f"best checkpoint: {best} ({scores[best.name]:.4g} in validation)"]

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: training goes on from `step` and will not come by them again. On rank 0 only."""
        self._join()
        for path in self._later_than(step):
            _log.warning("%s: removed, training goes on from step %d", path, step)
            path.unlink(missing_ok=True)

    def paths(self) -> list[Path]:
        """The checkpoints, damaged or not, by step."""
        found = [path for path in self.folder.glob("step-*.pt") if _NAME.fullmatch(path.name)]
        return sorted(found, key=step_of)

    def bytes_needed(self, checkpoint_bytes: int, max_steps: int) -> int:
        """The most that checkpoints of `checkpoint_bytes` each will take on disk until `max_steps`, counting the one that is being written,
        however often training is interrupted and writes one more."""
        for_good = max(max_steps - 1, 0) // self.keep.keep_every if self.keep.keep_every else 0
        return checkpoint_bytes * (self.keep.keep_last + self.keep.keep_best + for_good + 1)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}.pt"

    def _later_than(self, step: int) -> list[Path]:
        return [path for path in self.paths() if step_of(path) > step]

    # --- in the background ---

    def _clean_up(self) -> None:
        """Remove what a killed process left half-written; not before we write ourselves, since who only looks may have company."""
        if not self._cleaned:
            self._cleaned = True
            for name in ("step-*.pt", _SCORES):
                for leftover in self.folder.glob(f".{name}.*.part"):
                    leftover.unlink(missing_ok=True)

    def _write_aside(self, path: Path, snapshot: dict[str, Any], score: float | None) -> None:
        try:
            self._write(path, snapshot, score)
        except BaseException as error:
            _log.error("%s was not written: %s", path, error)  # now, since the next save may be an hour away
            self._error = error

    def _write(self, path: Path, snapshot: dict[str, Any], score: float | None) -> None:
        # Scores go first: a score without a file does no harm, a file without its score would not be among the best.
        self._write_scores(path, score)
        save_atomically(path, snapshot, _read_back)
        for damaged in self._later_than(step_of(path)):
            damaged.unlink(missing_ok=True)
        self._prune()

    def _prune(self) -> None:
        paths, scores = self.paths(), self._read_scores()
        kept = set(paths[-self.keep.keep_last :])
        if self.keep.keep_every:
            kept.update(path for path in paths if step_of(path) > 0 and step_of(path) % self.keep.keep_every == 0)
        scored = sorted((scores[path.name], step_of(path), path) for path in paths if scores.get(path.name, math.inf) < math.inf)
        kept.update(path for _, _, path in scored[: self.keep.keep_best])
        for path in paths:
            if path not in kept:
                path.unlink(missing_ok=True)

    def _read_scores(self) -> dict[str, float]:
        path = self.folder / _SCORES
        try:
            scores = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ValueError(
                f"{path}: cannot be read ({error}); without this file training goes on, not knowing the best so far"
            ) from error
        if not isinstance(scores, dict) or not all(score is None or type(score) in (int, float) for score in scores.values()):
            raise ValueError(f"{path}: holds other things than scores by the names of checkpoints; without this file training goes on")
        return {name: math.inf if score is None else float(score) for name, score in scores.items()}

    def _write_scores(self, new: Path, score: float | None) -> None:
        before = self._read_scores()
        names = {path.name for path in self.paths()}
        scores = {name: value for name, value in before.items() if name in names}
        if score is not None:
            scores[new.name] = float(score) if math.isfinite(score) else math.inf
        if scores != before:
            with atomic_file(self.folder / _SCORES) as file:
                plain = {name: value if math.isfinite(value) else None for name, value in scores.items()}
                file.write((json.dumps(plain, indent=1) + "\n").encode())

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """What `CheckpointFolder.save` was given, and "format", "version" and "step"; tensors on the CPU. Every byte is compared with its checksum.

    Raises:
        DamagedError: a `ValueError`: the file is cut short, has changed since it was written, or never was a checkpoint.
        ValueError: the file is whole but no training checkpoint (a model file, a file of another project), or of a later version.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    check_records(path)
    return _read(path)


def open_checkpoint(path: str | Path) -> dict[str, Any]:
    """What `load_checkpoint` gives, of a file whose records were compared already: tensors lie in the file, and what is not used is never
    read. Processes on one machine share that memory.

    What is done to those tensors does not reach the file. What is done to the file may reach them: it must be replaced, as checkpoints
    are, not written into.

    Raises:
        ValueError: no training checkpoint, or of a later version.
    """
    return _read(Path(path), mmap=True)


def check_records(path: str | Path) -> None:
    """Compare every record of a checkpoint or model file with its checksum, which `torch.load` does not do.

    Raises:
        DamagedError: the file is cut short, has changed since it was written, or never was one.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as records:
                damaged = records.testzip()
            torch._C.PyTorchFileReader(str(path))  # refuses damage of the directory that Python's own reader puts up with
        except Exception as error:  # what is raised depends on which bytes are damaged
            raise DamagedError(f"{path}: damaged, cut short, or never a checkpoint ({error or type(error).__name__})") from error
    if damaged is not None:
        raise DamagedError(f"{path}: damaged, the checksum of record {damaged} does not fit")


def step_of(path: str | Path) -> int:
    """Optimizer steps that had been done when the checkpoint was written, from its name.

    Raises:
        ValueError: the name is not that of a checkpoint.
    """
    match = _NAME.fullmatch(Path(path).name)
    if match is None:
        raise ValueError(f"{path}: not the name of a checkpoint, which is like step-000001200.pt")
    return int(match.group(1))


def _is_damaged(path: Path) -> bool:
    try:
        check_records(path)
    except DamagedError:
        return True
    return False


def _read_back(file: BinaryIO) -> None:
    """
    Raises:
        DamagedError: what lies on the disk is not what was written.
    """
    _forget_pages(file)
    check_records(Path(file.name))


def _forget_pages(file: BinaryIO) -> None:
    """Force the file to disk and out of the system's memory, so that what is read back comes from the disk (where the system can do that)."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(path: Path, mmap: bool = False) -> dict[str, Any]:
    """The content of a file whose records are whole; with `mmap` tensors are not read before they are used."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # what torch.load raises for a zip file of another kind depends on what is in it
        unsafe = str(error).startswith("Weights only load failed")  # followed by advice to load it nevertheless
        reason = "it holds other things than plain values and tensors" if unsafe else str(error).partition("\n")[0]
        raise ValueError(f"{path}: cannot be read as a training checkpoint: {reason}") from error
    kind = content.get("format") if isinstance(content, dict) else None
    if kind != FORMAT:
        keys = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
        found = "a model file, which has no state of training" if kind == "k2ssl-model" else f"it holds {keys or 'nothing'}"
        raise ValueError(f"{path}: not a training checkpoint: {found}")
    version = content.get("version")
    if version != VERSION:
        raise ValueError(f"{path}: version is {version!r}, this release reads version {VERSION}")
    return content
