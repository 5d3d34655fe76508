"""The training loop: any model, one process or many.

    trainer = Trainer(model, optimizer, schedule, TrainerConfig(), device=device, folder=Path("exp"), model_config=to_dict(config))
    trainer.fit(train_loader, valid_loader)

The model is the task: `forward(batch)` returns a `LossOutput`, and the loop knows nothing else of speech. Nothing in it waits for the
device except logging, validation, checkpoints and the running average.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from k2ssl import distributed
from k2ssl.optim.schedules import LearningRateSchedule
from k2ssl.train.averaging import RunningAverage
from k2ssl.train.checkpoint import CheckpointFolder, KeepConfig, check_records, open_checkpoint
from k2ssl.train.contract import Batch, Evaluation, Loader, Made
from k2ssl.train.guard import Guard, GuardConfig, Verdict
from k2ssl.train.ledger import Ledger, Status
from k2ssl.train.logger import TrainingLog
from k2ssl.train.memory import PeakMemory
from k2ssl.train.meter import Meter
from k2ssl.train.metrics import MetricSums
from k2ssl.train.plan import BatchConfig, BatchPlan
from k2ssl.train.precision import Precision, choose_precision
from k2ssl.train.recovery import handle, prepare_folder
from k2ssl.train.sharding import full_state, is_sharded
from k2ssl.train.state import Progress, checkpoint_content, go_on_reading, load_checkpoint_content, load_local_state, local_state
from k2ssl.train.stop import StopRequest
from k2ssl.train.update import Moment, Normalization, Sharding, Update
from k2ssl.train.validation import is_time_to_validate, validate, validate_once

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerConfig:
    """How training goes on; what is trained and on what is said elsewhere.

    Attributes:
        max_steps: optimizer steps after which training ends; 0: only max_epochs ends it.
        max_epochs: passes over the training data after which it ends.
        batch: seconds of audio per update.
        precision: number format of the forward pass; auto: bfloat16 on GPUs that have it, float16 on others, float32 on the CPU.
        normalize_by: targets: gradients are divided by the number of targets of the update; none: by the number of micro-batches only.
        sharding: none: every rank holds the whole model; fsdp: parameters, gradients and optimizer state are dealt out to the ranks.
        average_period: optimizer steps between additions to the running average of the weights; 0: no average.
        valid_every: optimizer steps between validations; 0: only at the end.
        valid_average: validate the averaged weights instead of the present ones.
        log_every: optimizer steps between lines of the log.
        keep: which checkpoints are written and kept.
        guard: what counts as divergence, and what is done about it.
        tensorboard: write TensorBoard files too, if it is installed.
    """

    max_steps: int = 0
    max_epochs: int = 300
    batch: BatchConfig = field(default_factory=BatchConfig)
    precision: Precision = "auto"
    normalize_by: Normalization = "targets"
    sharding: Sharding = "none"
    average_period: int = 200
    valid_every: int = 1000
    valid_average: bool = False
    log_every: int = 50
    keep: KeepConfig = field(default_factory=KeepConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name, least in (("max_steps", 0), ("max_epochs", 1), ("average_period", 0), ("valid_every", 0), ("log_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"TrainerConfig: {name} is {getattr(self, name)}, a whole number >= {least} is needed")
        if self.valid_average and self.sharding != "none":
            raise ValueError(
                f"TrainerConfig: valid_average is True and sharding {self.sharding!r}, allowed is one of the two: the average is whole"
            )
        if self.valid_average and not self.average_period:
            raise ValueError("TrainerConfig: valid_average is True, but average_period is 0, so that there is no average")


class Trainer:
    """Trains one model; see the module.

    Args:
        model: on `device` already, with `clock` and `check_batch`; see `k2ssl.batch`.
        optimizer, schedule: of its parameters.
        config: see there.
        device: of this rank.
        parallel: `model` as the ranks run it together (see `parallelise`), if they do; `optimizer` is of its parameters.
        folder: for checkpoints, logs and the ledger; None writes nothing, for tests and trials.
        model_config: what the model is built from, plain values; travels in the checkpoints.
        job: settings of the whole job, plain values; travel too.
        extra: what else travels in the checkpoints, plain values and tensors by names of their own.
        evaluation: made anew for every validation, which it gives further numbers.
        score_by: which number of a validation decides which checkpoints are the best; lower is better.
        sample_rate: of the audio, Hz; turns samples into hours.
        seed: of everything drawn during training.
        program: name in the ledger.
        expected_steps: of the whole run, where `max_steps` does not say it; for the remaining time that people are shown.
        quiet: plain lines instead of a progress bar.

    Raises:
        ValueError: settings that this device or this number of processes cannot meet.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LearningRateSchedule,
        config: TrainerConfig,
        *,
        device: torch.device,
        folder: Path | None,
        model_config: Mapping[str, Any],
        parallel: nn.Module | None = None,
        job: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        evaluation: Callable[[], Evaluation] | None = None,
        score_by: str = "loss",
        sample_rate: int = 16000,
        seed: int = 0,
        program: str = "train",
        expected_steps: int = 0,
        quiet: bool = False,
    ) -> None:
        self.model, self.optimizer, self.schedule, self.config = model, optimizer, schedule, config
        self.device, self.folder, self.seed, self.quiet = device, folder, seed, quiet
        self.model_config, self.job, self.extra = dict(model_config), dict(job or {}), dict(extra or {})
        self.evaluation, self.score_by = evaluation, score_by
        self.sample_rate, self.expected_steps = sample_rate, expected_steps
        self.plan = BatchPlan.of(config.batch, distributed.world_size())
        dtype = choose_precision(config.precision, device)
        self.update = Update(model, optimizer, device, dtype, normalize_by=config.normalize_by, parallel=parallel)
        self.progress = Progress()
        weights = self._whole_weights() if config.average_period else {}
        self.average = RunningAverage(weights, config.average_period) if weights and distributed.is_main() else None
        writes = folder is not None and distributed.is_main()
        self.checkpoints = CheckpointFolder(folder / "checkpoints", config.keep) if folder is not None and writes else None  # on rank 0
        self.guard = Guard(config.guard, folder if writes else None, device, overflows=self.update.loss_scale is not None)
        self.memory = PeakMemory(device)
        self.ledger = Ledger(folder, program, device, distributed.world_size()) if folder is not None else None
        self.log: TrainingLog | None = None
        self.position: dict[str, Any] | None = None  # of the loader, after the last update that was trained on
        self.stop = StopRequest()
        self.stopping = False  # a signal came
        self.recent: list[Made] = []  # the last two updates, to look into when one of them turns out bad
        self.meter = Meter(self.progress.step)
        self.validated, self.saved, self._resumed = -1, -1, -1  # the last steps that were
        self.score: float | None = None  # of the step that was validated; None: its checkpoint has it

    def fit(self, loader: Loader, valid_loader: Iterable[Batch] | None = None) -> bool:
        """Train to the end.

        Returns:
            False if a signal ended it before; a checkpoint has been written then.

        Raises:
            DivergedError: training diverged again and again.
            ValueError: an epoch without a batch for every rank, or a batch that the model refuses.
        """
        total = self.expected_steps or self.config.max_steps
        log_folder = self.folder if distributed.is_main() else None
        self.log = TrainingLog(
            log_folder,
            total_steps=total,
            resumed_at=self.progress.step,
            validated=valid_loader is None or self.validated == self.progress.step or not (is_time_to_validate(self) or self._is_over()),
            quiet=self.quiet,
            tensorboard=self.config.tensorboard,
        )
        status: Status = "failed"
        try:
            with self.stop:
                self._run(loader, valid_loader)
                with distributed.failing_together():  # launchers kill the ranks that remain some seconds after one has ended
                    if self.checkpoints is not None:
                        self.checkpoints.wait()
            status = "interrupted" if self.stopping else "done"
        except (KeyboardInterrupt, SystemExit):  # a second signal
            status = "interrupted"
            raise
        finally:
            try:
                if self.checkpoints is not None:
                    self.checkpoints.wait()
            finally:
                if self.ledger is not None:
                    self.ledger.close(status)
                self.log.close()
        return not self.stopping

    def train_step(self, batches: Sequence[Batch]) -> None:
        """One optimizer step from the micro-batches of one update."""
        progress = self.progress
        progress.batch_count += self.plan.count_per_step
        # upstream counts the present step too: at a rate that rises from 0, the first step is not lost
        self.schedule.advance(progress.step + 1, progress.epoch)
        scale = None if self.update.loss_scale is None else self.update.loss_scale.scale  # that of this step: the update replaces it
        self.update(batches, Moment(self.seed, progress.step, progress.batch_count), self.guard)
        self.recent = [*self.recent[-1:], Made(progress.step + 1, progress.batch_count, tuple(batches), scale)]
        progress.step += 1
        progress.epoch_updates += 1
        self.meter.samples += sum(batch.num_samples for batch in batches)
        self.update_average()
        if self.log is not None:
            self.log.tick(progress.step)

    def validate(self, loader: Iterable[Batch]) -> dict[str, float]:
        """Means over all batches of all ranks; empty if a signal came meanwhile. See `k2ssl.train.validation`."""
        return validate(self, loader)

    def save(self) -> None:
        """Write a checkpoint, with the score of the step if it was validated; called by all ranks."""
        self.count_audio()
        if self.folder is None:
            return
        self.saved = self.progress.step
        content = checkpoint_content(self)
        score = self.score if self.validated == self.saved else None
        with distributed.failing_together():
            if self.checkpoints is not None:
                self.checkpoints.save(self.progress.step, content, score)
        if self.ledger is not None:
            self.ledger.write()

    def resume(self, path: Path, loader: Loader, checked: bool = False) -> list[str]:
        """Go on from a checkpoint, exactly where its run was if ranks and batches are the same. `checked`: its records were compared.

        Returns:
            What has changed since, one line each.

        Raises:
            ValueError: the checkpoint cannot be read, or is of another model, optimizer or loader; names what differs.
        """
        if not checked:
            check_records(path)
        content = open_checkpoint(path)
        try:
            load_checkpoint_content(self, content)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{path}: this run cannot go on from it: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        go_on_reading(self, content, loader)
        self.saved = self._resumed = step = self.progress.step
        self.meter = Meter(step)
        if distributed.broadcast_object(self.checkpoints is not None and self.checkpoints.has_score(step)):
            self.validated, self.score = step, None
        return self.plan.changes(content["plan"])

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, by reference; see `local_state`."""
        return local_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back a copy of `state_dict`."""
        load_local_state(self, state)
        self.recent, self.meter = [], Meter(self.progress.step)

    # --- the loop ------------------------------------------------------------------------------------------------------------------------

    def _run(self, loader: Loader, valid_loader: Iterable[Batch] | None) -> None:
        prepare_folder(self, resumed=self._resumed == self.progress.step)
        self.meter = Meter(self.progress.step)
        if self.progress.step and is_time_to_validate(self):
            validate_once(self, valid_loader)  # what went before may have ended in it
        while not self._is_over():
            loader.set_epoch(self.progress.epoch)
            before = self.progress.epoch_updates
            for batches in self._updates(loader):
                self.train_step(batches)
                self._after_step(valid_loader)
                if self._is_over():
                    break
            if self.stopping:
                if self.saved != self.progress.step:
                    self.save()
                return
            if self._is_over():
                break
            if self.progress.epoch_updates == before == 0:
                raise ValueError(f"epoch {self.progress.epoch} has no batch for every rank")
            self.progress.epoch += 1
            self.progress.epoch_updates = 0
        handle(self, replace(self.guard.flush(), action="continue"))  # the last step is told of; there is none left to repeat
        if self.saved != self.progress.step:
            self.save()
        validate_once(self, valid_loader)

    def _is_over(self) -> bool:
        config, progress = self.config, self.progress
        return progress.epoch >= config.max_epochs or 0 < config.max_steps <= progress.step

    def _updates(self, loader: Loader) -> Iterator[list[Batch]]:
        """The micro-batches of one update after the other, as many on every rank as on the one that has fewest."""
        batches = iter(loader)
        while True:
            started = time.monotonic()
            group = list(islice(batches, self.plan.accumulation))
            position = loader.state_dict()
            count, going_on = distributed.agree(len(group), int(not self.stop.requested))
            self.meter.waited += time.monotonic() - started
            self.stopping = not going_on
            if self.stopping or not count:
                return
            self.position = position
            yield group[:count]

    def _after_step(self, valid_loader: Iterable[Batch] | None) -> None:
        config, step = self.config, self.progress.step
        verdict = self.guard.poll(step, self.recent[-1].ids)
        handle(self, verdict)
        if verdict.action == "continue" and step % config.log_every == 0:
            verdict = self._log_step()
            handle(self, verdict)
        if verdict.action != "continue":
            return  # rolled back: the step is another one now
        if step % config.keep.save_every == 0:
            self.save()  # before a validation, during which launchers may lose patience with a signal unanswered
        if is_time_to_validate(self):
            validate_once(self, valid_loader)

    def _log_step(self) -> Verdict:
        """Bring the sums of the last steps to the host, and show them."""
        self.count_audio()
        values = self.update.metrics.reduce()
        values |= {
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": float(self.update.grad_norm),
            "epoch": self.progress.epoch,
            "batch_count": self.progress.batch_count,
            "audio_hours": self.progress.audio_seconds / 3600,
            "memory_gib": self.memory.bytes / 2**30,
            **self.meter.lap(),
        }
        scale = None if self.update.loss_scale is None else float(self.update.loss_scale.scale)
        if scale is not None:
            values["loss_scale"] = scale
        if self.log is not None:
            self.log.train(self.progress.step, values)
        if self.ledger is not None:
            self.ledger.write()
        return self.guard.check_log(self.progress.step, values.get("perplexity_predicted"), scale)

    def count_audio(self) -> None:
        """Add the audio of all ranks since the last call to the sums."""
        meter, steps = self.meter, self.progress.step - self.meter.counted_step
        seconds = float(distributed.all_reduce_sum(torch.tensor(meter.samples, dtype=torch.float64))) / self.sample_rate
        meter.samples, meter.counted_step = 0, self.progress.step
        meter.seconds += seconds
        meter.steps += steps
        self.progress.audio_seconds += seconds
        if self.ledger is not None:
            self.ledger.add(audio_seconds=seconds, steps=steps)

    # --- averages and roll-backs -----------------------------------------------------------------------------------------------------------

    def update_average(self, now: bool = False) -> None:
        """Add the weights to the running average if it is time to, or `now` to see what it takes; called by all ranks."""
        period = self.config.average_period
        if period and (now or self.progress.step % period == 0):
            weights = self._whole_weights()
            if self.average is not None:
                self.average.update(weights, self.average.step + period if now else self.progress.step)

    def _whole_weights(self) -> Mapping[str, Any]:
        """The model's weights, put together on rank 0 where they are sharded; to be called by all ranks."""
        weights = self.model.state_dict()
        return full_state(weights) if is_sharded(self.update.parallel) else weights

    def rewound(self, step: int) -> None:
        """Training goes on from an earlier `step`; called by a roll-back."""
        self.recent, self.validated = [], -1  # a later step may have been, which is to come again
        self.meter = Meter(step)
        self.update.metrics = MetricSums(self.device)
        if self.log is not None:
            self.log.rewind(step)

    def say(self, text: str) -> None:
        """An event, for people and for the log."""
        if self.log is not None:
            self.log.event(self.progress.step, text)
        else:
            _log.warning("step %d: %s", self.progress.step, text)
