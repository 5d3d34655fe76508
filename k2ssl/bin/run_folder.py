"""The folder of a training run: whether there is a run in it to go on with, whether it is this one, and whether the disk suffices."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2ssl.atomic_file import atomic_file, writable_folder
from k2ssl.bin.folder_lock import CHECKPOINTS
from k2ssl.config import dump
from k2ssl.structure import from_dict, to_dict
from k2ssl.train.checkpoint import CheckpointFolder, check_records, open_checkpoint
from k2ssl.train.differences import differences
from k2ssl.train.ledger import total
from k2ssl.train.trainer import Trainer, TrainerConfig

SETTINGS = "settings.json"
_LINEAGE = "lineage"  # beside the settings in a checkpoint: where labels or tokens come from


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: to go on from; None: at the beginning.
        changes: settings that are not those of the checkpoint's run and make it another one, for people; accepted by the user.
    """

    checkpoint: Path | None = None
    changes: tuple[str, ...] = ()


def find_start(
    output: Path, resume: str, kind: type[Any], settings: Mapping[str, Any], may_change: Sequence[str], accept_changes: bool
) -> Start:
    """Whether to go on with a run, and from which of its checkpoints, whose records have been compared with their checksums then. Only looks.

    Args:
        output: folder of the run.
        resume: "auto": the newest checkpoint in `output`, if there is one; "never"; or the checkpoint to begin from where `output`
            has none yet.
        kind: dataclass of the job. A setting that the checkpoint's version did not have yet counts as its default.
        settings: those of now, plain values, with the lineage of the data.
        may_change: settings (dotted paths, of tables all that is in them) that do not make it another run.
        accept_changes: go on although other settings differ.

    Raises:
        ValueError: there is a run in `output` and it is another one or must not be resumed, or no checkpoint can be read.
    """
    folder = output / CHECKPOINTS
    found = CheckpointFolder(folder, TrainerConfig().keep).latest() if folder.is_dir() else None
    if resume not in ("auto", "never"):
        asked = Path(resume)
        if not asked.is_file():
            raise ValueError(f"resume is {resume!r}, allowed are auto, never and the path of a checkpoint: there is no such file")
        if found is not None and asked.resolve().parent == folder.resolve() and asked.name != found.name:
            raise ValueError(f"resume is {resume}, but {found.name} beside it is newer and would be lost: choose another output folder")
        if found is None:
            check_records(asked)
            found = asked
    if found is None:
        return Start()
    if resume == "never":
        raise ValueError(f"{output}: holds a run already ({found.name}); --resume auto goes on with it, or choose another output folder")
    saved = open_checkpoint(found).get("job")
    if saved is None:
        raise ValueError(f"{found}: this checkpoint does not say with which settings it was made, so training cannot go on from it")
    changes = tuple(
        text for text in differences(_completed(saved, kind), settings) if not _is_within(text.partition(" is ")[0], may_change)
    )
    if changes and not accept_changes:
        raise ValueError(
            f"{found}: of a run with other settings: {'; '.join(changes)}. Choose another output folder, or go on with the new settings by "
            "--accept-changes True"
        )
    return Start(found, changes)


def _completed(saved: Mapping[str, Any], kind: type[Any]) -> Mapping[str, Any]:
    """Settings and lineage with what was added since at its default; as they are where they cannot be read as `kind` any more."""
    try:
        job = from_dict(kind, {key: value for key, value in saved.items() if key != _LINEAGE})
    except ValueError:
        return saved
    return {**saved, **to_dict(job)}


def record_settings(output: Path, job: Any) -> None:
    """`settings.json`: every setting, defaults written out, in a form that the program reads back."""
    writable_folder(output)
    with atomic_file(output / SETTINGS) as file:
        file.write(dump(job).encode())


def check_disk(trainer: Trainer, output: Path, expected_steps: int) -> str:
    """What checkpoints will take, in one line; for rank 0.

    Args:
        trainer: writes the checkpoints.
        output: folder of the run.
        expected_steps: of the whole run; 0: unknown, then checkpoints that are kept for good are not counted.

    Raises:
        ValueError: the disk has less room than the policy of keeping checkpoints will need.
    """
    if trainer.checkpoints is None:
        return ""
    one = checkpoint_bytes(trainer)
    already = sum(path.stat().st_size for path in trainer.checkpoints.paths())
    most = trainer.checkpoints.bytes_needed(one, expected_steps)
    free = shutil.disk_usage(output).free
    if most - already > free:
        raise ValueError(
            f"{output}: checkpoints of {_size(one)} each will take {_size(most - already)} more, {_size(free)} are free; lower "
            "trainer.keep.keep_last, keep_best or keep_every, or make room"
        )
    unknown = ", and those of trainer.keep.keep_every" if trainer.config.keep.keep_every and not expected_steps else ""
    return f"checkpoints of {_size(one)} each, at most {_size(most)} in all{unknown}; {_size(free)} are free"


def told_at_end(trainer: Trainer, output: Path, before: int) -> list[str]:
    """What a run that has come to its end says: what it cost, and its last and best checkpoint; for rank 0.

    Args:
        trainer: has trained.
        output: folder of the run.
        before: step at which this start of the run began.
    """
    idle = ["nothing was left to do: the run had come to its end before"] if trainer.progress.step == before else []
    return [*idle, total(output).text(), *(trainer.checkpoints.told() if trainer.checkpoints is not None else ())]


def checkpoint_bytes(trainer: Trainer) -> int:
    """Of one checkpoint: weights and two moments in float32, the running average in float64."""
    params = sum(param.numel() for param in trainer.model.parameters())
    return params * (4 + 8 + (8 if trainer.config.average_period else 0))


def _is_within(path: str, tables: Sequence[str]) -> bool:
    return any(path == table or path.startswith(f"{table}.") for table in tables)


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
