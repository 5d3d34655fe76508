"""Cards: what is written is read back, what is damaged is refused, and what a run used is what its ledger says."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import k2ssl
from k2ssl.report import card as card_module
from k2ssl.report.card import CARD, Wer, begin_card, card_of, finish_card, read_card, updates_of, write_card
from k2ssl.report.origin import Code, code_version, git_state, read_json


def begun(world: Any, name: str = "ssl") -> Path:
    folder = world.out / name
    begin_card(folder, "finetune", read_json(folder / "settings.json"), ["python", "x"], 1234)
    return folder


def test_a_card_is_read_back_as_it_was_written(world: Any) -> None:
    folder = begun(world)
    card = read_card(folder / CARD)
    assert card.settings == read_json(folder / "settings.json") and card.command == ("python", "x") and card.parameters == 1234
    write_card(folder, card)
    assert read_card(folder / CARD) == card
    assert card.code == code_version() and card.code.k2ssl == k2ssl.__version__
    content = json.loads((folder / CARD).read_text())
    assert content["format"] == "k2ssl-card" and content["version"] == 1


def test_a_card_tells_data_labels_and_the_model_it_began_with(world: Any) -> None:
    import hashlib

    card = read_card(begun(world) / CARD)
    (train,) = card.data
    assert (train.path, train.hours, train.cuts) == ("out/cuts/cuts_train.jsonl.gz", 2.5, 1000)
    assert train.sha256 == hashlib.sha256((world.out / "cuts/cuts_train.jsonl.gz").read_bytes()).hexdigest()
    assert card.init is not None and card.init.run == "out/pretrain" and card.init.weights == "raw"
    assert card.init.sha256 == hashlib.sha256((world.out / "pretrained.pt").read_bytes()).hexdigest()
    (labels,) = read_card(begun(world, "pretrain") / CARD).labels
    assert (labels.features, labels.num_classes, labels.kmeans, labels.kmeans_sha256) == ("mfcc", 100, "out/mfcc/kmeans.pt", "k" * 64)
    assert labels.checkpoint is None and labels.checkpoint_sha256 is None and labels.cuts_sha256 == "3:abc"


def test_what_is_not_known_is_null(world: Any) -> None:
    for path in ("out/cuts/cuts_train.jsonl.gz", "out/cuts/summary_train.json", "out/pretrained.pt"):
        (world.base / path).unlink()
    card = card_of(world.out / "ssl", read_json(world.out / "ssl/settings.json"), "finetune")
    assert card.command is None and card.parameters is None and card.code.commit is None and card.code.k2ssl is None
    assert card.data[0].sha256 is None and card.data[0].hours is None and card.data[0].cuts is None
    assert card.init is not None and card.init.sha256 is None and card.init.run is None


def test_a_finished_card_holds_what_the_ledger_holds(world: Any) -> None:
    folder = begun(world)
    world.ledger(
        "out/ssl",
        {"program": "finetune", "gpu_seconds": 7200.0, "steps": 3, "peak_gpu_bytes": 5, "audio_seconds": 36.0, "num_devices": 2},
        {"program": "finetune", "gpu_seconds": 1800.0, "steps": 4, "peak_gpu_bytes": 7, "status": "interrupted", "num_devices": 2},
    )
    finish_card(folder)
    card = read_card(folder / CARD)
    assert (card.usage.gpu_hours, card.usage.steps, card.usage.peak_gpu_bytes, card.usage.audio_hours) == (2.5, 7, 7, 0.01)
    assert card.usage.devices == ("2 x Chip",) and card.usage.sessions == {"done": 1, "interrupted": 1}
    assert card.updates == 50 and card.command == ("python", "x")


def test_a_run_that_goes_on_keeps_the_origin_of_a_model_that_is_gone(world: Any) -> None:
    before = read_card(begun(world) / CARD)
    (world.out / "pretrained.pt").unlink()
    assert read_card(begun(world) / CARD).init == before.init
    assert before.init is not None and before.init.sha256 is not None


def test_a_run_that_goes_on_keeps_the_origin_of_a_model_that_was_replaced(world: Any) -> None:
    before = read_card(begun(world) / CARD)
    (world.out / "pretrained.pt").write_bytes(b"averaged again")
    assert read_card(begun(world) / CARD).init == before.init
    shutil.rmtree(world.out / "ssl/checkpoints")  # now the run begins anew
    assert read_card(begun(world) / CARD).init != before.init


def test_paths_of_the_machine_are_not_in_the_command(world: Any) -> None:
    folder = world.out / "ssl"
    begin_card(folder, "finetune", {}, ["/env/bin/python", "-m", "x", str(world.base / "conf/a.toml"), "/data/b.toml"], 1)
    assert read_card(folder / CARD).command == ("python", "-m", "x", "conf/a.toml", "/data/b.toml")


def test_settings_without_bounds_are_told_as_text(world: Any) -> None:
    begin_card(world.out / "ssl", "finetune", {"data": {"max_seconds": float("inf"), "min_seconds": 1.0}}, ["x"], 1)
    assert read_card(world.out / "ssl" / CARD).settings == {"data": {"max_seconds": "Infinity", "min_seconds": 1.0}}


def with_result(world: Any) -> Wer:
    """A begun card of `ssl` gets an error rate."""
    folder = begun(world)
    counts = {"errors": 1, "substitutions": 1, "insertions": 0, "deletions": 0, "words": 9, "utterances": 3}
    about = {
        "test_set": "test",
        "cuts": "3:c",
        "search": "greedy",
        "lm": None,
        "lm_scale": None,
        "files": {},
        "weights": "raw",
        "rule": "as-is",
    }
    rates = {"wer": 1 / 9, "low": None, "high": None, "audio_seconds": 6.0, "real_time_factor": None, "device": "1 x cpu", "decoding": "x"}
    wer = Wer(**about, **counts, **rates)  # type: ignore[arg-type]
    write_card(folder, dataclasses.replace(read_card(folder / CARD), results=(wer,)))
    return wer


def test_a_finished_run_that_is_started_again_keeps_its_card(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wer, folder = with_result(world), world.out / "ssl"
    before = read_card(folder / CARD)
    monkeypatch.setattr(card_module, "code_version", lambda: Code("9.9", None, None, None, None))
    begin_card(folder, "finetune", read_json(folder / "settings.json"), ["python", "again"], 1234)
    finish_card(folder)
    assert read_card(folder / CARD) == before and before.results == (wer,)


def test_a_run_that_goes_on_has_no_error_rates_yet_and_the_code_of_now(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_result(world)
    monkeypatch.setattr(card_module, "code_version", lambda: Code("9.9", None, None, None, None))
    folder = world.out / "ssl"
    settings = read_json(folder / "settings.json")
    begin_card(folder, "finetune", {**settings, "longer": True}, ["python", "longer"], 1234)
    card = read_card(folder / CARD)
    assert card.results == () and card.command == ("python", "longer") and card.code.k2ssl == "9.9"
    with_result(world)
    world.ledger("out/ssl", {"program": "finetune", "status": "running"})  # killed
    begin_card(folder, "finetune", settings, ["python", "on"], 1234)
    card = read_card(folder / CARD)
    assert card.results == () and card.command == ("python", "on")


def test_a_damaged_card_is_replaced_with_a_warning(world: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder = begun(world)
    (folder / CARD).write_text("{")
    begun(world)
    assert str(folder / CARD) in caplog.text and read_card(folder / CARD).parameters == 1234


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version is 2, this release reads version 1"),
        ({"format": "else"}, "'else'"),
        ({"parameters": "many"}, "parameters"),
        ({"surprise": 1}, "surprise"),
        ({"settings": 3}, "settings is 3"),
        ({"usage": {}}, "usage"),
    ],
)
def test_a_card_that_is_none_is_refused_by_name(world: Any, change: dict[str, Any], message: str) -> None:
    folder = begun(world)
    (folder / CARD).write_text(json.dumps({**json.loads((folder / CARD).read_text()), **change}))
    with pytest.raises(ValueError, match=r"card\.json") as caught:
        read_card(folder / CARD)
    assert message in str(caught.value)


def test_text_that_is_no_json_is_refused(world: Any) -> None:
    (world.out / "card.json").write_text("[1")
    with pytest.raises(ValueError, match=r"card\.json: not JSON"):
        read_card(world.out / "card.json")


def test_updates_are_those_of_the_newest_checkpoint_or_of_the_last_line_of_the_log(tmp_path: Path) -> None:
    assert updates_of(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 7}\n{"kind": "valid", "step": 9}\n{"kind": "tr\n')
    assert updates_of(tmp_path) == 7
    (tmp_path / "checkpoints").mkdir()
    for name in ("step-000000006.pt", "step-000000008.pt", "step-later.pt", ".step-000000009.pt.x.part"):
        (tmp_path / "checkpoints" / name).touch()
    assert updates_of(tmp_path) == 8


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_of_a_checkout_is_known_and_whether_files_were_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
        return subprocess.run(["git", "-C", str(tmp_path), *names, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    assert git_state(tmp_path) == (None, None)
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    assert git_state(tmp_path) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "other").write_text("not tracked")
    assert git_state(tmp_path)[1] is False
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path)[1] is True
    assert git_state(tmp_path / "file")[0] is None
