"""The trainer in one process: what a step computes, what a resumed run repeats, and what happens when a batch is bad."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from k2ssl.optim.build import OptimConfig
from k2ssl.train.checkpoint import KeepConfig, load_checkpoint
from k2ssl.train.guard import Guard, GuardConfig
from k2ssl.train.loss_scale import LossScale
from k2ssl.train.recovery import DivergedError
from k2ssl.train.update import Moment

Curve = Callable[..., list[tuple[float, ...]]]


class Agreeable:
    """A judge that accepts everything."""

    def judge(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        return torch.tensor(True)


@pytest.mark.parametrize("normalize_by", ["targets", "none"])
def test_gradients_are_those_of_the_mean_over_all_targets_or_of_the_sum_over_micro_batches(toy: Any, normalize_by: str) -> None:
    model = toy.MeanModel()
    trainer = toy.make_trainer(None, toy.make_config(1, normalize_by=normalize_by, average_period=0), model=model)
    batches = [toy.batch(0, num_utterances=1), toy.batch(1, num_utterances=3)]
    reference = copy.deepcopy(model)
    errors = [reference.predicted(batch) - batch.labels[0].float().mean(dim=1) for batch in batches]
    loss = torch.cat(errors).square().mean() if normalize_by == "targets" else sum(error.square().sum() for error in errors) / 2
    loss.backward()
    trainer.update(batches, Moment(7, 0, 1.0), Agreeable())
    assert torch.allclose(model.weight.grad, reference.weight.grad, rtol=1e-6)
    assert trainer.update.grad_norm.item() == pytest.approx(reference.weight.grad.norm().item(), rel=1e-6)


def test_a_resumed_run_repeats_an_uninterrupted_one_bit_by_bit_across_epochs(toy: Any, curve: Curve, tmp_path: Path) -> None:
    whole = toy.make_trainer(tmp_path / "whole", toy.make_config(14))
    assert whole.fit(toy.ToyLoader(num_batches=10))
    first = toy.make_trainer(tmp_path / "halves", toy.make_config(8))
    first.fit(toy.ToyLoader(num_batches=10))  # ends in the middle of the second epoch of five updates
    toy.make_model(seed=3)  # other things draw from torch's generator in between
    second = toy.make_trainer(tmp_path / "halves", toy.make_config(14), model=toy.make_model(seed=9))
    loader = toy.ToyLoader(num_batches=10)
    assert second.resume(tmp_path / "halves/checkpoints/step-000000008.pt", loader) == []
    assert second.fit(loader)
    names = ("loss", "grad_norm", "lr", "batch_count", "epoch", "audio_hours")
    assert curve(tmp_path / "halves", *names) == curve(tmp_path / "whole", *names)
    assert len(curve(tmp_path / "whole")) == 14
    ends = [load_checkpoint(tmp_path / name / "checkpoints/step-000000014.pt") for name in ("whole", "halves")]
    assert not differing(*ends)
    assert loader.handed_out[0] == (1, 6)


def differing(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested states are not the same bits."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return [found for key in a for found in differing(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)):
        return (
            [path] if len(a) != len(b) else [f for i, (x, y) in enumerate(zip(a, b, strict=True)) for f in differing(x, y, f"{path}[{i}]")]
        )
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0))
        return [] if same else [path]
    return [] if a == b or (a != a and b != b) else [path]


def test_validation_gives_the_same_numbers_each_time_and_leaves_training_alone(toy: Any, curve: Curve, tmp_path: Path) -> None:
    valid = [toy.batch(100), toy.batch(101)]
    with_validation = toy.make_trainer(tmp_path / "with", toy.make_config(5, valid_every=2))
    with_validation.fit(toy.ToyLoader(), valid)
    without = toy.make_trainer(tmp_path / "without", toy.make_config(5))
    without.fit(toy.ToyLoader())
    assert curve(tmp_path / "with") == curve(tmp_path / "without")
    first, second = with_validation.validate(valid), with_validation.validate(valid)
    assert first == second and 0 < first["loss_masked"] < 20
    assert with_validation.model.training


def test_validation_with_averaged_weights_uses_them_and_puts_the_present_ones_back(toy: Any) -> None:
    trainer = toy.make_trainer(None, toy.make_config(6, average_period=2, valid_average=True))
    valid = [toy.batch(100)]
    trainer.fit(toy.ToyLoader())
    present = copy.deepcopy(trainer.model.state_dict())
    with trainer.average.swapped_in(trainer.model):
        by_hand = dataclasses.replace(trainer.config, valid_average=False)
        trainer.config, asked = by_hand, trainer.config
        expected = trainer.validate(valid)
        trainer.config = asked
    assert trainer.validate(valid) == expected
    trainer.config = by_hand
    assert trainer.validate(valid) != expected
    assert not differing(present, trainer.model.state_dict())


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


def test_adamw_is_left_as_it_was_by_a_poisoned_batch(toy: Any) -> None:
    trainer = toy.make_trainer(None, toy.make_config(8), optim=OptimConfig(name="adamw", lr=1e-3))
    loader = toy.ToyLoader(poisoned=(2,))
    batches = list(loader)
    trainer.train_step(batches[:2])
    before = copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict()["state"]))
    trainer.train_step(batches[2:4])
    after = (trainer.model.state_dict(), trainer.optimizer.state_dict()["state"])
    assert not differing(list(before), list(after))
    trainer.train_step(batches[4:6])
    assert differing(list(before), [trainer.model.state_dict(), trainer.optimizer.state_dict()["state"]])


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


def test_looking_into_a_bad_step_does_not_change_what_comes_after(toy: Any, curve: Curve, tmp_path: Path, monkeypatch: Any) -> None:
    toy.make_trainer(tmp_path / "with", toy.make_config(6)).fit(toy.ToyLoader(poisoned=(3,)))
    monkeypatch.setattr("k2ssl.train.recovery._first_broken_module", lambda trainer, made: None)
    toy.make_trainer(tmp_path / "without", toy.make_config(6)).fit(toy.ToyLoader(poisoned=(3,)))
    assert curve(tmp_path / "with") == curve(tmp_path / "without")


def test_sums_between_two_lines_of_the_log_survive_a_restart(toy: Any, curve: Curve, tmp_path: Path) -> None:
    config = dataclasses.replace(toy.make_config(6), log_every=3)
    toy.make_trainer(tmp_path / "whole", config).fit(toy.ToyLoader())
    toy.make_trainer(tmp_path / "halves", dataclasses.replace(config, max_steps=4)).fit(toy.ToyLoader())
    second, loader = toy.make_trainer(tmp_path / "halves", config), toy.ToyLoader()
    second.resume(second.checkpoints.latest(), loader)
    second.fit(loader)
    assert curve(tmp_path / "halves", "loss", "num_targets") == curve(tmp_path / "whole", "loss", "num_targets")


def test_the_last_step_is_validated_and_saved_once_and_a_finished_run_does_nothing_again(toy: Any, tmp_path: Path) -> None:
    config = toy.make_config(4, valid_every=2, keep=KeepConfig(save_every=2))
    trainer = toy.make_trainer(tmp_path, config)
    trainer.fit(toy.ToyLoader(), [toy.batch(100)])
    again, loader = toy.make_trainer(tmp_path, config), toy.ToyLoader()
    path = again.checkpoints.latest()
    written = path.stat().st_mtime_ns
    again.resume(path, loader)
    again.fit(loader, [toy.batch(100)])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "valid"] == [2, 4]
    assert path.stat().st_mtime_ns == written and not loader.handed_out


def test_a_scaled_loss_trains_as_an_unscaled_one_and_overflows_are_no_incidents(toy: Any, tmp_path: Path) -> None:
    losses, norms = [], []
    for scale in (None, 1024.0, 1e38):
        trainer = toy.make_trainer(tmp_path / str(scale), toy.make_config(9))
        if scale is not None:
            trainer.update.loss_scale = LossScale("cpu", init=scale)
            trainer.guard = Guard(trainer.config.guard, tmp_path / str(scale), "cpu", overflows=True)
        batches = list(toy.ToyLoader())
        for step in range(3):
            trainer.train_step(batches[2 * step : 2 * step + 2])
            assert trainer.guard.poll(step + 1, ()).action == "continue"
        losses.append(trainer.update.metrics.reduce()["loss"])
        norms.append(trainer.update.grad_norm.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert not math.isfinite(norms[2]) and not (tmp_path / "1e+38/incidents").exists()


def test_other_ranks_or_batches_keep_the_audio_per_update_and_the_place_in_the_epoch(toy: Any, tmp_path: Path) -> None:
    toy.make_trainer(tmp_path, toy.make_config(3)).fit(toy.ToyLoader())
    other = toy.make_trainer(tmp_path, toy.make_config(4, per_micro_batch=0.5))
    assert (other.plan.accumulation, other.plan.micro_batch_seconds, other.plan.seconds_per_update) == (4, 0.5, 2.0)
    loader = toy.ToyLoader(num_batches=100)
    (change,) = other.resume(tmp_path / "checkpoints/step-000000003.pt", loader)
    assert "1 ranks x 2 micro-batches x 1.0 s became 1 x 4 x 0.5 s" in change
    assert loader.state_dict() == {"epoch": 0, "batches": 12}
    another = toy.make_trainer(tmp_path, toy.make_config(4, per_update=4.0))
    loader = toy.ToyLoader(num_batches=100)
    changes = another.resume(tmp_path / "checkpoints/step-000000003.pt", loader)
    assert loader.state_dict() == {"epoch": 0, "batches": 6}  # the same plan of batches: exactly where it was
    assert "seconds per update were 2.0, they are 4 now" in changes[0]


def test_checkpoints_of_another_model_or_optimizer_are_refused_by_name(toy: Any, tmp_path: Path) -> None:
    toy.make_trainer(tmp_path, toy.make_config(1)).fit(toy.ToyLoader())
    path = tmp_path / "checkpoints/step-000000001.pt"
    larger = toy.HubertModel(dataclasses.replace(toy.make_model().config, feature_penalty=5.0))
    with pytest.raises(ValueError, match=r"step-000000001.pt: the checkpoint is of another model: feature_penalty is 10.0 there, 5.0 here"):
        toy.make_trainer(None, toy.make_config(1), model=larger).resume(path, toy.ToyLoader())
    with pytest.raises(ValueError, match=r"step-000000001.pt"):
        toy.make_trainer(None, toy.make_config(1), optim=OptimConfig(name="adamw", lr=1e-3)).resume(path, toy.ToyLoader())


def test_an_epoch_without_batches_is_an_error_not_an_endless_loop(toy: Any) -> None:
    with pytest.raises(ValueError, match="epoch 0 has no batch"):
        toy.make_trainer(None, toy.make_config(5)).fit(toy.ToyLoader(num_batches=0))


def test_a_short_last_update_is_made_of_what_there_is(toy: Any, curve: Curve, tmp_path: Path) -> None:
    trainer = toy.make_trainer(tmp_path, dataclasses.replace(toy.make_config(0), max_epochs=2))
    loader = toy.ToyLoader(num_batches=5)  # updates of 2, 2 and 1 micro-batches
    assert trainer.fit(loader)
    assert trainer.progress.step == 6 and len(loader.handed_out) == 10
    assert [epoch for _, epoch in curve(tmp_path, "epoch")] == [0, 0, 0, 1, 1, 1]
    assert trainer.progress.audio_seconds == pytest.approx(10 * toy.SECONDS)


def test_bfloat16_trains_to_about_the_same_loss(toy: Any) -> None:
    losses = []
    for precision in ("float32", "bfloat16"):
        trainer = toy.make_trainer(None, toy.make_config(1, precision=precision))
        trainer.train_step(list(toy.ToyLoader(num_batches=2)))
        losses.append(trainer.update.metrics.reduce()["loss_masked"])
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("name", ["scaled_adam", "adamw"])
def test_a_step_never_waits_for_the_device(
    toy: Any, name: Any, monkeypatch: pytest.MonkeyPatch, no_questions: type[TorchDispatchMode]
) -> None:
    model = toy.make_model()
    monkeypatch.setattr(model, "check_batch", lambda batch: None)  # reads values of tensors on the CPU only
    monkeypatch.setattr(model, "_num_selected", lambda weights, most_masked: weights.shape[0] * most_masked)  # as off the CPU
    advance = model.clock.advance

    def advance_unwatched(count: float) -> None:
        with _disable_current_modes():  # waits for the step before the last, by design
            advance(count)

    monkeypatch.setattr(model.clock, "advance", advance_unwatched)
    trainer = toy.make_trainer(None, toy.make_config(9, average_period=0), model=model, optim=OptimConfig(name=name, lr=1e-3))
    batches = list(toy.ToyLoader())
    trainer.train_step(batches[:2])  # state is made in the first step
    with no_questions():
        for _ in range(5):  # one of them updates the sizes of parameters
            trainer.train_step(batches[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valid_average": True, "sharding": "fsdp"}, "valid_average is True and sharding 'fsdp'"),
        ({"max_steps": -1}, "max_steps is -1"),
        ({"log_every": 0}, "log_every is 0"),
        ({"average_period": 0, "valid_average": True}, "there is no average"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(toy: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(toy.make_config(1), **change)


def test_what_this_machine_cannot_do_is_refused_by_name(toy: Any) -> None:
    with pytest.raises(ValueError, match="precision is 'float16'"):
        toy.make_trainer(None, toy.make_config(1, precision="float16"))
    with pytest.raises(ValueError, match="sharding is 'fsdp'"):
        toy.make_trainer(None, toy.make_config(1, sharding="fsdp"))


def test_the_golden_loss_curve_of_thirty_steps_is_kept(toy: Any, curve: Curve, tmp_path: Path, golden: Any, agreement: Any) -> None:
    for name in ("once", "twice"):
        toy.make_trainer(tmp_path / name, toy.make_config(30)).fit(toy.ToyLoader(num_batches=100))
    once = curve(tmp_path / "once", "loss", "accuracy_masked")
    assert once == curve(tmp_path / "twice", "loss", "accuracy_masked")
    recorded = json.loads((Path(__file__).parents[1] / "golden/pretrain_curve.json").read_text())
    measured = torch.tensor([loss for _, loss, _ in once], dtype=torch.float64)
    agreement.relative("30 steps of Zipformer tiny: loss", measured, torch.tensor(recorded["loss"], dtype=torch.float64), 1e-4)
    assert once[-1][1] < once[0][1] / 2 and math.isfinite(once[-1][1])
