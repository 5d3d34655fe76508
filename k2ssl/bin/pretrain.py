"""Pre-train an encoder by masked prediction of frame labels.

    python -m k2ssl.bin.pretrain conf/zipformer_base.toml --data.cuts cuts_train.jsonl.gz --data.labels labels/train --output exp/base
    torchrun --nproc-per-node 8 -m k2ssl.bin.pretrain conf/zipformer_base.toml ...

The defaults are the published flags of Zipformer Base. An update takes so many seconds of audio (trainer.batch) whatever the number of
GPUs. The same command goes on where it was interrupted, exactly; OUTPUT gets checkpoints/, metrics.jsonl, tensorboard/, ledger.jsonl,
settings.json and, when something went wrong, incidents/. Exit status: 0 done; 1 the run failed or diverged; 2 refused before training:
wrong usage or settings, data or labels that do not fit, an output folder of another run, too little memory or disk; 130 interrupted, with a
checkpoint written. See docs/training.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch

from k2ssl.bin.pretrain_data import OpenedData, PretrainData
from k2ssl.bin.pretrain_remarks import settings_without_effect
from k2ssl.bin.program import run_program
from k2ssl.bin.training_run import Run as TrainingRun
from k2ssl.bin.training_run import TrainingJob, expected_steps, prepare_model, run_training
from k2ssl.bin.trials import PreflightConfig
from k2ssl.models.hubert import HubertConfig, HubertModel

__all__ = ["OpenedData", "PreflightConfig", "Pretrain", "Run", "build_model", "expected_steps", "main", "pretrain"]


@dataclass(frozen=True, kw_only=True)
class Pretrain(TrainingJob):
    """Settings of the program.

    Attributes:
        output: folder of the run.
        data: manifests and labels.
        model: what is trained.
        optim: the optimizer.
        schedule: of the learning rate.
        trainer: length, batches, checkpoints.
        preflight: what is tried before training.
        seed: of the initial weights, the order of the data and everything drawn during training.
        device: auto, cpu, cuda or cuda:NUMBER; auto takes the GPU if there is one.
        activation_checkpointing: compute the layers again in the backward pass instead of keeping what they computed: less memory, a
            third more time.
        fuse: compile chains of elementwise operations into one kernel each; needs a C++ compiler on a CPU, Triton on a GPU, and takes a
            minute or two more at the first start on a machine. Results differ in rounding.
        triton: on a GPU, let Triton's kernels compute Swoosh and parts of the waveform frontend where they can.
        resume: auto goes on with the run in OUTPUT if there is one; never refuses such a folder; or the checkpoint of another run to go
            on from where OUTPUT has none yet.
        accept_changes: go on although the settings have changed. Of those of the optimizer only the rates are taken over.
        estimate: time some steps, tell how long the run will take, and end.
        tune: find the largest micro-batch that fits, print the settings with it, and end; for a single process.
        diagnose: run a few steps and end: inf-check names the first module whose output or gradient is not finite; statistics prints
            those of weights, gradients and outputs; profile writes a trace for chrome://tracing into OUTPUT.
        quiet: plain lines instead of a progress bar, for logs.
    """

    data: PretrainData
    model: HubertConfig = field(default_factory=HubertConfig)


def pretrain(job: Pretrain) -> None:
    """Do the job on this rank; errors as `run_training`."""
    run_training(job, lambda: OpenedData(job.data), settings_without_effect(job), build_model, Run)


class Run(TrainingRun):
    """Of pre-training; see `TrainingRun`."""

    program = "pretrain"


def build_model(job: Pretrain, device: torch.device) -> HubertModel:
    """The model with weights drawn from the seed, the same on every rank and on every device."""
    return prepare_model(job, lambda: HubertModel(job.model), device)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_program(pretrain, Pretrain, sys.argv[1:] if argv is None else argv, "pretrain", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
