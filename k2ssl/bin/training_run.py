"""What the training programs share: from a job and its opened data to a run that is tried, trained, and gone on with."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import nn

from k2ssl import distributed
from k2ssl.bin.cluster_cuts import check_seed
from k2ssl.bin.cluster_features import choose_device
from k2ssl.bin.diagnose import Diagnosis, diagnose
from k2ssl.bin.folder_lock import alone_in
from k2ssl.bin.pretrain_remarks import ending_in_warm_up
from k2ssl.bin.refusal import refusing, say
from k2ssl.bin.run_folder import Start, check_disk, find_start, record_settings, told_at_end
from k2ssl.bin.trials import PreflightConfig, estimate, run_preflight, tune_micro_batch
from k2ssl.config import ConfigError
from k2ssl.models.frontend import WaveformFrontend
from k2ssl.models.transformer import TransformerLayer
from k2ssl.models.zipformer_layer import ZipformerLayer
from k2ssl.nn.fusion import check_fusion, use_fusion
from k2ssl.nn.kernels import use_triton
from k2ssl.optim.build import OptimConfig, ScheduleConfig, build_optimizer, build_schedule
from k2ssl.report.card import begin_card, finish_card
from k2ssl.structure import to_dict
from k2ssl.train.plan import BatchPlan
from k2ssl.train.trainer import Trainer, TrainerConfig
from k2ssl.train.update import parallelise

if TYPE_CHECKING:
    from k2ssl.data.loader import BatchLoader
    from k2ssl.models.asr import AsrModel
    from k2ssl.models.hubert import HubertModel

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
    "triton",
    "tokenizer",  # its hash counts, not where it lies
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

_RATES = ("optim.lr ", "optim.lr_scales")  # beginnings of changes that the optimizer goes on with


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """Settings that the training programs share. Each program has `data` and `model` of its own besides, and documents all, for --help."""

    output: str
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    seed: int = 42
    device: str = "auto"
    activation_checkpointing: bool = False
    fuse: bool = False
    triton: bool = True
    resume: str = "auto"
    accept_changes: bool = False
    estimate: bool = False
    tune: bool = False
    diagnose: Diagnosis = "no"
    quiet: bool = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        modes = [mode for mode, on in (("estimate", self.estimate), ("tune", self.tune), ("diagnose", self.diagnose != "no")) if on]
        if len(modes) > 1:
            raise ValueError(f"{name}: {' and '.join(modes)} are asked for at once, allowed is one of them")
        check_seed(name, self.seed)


class Data(Protocol):
    """What is asked of opened data."""

    @property
    def lineage(self) -> Mapping[str, Any]: ...

    def seconds(self) -> float | None: ...

    def check(self, model: Any, quick: bool = False) -> list[str]: ...

    def train_loader(self, plan: BatchPlan, sample_rate: int, seed: int, device: torch.device) -> BatchLoader[Any]: ...

    def valid_loader(self, plan: BatchPlan, sample_rate: int, device: torch.device, drop_incomplete: bool) -> BatchLoader[Any] | None: ...


Model = TypeVar("Model", "HubertModel", "AsrModel")


def run_training(
    job: Any, open_data: Callable[[], Any], remarks: Iterable[str], build: Callable[[Any, torch.device], Any], kind: type[Run]
) -> None:
    """Do a job on this rank.

    Args:
        job: settings.
        open_data: opens its data.
        remarks: settings without effect.
        build: makes the model of a job.
        kind: the program's own run.

    Raises:
        ConfigError: refused before training; no file of an earlier run has been changed then.
        ValueError: the run failed.
        KeyboardInterrupt: a signal ended it; a checkpoint has been written.
    """
    with distributed.set_up(choose_device(job.device)) as device, ExitStack() as held:
        output = Path(job.output)
        is_trial = job.estimate or job.tune or job.diagnose != "no"
        start = Start()
        with refusing():
            use_fusion("inductor" if job.fuse else None)
            check_fusion(device)
            use_triton(job.triton)
            data = open_data()
            if distributed.is_main() and not (job.estimate or job.tune):
                if not is_trial:  # before we look: who trains there now may write a newer checkpoint than we would find
                    held.enter_context(alone_in(output))
                start = find_start(output, job.resume, type(job), settings_of(job, data), MAY_CHANGE, job.accept_changes)
                kind.check_start(start)
        start = distributed.broadcast_object(start)
        for text in remarks:
            _log.warning("warning: %s", text)
        model = build(job, device)
        with refusing():
            if distributed.is_main():
                say(*data.check(model, quick=start.checkpoint is not None))
            if start.checkpoint is None:
                say(*kind.initialise(job, model))
        run = kind(job, data, model, device, folder=None if is_trial else output)
        say(*run.description())
        for text in ending_in_warm_up(job.schedule, run.expected_steps):
            _log.warning("warning: %s", text)
        if job.tune:
            say(*tune_micro_batch(job, lambda trial: kind(trial, data, build(trial, device), device, folder=None), device))
        elif job.estimate:
            say(*estimate(run.trainer, run.train_loader, run.expected_steps))
        elif job.diagnose != "no":
            run.diagnose(start)
        else:
            run.train(start)


class Run:
    """A trainer with its loaders; the programs fill in what is theirs.

    Args:
        job: settings.
        data: opened.
        model: on `device`.
        device: of this rank.
        folder: for what the trainer writes; None for a trial.

    Raises:
        ConfigError: settings that do not go together.
    """

    program: ClassVar[str]

    def __init__(self, job: Any, data: Any, model: Any, device: torch.device, folder: Path | None) -> None:
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
                model_config=self.model_config(),
                parallel=parallel,
                job=settings_of(job, data),
                sample_rate=sample_rate,
                seed=job.seed,
                program=self.program,
                expected_steps=self.expected_steps,
                quiet=job.quiet,
                **self.more(),
            )
            self.train_loader = data.train_loader(self.trainer.plan, sample_rate, job.seed, device)
            # sharded ranks compute every batch together
            together = job.trainer.sharding != "none"
            self.valid_loader = data.valid_loader(self.trainer.plan, sample_rate, device, drop_incomplete=together)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @classmethod
    def check_start(cls, start: Start) -> None:
        """Refuse changes that make no sense for this program even where the user accepts them.

        Raises:
            ValueError: of the optimizer, anything but its rates.
        """
        if stuck := [text for text in start.changes if text.startswith("optim.") and not text.startswith(_RATES)]:
            raise ValueError(
                f"{start.checkpoint}: {'; '.join(stuck)}; that is part of the optimizer's state, and only its rates (optim.lr, "
                "optim.lr_scales) can be changed within a run: choose another output folder"
            )

    @classmethod
    def initialise(cls, job: Any, model: Any) -> list[str]:
        """Give a new run's model other weights than drawn ones; returns what was done, for people. ValueError: they do not fit."""
        return []

    def model_config(self) -> dict[str, Any]:
        """What the model is built from, as a model file tells it."""
        return to_dict(self.job.model)

    def more(self) -> dict[str, Any]:
        """Further arguments of the trainer."""
        return {}

    def num_parameters(self) -> int:
        """Of the model, whole, however it is sharded."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def description(self) -> list[str]:
        """What will be trained, and on what."""
        seconds = self.data.seconds()
        hours = "" if seconds is None else f", {seconds / 3600:,.2f} h of audio an epoch"
        return [
            f"model of {self.num_parameters() / 1e6:.2f} M parameters on {distributed.world_size()} x {self.device.type}, "
            f"{str(self.trainer.update.dtype).removeprefix('torch.')}{hours}",
            self.trainer.plan.text(),
        ]

    def diagnose(self, start: Start) -> None:
        """Look into the run where it is now; see `k2ssl.bin.diagnose`."""
        if start.checkpoint is None:
            say("there is no checkpoint yet: diagnosis of the weights that training begins with")
        else:
            self._go_on(start.checkpoint, start.changes)
        say(*diagnose(self.trainer, self.train_loader, self.job.diagnose, Path(self.job.output)))

    def train(self, start: Start) -> None:
        """Try what could fail, then train to the end."""
        trainer, output = self.trainer, Path(self.job.output)
        changes = [] if start.checkpoint is None else self._go_on(start.checkpoint, start.changes)
        self._check_validation()
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
                # that changes were accepted was said of those of this start, not of all that may come
                record_settings(output, replace(self.job, accept_changes=False))
                begin_card(output, self.program, to_dict(self.job), sys.orig_argv, self.num_parameters())
        before = trainer.progress.step
        if not trainer.fit(self.train_loader, self.valid_loader):
            raise KeyboardInterrupt
        if distributed.is_main():
            finish_card(output)
            say(*told_at_end(trainer, output, before))

    def _check_validation(self) -> None:
        """ConfigError where the validation data give no batch, lest that be found when a thousand steps have been trained."""
        if self.valid_loader is None:
            return
        with refusing():
            has_one = torch.tensor(int(next(self.valid_loader.requests(), None) is not None))
        if not distributed.all_reduce_sum(has_one):
            together = (
                "" if self.job.trainer.sharding == "none" else f", of which every one of the {distributed.world_size()} ranks needs one"
            )
            raise ConfigError(f"data.valid_cuts give no batch{together}; see data.min_seconds and max_seconds, or leave them out")

    def _go_on(self, checkpoint: Path, changes: tuple[str, ...]) -> list[str]:
        """Go on from a checkpoint, with the settings of now; returns what has changed, which people have been told then."""
        trainer = self.trainer
        rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
        try:
            by_count = changes or self.job.accept_changes  # of what the manifests hold, too
            found = trainer.resume(checkpoint, _ByCount(self.train_loader) if by_count else self.train_loader, checked=True)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if any(text.startswith(_RATES) for text in changes):
            for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
                group["initial_lr"] = rate * trainer.guard.lr_factor
        say(*(f"note: {text}" for text in [*changes, *found]))
        say(f"going on from {checkpoint} at step {trainer.progress.step:,}")
        return [*changes, *found]


class _ByCount:
    """The loader of a run whose settings or data have changed: goes on after as many batches as were read, whatever they hold now."""

    def __init__(self, loader: BatchLoader[Any]) -> None:
        self.loader = loader
        self.set_epoch, self.state_dict, self.start_at = loader.set_epoch, loader.state_dict, loader.start_at

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loader.start_at(state["epoch"], state["batches"])


def settings_of(job: TrainingJob, data: Data) -> dict[str, Any]:
    """What a checkpoint tells of its run: all settings, and where the labels or tokens come from."""
    return {**to_dict(job), "lineage": data.lineage}


def expected_steps(config: TrainerConfig, seconds: float | None) -> int:
    """Optimizer steps until training ends, for an epoch of so many seconds of audio; 0: not known."""
    if not seconds:
        return config.max_steps
    in_epochs = math.ceil(seconds / config.batch.seconds_per_update) * config.max_epochs
    return min(config.max_steps or in_epochs, in_epochs)


def prepare_model(job: Any, make: Callable[[], Model], device: torch.device) -> Model:
    """The model with weights drawn from the seed, the same on every rank and on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = make()
    model.encoder.recompute_layers = job.activation_checkpointing
    if job.data.normalize and isinstance(model.frontend, WaveformFrontend):
        model.frontend.normalizes_audio = False  # the data is normalised already, over whole utterances instead of crops
    return model.to(device)


def units_to_shard(model: nn.Module) -> list[nn.Module]:
    """The encoder's layers: what is gathered, used and let go of together."""
    return [module for module in model.modules() if isinstance(module, ZipformerLayer | TransformerLayer)]
