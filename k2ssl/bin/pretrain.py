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

import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from k2ssl import distributed
from k2ssl.bin.cluster_features import choose_device
from k2ssl.bin.diagnose import Diagnosis, diagnose
from k2ssl.bin.pretrain_data import OpenedData, PretrainData
from k2ssl.bin.pretrain_remarks import settings_without_effect
from k2ssl.bin.program import run_program
from k2ssl.bin.run_folder import Start, alone_in, check_disk, find_start, record_settings, refusing, say
from k2ssl.bin.trials import PreflightConfig, estimate, run_preflight, tune_micro_batch
from k2ssl.config import ConfigError
from k2ssl.models.frontend import WaveformFrontend
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.transformer import TransformerLayer
from k2ssl.models.zipformer_layer import ZipformerLayer
from k2ssl.optim.build import OptimConfig, ScheduleConfig, build_optimizer, build_schedule
from k2ssl.structure import to_dict
from k2ssl.train.ledger import total
from k2ssl.train.trainer import Trainer, TrainerConfig
from k2ssl.train.update import parallelise

if TYPE_CHECKING:
    from k2ssl.data.loader import BatchLoader

_log = logging.getLogger(__name__)

# What may be changed between two starts of one run: how long, how often, how fast, but not what.
MAY_CHANGE = (
    "output",
    "device",
    "quiet",
    "resume",
    "accept_changes",
    "estimate",
    "tune",
    "diagnose",
    "preflight",
    "activation_checkpointing",
    "data.num_workers",
    "data.max_check",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.batch.seconds_per_micro_batch",
    "trainer.sharding",
    "trainer.valid_every",
    "trainer.log_every",
    "trainer.keep",
    "trainer.guard",
    "trainer.tensorboard",
)


