"""A few training steps under observation: where numbers stop being finite, what sizes they have, where time goes."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from k2ssl import distributed
from k2ssl.atomic_file import atomic_file, writable_folder
from k2ssl.models.frontend import WaveformFrontend
from k2ssl.train.inf_check import InfCheck
from k2ssl.train.profiler import profile_steps
from k2ssl.train.statistics import StatisticsRecorder
from k2ssl.train.trainer import Trainer

if TYPE_CHECKING:
    from k2ssl.data.loader import BatchLoader

Diagnosis = Literal["no", "inf-check", "statistics", "profile"]

_STEPS = 5
_PROFILED = (3, 5)  # first and last step of a trace, from 1


def diagnose(trainer: Trainer, loader: BatchLoader[Any], what: Diagnosis, output: Path) -> list[str]:
    """Make five steps on what comes next, observed; the run in `output` is left alone.

    Returns:
        What was found, for people.

    Raises:
        NonFiniteError: inf-check found something; names the module.
        ValueError: there is too little data.
    """
    batches = list(islice(loader, _STEPS))
    if not batches and trainer.progress.step:  # the checkpoint was written at the end of an epoch
        loader.set_epoch(trainer.progress.epoch + 1)
        batches = list(islice(loader, _STEPS))
    if not batches:
        raise ValueError("diagnose: the training data gives no batch")
    if what != "profile":
        model: Any = trainer.model
        model.encoder.recompute_layers = False  # hooks would see every output twice
        if isinstance(model.frontend, WaveformFrontend):
            model.frontend.fast = False  # hooks would see no output of its layers
    if what == "inf-check":
        with InfCheck(trainer.model):
            for batch in batches:
                trainer.train_step([batch])
        return [f"{len(batches)} steps: every output, gradient and parameter is finite"]
    if what == "profile":
        with profile_steps(writable_folder(output), *_PROFILED) as before_step:
            for number, batch in enumerate(batches, start=1):
                before_step(number)
                trainer.train_step([batch])
        return []
    with StatisticsRecorder(trainer.model) as recorder:
        for batch in batches:
            trainer.train_step([batch])
            recorder.end_step()
    if distributed.is_main():
        with atomic_file(writable_folder(output) / "statistics.json") as file:
            file.write(json.dumps(recorder.to_dict(), indent=1).encode())
    return [recorder.table(), f"the same in {output / 'statistics.json'}"]
