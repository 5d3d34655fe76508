"""The trainer in one process: what a step computes, what a resumed run repeats, and what happens when a batch is bad."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from k2ssl.optim.build import OptimConfig
from k2ssl.train import checkpoint
from k2ssl.train.checkpoint import KeepConfig, load_checkpoint, step_of
from k2ssl.train.guard import Guard
from k2ssl.train.logger import TrainingLog
from k2ssl.train.loss_scale import LossScale
from k2ssl.train.state import load_checkpoint_content
from k2ssl.train.update import Moment, draws_of

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


@pytest.mark.parametrize("name", ["scaled_adam", "adamw"])
def test_a_run_may_go_on_from_a_checkpoint_that_is_removed_meanwhile(toy: Any, tmp_path: Path, name: Any) -> None:
    keep, optim = KeepConfig(save_every=1, keep_last=1, keep_best=0), OptimConfig(name=name, lr=1e-3)
    toy.make_trainer(tmp_path / "whole", toy.make_config(5, keep=keep), optim=optim).fit(toy.ToyLoader())
    toy.make_trainer(tmp_path / "halves", toy.make_config(2, keep=keep), optim=optim).fit(toy.ToyLoader())
    second, loader = toy.make_trainer(tmp_path / "halves", toy.make_config(5, keep=keep), optim=optim), toy.ToyLoader()
    second.resume(second.checkpoints.latest(), loader)
    assert second.fit(loader)
    ends = [load_checkpoint(tmp_path / folder / "checkpoints/step-000000005.pt") for folder in ("whole", "halves")]
    assert not differing(*ends)
    assert len(second.checkpoints.paths()) == 1


def test_a_damaged_checkpoint_is_not_resumed_from(toy: Any, tmp_path: Path) -> None:
    toy.make_trainer(tmp_path, toy.make_config(1)).fit(toy.ToyLoader())
    path = tmp_path / "checkpoints/step-000000001.pt"
    whole = path.read_bytes()
    weights = max(load_checkpoint(path)["model"].values(), key=torch.Tensor.numel).numpy().tobytes()
    assert weights in whole
    path.write_bytes(whole.replace(weights, b"x" + weights[1:], 1))
    with pytest.raises(ValueError, match=r"step-000000001\.pt: damaged"):
        toy.make_trainer(None, toy.make_config(1)).resume(path, toy.ToyLoader())


def test_micro_batches_draw_by_their_place_among_all_ranks_and_validation_never_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(rank: int, world_size: int, numbers: int, *step: int) -> list[tuple[int, ...]]:
        monkeypatch.setattr("k2ssl.distributed.rank", lambda: rank)
        monkeypatch.setattr("k2ssl.distributed.world_size", lambda: world_size)
        return [draws_of(7, number, *step) for number in range(numbers)]

    alone = drawn(0, 1, 6, 3)
    assert alone == [(7, 3, place) for place in range(6)]
    assert sorted(drawn(0, 2, 3, 3) + drawn(1, 2, 3, 3)) == alone
    assert not {*drawn(0, 1, 6, 0), *alone} & {*drawn(0, 2, 3), *drawn(1, 2, 3)}


def test_who_validates_more_often_than_it_saves_has_the_best_all_the_same(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy.make_config(11, valid_every=2, keep=KeepConfig(save_every=5, keep_last=1, keep_best=1))
    trainer = toy.make_trainer(tmp_path, config)
    losses = {2: 0.9, 4: 0.5, 6: 0.7, 8: 0.3, 10: 0.4, 11: math.nan}
    monkeypatch.setattr(trainer, "validate", lambda loader: {"loss": losses[trainer.progress.step]})
    written, save, rate = [], trainer.checkpoints.save, trainer.checkpoints.rate

    def noted(step: int, content: Any, score: float | None = None) -> Path:
        trainer.checkpoints.wait()
        assert len(trainer.checkpoints.paths()) <= 2  # as the disk was checked for
        written.append((step, score))
        return save(step, content, score)

    def rated(step: int, score: float) -> None:
        written.append((step, score))
        rate(step, score)

    monkeypatch.setattr(trainer.checkpoints, "save", noted)
    monkeypatch.setattr(trainer.checkpoints, "rate", rated)
    assert trainer.fit(toy.ToyLoader(num_batches=100), [toy.batch(100)])
    assert written[:-2] == [(0, None), (2, 0.9), (4, 0.5), (5, None), (8, 0.3), (10, None), (10, 0.4)]
    assert written[-2] == (11, None) and written[-1][0] == 11
    assert [path.name for path in trainer.checkpoints.paths()] == ["step-000000008.pt", "step-000000011.pt"]


def test_a_signal_during_a_validation_breaks_it_off_behind_the_checkpoint_and_who_goes_on_validates_first(toy: Any, tmp_path: Path) -> None:
    config = toy.make_config(6, valid_every=2, keep=KeepConfig(save_every=2, keep_last=9))
    batches = [toy.batch(100), toy.batch(101), toy.batch(102)]
    assert toy.make_trainer(tmp_path / "whole", config).fit(toy.ToyLoader(), batches)
    trainer, read = toy.make_trainer(tmp_path / "parts", config), []

    def note() -> None:
        read.append(trainer.progress.step)
        if read.count(4) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    assert not trainer.fit(toy.ToyLoader(), _Telling(batches, note))
    assert read == [2, 2, 2, 4, 4]
    assert [step_of(path) for path in trainer.checkpoints.paths()] == [0, 2, 4] and not trainer.checkpoints.has_score(4)
    again, loader = toy.make_trainer(tmp_path / "parts", config), toy.ToyLoader()
    again.resume(again.checkpoints.latest(), loader)
    assert again.fit(loader, batches) and again.checkpoints.has_score(4)
    for kind in ("train", "valid"):
        assert _losses(tmp_path / "parts", kind) == _losses(tmp_path / "whole", kind)


def _losses(folder: Path, kind: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("rated", [False, True])
def test_a_validation_that_is_in_the_log_already_comes_again_only_where_the_checkpoint_has_no_score(
    toy: Any, tmp_path: Path, rated: bool
) -> None:
    config = toy.make_config(4, valid_every=2, keep=KeepConfig(save_every=2))
    trainer = toy.make_trainer(tmp_path, config)
    trainer.fit(toy.ToyLoader(), [toy.batch(100)])
    before = _losses(tmp_path, "valid")
    if not rated:  # as after a kill between the two
        (tmp_path / "checkpoints" / "scores.json").unlink()
    again, loader = toy.make_trainer(tmp_path, config), toy.ToyLoader()
    again.resume(again.checkpoints.latest(), loader)
    read: list[int] = []
    again.fit(loader, _Telling([toy.batch(100)], lambda: read.append(again.progress.step)))
    assert read == ([] if rated else [4]) and _losses(tmp_path, "valid") == before and [step for step, _ in before] == [2, 4]
    assert again.checkpoints.has_score(4)


class _Telling:
    """Batches, each of which is told of before it comes."""

    def __init__(self, batches: list[Any], tell: Callable[[], None]) -> None:
        self.batches, self.tell = batches, tell

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.tell()
            yield batch


@pytest.mark.parametrize("last", [6, 7])
def test_a_step_that_was_validated_keeps_its_score_whenever_it_is_saved(toy: Any, tmp_path: Path, last: int) -> None:
    config = toy.make_config(last, valid_every=3, keep=KeepConfig(save_every=4, keep_best=0))
    trainer, valid = toy.make_trainer(tmp_path, config), TrainingLog.valid

    def stopping(log: TrainingLog, step: int, values: Any) -> None:
        valid(log, step, values)
        trainer.stop.requested = last == 7 and step == 6  # the checkpoint of step 6 is written for the signal alone

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLog, "valid", stopping)
        assert trainer.fit(toy.ToyLoader(), [toy.batch(100)]) is (last == 6)
    assert trainer.checkpoints.has_score(6)
    again, loader, read = toy.make_trainer(tmp_path, config), toy.ToyLoader(), []
    again.resume(again.checkpoints.latest(), loader)
    again.fit(loader, _Telling([toy.batch(100)], lambda: read.append(again.progress.step)))
    assert read == ([] if last == 6 else [7])
    assert [step for step, _ in _losses(tmp_path, "valid")] == ([3, 6] if last == 6 else [3, 6, 7])


def test_who_validates_at_other_steps_now_keeps_what_is_in_the_log(toy: Any, tmp_path: Path) -> None:
    toy.make_trainer(tmp_path, toy.make_config(4, valid_every=4, keep=KeepConfig(save_every=4))).fit(toy.ToyLoader(), [toy.batch(100)])
    (tmp_path / "checkpoints" / "scores.json").unlink()
    again, loader = toy.make_trainer(tmp_path, toy.make_config(6, valid_every=3)), toy.ToyLoader()
    again.resume(again.checkpoints.latest(), loader)
    again.fit(loader, [toy.batch(100)])
    assert [step for step, _ in _losses(tmp_path, "valid")] == [4, 6]


def test_steps_that_come_again_after_a_roll_back_are_validated_again(toy: Any, tmp_path: Path) -> None:
    trainer = toy.make_trainer(tmp_path, toy.make_config(4, valid_every=2, keep=KeepConfig(save_every=2)))
    trainer.fit(toy.ToyLoader(), [toy.batch(100)])
    assert trainer.validated == 4
    trainer.rewound(2)
    assert trainer.validated < 0


def test_a_disk_that_was_full_for_one_checkpoint_costs_no_more_than_that(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = toy.make_trainer(tmp_path, toy.make_config(6, keep=KeepConfig(save_every=2, keep_last=9)))
    write = checkpoint.save_atomically

    def full(path: Path, *arguments: Any) -> None:
        if "000002" in path.name:
            raise OSError(28, "No space left on device", str(path))
        write(path, *arguments)

    monkeypatch.setattr(checkpoint, "save_atomically", full)
    assert trainer.fit(toy.ToyLoader())
    assert [step_of(path) for path in trainer.checkpoints.paths()] == [0, 4, 6]


def test_nothing_is_trained_where_the_first_checkpoint_cannot_be_written(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, loader = toy.make_trainer(tmp_path, toy.make_config(6)), toy.ToyLoader()

    def full(path: Path, *_: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "save_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(loader)
    assert not loader.handed_out


def test_a_run_whose_last_checkpoint_cannot_be_written_has_failed(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = toy.make_trainer(tmp_path, toy.make_config(2))

    def full(path: Path, *arguments: Any) -> None:
        if "000002" in path.name:
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("k2ssl.train.checkpoint.save_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(toy.ToyLoader())
    assert json.loads((tmp_path / "ledger.jsonl").read_text().splitlines()[-1])["status"] == "failed"


@pytest.mark.parametrize(("last", "written"), [(4, [0, 2, 4]), (3, [0, 2, 3])])
def test_who_is_stopped_right_after_a_checkpoint_does_not_write_it_again(toy: Any, tmp_path: Path, last: int, written: list[int]) -> None:
    trainer = toy.make_trainer(tmp_path, toy.make_config(9, keep=KeepConfig(save_every=2, keep_last=9)))
    loader = toy.ToyLoader(num_batches=8)  # four updates: the stop may come between two epochs
    saved, save, train_step = [], trainer.checkpoints.save, trainer.train_step

    def noted(step: int, *arguments: Any) -> Path:
        saved.append(step)
        return save(step, *arguments)

    def stop_after(batches: Any) -> None:
        train_step(batches)
        if trainer.progress.step == last:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.checkpoints.save, trainer.train_step = noted, stop_after
    assert not trainer.fit(loader)
    assert saved == written
    again = toy.make_trainer(tmp_path, toy.make_config(9))
    again.resume(again.checkpoints.latest(), loader := toy.ToyLoader(num_batches=8))
    again.fit(loader)
    assert loader.handed_out[0] == ((0, 6) if last == 3 else (1, 0)) and again.progress.step == 9


def test_utterances_of_ranks_that_are_gone_go_to_those_that_are_there(toy: Any, tmp_path: Path) -> None:
    toy.make_trainer(tmp_path, toy.make_config(2)).fit(toy.ToyLoader(poisoned=(2,)))
    path = tmp_path / "checkpoints/step-000000002.pt"
    content = load_checkpoint(path)
    (rank,) = content["ranks"]
    assert rank["ids"] == {2: ["utterance-0-2-0", "utterance-0-2-1", "utterance-0-3-0", "utterance-0-3-1"]}
    trainer = toy.make_trainer(None, toy.make_config(2))
    load_checkpoint_content(trainer, {**content, "ranks": [{**rank, "ids": {2: ["a"]}}, {**rank, "ids": {2: ["b"], 9: ["c"]}}]})
    assert trainer.guard.ids() == {2: ["a", "b"]}
