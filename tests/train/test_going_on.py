"""What a run that goes on owes to the one before: a validation it did not get to, its own steps only, the place in the data."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from k2ssl.optim.build import OptimConfig
from k2ssl.train.checkpoint import KeepConfig
from k2ssl.train.ledger import total


def kinds(folder: Path, kind: str) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["kind"] == kind]


def test_a_run_that_died_in_its_last_validation_does_it_when_it_goes_on(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy.make_config(4, keep=KeepConfig(save_every=2))  # validated at the end only, after the checkpoint of the last step
    died = toy.make_trainer(tmp_path, config)

    def die(loader: Any) -> dict[str, float]:
        raise MemoryError

    monkeypatch.setattr(died, "validate", die)
    with pytest.raises(MemoryError):
        died.fit(toy.ToyLoader(), [toy.batch(100)])
    for attempt in range(2):  # a third start finds nothing left to do
        again = toy.make_trainer(tmp_path, config)
        again.resume(again.checkpoints.latest(), loader := toy.ToyLoader())
        again.fit(loader, [toy.batch(100)])
        assert kinds(tmp_path, "valid") == [4] and not loader.handed_out, attempt
    assert list(json.loads((tmp_path / "checkpoints/scores.json").read_text())) == ["step-000000004.pt"]


def test_steps_of_the_run_that_a_checkpoint_comes_from_are_not_counted_in_another_folder(toy: Any, tmp_path: Path) -> None:
    toy.make_trainer(tmp_path / "one", toy.make_config(4)).fit(toy.ToyLoader())
    two = toy.make_trainer(tmp_path / "two", toy.make_config(6))
    two.resume(tmp_path / "one/checkpoints/step-000000004.pt", loader := toy.ToyLoader(20))
    two.fit(loader)
    assert total(tmp_path / "two").steps == 2 and total(tmp_path / "two").audio_hours == pytest.approx(4.0 / 3600)


def test_the_place_in_an_epoch_is_kept_through_several_changes_of_batches(toy: Any, tmp_path: Path) -> None:
    def run(steps: int, **batches: float) -> Any:
        trainer = toy.make_trainer(tmp_path, toy.make_config(steps, **batches), model=toy.MeanModel())
        loader = toy.ToyLoader(40)
        if path := trainer.checkpoints.latest():
            trainer.resume(path, loader)
        trainer.fit(loader)
        return trainer, loader

    run(4)  # four updates of twice a second: 8 s
    trainer, loader = run(6, per_update=4.0)
    assert loader.handed_out[0] == (0, 8) and trainer.progress.epoch_updates == 4  # 16 s, in updates of 4 s
    _, loader = run(7, per_update=4.0, per_micro_batch=2.0)
    assert loader.handed_out[0] == (0, 8)  # of 2 s each


def test_what_is_left_is_told_of_the_end_that_comes_first(toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = toy.make_trainer(tmp_path, toy.make_config(1000, max_epochs=1))
    trainer.expected_steps = 5
    trainer.fit(toy.ToyLoader())
    assert "step 5 of 5 (100%)" in capsys.readouterr().err and trainer.progress.step == 5


def test_a_second_signal_is_an_interruption_too(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = toy.make_trainer(tmp_path, toy.make_config(4))
    train_step = trainer.train_step

    def twice(batches: Any) -> None:
        train_step(batches)
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr("k2ssl.train.stop.time.monotonic", lambda: 1e12)  # much later
        os.kill(os.getpid(), signal.SIGINT)

    trainer.train_step = twice
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(toy.ToyLoader())
    assert json.loads((tmp_path / "ledger.jsonl").read_text().splitlines()[-1])["status"] == "interrupted"


def test_an_average_that_has_no_weights_yet_is_not_validated(toy: Any, tmp_path: Path) -> None:
    keep, optim = KeepConfig(save_every=4), OptimConfig(lr=0.5)
    toy.make_trainer(tmp_path, toy.make_config(4, keep=keep, average_period=0), model=toy.MeanModel(), optim=optim).fit(toy.ToyLoader(40))
    config = toy.make_config(6, keep=keep, average_period=3, valid_average=True, valid_every=1)
    trainer = toy.make_trainer(tmp_path, config, model=toy.MeanModel(), optim=optim)
    trainer.resume(trainer.checkpoints.latest(), loader := toy.ToyLoader(40))
    seen: list[list[float]] = []
    validate = trainer.validate

    def noted(batches: Any) -> dict[str, float]:
        trainer.model.register_forward_hook(lambda model, arguments, output: seen.append(model.weight.tolist()))
        return validate(batches)

    trainer.validate = noted
    trainer.fit(loader, [toy.batch(99)])
    assert seen[0] != toy.MeanModel().weight.tolist()


@pytest.mark.parametrize("second", [2.0, float("nan")])
def test_a_finished_run_validates_nothing_again_whatever_its_last_score(toy: Any, tmp_path: Path, second: float) -> None:
    config = toy.make_config(8, valid_every=4, keep=KeepConfig(save_every=100))  # the last step is neither saved for itself nor the best
    for _ in range(3):
        trainer, loader = toy.make_trainer(tmp_path, config, model=toy.MeanModel()), toy.ToyLoader(40)
        if path := trainer.checkpoints.latest():
            trainer.resume(path, loader)
        trainer.validate = lambda batches, trainer=trainer: {"loss": 1.0 if trainer.progress.step == 4 else second}
        trainer.fit(loader, [toy.batch(100)])
        assert kinds(tmp_path, "valid") == [4, 8]
    scores = json.loads((tmp_path / "checkpoints/scores.json").read_text())
    assert scores == {"step-000000004.pt": 1.0, "step-000000008.pt": None if second != second else second}
    last, best = trainer.checkpoints.told()
    assert "step-000000008.pt" in last and "step-000000004.pt (1 in validation)" in best


def test_an_epoch_that_was_begun_is_not_an_empty_one_in_updates_of_more_audio(toy: Any, tmp_path: Path) -> None:
    toy.make_trainer(tmp_path, toy.make_config(1), model=toy.MeanModel()).fit(toy.ToyLoader(2))
    more = toy.make_trainer(tmp_path, toy.make_config(3, per_update=6.0), model=toy.MeanModel())
    more.resume(more.checkpoints.latest(), loader := toy.ToyLoader(2))
    more.fit(loader)
    assert (more.progress.step, more.progress.epoch) == (3, 2)
