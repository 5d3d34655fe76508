"""Average the weights of a model: over given checkpoints, or over a range of training steps.

    python -m k2ssl.bin.average --output avg.pt --checkpoints step-000090000.pt step-000095000.pt step-000100000.pt
    python -m k2ssl.bin.average --output avg.pt --start step-000080000.pt --end step-000100000.pt
    python -m k2ssl.bin.average --output avg.pt --end step-000100000.pt

The first takes the plain mean of checkpoints or model files. The others take what training itself has averaged, every few steps: the mean
over all steps between two checkpoints, or since the beginning. Writes OUTPUT, a model file. Exit status: 0 done, 1 the run failed, 2 wrong
usage or settings, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from k2ssl.atomic_file import writable_folder
from k2ssl.bin.program import run_program
from k2ssl.config import ConfigError
from k2ssl.models.hubert import HubertModel
from k2ssl.models.load import load_model, model_from, read_content, save_model
from k2ssl.structure import to_dict
from k2ssl.train.averaging import average_of, average_over_range
from k2ssl.train.checkpoint import check_records


@dataclass(frozen=True)
class Average:
    """Settings of the program.

    Attributes:
        output: file for the averaged model.
        checkpoints: training checkpoints or model files to take the plain mean of; at least two.
        start: training checkpoint after which the range of steps begins; without it the range begins at step 0.
        end: training checkpoint with which the range of steps ends.
        overwrite: replace OUTPUT if it exists.
    """

    output: str
    checkpoints: tuple[str, ...] = ()
    start: str | None = None
    end: str | None = None
    overwrite: bool = False


def average(job: Average) -> None:
    """Do the job."""
    _check(job)
    writable_folder(Path(job.output).parent)
    for path in (*job.checkpoints, job.start, job.end):
        if path is not None:
            check_records(path)
    if job.end is None:
        model, what = _mean_of(job.checkpoints), f"mean of {len(job.checkpoints)} models"
    else:
        model, what = _mean_over_range(job.start, job.end)
    save_model(job.output, model)
    print(f"{job.output}: {what}, {sum(p.numel() for p in model.parameters()):,} parameters")


def _check(job: Average) -> None:
    if bool(job.checkpoints) == (job.end is not None) or (job.checkpoints and job.start is not None):
        raise ConfigError("either --checkpoints A B ... is needed, or --end B with or without --start A")
    if len(job.checkpoints) == 1:
        raise ConfigError(f"checkpoints is {job.checkpoints[0]} alone, at least two are needed")
    named = [path for path in (*job.checkpoints, job.start, job.end, job.output) if path is not None]
    files = [Path(path).resolve() for path in named]
    for number, path in enumerate(named):
        if (earlier := files.index(files[number])) < number:
            raise ConfigError(f"{path} is the same file as {named[earlier]}, different ones are needed")
    if Path(job.output).exists() and not job.overwrite:
        raise ValueError(f"{job.output} exists; --overwrite True replaces it")


def _mean_of(paths: tuple[str, ...]) -> HubertModel:
    """One file is read after the other, so that memory does not grow with their number."""
    result = load_model(paths[0])

    def states() -> Iterator[Mapping[str, Tensor]]:
        yield result.state_dict()
        for path in paths[1:]:
            model = load_model(path)
            _check_same_architecture(paths[0], result, path, model)
            yield model.state_dict()

    result.load_state_dict(average_of(states()))
    return result


def _mean_over_range(start: str | None, end: str) -> tuple[HubertModel, str]:
    last = read_content(end)
    result = model_from(last, end, "average")
    if start is None:
        return result, f"mean over steps 1 to {last['average']['step']}"
    first = read_content(start)
    _check_same_architecture(start, model_from(first, start, "average"), end, result)
    try:
        result.load_state_dict(average_over_range(first, last))
    except ValueError as error:
        raise ValueError(f"start {start}, end {end}: {error}") from error
    return result, f"mean over steps {first['average']['step'] + 1} to {last['average']['step']}"


def _check_same_architecture(one: str, left: HubertModel, two: str, right: HubertModel) -> None:
    for key, ours, theirs in _differences(to_dict(left.config), to_dict(right.config), "config"):
        raise ValueError(f"the architectures differ: {key} is {ours!r} in {one}, {theirs!r} in {two}")


def _differences(left: Any, right: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for key in [*left, *(key for key in right if key not in left)]:
            yield from _differences(left.get(key), right.get(key), f"{path}.{key}")
    elif left != right:
        yield path, left, right


def main(argv: list[str] | None = None) -> int:
    return run_program(average, Average, sys.argv[1:] if argv is None else argv, "average", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
