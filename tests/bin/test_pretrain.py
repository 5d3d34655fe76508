"""The pre-training program on a small corpus of synthetic sounds: what it leaves behind, interruptions of every kind, and trials."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from k2ssl.bin import average, pretrain, training_run
from k2ssl.config import load
from k2ssl.data.cuts import read_cuts
from k2ssl.data.labels import LabelStore
from k2ssl.data.loader import pretrain_loader
from k2ssl.models.hubert import HubertConfig
from k2ssl.models.load import load_model
from k2ssl.nn.fusion import use_fusion
from k2ssl.structure import from_dict
from k2ssl.train.checkpoint import load_checkpoint
from k2ssl.train.trainer import Trainer

STEPS = 12  # of three or four an epoch
NAMES = ("loss", "accuracy_masked", "grad_norm", "lr", "batch_count", "epoch", "audio_hours")

# The program in a process of its own, which does something to itself after a step.
CHILD = """
import os, signal, subprocess, sys
from k2ssl.bin import pretrain
from k2ssl.train.trainer import Trainer
step, name, everybody = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "group"
plain = Trainer.train_step
def train_step(self, batches):
    plain(self, batches)
    if self.progress.step == step and self.log is not None:  # not while it tries the worst batches
        if not everybody:
            self.checkpoints.wait()
            os.kill(os.getpid(), getattr(signal, name))
        else:  # as a terminal or a scheduler does it: from outside
            kill = f"import os, signal; os.killpg({os.getpgid(0)}, signal.{name})"
            subprocess.run([sys.executable, "-S", "-c", kill], start_new_session=True, check=True)
Trainer.train_step = train_step
sys.exit(pretrain.main(sys.argv[4:]))
"""


def environment() -> dict[str, str]:
    """As many threads as here, on which the last bits of sums depend."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(Path(__file__).parents[2])}


def interrupted(arguments: list[str], step: int, name: str, whom: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(step), name, whom, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), start_new_session=True, timeout=300)


def lines(folder: Path, kind: str, *names: str) -> list[tuple[Any, ...]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], *(record[name] for name in names)) for record in records if record["kind"] == kind]


def assert_same_bits(ours: Any, theirs: Any, path: str = "checkpoint") -> None:
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for key in ours:
            assert_same_bits(ours[key], theirs[key], f"{path}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), path
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same_bits(*pair, f"{path}[{number}]")
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours.nan_to_num(nan=-1.0), theirs.nan_to_num(nan=-1.0)), path
    else:
        assert ours == theirs or (ours != ours and theirs != theirs), path


