"""The trainer in two real processes: the same as one that accumulates, killed and resumed, sharded, with uneven data."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Curve = Callable[..., list[tuple[float, ...]]]
ROOT = Path(__file__).parents[2]
TOY_RUN = Path(__file__).with_name("toy_run.py")


def command(folder: Path, *options: str, ranks: int = 2) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, str(TOY_RUN), str(folder), *options]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(folder: Path, *options: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(command(folder, *options, ranks=ranks), capture_output=True, text=True, env=environment(), timeout=300)
    return done


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty uninterrupted steps of two ranks."""
    folder = tmp_path_factory.mktemp("straight")
    done = run(folder, "--steps", "20")
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_equal_one_that_accumulates(straight: Path, toy: Any, curve: Curve, tmp_path: Path, agreement: Any) -> None:
    toy.make_trainer(tmp_path, toy.make_config(20)).fit(toy.ToyLoader())
    two, one = (torch.tensor(curve(folder, "loss"), dtype=torch.float64)[:, 1] for folder in (straight, tmp_path))
    agreement.relative("1 process x 2 micro-batches against 2 processes, loss of 20 steps", two, one, 1e-5)
    weights = [torch.load(straight / f"weights-{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_two_processes_killed_in_mid_epoch_go_on_bit_by_bit(straight: Path, curve: Curve, tmp_path: Path) -> None:
    options = ("--steps", "20", "--save-every", "3")
    process = subprocess.Popen(
        command(tmp_path, *options), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    saved = tmp_path / "checkpoints/step-000000009.pt"  # of five steps an epoch
    deadline = time.monotonic() + 120
    while not saved.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "weights-0.pt").exists()
    done = run(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    names = ("loss", "grad_norm", "lr", "audio_hours")
    assert curve(tmp_path, *names) == curve(straight, *names)
    for rank in range(2):
        ours, theirs = (torch.load(folder / f"weights-{rank}.pt", weights_only=True) for folder in (tmp_path, straight))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    sessions = {json.loads(line)["session"] for line in (tmp_path / "ledger.jsonl").read_text().splitlines()}
    assert len(sessions) == 2


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_a_signal_to_one_rank_during_a_validation_stops_all_and_the_run_goes_on(tmp_path: Path, sharding: str) -> None:
    options = ("--steps", "3", "--save-every", "2", "--valid-every", "2", "--sharding", sharding)
    assert run(tmp_path, *options, "--stopped-rank", "1").returncode == 1  # torchrun's own, of ranks that end with 130
    scores = tmp_path / "checkpoints/scores.json"
    assert (tmp_path / "checkpoints/step-000000002.pt").is_file()
    assert scores.exists() is (sharding == "fsdp"), "ranks that share a model out compute a validation together, to its end"
    done = run(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "valid"] == [2, 3] and len(json.loads(scores.read_text())) == 2


def test_sigterm_to_the_launcher_writes_a_checkpoint_on_the_same_step_of_all_ranks(straight: Path, curve: Curve, tmp_path: Path) -> None:
    process = subprocess.Popen(command(tmp_path, "--steps", "20"), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"step": 4' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    (path,) = [path for path in (tmp_path / "checkpoints").glob("step-*.pt") if path.name != "step-000000000.pt"]
    assert 4 <= int(path.stem[5:]) < 20
    done = run(tmp_path, "--steps", "20")
    assert done.returncode == 0, done.stderr
    assert curve(tmp_path) == curve(straight)


def test_sharded_parameters_give_the_losses_of_replicated_ones(straight: Path, curve: Curve, tmp_path: Path, agreement: Any) -> None:
    done = run(tmp_path, "--steps", "20", "--sharding", "fsdp", "--save-every", "7")
    assert done.returncode == 0, done.stderr
    sharded, replicated = (torch.tensor(curve(folder, "loss"), dtype=torch.float64)[:, 1] for folder in (tmp_path, straight))
    agreement.relative("FSDP against DDP, loss of 20 steps", sharded, replicated, 1e-5)
    whole, ours = (torch.load(folder / "checkpoints/step-000000020.pt", weights_only=True) for folder in (straight, tmp_path))
    assert whole["model"].keys() == ours["model"].keys() and whole["optimizer"]["state"].keys() == ours["optimizer"]["state"].keys()
    # single biases whose gradients are zero but for rounding step to either side in float32; test_sharding.py compares in float64
    flat = [torch.cat([value.flatten() for value in content["model"].values()]).double() for content in (ours, whole)]
    assert (flat[0] - flat[1]).norm() < 1e-2 * flat[1].norm()


def test_loaders_of_different_length_cannot_dead_lock(curve: Curve, tmp_path: Path) -> None:
    done = run(tmp_path, "--steps", "6", "--num-batches", "6", "--short-rank", "1")
    assert done.returncode == 0, done.stderr
    assert [epoch for _, epoch in curve(tmp_path, "epoch")] == [0, 0, 1, 1, 2, 2]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of two ranks, of which rank 1 reads something bad in step 2."""
    folder = tmp_path_factory.mktemp("poisoned")
    done = run(folder, "--steps", "3", "--save-every", "2", "--poisoned", "3")
    assert done.returncode == 0, done.stderr
    return folder


def test_all_ranks_agree_about_a_batch_that_is_bad_on_one(straight: Path, poisoned: Path, curve: Curve) -> None:
    (path,) = (poisoned / "incidents").iterdir()
    incident = json.loads(path.read_text())
    assert incident["step"] == 2 and [bool(entry["first_non_finite"]) for entry in incident["ranks"]] == [False, True]
    assert incident["ranks"][1]["ids"] == ["utterance-0-3-0", "utterance-0-3-1"]
    weights = [torch.load(poisoned / f"weights-{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(a, b) and torch.isfinite(a).all() for a, b in zip(*weights, strict=True))
    assert curve(poisoned)[0] == curve(straight)[0]


def test_an_incident_before_an_interruption_is_told_with_every_ranks_own_utterances(poisoned: Path, tmp_path: Path) -> None:
    shutil.copytree(poisoned, tmp_path, dirs_exist_ok=True)
    (path,) = (tmp_path / "incidents").iterdir()
    before = json.loads(path.read_text())
    path.unlink()
    (tmp_path / "checkpoints/step-000000003.pt").unlink()  # what is known of step 2 is not yet looked at in the one at step 2
    done = run(tmp_path, "--steps", "3")
    assert done.returncode == 0, done.stderr
    after = json.loads(path.read_text())
    assert [entry["ids"] for entry in after["ranks"]] == [[f"utterance-0-{number}-{i}" for i in range(2)] for number in (2, 3)]
    assert after["step"] == before["step"] == 2 and after["batch_count"] == before["batch_count"]


def test_all_ranks_roll_back_together(tmp_path: Path) -> None:
    done = run(tmp_path, "--steps", "8", "--num-batches", "60", "--save-every", "2", "--max-skipped", "2", "--poisoned", "8", "10")
    assert done.returncode == 0, done.stderr
    assert "rolled back to step 4" in (tmp_path / "metrics.jsonl").read_text()
    weights = [torch.load(tmp_path / f"weights-{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(a, b) and torch.isfinite(a).all() for a, b in zip(*weights, strict=True))
