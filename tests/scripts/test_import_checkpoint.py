"""The script as its users run it; all but one run in this process, which saves starting one each time."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from k2ssl.models.frontend import WaveformConfig
from k2ssl.models.hubert import HubertConfig
from k2ssl.models.load import load_model
from k2ssl.models.prediction_head import HeadConfig
from k2ssl.models.transformer import TransformerConfig
from k2ssl.structure import to_dict

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "import_checkpoint.py"
CONFIG = HubertConfig(
    frontend=WaveformConfig(channels=16),
    encoder=TransformerConfig.tiny(),
    head=HeadConfig(num_classes=(20,), similarity="cosine", code_dim=8),
)
ALLOWED = ("--allow-missing", "heads.", "--allow-left-over", "lm_head.")


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("import_checkpoint", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def huggingface_state() -> dict[str, Tensor]:
    with np.load(ROOT / "tests" / "golden" / "huggingface_hubert_group.npz") as arrays:
        return {name.removeprefix("state."): torch.tensor(arrays[name]) for name in arrays.files if name.startswith("state.")}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a fine-tuned checkpoint with foreign objects, `in.pt`, and the configuration of its model, `model.json`."""
    state = {f"hubert.{key}": value for key, value in huggingface_state().items()} | {"lm_head.weight": torch.zeros(5, 32)}
    average = {key: value.double() + 1 for key, value in state.items()}
    torch.save({"model": state, "model_avg": average, "args": argparse.Namespace(lr=1.0)}, tmp_path / "in.pt")
    (tmp_path / "model.json").write_text(json.dumps(to_dict(CONFIG)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_checkpoint_becomes_a_model_file_and_everything_is_accounted_for(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "in.pt", "out.pt", "--config", "model.json", *ALLOWED],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "source: huggingface" and lines[-1] == "written: out.pt"
    assert "  heads.0.codes" in lines and "  lm_head.weight" in lines
    assert not any("->" in line for line in lines)
    model = load_model("out.pt")
    assert model.config == CONFIG
    assert torch.equal(model.mask_embedding, huggingface_state()["masked_spec_embed"])


def test_what_the_checkpoint_lacks_starts_from_the_same_values_each_time(script: ModuleType) -> None:
    for out in ("one.pt", "two.pt"):
        torch.rand(3)
        assert script.main(["in.pt", out, "--config", "model.json", *ALLOWED]) == 0
    assert torch.equal(load_model("one.pt").heads[0].codes, load_model("two.pt").heads[0].codes)


def test_the_average_is_taken_and_all_pairs_are_printed_if_asked_for(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    Path("model.toml").write_text(
        "[frontend]\nkind = 'waveform'\nchannels = 16\n"
        "[encoder]\nkind = 'transformer'\nnum_layers = 2\ndim = 32\nfeedforward_dim = 64\nnum_heads = 4\nconv_pos_kernel = 16\n"
        "conv_pos_groups = 4\n"
        "[head]\nnum_classes = [20]\nsimilarity = 'cosine'\ncode_dim = 8\n"
    )
    options = ["--weights", "model_avg", "--source", "huggingface", "--all", *ALLOWED]
    assert script.main(["in.pt", "out.pt", "--config", "model.toml", *options]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["hubert.masked_spec_embed", "->", "mask_embedding"] in lines
    expected = (huggingface_state()["masked_spec_embed"].double() + 1).float()
    assert torch.equal(load_model("out.pt").mask_embedding, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in.pt", "out.pt", "--config", "model.json"], "lm_head.weight"),
        (["in.pt", "out.pt", "--config", "model.json", "--source", "icefall", *ALLOWED], "is the source huggingface?"),
        (["in.pt", "taken.pt", "--config", "model.json", *ALLOWED], "taken.pt exists; --force replaces it"),
        (["in.pt", "in.pt", "--config", "model.json", "--force", *ALLOWED], "in.pt is the checkpoint itself"),
        (["in.pt", ".", "--config", "model.json", "--force", *ALLOWED], "is a folder"),
        (["in.pt", "no/out.pt", "--config", "model.json", *ALLOWED], "no is not a folder"),
        (["in.pt", "out.pt", "--config", "bad.json", *ALLOWED], "bad.json: colour: unknown key"),
        (["in.pt", "out.pt", "--config", "none.toml", *ALLOWED], "none.toml"),
        (["in.pt", "out.pt", "--config", "junk.pt", *ALLOWED], "junk.pt"),
        (["junk.pt", "out.pt", "--config", "model.json"], "junk.pt: cannot be read as a checkpoint"),
        (["none.pt", "out.pt", "--config", "model.json"], "none.pt: no such file"),
        (["in.pt", "out.pt", "--config", "model.json", "--weights", "ema"], "entries that do: model, model_avg"),
    ],
)
def test_bad_input_ends_with_a_message_status_1_and_no_file(
    script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    Path("taken.pt").write_bytes(b"precious")
    Path("bad.json").write_text('{"colour": 1}')
    Path("junk.pt").write_bytes(b"junk")
    before = sorted(folder.iterdir())
    assert script.main(arguments) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("import_checkpoint: ") and message in printed
    assert sorted(folder.iterdir()) == before
    assert Path("taken.pt").read_bytes() == b"precious"


def test_force_replaces_a_file(script: ModuleType) -> None:
    Path("taken.pt").write_bytes(b"old")
    assert script.main(["in.pt", "taken.pt", "--config", "model.json", "--force", *ALLOWED]) == 0
    assert load_model("taken.pt").config == CONFIG


def test_wrong_usage_ends_with_status_2_and_help_with_0(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    both = ["--size", "hubert_base", "--config", "model.json"]
    for arguments, status in (([], 2), (["--size", "enormous"], 2), (both, 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as caught:
            script.main(["in.pt", "out.pt", *arguments])
        assert caught.value.code == status
    printed = capsys.readouterr().out
    for option in ("--size", "--config", "--source", "--weights", "--allow-missing", "--allow-left-over", "--all", "--force"):
        assert option in printed


def test_with_a_size_the_checkpoint_tells_its_head(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    published = {name: build() for name, build in script.SIZES.items()}
    assert all(getattr(HubertConfig, name)() == config for name, config in published.items())
    other_head = HeadConfig(num_classes=(504,), similarity="linear")
    monkeypatch.setitem(script.SIZES, "hubert_base", lambda: replace(CONFIG, head=other_head))

    names = {"feature_projection.": "encoder.feature_projection.", "encoder.": "encoder.transformer."}
    state = {}
    for key, value in huggingface_state().items():  # with the names of torchaudio's pre-training model
        beginning = next((beginning for beginning in names if key.startswith(beginning)), "")
        state["wav2vec2." + names.get(beginning, "") + key.removeprefix(beginning)] = value
    state["mask_generator.mask_embedding"] = state.pop("wav2vec2.masked_spec_embed")
    state["logit_generator.label_embeddings"] = torch.randn(20, 8)
    state["logit_generator.final_proj.weight"] = torch.randn(8, 32)
    state["logit_generator.final_proj.bias"] = torch.randn(8)
    torch.save(state, "torchaudio.pt")

    assert script.main(["torchaudio.pt", "out.pt", "--size", "hubert_base"]) == 0
    model = load_model("out.pt")
    assert model.config == CONFIG
    assert torch.equal(model.heads[0].codes, state["logit_generator.label_embeddings"])