@pytest.fixture(scope="module")
def whole(sounds: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted: two data workers, two micro-batches an update, averaging, validation."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert pretrain.main(sounds.command(output, *sounds.VALIDATED, "--trainer.max-steps", str(STEPS))) == 0
    return output


def test_a_run_trains_validates_averages_and_accounts(whole: Path, sounds: Any) -> None:
    train, valid = lines(whole, "train", "loss", "epoch"), lines(whole, "valid", "loss", "accuracy_masked")
    assert [step for step, *_ in train] == list(range(1, STEPS + 1)) and sorted({step for step, *_ in valid}) == [4, 8, 12]
    assert train[-1][2] >= 2 and train[-1][1] < train[0][1]
    assert valid[-1][1] < valid[0][1]
    ledger = json.loads((whole / "ledger.jsonl").read_text().splitlines()[-1])
    assert ledger["status"] == "done" and ledger["steps"] == STEPS and ledger["program"] == "pretrain"
    assert ledger["audio_seconds"] == pytest.approx(3600 * lines(whole, "train", "audio_hours")[-1][1])
    assert sorted(path.name for path in (whole / "checkpoints").glob("step-*.pt"))[-1] == "step-000000012.pt"


def test_kernels_of_triton_can_be_switched_off_and_on_again(sounds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[bool] = []
    monkeypatch.setattr(training_run, "use_triton", chosen.append)
    command = (*sounds.command(tmp_path / "run"), "--preflight.run", "False")
    assert pretrain.main([*command, "--trainer.max-steps", "1", "--triton", "False"]) == 0
    assert pretrain.main([*command, "--trainer.max-steps", "2"]) == 0
    assert chosen == [False, True]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_fused_chains_train_along_the_same_curve(whole: Path, sounds: Any, tmp_path: Path) -> None:
    try:
        assert pretrain.main(sounds.command(tmp_path / "run", *sounds.VALIDATED, "--trainer.max-steps", "3", "--fuse", "True")) == 0
    finally:
        use_fusion(None)
    for (step, fused), (_, plain) in zip(lines(tmp_path / "run", "train", "loss"), lines(whole, "train", "loss"), strict=False):
        assert fused == pytest.approx(plain, rel=1e-4), step


def test_the_settings_beside_a_run_are_the_whole_job(whole: Path, sounds: Any) -> None:
    given = load(pretrain.Pretrain, sounds.command(whole, *sounds.VALIDATED, "--trainer.max-steps", str(STEPS)))
    assert load(pretrain.Pretrain, [str(whole / "settings.json")]) == given
    saved = load_checkpoint(whole / "checkpoints/step-000000012.pt")["job"]
    assert saved.pop("lineage")["labels[0]"]["features"] == "mfcc"
    assert from_dict(pretrain.Pretrain, saved) == given


def test_checkpoints_hold_a_model_raw_and_averaged(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = whole / "checkpoints/step-000000012.pt"
    raw, averaged = load_model(last), load_model(last, weights="average")
    content = load_checkpoint(last)
    assert raw.config == averaged.config == from_dict(HubertConfig, content["config"])
    assert content["average"]["step"] == 12
    name = "mask_embedding"
    assert torch.equal(raw.state_dict()[name], content["model"][name]) and not torch.equal(raw.mask_embedding, averaged.mask_embedding)
    assert average.main(["--end", str(last), "--output", str(tmp_path / "model.pt")]) == 0
    assert torch.equal(load_model(tmp_path / "model.pt").mask_embedding, averaged.mask_embedding)


def test_the_sizes_said_before_training_are_those_on_disk(
    whole: Path, sounds: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain.main(sounds.command(tmp_path / "run", "--trainer.max-steps", "1")) == 0
    said = capsys.readouterr().out
    told = float(said.split("checkpoints of ")[1].split(" MiB each")[0])
    size = (tmp_path / "run/checkpoints/step-000000001.pt").stat().st_size / 2**20
    assert told == pytest.approx(size, rel=0.5), "a tiny model's file is names and settings for a good part"
    assert "longest audio" in said and "1 steps" in said.splitlines()[-2]
    assert said.splitlines()[-1] == f"last checkpoint: {tmp_path / 'run/checkpoints/step-000000001.pt'}"


def test_killed_and_interrupted_runs_end_with_the_bits_of_one_that_was_not(whole: Path, sounds: Any, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = sounds.command(output, *sounds.VALIDATED, "--trainer.max-steps", str(STEPS))
    # Ctrl-C in a terminal and a scheduler's SIGTERM go to the data workers too
    for step, name in ((2, "SIGINT"), (5, "SIGTERM")):
        ended = interrupted(command, step, name, "group")
        assert ended.returncode == 130, ended.stderr
        assert ended.stderr.splitlines()[-1] == "pretrain: interrupted; the same command goes on, or begins again where nothing was kept"
        assert "Traceback" not in ended.stderr
        assert (output / f"checkpoints/step-{step:09d}.pt").exists()
    killed = interrupted(command, 10, "SIGKILL", "main")
    assert killed.returncode == -signal.SIGKILL
    assert "at step 5" in killed.stdout
    assert pretrain.main(command) == 0
    assert lines(output, "train", *NAMES) == lines(whole, "train", *NAMES)
    assert lines(output, "valid", *NAMES[:2]) == lines(whole, "valid", *NAMES[:2])
    ours, theirs = (load_checkpoint(folder / "checkpoints/step-000000012.pt") for folder in (output, whole))
    assert ours["job"].pop("output") != theirs["job"].pop("output")
    for content in (ours, theirs):
        content["ranks"][0].pop("generator")  # torch's own, which pytest seeds and training never draws from
    assert_same_bits(ours, theirs)
    ends = [json.loads(line)["status"] for line in (output / "ledger.jsonl").read_text().splitlines()]
    assert ends.count("interrupted") == 2 and ends[-1] == "done"


def test_data_workers_leave_ctrl_c_to_the_main_process(sounds: Any) -> None:
    loader = pretrain_loader(read_cuts(sounds.cuts()), [LabelStore.open(sounds.labels())], max_duration=1.0, min_seconds=0.5, num_workers=2)
    batches = iter(loader)
    count = len(next(batches).ids) + len(next(batches).ids)  # one of each worker
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    assert count + sum(len(batch.ids) for batch in batches) == 30


def test_two_processes_train_as_one_does_with_twice_the_micro_batches(sounds: Any, tmp_path: Path, agreement: Any) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "k2ssl.bin.pretrain"]
    arguments = sounds.command(tmp_path / "two", *sounds.VALIDATED, "--trainer.max-steps", "4", "--trainer.valid-every", "2")
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 ranks x 1 micro-batch x") == 1, "rank 0 alone talks"
    assert pretrain.main(sounds.command(tmp_path / "one", *sounds.VALIDATED, "--trainer.max-steps", "4", "--trainer.valid-every", "2")) == 0
    # the batches are the same, dealt out in turn: accumulated there, side by side here
    two, one = (torch.tensor(lines(tmp_path / name, "train", "loss"), dtype=torch.float64)[:3] for name in ("two", "one"))
    agreement.relative("pretrain with 2 processes against 2 micro-batches, loss", two, one, 1e-5)
    # ... and one process goes on where two were
    assert pretrain.main([*arguments, "--trainer.max-steps", "5"]) == 0
    assert lines(tmp_path / "two", "train", "loss")[-1][0] == 5


def test_an_estimate_tells_the_hours_of_the_whole_run_and_writes_nothing(
    sounds: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("k2ssl.bin.trials._TIMED", 4)
    monkeypatch.setattr("k2ssl.bin.trials._WARM_UP", 1)
    assert pretrain.main(sounds.command(tmp_path / "run", "--estimate", "True", "--trainer.max-epochs", "1000")) == 0
    told = capsys.readouterr().out.splitlines()[-2:]
    assert told[0].startswith("4 steps: ") and "x real time" in told[0]
    per_step = float(told[0].split()[2])
    hours = float(told[1].split("will take ")[1].split(" h ")[0])
    steps = int(told[1].split()[0].replace(",", ""))
    assert steps == 1000 * sounds.UPDATES_PER_EPOCH and hours == pytest.approx(steps * per_step / 3600, abs=0.0051 + 0.0005 * steps / 3600)
    assert not (tmp_path / "run").exists()


def test_the_tuner_finds_the_largest_micro_batch_for_a_limit(
    sounds: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    class Report:
        def __init__(self, peak: int) -> None:
            self.peak_bytes = peak

    def measured(trainer: Trainer, loader: Any, most_batches: int, limit: int | None) -> Report:
        assert loader.sampling.max_duration == trainer.plan.micro_batch_seconds and trainer.plan.accumulation == 1
        asked.append(trainer.plan.micro_batch_seconds)
        return Report(int(2**30 * (0.1 + 0.1 * asked[-1])))

    monkeypatch.setattr("k2ssl.bin.trials.measure_worst", measured)
    arguments = sounds.command(
        tmp_path / "run", "--tune", "True", "--preflight.memory-limit-gib", "1.0", "--trainer.batch.seconds-per-update", "40"
    )
    assert pretrain.main(arguments) == 0
    told = capsys.readouterr().out
    (tmp_path / "tuned.json").write_text(told[told.index("\n{") :])
    tuned = load(pretrain.Pretrain, [str(tmp_path / "tuned.json")])
    # 0.9 GiB after the margin are 0.1 and 8 x 0.1
    assert tuned.trainer.batch.seconds_per_micro_batch == 8.0 and not tuned.tune and asked[0] == 4.0
    assert not (tmp_path / "run").exists()


def test_the_tuner_measures_real_steps(sounds: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = sounds.command(tmp_path / "run", "--tune", "True", "--preflight.memory-limit-gib", "100")
    assert pretrain.main(arguments) == 0
    assert f"{sounds.SECONDS_PER_UPDATE} s of audio per micro-batch take" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["inf-check", "statistics", "profile"])
def test_a_diagnosis_observes_a_few_steps(
    sounds: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    models: list[Any] = []
    plain = pretrain.build_model
    monkeypatch.setattr(pretrain, "build_model", lambda *arguments: models.append(plain(*arguments)) or models[-1])
    arguments = sounds.command(tmp_path / "run", "--diagnose", what, "--activation-checkpointing", "True", "--data.num-workers", "0")
    assert pretrain.main(arguments) == 0
    assert models[0].encoder.recompute_layers is (what == "profile"), "hooks would see every output twice"
    assert models[0].frontend.fast is (what == "profile"), "hooks would see no output of its layers"
    told = capsys.readouterr().out
    written = sorted(path.name for path in (tmp_path / "run").glob("*"))
    if what == "inf-check":
        assert "5 steps: every output, gradient and parameter is finite" in told and not written
    elif what == "statistics":
        found = json.loads((tmp_path / "run/statistics.json").read_text())
        assert found["steps"] == 5 and found["parameters"]["mask_embedding"]["rms"] > 0 and "output of module" in told
    else:
        assert len(written) == 1 and "trace" in written[0]


def test_a_diagnosis_looks_at_the_run_where_it_is(sounds: Any, tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for path in (tmp_path / "run/checkpoints").glob("*.pt"):
        content = load_checkpoint(path)
        content["model"]["heads.0.projection.weight"][0, 0] = float("nan")
        torch.save(content, path)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    command = sounds.command(tmp_path / "run", *sounds.VALIDATED, "--trainer.max-steps", str(STEPS), "--diagnose", "inf-check")
    assert pretrain.main([*command, "--data.num-workers", "0"]) == 1
    told = capsys.readouterr()
    assert "heads.0" in told.err.splitlines()[-1] and "step-000000012.pt at step 12" in told.out
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert pretrain.main([*command, "--resume", str(tmp_path / "none.pt")]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_an_inf_check_names_the_module(
    sounds: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pretrain.build_model

    def broken(*arguments: Any) -> Any:
        model = plain(*arguments)
        with torch.no_grad():
            model.heads[0].projection.weight[0, 0] = float("nan")
        return model

    monkeypatch.setattr(pretrain, "build_model", broken)
    assert pretrain.main(sounds.command(tmp_path / "run", "--diagnose", "inf-check", "--data.num-workers", "0")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("pretrain: ") and "heads.0" in error
