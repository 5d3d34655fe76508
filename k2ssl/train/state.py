"""Everything that training goes on from: gathered into one checkpoint for all ranks, and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from k2ssl import distributed
from k2ssl.train.differences import differences
from k2ssl.train.sharding import full_state, is_sharded, load_full_state

if TYPE_CHECKING:
    from k2ssl.train.contract import Loader
    from k2ssl.train.trainer import Trainer


@dataclass
class Progress:
    """How far training is.

    Attributes:
        step: optimizer steps done.
        epoch: passes over the data done.
        epoch_updates: updates made in the present pass.
        batch_count: adjusted batch count of the last step; see `BatchPlan.count_per_step`.
        audio_seconds: of audio trained on, over all ranks.
    """

    step: int = 0
    epoch: int = 0
    epoch_updates: int = 0
    batch_count: float = 0.0
    audio_seconds: float = 0.0

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `asdict` gave."""
        for item in fields(self):
            setattr(self, item.name, state[item.name])


def local_state(trainer: Trainer) -> dict[str, Any]:
    """What this rank trains with, by reference; copy what is to be kept while training goes on."""
    update, average = trainer.update, trainer.average
    return {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.schedule.state_dict(),
        "loss_scale": None if update.loss_scale is None else update.loss_scale.state_dict(),
        "average": None if average is None else average.state_dict(),
        "guard": trainer.guard.state_dict(),
        "progress": asdict(trainer.progress),
        "rank": _rank_state(trainer),
    }


def load_local_state(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Put back what `local_state` gave on the same rank, or a copy of it; an optimizer of torch may go on to use the very tensors."""
    trainer.model.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    _load_common(trainer, state)
    _load_rank_state(trainer, state["rank"])


def checkpoint_content(trainer: Trainer) -> dict[str, Any]:
    """The whole state over all ranks; to be called by all of them, complete on rank 0 only."""
    state = local_state(trainer)
    ranks = distributed.gather_objects(state.pop("rank"))
    sharded = is_sharded(trainer.update.parallel)
    for name in ("model", "optimizer") if sharded else ():
        state[name] = full_state(state[name])
    return {
        **trainer.extra,
        **state,
        "config": trainer.model_config,
        "job": trainer.job,
        "plan": asdict(trainer.plan),
        "loader": trainer.position,
        "ranks": ranks,
    }


def load_checkpoint_content(trainer: Trainer, content: Mapping[str, Any]) -> None:
    """Go on from a checkpoint, but for the loader; on every rank. The number of ranks may have changed: what differs between them is
    drawn anew at every step anyway.

    Raises:
        ValueError: the checkpoint is of another model or of another optimizer; names what differs.
    """
    check_same_model(content["config"], trainer.model_config)
    if is_sharded(trainer.update.parallel):
        load_full_state(trainer.model, trainer.optimizer, content["model"], content["optimizer"])
    else:
        trainer.model.load_state_dict(content["model"])
        trainer.optimizer.load_state_dict(content["optimizer"])
    _load_common(trainer, content)
    ranks, rank, world_size = content["ranks"], distributed.rank(), distributed.world_size()
    state = ranks[min(rank, len(ranks) - 1)]
    if len(ranks) != world_size:
        # sums since the last line of the log are nobody's now; the utterances of ranks that are gone go to those that are there
        state = {**state, "metrics": trainer.update.metrics.state_dict(), "ids": _joined_ids(ranks[rank::world_size])}
    _load_rank_state(trainer, state)


def go_on_reading(trainer: Trainer, content: Mapping[str, Any], loader: Loader) -> None:
    """Let the loader go on where that of a checkpoint was; the same audio lies behind it then, in updates of another size perhaps."""
    saved, plan, progress = content["plan"], trainer.plan, trainer.progress
    trainer.position = content["loader"]
    if trainer.position is None:
        return
    updates = saved["seconds_per_update"] * progress.epoch_updates / plan.seconds_per_update
    progress.epoch_updates = max(1, round(updates)) if updates else 0  # an epoch that was begun stays one
    if plan.same_batches(saved):
        loader.load_state_dict(trainer.position)
    else:
        loader.start_at(progress.epoch, progress.epoch_updates * plan.accumulation)


def check_same_model(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Settings that the checkpoint does not know are newer than it; what they are by default is for the programs to know, which compare them.

    Raises:
        ValueError: the checkpoint's model was built from other settings; names each that differs.
    """
    if differing := differences(saved, present, new_keys=False):
        raise ValueError("the checkpoint is of another model: " + "; ".join(differing))


def _load_common(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """What is equal on all ranks, apart from model and optimizer; the schedule after the optimizer, whose rates it writes."""
    trainer.schedule.load_state_dict(state["schedule"])
    if trainer.update.loss_scale is not None and state["loss_scale"] is not None:
        trainer.update.loss_scale.load_state_dict(state["loss_scale"])
    if trainer.average is not None and state["average"] is not None:
        trainer.average.load_state_dict(state["average"])
    trainer.guard.load_state_dict(state["guard"])
    trainer.progress.load(state["progress"])


def _rank_state(trainer: Trainer) -> dict[str, Any]:
    clock: Any = trainer.model.clock
    state = {
        "clock": clock.state_dict(),
        "metrics": trainer.update.metrics.state_dict(),
        "generator": torch.get_rng_state(),
        "ids": trainer.guard.ids(),
    }
    if trainer.device.type == "cuda":
        state["cuda_generator"] = torch.cuda.get_rng_state(trainer.device)
    return state


def _joined_ids(ranks: Sequence[Mapping[str, Any]]) -> dict[int, list[str]]:
    """Of several ranks' states, the utterances by step."""
    joined: dict[int, list[str]] = {}
    for state in ranks:
        for step, ids in state.get("ids", {}).items():
            joined.setdefault(step, []).extend(ids)
    return joined


def _load_rank_state(trainer: Trainer, state: Mapping[str, Any]) -> None:
    clock: Any = trainer.model.clock
    clock.load_state_dict(state["clock"])
    trainer.update.metrics.load_state_dict(state["metrics"])
    torch.set_rng_state(state["generator"])
    if "ids" in state:  # not in the first checkpoints of this format
        trainer.guard.load_ids(state["ids"])
    if trainer.device.type == "cuda" and "cuda_generator" in state:
        torch.cuda.set_rng_state(state["cuda_generator"], trainer.device)