@dataclass(frozen=True)
class Pretrain:
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
        resume: auto goes on with the run in OUTPUT if there is one; never refuses such a folder; or the checkpoint of another run to go
            on from where OUTPUT has none yet.
        accept_changes: go on although the settings have changed. Of those of the optimizer only the rates are taken over.
        estimate: time some steps, tell how long the run will take, and end.
        tune: find the largest micro-batch that fits, print the settings with it, and end; for a single process.
        diagnose: run a few steps and end: inf-check names the first module whose output or gradient is not finite; statistics prints
            those of weights, gradients and outputs; profile writes a trace for chrome://tracing into OUTPUT.
        quiet: plain lines instead of a progress bar, for logs.
    """

    output: str
    data: PretrainData
    model: HubertConfig = field(default_factory=HubertConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    seed: int = 42
    device: str = "auto"
    activation_checkpointing: bool = False
    resume: str = "auto"
    accept_changes: bool = False
    estimate: bool = False
    tune: bool = False
    diagnose: Diagnosis = "no"
    quiet: bool = False

    def __post_init__(self) -> None:
        modes = [name for name, on in (("estimate", self.estimate), ("tune", self.tune), ("diagnose", self.diagnose != "no")) if on]
        if len(modes) > 1:
            raise ValueError(f"Pretrain: {' and '.join(modes)} are asked for at once, allowed is one of them")
        if self.seed < 0:
            raise ValueError(f"Pretrain: seed is {self.seed}, a whole number >= 0 is needed")


def pretrain(job: Pretrain) -> None:
    """Do the job on this rank.

    Raises:
        ConfigError: refused before training; no file of an earlier run has been changed then.
        ValueError: the run failed.
        KeyboardInterrupt: a signal ended it; a checkpoint has been written.
    """
    with distributed.set_up(choose_device(job.device)) as device:
        output = Path(job.output)
        is_trial = job.estimate or job.tune or job.diagnose != "no"
        start = Start()
        with refusing():
            data = OpenedData(job.data)
            if distributed.is_main() and not is_trial:
                start = find_start(output, job.resume, settings_of(job, data), MAY_CHANGE, job.accept_changes)
        start = distributed.broadcast_object(start)
        for text in settings_without_effect(job):
            _log.warning("warning: %s", text)
        model = build_model(job, device)
        with refusing():
            if distributed.is_main():
                say(*data.check(model, quick=start.checkpoint is not None))
        run = Run(job, data, model, device, folder=None if is_trial else output)
        say(*run.description())
        if job.tune:
            say(*tune_micro_batch(job, data, device))
        elif job.estimate:
            say(*estimate(run.trainer, run.train_loader, run.expected_steps))
        elif job.diagnose != "no":
            say(*diagnose(run.trainer, run.train_loader, job.diagnose, output))
        else:
            run.train(start)


class Run:
    """A trainer with its loaders.

    Args:
        job: settings.
        data: opened.
        model: of `build_model`.
        device: of this rank.
        folder: for what the trainer writes; None for a trial.

    Raises:
        ConfigError: settings that do not go together.
    """

    def __init__(self, job: Pretrain, data: OpenedData, model: HubertModel, device: torch.device, folder: Path | None) -> None:
        self.job, self.data, self.model, self.device = job, data, model, device
        sample_rate = model.frontend.sample_rate
        self.expected_steps = expected_steps(job.trainer, data.seconds())
        try:
            parallel = parallelise(model, device, job.trainer.sharding, units_to_shard(model))
            optimizer = build_optimizer(job.optim, model)
            self.trainer = Trainer(
                model,
                optimizer,
                build_schedule(job.schedule, optimizer),
                job.trainer,
                device=device,
                folder=folder,
                model_config=to_dict(job.model),
                parallel=parallel,
                job=settings_of(job, data),
                sample_rate=sample_rate,
                seed=job.seed,
                program="pretrain",
                expected_steps=self.expected_steps,
                quiet=job.quiet,
            )
            self.train_loader = data.train_loader(self.trainer.plan, sample_rate, job.seed, device)
            # sharded ranks compute every batch together
            together = job.trainer.sharding != "none"
            self.valid_loader = data.valid_loader(self.trainer.plan, sample_rate, device, drop_incomplete=together)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def description(self) -> list[str]:
        """What will be trained, and on what."""
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        seconds = self.data.seconds()
        hours = "" if seconds is None else f", {seconds / 3600:,.2f} h of audio an epoch"
        return [
            f"model of {num_parameters / 1e6:.2f} M parameters on {distributed.world_size()} x {self.device.type}, "
            f"{str(self.trainer.update.dtype).removeprefix('torch.')}{hours}",
            self.trainer.plan.text(),
        ]

    def train(self, start: Start) -> None:
        """Try what could fail, then train to the end."""
        with ExitStack() as held:
            with refusing():
                if distributed.is_main():
                    held.enter_context(alone_in(Path(self.job.output)))
            self._train(start)

    def _train(self, start: Start) -> None:
        trainer, output = self.trainer, Path(self.job.output)
        changes = [] if start.checkpoint is None else self._go_on(start.checkpoint, start.changes)
        with refusing():
            if distributed.is_main():
                say(check_disk(trainer, output, self.expected_steps))
        if self.job.preflight.run and (start.checkpoint is None or changes):
            try:
                say(*run_preflight(trainer, self.train_loader, self.job.preflight))
            except ValueError as error:
                raise ConfigError(str(error)) from error
        with distributed.failing_together():
            if distributed.is_main():
                record_settings(output, self.job)
        if not trainer.fit(self.train_loader, self.valid_loader):
            raise KeyboardInterrupt
        if distributed.is_main():
            say(total(output).text())

    def _go_on(self, checkpoint: Path, changes: tuple[str, ...]) -> list[str]:
        """Go on from a checkpoint, with the settings of now; returns what has changed, which people have been told then."""
        trainer = self.trainer
        rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
        try:
            found = trainer.resume(checkpoint, _ByCount(self.train_loader) if changes else self.train_loader)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if any(text.startswith("optim.lr") for text in changes):
            for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
                group["initial_lr"] = rate * trainer.guard.lr_factor
        say(*(f"note: {text}" for text in [*changes, *found]))
        say(f"going on from {checkpoint} at step {trainer.progress.step:,}")
        return [*changes, *found]


class _ByCount:
    """The loader of a run whose settings have changed: goes on after as many batches as were read, whatever they hold now."""

    def __init__(self, loader: BatchLoader[Any]) -> None:
        self.loader = loader
        self.set_epoch, self.state_dict, self.start_at = loader.set_epoch, loader.state_dict, loader.start_at

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loader.start_at(state["epoch"], state["batches"])


def settings_of(job: Pretrain, data: OpenedData) -> dict[str, Any]:
    """What a checkpoint tells of its run: all settings, and where the labels come from."""
    return {**to_dict(job), "lineage": data.lineage}


def expected_steps(config: TrainerConfig, seconds: float | None) -> int:
    """Optimizer steps until training ends, for an epoch of so many seconds of audio; 0: not known."""
    if not seconds:
        return config.max_steps
    in_epochs = math.ceil(seconds / config.batch.seconds_per_update) * config.max_epochs
    return min(config.max_steps or in_epochs, in_epochs)


def build_model(job: Pretrain, device: torch.device) -> HubertModel:
    """The model with weights drawn from the seed, the same on every rank and on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = HubertModel(job.model)
    model.encoder.recompute_layers = job.activation_checkpointing
    if job.data.normalize and isinstance(model.frontend, WaveformFrontend):
        model.frontend.normalizes_audio = False  # the data is normalised already, over whole utterances instead of crops
    return model.to(device)


def units_to_shard(model: nn.Module) -> list[nn.Module]:
    """The encoder's layers: what is gathered, used and let go of together."""
    return [module for module in model.modules() if isinstance(module, ZipformerLayer | TransformerLayer)]


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_program(pretrain, Pretrain, sys.argv[1:] if argv is None else argv, "pretrain", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
