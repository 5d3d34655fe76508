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
from k2ssl.bin.decode_model import TrainedModel, load_trained
from k2ssl.data.tokenizer import LetterTokenizer, NormalizationConfig
from k2ssl.models.asr import AsrConfig, AsrModel
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.load import Weights, config_to_dict, load_model, save_model
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
    assert sorted(written) == ["config", "format", "model", "version", "weights"] and written["format"] == "k2ssl-model"
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
    assert main(["--output", "avg.pt", "--end", "6.pt"]) == 2
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


def checkpoint_that_is_not_finite() -> None:
    content = torch.load("5.pt", weights_only=True)
    for key, weights, value in (("average", content["average"]["model"], "nan"), ("model", content["model"], "inf")):
        assert "mask_embedding" in weights, key
        weights["mask_embedding"][:2] = float(value)
    torch.save(content, "bad.pt")


@pytest.mark.parametrize(
    ("prepare", "arguments", "status", "message"),
    [
        (
            other_architecture,
            "--checkpoints 1.pt 2.pt other.pt",
            2,
            r"1\.pt and other\.pt cannot be averaged: config\.head\.num_classes is .* in 1\.pt, \[7\] in other\.pt",
        ),
        (
            other_run_with_average,
            "--start other.pt --end 4.pt",
            2,
            r"other\.pt and 4\.pt cannot be averaged: config\.head\.num_classes is \[7\] in other\.pt",
        ),
        (None, "--end plain.pt", 2, r"plain\.pt: holds no averaged weights"),
        (None, "--start plain.pt --end 4.pt", 2, r"plain\.pt: holds no averaged weights"),
        (None, "--start 1.pt --end 4.pt", 2, r"1\.pt: its running average has never been updated"),
        (
            None,
            "--start 6.pt --end 4.pt",
            2,
            r"from 6\.pt to 4\.pt: the running average of the start goes to step 6, that of the end to",
        ),
        (None, "--start 4.pt --end 5.pt", 2, r"the running average of the start goes to step 4, that of the end to step 4"),
        (None, "--start 4.pt --end 4.pt", 2, r"4\.pt is the same file as 4\.pt"),
        (None, "--checkpoints 1.pt 2.pt folder/../1.pt", 2, r"folder/\.\./1\.pt is the same file as 1\.pt"),
        (None, "--checkpoints 1.pt none.pt", 2, r"none\.pt: there is no such file"),
        (None, "--end none.pt", 2, r"none\.pt: there is no such file"),
        (cut_checkpoint, "--checkpoints 1.pt cut.pt", 2, r"cut\.pt: damaged, cut short"),
        (flip_checkpoint, "--start cut.pt --end 6.pt", 2, r"cut\.pt: damaged, the checksum of record .* does not fit"),
        (
            checkpoint_that_is_not_finite,
            "--checkpoints 1.pt bad.pt",
            2,
            r"bad\.pt: cannot be averaged, 2 of \d+ values of mask_embedding under 'model' are not finite numbers",
        ),
        (checkpoint_that_is_not_finite, "--checkpoints bad.pt 1.pt", 2, r"bad\.pt: cannot be averaged, 2 of .* under 'model'"),
        (checkpoint_that_is_not_finite, "--end bad.pt", 2, r"bad\.pt: cannot be averaged, 2 of .* under 'average'"),
        (checkpoint_that_is_not_finite, "--start 2.pt --end bad.pt", 2, r"bad\.pt: cannot be averaged, 2 of .* under 'average'"),
        (checkpoint_that_is_not_finite, "--start bad.pt --end 6.pt", 2, r"bad\.pt: cannot be averaged, 2 of .* under 'average'"),
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


# --- recognition models ---------------------------------------------------------------------------------------------------------------------

READERS = LetterTokenizer("ABCD", NormalizationConfig())


def recognizer(path: str, step: int = 2, letters: str = "ABCD", normalize: bool = True, **changes: object) -> AsrModel:
    """A checkpoint as fine-tuning writes it, with drawn weights and a drawn average."""
    model, average = (AsrModel(AsrConfig.tiny(7, "ctc")) for _ in range(2))
    tokenizer = LetterTokenizer(letters, NormalizationConfig()).to_dict()
    mean = {name: value.double() if value.is_floating_point() else value for name, value in average.state_dict().items()}
    content = {"config": config_to_dict(model.config), "model": model.state_dict(), "average": {"step": step, "model": mean}}
    content |= {"tokenizer": tokenizer, "job": {"data": {"normalize": normalize}, "seed": 3}, "optimizer": {"lr": 0.1}}
    torch.save({key: value for key, value in {**content, **changes}.items() if value is not None}, path)
    return model


def loaded(*paths: str, weights: Weights = "raw", after: str | None = None) -> TrainedModel:
    return load_trained(paths, weights, after, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("arguments", "in_memory"),
    [
        ("--checkpoints a.pt b.pt c.pt", lambda: loaded("a.pt", "b.pt", "c.pt")),
        ("--start a.pt --end b.pt", lambda: loaded("b.pt", weights="average", after="a.pt")),
        ("--end b.pt", lambda: loaded("b.pt", weights="average")),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_the_average_of_recognition_models_can_be_decoded_and_is_the_one_that_decoding_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, in_memory: Callable[[], TrainedModel], normalize: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    models = [recognizer(name, step, normalize=normalize) for step, name in ((2, "a.pt"), (6, "b.pt"), (8, "c.pt"))]
    assert main(["--output", "avg.pt", *arguments.split()]) == 0
    written, expected = loaded("avg.pt"), in_memory()
    assert written.tokenizer.sha256 == expected.tokenizer.sha256 == READERS.sha256
    assert written.normalize is expected.normalize is normalize
    assert re.fullmatch(r"mean (of 3 models|over steps [13] to 6)", written.weights)
    states = expected.model.state_dict()
    assert all(torch.equal(value, states[name]) for name, value in written.model.state_dict().items())
    assert not torch.equal(written.model.mask_embedding, models[1].mask_embedding)
    assert sorted(torch.load("avg.pt", weights_only=True)) == ["config", "format", "job", "model", "tokenizer", "version", "weights"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"letters": "BACD"}, "their tokenizers differ"),
        ({"tokenizer": None}, "their tokenizers differ"),
        ({"normalize": False}, r"data\.normalize was True for a\.pt, False for b\.pt"),
    ],
)
@pytest.mark.parametrize("arguments", ["--checkpoints a.pt b.pt", "--start a.pt --end b.pt"])
def test_recognition_models_that_do_not_belong_together_are_not_averaged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    message: str,
    arguments: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    recognizer("a.pt")
    recognizer("b.pt", step=4, **changes)  # type: ignore[arg-type]
    assert main(["--output", "avg.pt", *arguments.split()]) == 2
    assert re.search(rf"a\.pt and b\.pt cannot be averaged: {message}", capsys.readouterr().err) and not Path("avg.pt").exists()


def test_a_recognition_model_is_not_averaged_with_an_encoder(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    recognizer("a.pt")
    assert main(["--output", "avg.pt", "--checkpoints", "a.pt", "1.pt"]) == 2
    assert "1.pt: holds a pre-trained model, as k2ssl.bin.pretrain makes it; a recognition model, as" in capsys.readouterr().err


def test_a_run_that_does_not_say_how_its_audio_came_stands_in_no_ones_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recognizer("a.pt")
    recognizer("b.pt", job=None)
    assert main(["--output", "avg.pt", "--checkpoints", "a.pt", "b.pt"]) == 0
    assert loaded("avg.pt").normalize


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
