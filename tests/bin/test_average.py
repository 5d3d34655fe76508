"""Averaging checkpoints from the command line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from k2ssl.bin.average import main
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.load import load_model, save_model
from k2ssl.structure import to_dict
from k2ssl.train.averaging import RunningAverage
from k2ssl.train.checkpoint import CheckpointFolder, KeepConfig

TINY = HubertConfig.tiny()
Run = dict[int, dict[str, Tensor]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Checkpoints 1.pt to 6.pt of a run that is sampled every second step, in the working folder; returns the models by step."""
    monkeypatch.chdir(tmp_path)
    model = HubertModel(TINY)
    average = RunningAverage(model, 2)
    folder = CheckpointFolder(tmp_path / "folder", KeepConfig(save_every=1, keep_last=9), background=False)
    models = {}
    for step in range(1, 7):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
        average.update(model, step)
        content = {"config": to_dict(TINY), "model": model.state_dict(), "average": average.state_dict(), "optimizer": {"lr": 0.1}}
        folder.save(step, content).rename(tmp_path / f"{step}.pt")
        models[step] = {name: value.clone() for name, value in model.state_dict().items()}
    save_model("plain.pt", model)
    return models


def expected(run: Run, *steps: int) -> dict[str, Tensor]:
    stacked = {name: torch.stack([run[step][name] for step in steps]) for name in run[1]}
    return {name: value.double().mean(dim=0).to(value.dtype) for name, value in stacked.items()}


def assert_written(models: dict[str, Tensor]) -> None:
    written = torch.load("avg.pt", weights_only=True)
    assert sorted(written) == ["config", "format", "model", "version"] and written["format"] == "k2ssl-model"
    assert load_model("avg.pt").config == TINY
    assert written["model"].keys() == models.keys()
    for name, value in models.items():
        assert written["model"][name].dtype == value.dtype
        torch.testing.assert_close(written["model"][name], value, rtol=2e-7, atol=1e-7)


def test_the_plain_mean_of_checkpoints_and_model_files(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", "avg.pt", "--checkpoints", "1.pt", "2.pt", "plain.pt"]) == 0
    assert_written(expected(run, 1, 2, 6))
    assert capsys.readouterr().out.startswith("avg.pt: mean of 3 models, ")


def test_the_mean_over_a_range_of_steps(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", "avg.pt", "--start", "2.pt", "--end", "6.pt"]) == 0
    assert_written(expected(run, 4, 6))
    assert capsys.readouterr().out.startswith("avg.pt: mean over steps 3 to 6, ")


def test_the_mean_since_the_beginning_and_an_output_that_is_replaced(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", "avg.pt", "--end", "4.pt"]) == 0
    assert_written(expected(run, 2, 4))
    before = Path("avg.pt").read_bytes()
    assert main(["--output", "avg.pt", "--end", "6.pt"]) == 1
    assert capsys.readouterr().err == "average: avg.pt exists; --overwrite True replaces it\n" and Path("avg.pt").read_bytes() == before
    assert main(["--output", "avg.pt", "--end", "6.pt", "--overwrite", "True"]) == 0
    assert_written(expected(run, 2, 4, 6))


def other_architecture() -> None:
    save_model("other.pt", HubertModel(replace(TINY, head=replace(TINY.head, num_classes=(7,)))))


def other_run_with_average() -> None:
    config = replace(TINY, head=replace(TINY.head, num_classes=(7,)))
    model = HubertModel(config)
    average = {"step": 2, "model": model.state_dict()}
    torch.save({"config": to_dict(config), "model": model.state_dict(), "average": average}, "other.pt")


def cut_checkpoint() -> None:
    Path("cut.pt").write_bytes(Path("2.pt").read_bytes()[:3000])


def flip_checkpoint() -> None:
    content = bytearray(Path("2.pt").read_bytes())
    weights = load_model("2.pt").mask_embedding.detach().numpy().tobytes()
    content[content.index(weights) + 2] ^= 1
    Path("cut.pt").write_bytes(content)


@pytest.mark.parametrize(
    ("prepare", "arguments", "status", "message"),
    [
        (
            other_architecture,
            "--checkpoints 1.pt 2.pt other.pt",
            1,
            r"architectures differ: config\.head\.num_classes is .* in 1\.pt, \[7\] in other\.pt",
        ),
        (
            other_run_with_average,
            "--start other.pt --end 4.pt",
            1,
            r"architectures differ: config\.head\.num_classes is \[7\] in other\.pt",
        ),
        (None, "--end plain.pt", 1, r"plain\.pt: holds no averaged weights"),
        (None, "--start plain.pt --end 4.pt", 1, r"plain\.pt: holds no averaged weights"),
        (None, "--start 1.pt --end 4.pt", 1, r"1\.pt: its running average has never been updated"),
        (
            None,
            "--start 6.pt --end 4.pt",
            1,
            r"start 6\.pt, end 4\.pt: the running average of the start goes to step 6, that of the end to",
        ),
        (None, "--start 4.pt --end 5.pt", 1, r"the running average of the start goes to step 4, that of the end to step 4"),
        (None, "--start 4.pt --end 4.pt", 2, r"4\.pt is the same file as 4\.pt"),
        (None, "--checkpoints 1.pt 2.pt folder/../1.pt", 2, r"folder/\.\./1\.pt is the same file as 1\.pt"),
        (None, "--checkpoints 1.pt none.pt", 1, r"none\.pt: No such file or directory"),
        (None, "--end none.pt", 1, r"none\.pt: No such file or directory"),
        (cut_checkpoint, "--checkpoints 1.pt cut.pt", 1, r"cut\.pt: damaged, cut short"),
        (flip_checkpoint, "--start cut.pt --end 6.pt", 1, r"cut\.pt: damaged, the checksum of record .* does not fit"),
        (None, "--checkpoints 1.pt", 2, r"checkpoints is 1\.pt alone, at least two are needed"),
        (None, "", 2, "either --checkpoints A B ... is needed, or --end B"),
        (None, "--start 2.pt", 2, "either --checkpoints A B ... is needed, or --end B"),
        (None, "--checkpoints 1.pt 2.pt --end 4.pt", 2, "either --checkpoints A B ... is needed, or --end B"),
        (None, "--checkpoints 1.pt 2.pt --start 4.pt", 2, "either --checkpoints A B ... is needed, or --end B"),
    ],
)
def test_what_cannot_be_averaged_is_refused_and_nothing_is_written(
    run: Run, capsys: pytest.CaptureFixture[str], prepare: Callable[[], None] | None, arguments: str, status: int, message: str
) -> None:
    if prepare is not None:
        prepare()
    before = sorted(Path().iterdir())
    assert main(["--output", "avg.pt", *arguments.split()]) == status
    error = capsys.readouterr().err
    assert error.startswith("average: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert sorted(Path().iterdir()) == before


def test_an_input_is_never_replaced(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("6.pt").read_bytes()
    assert main(["--output", "6.pt", "--start", "2.pt", "--end", "6.pt", "--overwrite", "True"]) == 2
    assert "6.pt is the same file as 6.pt" in capsys.readouterr().err and Path("6.pt").read_bytes() == before


def test_the_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--output", "--checkpoints", "--start", "--end", "--overwrite", "mean"))
