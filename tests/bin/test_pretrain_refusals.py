"""What the pre-training program refuses: one line, status 2, nothing changed; and what it warns of."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from k2ssl.bin import pretrain, training_run
from k2ssl.bin.folder_lock import alone_in
from k2ssl.bin.pretrain_remarks import ending_in_warm_up, settings_without_effect
from k2ssl.bin.program import run_program
from k2ssl.config import load
from k2ssl.data.cuts import read_cuts, write_cuts
from k2ssl.models.load import load_model
from k2ssl.nn.fusion import use_fusion
from k2ssl.optim.build import ScheduleConfig
from k2ssl.train.checkpoint import load_checkpoint
from k2ssl.train.recovery import DivergedError
from k2ssl.train.trainer import Trainer

Refused = Callable[..., str]
ONE_STEP = ("--trainer.max-steps", "1", "--trainer.average-period", "1", "--data.num-workers", "0", "--preflight.run", "False")
DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Refused:
    """Runs the program, which has to end with `status` and one line on standard error; returns that line."""

    def run(arguments: list[str], status: int = 2) -> str:
        capsys.readouterr()
        assert pretrain.main(arguments) == status
        error = capsys.readouterr().err
        line = error.splitlines()[-1]
        assert line.startswith("pretrain: ") and "Traceback" not in error
        return line

    return run


@pytest.fixture(scope="module")
def finished(sounds: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    assert pretrain.main(sounds.command(output, *ONE_STEP)) == 0
    return output


@pytest.fixture
def unfused() -> Iterator[None]:
    """What was compiled before is compiled again, and what a program compiled is forgotten afterwards."""
    torch._dynamo.reset()
    yield
    use_fusion(None)
    torch._dynamo.reset()


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_data_that_is_not_there_is_refused(sounds: Any, refused: Refused, tmp_path: Path) -> None:
    output = tmp_path / "run"
    missing = tmp_path / "cuts_none.jsonl.gz"
    assert f"data.cuts: {missing}: there is no such file" in refused(sounds.command(output, cuts=missing))
    assert "no" in (line := refused(sounds.command(output, labels=tmp_path / "labels"))) and str(tmp_path / "labels") in line
    assert "data.labels" in refused(["--output", str(output), "--data.cuts", str(sounds.cuts())])
    assert "labels has 0 entries for 1 cuts" in refused(["--output", str(output), "--data.cuts", str(sounds.cuts()), "--data.labels"])
    valid = ["--data.valid-cuts", str(missing), "--data.valid-labels", str(sounds.labels())]
    assert f"data.valid_cuts: {missing}" in refused(sounds.command(output, *valid))
    assert not output.exists()


def test_fusing_without_a_compiler_is_refused(
    sounds: Any, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unfused: None
) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with config.patch({"cpp.cxx": (None, "/no/such/compiler")}):  # monkeypatch would leave torch's settings without this one
        line = refused(sounds.command(tmp_path / "run", "--fuse", "True"))
    assert "fused on cpu" in line and "compiler" in line
    assert not (tmp_path / "run").exists()


def test_labels_that_do_not_fit_are_refused_naming_both_sides(sounds: Any, refused: Refused, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert "30 of 30 cuts of the cut list have no labels: these are labels of another split" in refused(
        sounds.command(output, labels=sounds.labels("valid"))
    )
    fast = sounds.label(tmp_path / "fast", frame_rate=100.0)
    assert "100 labels per second, the model takes 50" in refused(sounds.command(output, labels=fast))
    many = sounds.label(tmp_path / "many", num_classes=9)
    assert "9 classes, the model's head has 8" in refused(sounds.command(output, labels=many))
    long = sounds.label(tmp_path / "long", extra=5)
    assert "30 of 30 cuts have labels of another length" in refused(sounds.command(output, labels=long))
    heads = ["--model.head.num-classes", "8", "8"]
    assert "1 label sets are given, the model has 2 heads" in refused([*sounds.command(output), *heads])
    assert not output.exists()


def test_one_name_for_different_cuts_of_two_corpora_is_refused(sounds: Any, refused: Refused, tmp_path: Path) -> None:
    first, *others = read_cuts(sounds.cuts("valid"))
    namesake = next(cut for cut in read_cuts(sounds.cuts()) if abs(cut.duration - first.duration) > 0.3).id
    renamed = tmp_path / "cuts_renamed.jsonl.gz"
    write_cuts([first.with_id(namesake), *others], renamed)
    plain, sounds.cuts = sounds.cuts, lambda split="train": renamed
    try:
        labels = sounds.label(tmp_path / "labels")
    finally:
        sounds.cuts = plain
    both = ["--data.cuts", str(sounds.cuts()), str(renamed), "--data.labels", str(sounds.labels()), str(labels)]
    line = refused([*sounds.command(tmp_path / "run"), *both])
    assert f"cut '{namesake}' has " in line and str(labels) in line and "rename" in line


def test_settings_out_of_place_are_refused(sounds: Any, refused: Refused, tmp_path: Path) -> None:
    output = tmp_path / "run"
    (tmp_path / "wrong.toml").write_text("[trainer]\nmax_stepps = 3\n")
    line = refused([str(tmp_path / "wrong.toml"), *sounds.command(output)])
    assert "trainer.max_stepps: unknown key; known keys are" in line and "wrong.toml" in line
    assert "device is 'tpu', allowed are auto, cpu, cuda" in refused([*sounds.command(output), "--device", "tpu"])
    assert "estimate and tune are asked for at once" in refused(sounds.command(output, "--estimate", "True", "--tune", "True"))
    assert "sharding is 'fsdp', which takes several processes" in refused(sounds.command(output, "--trainer.sharding", "fsdp"))
    assert "precision is 'float16'" in refused(sounds.command(output, "--trainer.precision", "float16"))
    prefix = tmp_path / "scales.toml"
    prefix.write_text('[optim.lr_scales]\n"encodr" = 0.5\n')
    assert "lr_scales prefix 'encodr'" in refused([str(prefix), *sounds.command(output)])
    assert "weights is (0.0,)" in refused(sounds.command(output, "--data.weights", "0"))


def test_an_output_folder_of_another_run_is_refused_unless_asked(
    sounds: Any, refused: Refused, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    before = contents(output)
    command = sounds.command(output, *ONE_STEP, "--accept-changes", "False")
    slower = [*command, "--optim.lr", "0.02", "--seed", "7", "--trainer.max-steps", "2"]
    line = refused(slower)
    assert "step-000000001.pt" in line and "--accept-changes True" in line
    assert "optim.lr is 0.045 there, 0.02 here; seed is 42 there, 7 here" in line and "max_steps" not in line
    assert "--resume auto goes on" in refused([*command, "--resume", "never"])
    assert "there is no such file" in refused([*command, "--resume", str(tmp_path / "none.pt")])
    assert contents(output) == before
    assert pretrain.main([*slower, "--accept-changes", "True"]) == 0
    assert "note: optim.lr is 0.045 there, 0.02 here" in capsys.readouterr().out
    records = [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]
    rates = {record["step"]: record["lr"] for record in records if record["kind"] == "train"}
    assert rates[1] == pytest.approx(0.045 / 5, rel=0.01) and rates[2] == pytest.approx(0.02 * 2 / 5, rel=0.01)
    settings = json.loads((output / "settings.json").read_text())
    assert settings["optim"]["lr"] == 0.02 and settings["accept_changes"] is False  # it was said of these changes
    again = [str(output / "settings.json"), "--optim.lr", "0.01", "--trainer.max-steps", "3"]
    assert "optim.lr is 0.02 there, 0.01 here" in refused(again)


@pytest.mark.parametrize("change", [("--optim.clipping-scale", "5"), ("--optim.name", "adamw")])
def test_what_is_part_of_the_optimizers_state_cannot_change_within_a_run(
    sounds: Any, refused: Refused, finished: Path, tmp_path: Path, change: tuple[str, str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    before = contents(tmp_path / "run")
    line = refused(sounds.command(tmp_path / "run", *ONE_STEP, "--trainer.max-steps", "2", "--accept-changes", "True", *change))
    assert f"{change[0].strip('-').replace('-', '_')} is " in line and "only its rates (optim.lr, optim.lr_scales) can be changed" in line
    assert contents(tmp_path / "run") == before


def test_validation_data_that_give_no_batch_are_refused_before_training(sounds: Any, refused: Refused, tmp_path: Path) -> None:
    limits = ("--data.min-seconds", "1.4", "--data.max-seconds", "1.5")  # which no cut of the validation data reaches
    line = refused(sounds.command(tmp_path / "run", *sounds.VALIDATED, *ONE_STEP, *limits))
    assert "data.valid_cuts give no batch; see data.min_seconds" in line and not (tmp_path / "run").exists()


def test_a_setting_that_an_older_checkpoint_lacks_counts_as_its_default(
    sounds: Any, refused: Refused, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    path = output / "checkpoints/step-000000001.pt"
    content = load_checkpoint(path)
    del content["job"]["fuse"], content["job"]["data"]["crop_step"]
    del content["job"]["model"]["masking"]["equal_counts"], content["config"]["masking"]["equal_counts"]
    torch.save(content, path)
    longer = sounds.command(output, *ONE_STEP, "--trainer.max-steps", "2", "--accept-changes", "False")
    assert "data.crop_step is 0.0 there, 0.25 here" in refused([*longer, "--data.crop-step", "0.25"])
    line = refused([*longer, "--model.masking.equal-counts", "False"])
    assert "model.masking.equal_counts is True there, False here" in line
    assert pretrain.main(longer) == 0
    assert (output / "checkpoints/step-000000002.pt").is_file()


def test_labels_of_other_centres_are_another_run(sounds: Any, refused: Refused, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    path = output / "checkpoints/step-000000001.pt"
    content = load_checkpoint(path)
    content["job"]["lineage"]["labels[0]"]["kmeans_sha256"] = "others"
    torch.save(content, path)
    line = refused(sounds.command(output, *ONE_STEP, "--trainer.max-steps", "2"))
    assert "lineage.labels[0].kmeans_sha256 is 'others' there, 'centres' here" in line


def test_labels_are_checked_again_before_a_run_goes_on(
    sounds: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[bool] = []
    plain = pretrain.OpenedData.check

    def check(self: Any, model: Any, quick: bool = False) -> list[str]:
        checked.append(quick)
        return plain(self, model, quick)

    monkeypatch.setattr(pretrain.OpenedData, "check", check)
    monkeypatch.setattr("k2ssl.bin.pretrain_data._QUICK", 3)
    shutil.copytree(finished, tmp_path / "run")
    assert pretrain.main(sounds.command(tmp_path / "run", *ONE_STEP)) == 0
    job = load(pretrain.Pretrain, sounds.command(tmp_path / "run", *ONE_STEP))
    data, model = pretrain.OpenedData(job.data), load_model(tmp_path / "run/checkpoints/step-000000001.pt")
    assert checked == [True]
    assert "3 cuts checked" in data.check(model, quick=True)[0] and "30 cuts checked" in data.check(model)[0]


def test_checkpoints_that_cannot_be_gone_on_from_are_refused(sounds: Any, refused: Refused, finished: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(finished, damaged)
    for path in (damaged / "checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-1000])
    before = contents(damaged)
    assert "all of them damaged" in refused(sounds.command(damaged, *ONE_STEP))
    assert contents(damaged) == before
    line = refused(sounds.command(tmp_path / "new", *ONE_STEP, "--resume", str(damaged / "checkpoints/step-000000001.pt")))
    assert "step-000000001.pt: damaged" in line
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    before = contents(other / "checkpoints") | contents(other / "settings.json")
    line = refused(sounds.command(other, *ONE_STEP, "--model.feature-penalty", "5", "--accept-changes", "True"))
    assert "the checkpoint is of another model: feature_penalty is 10.0 there, 5.0 here" in line
    assert contents(other / "checkpoints") | contents(other / "settings.json") == before
    shutil.copy(other / "checkpoints/step-000000001.pt", other / "checkpoints/step-000000009.pt")
    line = refused(sounds.command(other, *ONE_STEP, "--resume", str(other / "checkpoints/step-000000001.pt")))
    assert "step-000000009.pt beside it is newer" in line


def test_a_run_can_begin_from_a_checkpoint_of_another_folder_and_be_interrupted(
    sounds: Any, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = str(finished / "checkpoints/step-000000001.pt")
    command = sounds.command(tmp_path / "run", *ONE_STEP, "--resume", start)
    assert pretrain.main([*command, "--trainer.max-steps", "2"]) == 0
    assert "going on from " + start in capsys.readouterr().out
    assert pretrain.main([*command, "--trainer.max-steps", "3"]) == 0
    assert f"going on from {tmp_path / 'run/checkpoints/step-000000002.pt'} at step 2" in capsys.readouterr().out


def test_too_little_memory_or_disk_is_said_before_training(
    sounds: Any, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = refused(sounds.command(tmp_path / "memory", "--trainer.max-steps", "1", "--preflight.memory-limit-gib", "0.001"))
    assert "preflight: the update 'longest audio' (8 utterances" in line and "1.02 MiB" not in line and "are allowed; lower" in line
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**12, 10**12 - 10**6, 10**6))
    line = refused(sounds.command(tmp_path / "disk", *ONE_STEP, "--trainer.keep.keep-last", "3"))
    assert "checkpoints of 0.5 MiB each will take" in line and "1.0 MiB are free; lower trainer.keep.keep_last" in line
    assert list(tmp_path.iterdir()) == []  # not even a folder is left


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DivergedError("training diverged at step 9"), "pretrain: training diverged at step 9"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), "pretrain: CUDA out of memory. Tried to allocate"),
        (MemoryError(), "pretrain: MemoryError()"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "pretrain: [enforce fail] DefaultCPU"),
    ],
)
def test_failures_of_the_run_are_one_line_and_status_1(
    sounds: Any, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fails(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(Trainer, "train_step", fails)
    assert refused(sounds.command(tmp_path / "run", *ONE_STEP), status=1).startswith(said)
    assert '"failed"' in (tmp_path / "run/ledger.jsonl").read_text().splitlines()[-1]


def test_our_own_mistakes_keep_their_traceback() -> None:
    def fails(job: object) -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        run_program(fails, pretrain.PreflightConfig, [], "pretrain", "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.weights", "2"], "data.weights: no effect with one manifest"),
        (
            ["--trainer.valid-every", "7", "--trainer.keep.keep-best", "3"],
            "trainer.valid_every, trainer.keep.keep_best: no effect without data.valid_cuts",
        ),
        (["--trainer.valid-average", "True"], "trainer.valid_average: no effect without data.valid_cuts"),
        (
            ["--trainer.precision", "float32", "--trainer.guard.min-scale", "1"],
            "trainer.guard.min_scale: no effect with trainer.precision float32",
        ),
        (["--trainer.guard.max-rollbacks", "0", "--trainer.guard.lr-factor", "0.1"], "trainer.guard.lr_factor: no effect"),
        (["--preflight.run", "False"], "preflight.batches: no effect with preflight.run False"),
        (["--model.head.code-dim", "64"], "model.head.code_dim: no effect with model.head.similarity linear"),
        (["--model.masking.channel-length", "3"], "model.masking.channel_length: no effect"),
        (["--data.normalize", "True"], "data.normalize: the trained model does not normalise"),
    ],
)
def test_settings_without_effect_are_named(sounds: Any, tmp_path: Path, options: list[str], said: str) -> None:
    plain = load(pretrain.Pretrain, sounds.command(tmp_path))
    assert list(settings_without_effect(plain)) == []
    (text,) = settings_without_effect(load(pretrain.Pretrain, sounds.command(tmp_path, *options)))
    assert text.startswith(said)


def test_a_transformer_has_no_schedules_for_a_reference_duration(sounds: Any, tmp_path: Path) -> None:
    conf = tmp_path / "transformer.toml"
    conf.write_text('[model.encoder]\nkind = "transformer"\n[trainer.batch]\nreference_seconds = 80.0\n')
    files = ["--data.cuts", "a.jsonl.gz", "--data.labels", "a", "--output", "run"]
    (text,) = settings_without_effect(load(pretrain.Pretrain, [str(conf), *files]))
    assert text.startswith("trainer.batch.reference_seconds: no effect with a Transformer")


def test_warnings_are_shown_when_the_program_starts(sounds: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert pretrain.main(sounds.command(tmp_path / "run", *ONE_STEP, "--data.weights", "3")) == 0
    assert "warning: data.weights: no effect with one manifest" in caplog.messages


def test_data_that_is_normalised_as_a_whole_is_not_normalised_again_by_crop(sounds: Any, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert pretrain.main(sounds.command(output, *ONE_STEP, "--model.frontend.norm", "layer", "--data.normalize", "True")) == 0
    job = load(pretrain.Pretrain, [str(output / "settings.json")])
    assert list(settings_without_effect(replace(job, preflight=pretrain.PreflightConfig()))) == []
    assert pretrain.build_model(job, torch.device("cpu")).frontend.normalizes_audio is False
    assert load_model(output / "checkpoints/step-000000001.pt").frontend.normalizes_audio is True, (
        "whoever uses the model hands it raw audio"
    )


def test_validation_without_sharding_sees_every_utterance_once(sounds: Any, tmp_path: Path) -> None:
    job = load(pretrain.Pretrain, sounds.command(tmp_path, *sounds.VALIDATED, "--data.num-workers", "0"))
    data = pretrain.OpenedData(job.data)
    run = pretrain.Run(job, data, pretrain.build_model(job, torch.device("cpu")), torch.device("cpu"), None)
    ids = [name for batch in run.valid_loader for name in batch.ids]
    assert sorted(ids) == sorted(cut.id for cut in read_cuts(sounds.cuts("valid")))
    assert not run.valid_loader.sampling.drop_incomplete
    together = data.valid_loader(run.trainer.plan, 16000, torch.device("cpu"), drop_incomplete=True)
    assert together.sampling.drop_incomplete and run.train_loader.sampling.drop_incomplete


def test_nobody_looks_for_checkpoints_in_a_folder_where_another_process_trains(
    sounds: Any, refused: Refused, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run, "find_start", lambda *arguments: pytest.fail("looked"))
    before = contents(finished)
    with alone_in(finished):
        assert "another process works in this folder" in refused(sounds.command(finished, *ONE_STEP))
    assert contents(finished) == before


def test_a_start_reads_a_checkpoint_once(sounds: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared, mapped = [], []
    testzip, load_file = zipfile.ZipFile.testzip, torch.load

    def compare(records: zipfile.ZipFile) -> str | None:
        compared.append(records)
        return testzip(records)

    def read(path: Path, **options: Any) -> Any:
        mapped.append(options.get("mmap"))
        return load_file(path, **options)

    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr(Trainer, "fit", lambda *arguments: True)  # writes nothing, reads nothing back
    monkeypatch.setattr(zipfile.ZipFile, "testzip", compare)
    monkeypatch.setattr(torch, "load", read)
    again = sounds.command(tmp_path / "run", *ONE_STEP)
    elsewhere = sounds.command(tmp_path / "new", *ONE_STEP, "--resume", str(finished / "checkpoints/step-000000001.pt"))
    for command in (again, elsewhere):
        compared.clear()
        mapped.clear()
        assert pretrain.main(command) == 0
        assert len(compared) == 1 and mapped and all(mapped)


@pytest.mark.parametrize(
    ("schedule", "steps", "ends"),
    [
        (ScheduleConfig(warmup_batches=10.0), 10, True),
        (ScheduleConfig(warmup_batches=10.0), 11, False),
        (ScheduleConfig(warmup_batches=10.0), 0, False),
        (ScheduleConfig("eden2", warmup_batches=0.0), 1, False),
        (ScheduleConfig("tri_stage", decay_batches=5.0), 10, True),
        (ScheduleConfig("tri_stage", max_batches=100.0), 10, False),
    ],
)
def test_a_run_that_ends_in_its_warm_up_is_known(schedule: ScheduleConfig, steps: int, ends: bool) -> None:
    assert len(list(ending_in_warm_up(schedule, steps))) == ends


def test_a_run_that_ends_in_its_warm_up_is_warned_of(sounds: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = sounds.command(tmp_path / "run", "--trainer.max-steps", "1", "--schedule.warmup-batches", "3")
    assert pretrain.main(command) == 0
    assert "warning: schedule.warmup_batches is 3, and the run has 1 updates" in caplog.text
