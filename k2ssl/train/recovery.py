"""What the trainer does about a bad step: look into it, tell, and roll back where dropping steps is not enough."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from k2ssl import distributed
from k2ssl.train.checkpoint import open_checkpoint
from k2ssl.train.guard import Guard, Incident, Verdict
from k2ssl.train.inf_check import find_nonfinite
from k2ssl.train.precision import autocast
from k2ssl.train.sharding import is_sharded
from k2ssl.train.state import load_checkpoint_content
from k2ssl.train.update import draws_of

if TYPE_CHECKING:
    from k2ssl.train.contract import Made
    from k2ssl.train.trainer import Trainer

_log = logging.getLogger(__name__)


class DivergedError(ValueError):
    """Training diverged more often than it may be rolled back."""


def prepare_folder(trainer: Trainer, resumed: bool) -> None:
    """See to it that there is a checkpoint to roll back to and, in a run that was `resumed`, none of a later step; called by all ranks."""
    step, has_none = trainer.progress.step, False
    if trainer.checkpoints is not None:
        if resumed:
            trainer.checkpoints.drop_after(step)
        has_none = not trainer.checkpoints.paths()
    if step == 0 or distributed.broadcast_object(has_none):
        trainer.save()
        with distributed.failing_together():  # now, before anything is trained that cannot be kept
            if trainer.checkpoints is not None:
                trainer.checkpoints.wait()


def handle(trainer: Trainer, verdict: Verdict) -> None:
    """Act upon a verdict; called by all ranks, which all have the same.

    Raises:
        DivergedError: the verdict is to stop.
    """
    for incident in verdict.incidents:
        _report(trainer, incident)
    if verdict.action == "stop":
        last = verdict.incidents[-1]
        raise DivergedError(
            f"training diverged at step {last.step} ({last.kind}) after {trainer.guard.rollbacks} roll-backs, max_rollbacks is "
            f"{trainer.config.guard.max_rollbacks}; see {trainer.guard.folder or 'the log'}"
        )
    if verdict.action == "roll_back":
        _roll_back(trainer, verdict)


def _report(trainer: Trainer, incident: Incident) -> None:
    """Write the incident down, with the utterances of every rank and the first module that computed something not finite."""
    made = next((made for made in trainer.recent if made.step == incident.step), None)
    progress = trainer.progress
    count = progress.batch_count - (progress.step - incident.step) * trainer.plan.count_per_step if made is None else made.batch_count
    broken = _first_broken_module(trainer, made) if made is not None and incident.kind.startswith("non_finite") else None
    found = distributed.gather_objects({"ids": incident.ids, "first_non_finite": broken})
    if found is None:
        return
    trainer.guard.write_incident(incident, {"ranks": found, "batch_count": count})
    where = next((f", first in {entry['first_non_finite']}" for entry in found if entry["first_non_finite"]), "")
    trainer.say(f"{incident.kind.replace('_', ' ')} at step {incident.step}{where}")


def _first_broken_module(trainer: Trainer, made: Made) -> str | None:
    """Replay the step's micro-batches of this rank, with its draws and its scale, until something is not finite. The weights are those of
    the next step by now, which only coasted or did not move."""
    if is_sharded(trainer.update.parallel):
        return None  # one rank alone cannot run a sharded model
    model: Any = trainer.model
    clock = model.clock
    before, step = clock.state_dict(), model.step
    try:
        model.step = made.step - 1
        for number, batch in enumerate(made.batches):
            clock.batch_count = made.batch_count
            clock.seed(*draws_of(trainer.seed, number, made.step - 1))

            def run(batch: Any = batch) -> Any:
                with autocast(trainer.update.dtype, trainer.device):
                    loss = model(batch.to(trainer.device)).loss
                return loss if made.loss_scale is None else loss * made.loss_scale

            if (name := find_nonfinite(model, run)) is not None:
                return name
    except Exception as error:  # no memory for the gradients a second time, for one: telling where is worth no more than the run
        return f"(not found: {error})"
    finally:
        clock.load_state_dict(before)
        model.step = step
    return None


def _began(guard: Guard, incident: Incident) -> int:
    """The first step that may be bad. A collapse is seen when something is logged, and may have begun after the last time that it was not."""
    if not incident.kind.startswith("collapsed") or guard.sound_step is None:
        return incident.step
    return min(incident.step, guard.sound_step + 1)


def _roll_back(trainer: Trainer, verdict: Verdict) -> None:
    """Go back to the newest checkpoint from before the first bad step that is still counted; the data goes on from where it is, so that
    what triggered it is not seen again, and the rate is lowered."""
    incidents: Sequence[Incident] = (*trainer.guard.recent, *verdict.incidents)
    first_bad = min(_began(trainer.guard, incident) for incident in incidents)
    position, epoch, updates = trainer.position, trainer.progress.epoch, trainer.progress.epoch_updates
    trainer.count_audio()  # what was trained on in vain has been paid for too
    if trainer.folder is None:
        raise DivergedError(f"training diverged at step {first_bad}, and there is no folder with checkpoints to go back to")
    path = None
    if trainer.checkpoints is not None:
        # waits for the one that is being written, and knows of it if that fails: the save below then says whether there is room again.
        # dropped steps leave no harm in the weights, and of a collapse a later roll-back may do better: any checkpoint is better than none
        path = trainer.checkpoints.latest(before=first_bad) or trainer.checkpoints.latest()
    path = distributed.broadcast_object(path)
    if path is None:
        raise DivergedError(f"training diverged at step {first_bad}, and there is no checkpoint in {trainer.folder} to go back to")
    content = open_checkpoint(path)  # its records were compared on rank 0
    load_checkpoint_content(trainer, content)
    trainer.position, trainer.progress.epoch, trainer.progress.epoch_updates = position, epoch, updates
    trainer.guard.rolled_back(trainer.progress.step)
    if trainer.update.loss_scale is not None:
        trainer.update.loss_scale.rescue()  # the checkpoint's may have been on its way down
    # the checkpoint's rates may have been lowered before
    factor = trainer.config.guard.lr_factor ** (trainer.guard.rollbacks - content["guard"]["rollbacks"])
    for group in trainer.optimizer.param_groups:
        group["initial_lr"] *= factor
    step = trainer.progress.step
    if trainer.checkpoints is not None:
        trainer.checkpoints.drop_after(step)
    trainer.rewound(step)
    trainer.say(
        f"rolled back to step {step}, roll-back {trainer.guard.rollbacks} of {trainer.config.guard.max_rollbacks}, learning rate x {trainer.guard.lr_factor:g}"
    )
    trainer.save()  # a checkpoint from before does not know of the roll-back, nor of the data to leave out
