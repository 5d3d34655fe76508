"""What the trainer does about bad steps: drops them, looks into them, goes back to a checkpoint, gives up."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from k2ssl.train import checkpoint
from k2ssl.train.checkpoint import KeepConfig, load_checkpoint
from k2ssl.train.guard import Guard, GuardConfig
from k2ssl.train.loss_scale import LossScale
from k2ssl.train.recovery import DivergedError, _first_broken_module

Curve = Callable[..., list[tuple[float, ...]]]


def test_one_poisoned_batch_is_skipped_and_written_down(toy: Any, curve: Curve, tmp_path: Path) -> None:
    trainer = toy.make_trainer(tmp_path, toy.make_config(8))
    assert trainer.fit(toy.ToyLoader(poisoned=(5,)))
    (incident,) = (json.loads(path.read_text()) for path in (tmp_path / "incidents").iterdir())
    assert (incident["step"], incident["kind"], incident["rollbacks"]) == (3, "non_finite_loss", 0)
    (found,) = incident["ranks"]
    assert found["ids"] == [f"utterance-0-{number}-{i}" for number in (4, 5) for i in range(2)]
    assert found["first_non_finite"].startswith("input"), found
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    assert trainer.guard.rollbacks == 0 and [step for step, *_ in curve(tmp_path)] == list(range(1, 9))


def test_a_stretch_of_bad_batches_is_left_behind_by_a_roll_back_at_a_lower_rate(toy: Any, curve: Curve, tmp_path: Path) -> None:
    config = toy.make_config(12, keep=KeepConfig(save_every=4), guard=GuardConfig(max_skipped=2, lr_factor=0.5))
    trainer = toy.make_trainer(tmp_path, config)
    loader = toy.ToyLoader(num_batches=100, poisoned=(12, 14))  # steps 7 and 8
    assert trainer.fit(loader)
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"event"' in line]
    assert [event["text"].split(",")[0] for event in events][-1] == "rolled back to step 4"
    assert trainer.guard.rollbacks == 1 and trainer.progress.step == 12
    # the data goes on: no batch twice
    assert loader.handed_out == [(0, number) for number in range(len(loader.handed_out))]
    assert [step for step, *_ in curve(tmp_path)] == list(range(1, 13))
    # Eden with warm-up over 10 batches, at half the base rate
    rates = dict(curve(tmp_path, "lr"))
    eden = lambda b: (1 + (b / 100) ** 2) ** -0.25 * min(b / 10, 1)  # noqa: E731
    assert rates[3] == pytest.approx(0.045 * eden(3)) and rates[12] == pytest.approx(0.5 * 0.045 * eden(12))
    saved = load_checkpoint(trainer.checkpoints.latest())
    assert saved["guard"]["rollbacks"] == 1


def test_a_persistent_fault_ends_the_run_after_so_many_roll_backs(toy: Any, tmp_path: Path) -> None:
    config = toy.make_config(30, keep=KeepConfig(save_every=2), guard=GuardConfig(max_skipped=2, max_rollbacks=2))
    trainer = toy.make_trainer(tmp_path, config)
    with pytest.raises(DivergedError, match=r"after 2 roll-backs, max_rollbacks is 2; see .*incidents"):
        trainer.fit(toy.ToyLoader(num_batches=200, poisoned=tuple(range(8, 200))))
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    assert '"failed"' in (tmp_path / "ledger.jsonl").read_text().splitlines()[-1]
    assert len(list((tmp_path / "incidents").iterdir())) >= 3


def test_a_roll_back_survives_a_restart(toy: Any, tmp_path: Path) -> None:
    config = toy.make_config(10, keep=KeepConfig(save_every=4), guard=GuardConfig(max_skipped=2))
    trainer = toy.make_trainer(tmp_path, config)
    trainer.fit(toy.ToyLoader(num_batches=100, poisoned=(12, 14)))
    again = toy.make_trainer(tmp_path, toy.make_config(12, guard=GuardConfig(max_skipped=2)))
    loader = toy.ToyLoader(num_batches=100)
    again.resume(again.checkpoints.latest(), loader)
    assert again.guard.rollbacks == 1
    again.fit(loader)
    assert again.optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.0225)


def test_two_roll_backs_lower_the_rate_twice(toy: Any, tmp_path: Path) -> None:
    config = toy.make_config(14, keep=KeepConfig(save_every=4), guard=GuardConfig(max_skipped=2))
    trainer = toy.make_trainer(tmp_path, config)
    assert trainer.fit(toy.ToyLoader(num_batches=100, poisoned=(12, 14, 30, 32)))
    assert trainer.guard.rollbacks == 2
    assert trainer.optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.045 / 4)


def test_a_collapse_of_the_predicted_codes_rolls_back_and_keeps_the_checkpoints_before_it(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("k2ssl.train.guard._WINDOW", 5)
    config = toy.make_config(20, keep=KeepConfig(save_every=4, keep_last=9), guard=GuardConfig(max_skipped=4))
    trainer = toy.make_trainer(tmp_path, config)
    reduce = trainer.update.metrics.reduce
    seen: list[int] = []

    def collapsed_once() -> dict[str, float]:
        seen.append(trainer.progress.step)
        perplexity = {1: 1.5, 14: 0.1}.get(len(seen), 4.0)  # learnt, then gone at the fourteenth line
        return {**reduce(), "perplexity_predicted": perplexity}

    monkeypatch.setattr(trainer.update.metrics, "reduce", collapsed_once)
    assert trainer.fit(toy.ToyLoader(num_batches=200, poisoned=(4,)))  # step 3 is long forgotten at step 14
    assert trainer.guard.rollbacks == 1
    assert seen[13] == 14 and "rolled back to step 12" in (tmp_path / "metrics.jsonl").read_text()
    assert [path.name for path in trainer.checkpoints.paths()] == [f"step-{step:09d}.pt" for step in range(0, 21, 4)]
    (collapse,) = [path for path in (tmp_path / "incidents").iterdir() if "collapsed_codes" in path.name]
    assert json.loads(collapse.read_text())["value"] == 0.1


def test_where_a_collapse_is_still_there_after_a_roll_back_the_next_one_goes_further(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = toy.make_trainer(tmp_path, toy.make_config(20, keep=KeepConfig(save_every=4, keep_last=9)))
    lines = iter([1.5, *[4.0] * 12, 0.1, 0.1])  # the checkpoint of step 12 has it already
    kind = type(trainer.update.metrics)
    reduce = kind.reduce
    monkeypatch.setattr(kind, "reduce", lambda metrics: {**reduce(metrics), "perplexity_predicted": next(lines, 4.0)})
    assert trainer.fit(toy.ToyLoader(num_batches=200))
    assert trainer.guard.rollbacks == 2
    assert re.findall(r"rolled back to step (\d+)", (tmp_path / "metrics.jsonl").read_text()) == ["12", "8"]


def test_a_scale_that_collapsed_over_a_checkpoint_does_not_stop_a_run_that_is_sound_again(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(toy.make_config(40, keep=KeepConfig(save_every=4, keep_last=9)), log_every=10)
    trainer = toy.make_trainer(tmp_path, config)
    trainer.update.loss_scale = LossScale("cpu")
    trainer.guard = Guard(config.guard, tmp_path, "cpu", overflows=True)
    divide, updates = trainer.update._divide_gradients, itertools.count(1)

    def overflow(num_targets: torch.Tensor, num_batches: int) -> None:
        divide(num_targets, num_batches)
        if 5 <= next(updates) <= 25:  # over the checkpoints of 8 to 24
            trainer.update.params[0].grad.fill_(float("inf"))

    monkeypatch.setattr(trainer.update, "_divide_gradients", overflow)
    assert trainer.fit(toy.ToyLoader(num_batches=300))
    assert re.findall(r"rolled back to step (\d+)", (tmp_path / "metrics.jsonl").read_text()) == ["20"]
    assert trainer.guard.rollbacks == 1 and trainer.update.loss_scale.scale >= 1


def test_looking_into_a_bad_step_does_not_change_what_comes_after(toy: Any, curve: Curve, tmp_path: Path, monkeypatch: Any) -> None:
    toy.make_trainer(tmp_path / "with", toy.make_config(6)).fit(toy.ToyLoader(poisoned=(3,)))
    monkeypatch.setattr("k2ssl.train.recovery._first_broken_module", lambda trainer, made: None)
    toy.make_trainer(tmp_path / "without", toy.make_config(6)).fit(toy.ToyLoader(poisoned=(3,)))
    assert curve(tmp_path / "with") == curve(tmp_path / "without")


def test_a_bad_step_is_looked_into_with_its_own_draws_count_and_number(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = toy.make_trainer(tmp_path, toy.make_config(5))
    clock, seen = trainer.model.clock, []
    seed = clock.seed

    def noted(*parts: int) -> None:
        seen.append((parts, clock.batch_count, trainer.model.step))
        seed(*parts)

    monkeypatch.setattr(clock, "seed", noted)
    monkeypatch.setattr("k2ssl.train.recovery.find_nonfinite", lambda model, run: None)  # goes on to the last micro-batch
    trainer.fit(toy.ToyLoader(poisoned=(5,)))  # step 3, which is known of after step 4
    assert len(seen) == 12 and seen[8:10] == seen[4:6] and seen[4][0] == (7, 2, 0)
    assert trainer.model.step == 4  # steps done before the last one


def test_a_bad_step_is_looked_into_with_the_loss_scale_that_it_had(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = toy.make_trainer(None, toy.make_config(3))
    trainer.update.loss_scale = LossScale("cpu", init=16.0, growth_interval=1)  # another one after every step
    trainer.guard = Guard(trainer.config.guard, None, "cpu", overflows=True)
    batches, losses = list(toy.ToyLoader()), []
    monkeypatch.setattr("k2ssl.train.recovery.find_nonfinite", lambda model, run: losses.append(run().item()))
    for step in range(2):
        trainer.train_step(batches[2 * step : 2 * step + 2])
    first, second = trainer.recent
    assert [first.loss_scale, second.loss_scale, trainer.update.loss_scale.scale] == [16.0, 32.0, 64.0]
    assert _first_broken_module(trainer, first) is None
    assert _first_broken_module(trainer, dataclasses.replace(first, loss_scale=None)) is None
    assert losses[0] / losses[2] == losses[1] / losses[3] == 16.0
    assert trainer.model.step == 1  # put back


def test_a_run_that_began_from_another_folder_can_be_rolled_back_before_its_first_checkpoint(toy: Any, tmp_path: Path) -> None:
    toy.make_trainer(tmp_path / "one", toy.make_config(3)).fit(toy.ToyLoader(num_batches=100))
    config = toy.make_config(8, guard=GuardConfig(max_skipped=2))
    trainer, loader = toy.make_trainer(tmp_path / "other", config), toy.ToyLoader(num_batches=100, poisoned=(8, 10))  # steps 5 and 6
    trainer.resume(tmp_path / "one/checkpoints/step-000000003.pt", loader)
    assert trainer.fit(loader)
    assert "rolled back to step 3" in (tmp_path / "other/metrics.jsonl").read_text()
    assert [path.name for path in trainer.checkpoints.paths()] == ["step-000000003.pt", "step-000000008.pt"]


def test_a_roll_back_without_any_checkpoint_is_a_stop_that_says_so(toy: Any, tmp_path: Path) -> None:
    trainer = toy.make_trainer(tmp_path, toy.make_config(8, guard=GuardConfig(max_skipped=2)))
    loader = toy.ToyLoader(num_batches=100, poisoned=(6, 8))
    handed_out = loader.handed_out
    train_step = trainer.train_step

    def lose_the_checkpoints(batches: Any) -> None:
        trainer.checkpoints.wait()
        for path in trainer.checkpoints.paths():
            path.unlink()
        train_step(batches)

    trainer.train_step = lose_the_checkpoints
    with pytest.raises(DivergedError, match=r"at step 4, and there is no checkpoint in .* to go back to"):
        trainer.fit(loader)
    assert handed_out


def test_a_roll_back_goes_past_a_checkpoint_that_could_not_be_written(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, failed = checkpoint.save_atomically, []

    def full(path: Path, *arguments: Any) -> None:
        if "000004" in path.name and not failed:
            failed.append(path)
            raise OSError(28, "No space left on device", str(path))
        write(path, *arguments)

    monkeypatch.setattr(checkpoint, "save_atomically", full)
    config = toy.make_config(8, keep=KeepConfig(save_every=2, keep_last=9), guard=GuardConfig(max_skipped=2))
    trainer = toy.make_trainer(tmp_path, config)
    assert trainer.fit(toy.ToyLoader(20, poisoned=(9, 11)))
    assert failed and trainer.guard.rollbacks == 1
    assert "rolled back to step 2" in (tmp_path / "metrics.jsonl").read_text()


def test_later_checkpoints_stay_until_training_begins(toy: Any, tmp_path: Path) -> None:
    keep = KeepConfig(save_every=2, keep_last=9)
    toy.make_trainer(tmp_path, toy.make_config(4, keep=keep)).fit(toy.ToyLoader())
    again, loader = toy.make_trainer(tmp_path, toy.make_config(3, keep=keep)), toy.ToyLoader()
    again.resume(tmp_path / "checkpoints/step-000000002.pt", loader)
    assert len(again.checkpoints.paths()) == 3
    again.fit(loader)
    assert [path.name for path in again.checkpoints.paths()] == [f"step-00000000{step}.pt" for step in (0, 2, 3)]
