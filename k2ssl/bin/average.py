"""Average the weights of a model: over given checkpoints, or over a range of training steps.

    python -m k2ssl.bin.average --output avg.pt --checkpoints step-000090000.pt step-000095000.pt step-000100000.pt
    python -m k2ssl.bin.average --output avg.pt --start step-000080000.pt --end step-000100000.pt
    python -m k2ssl.bin.average --output avg.pt --end step-000100000.pt

The first takes the plain mean of checkpoints or model files. The others take what training itself has averaged, every few steps: the mean
over all steps between two checkpoints, or since the beginning. Models of pre-training and of recognition are taken alike. Writes OUTPUT, a
model file; of a recognition model it also holds the tokenizer, so that k2ssl.bin.decode takes it. Exit status: 0 done, 1 the run failed, 2
wrong usage or settings, 130 interrupted.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from k2ssl.atomic_file import save_atomically
from k2ssl.bin.cluster_cuts import check_files
from k2ssl.bin.model_averages import mean_of_models, mean_over_steps, open_model
from k2ssl.bin.output_file import check_output
from k2ssl.bin.program import run_program
from k2ssl.bin.refusal import refusing
from k2ssl.config import ConfigError
from k2ssl.models.load import FORMAT, VERSION, config_to_dict
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
    check_files(checkpoints=job.checkpoints, start=job.start, end=job.end)
    check_output(job.output, job.overwrite, checkpoints=job.checkpoints, start=job.start, end=job.end)
    with refusing():
        for path in (*job.checkpoints, job.start, job.end):
            if path is not None:
                check_records(path)
        if job.end is None:
            file = open_model(job.checkpoints[0], "raw")
            mean, what = mean_of_models(file, job.checkpoints[1:]), f"mean of {len(job.checkpoints)} models"
        else:
            file = open_model(job.end, "average")
            mean, what = mean_over_steps(job.start, file)
    model = file.model
    model.load_state_dict(mean)  # in its own number formats
    content = {"format": FORMAT, "version": VERSION, "config": config_to_dict(model.config), "model": model.state_dict(), "weights": what}
    save_atomically(job.output, {**content, **file.belongings})
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


def main(argv: list[str] | None = None) -> int:
    return run_program(average, Average, sys.argv[1:] if argv is None else argv, "average", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
