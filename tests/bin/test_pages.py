"""Blocks of the documentation that take trained models or labels do what their pages say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from k2ssl.bin import pretrain
from k2ssl.data.cuts import read_cuts
from k2ssl.data.labels import LabelShardWriter, Lineage, cut_list_hash, merge_shards
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.load import load_model, save_model
from k2ssl.train.checkpoint import load_checkpoint
from tests.command_lines import REPOSITORY, commands_in

_BLOCK = re.compile(r"<!-- tests/bin/test_pages\.py runs this block -->\n```(?P<language>\w*)\n(?P<body>.*?)^```$", re.M | re.S)


def blocks(page: str) -> list[str]:
    return [match["body"] for match in _BLOCK.finditer((REPOSITORY / "docs" / page).read_text(encoding="utf-8"))]


def command(block: str) -> list[str]:
    """The arguments of the one command of a block, which is of pretrain; files of the repository with their whole paths."""
    ((_, _, module, *words),) = commands_in(block)
    assert module == "k2ssl.bin.pretrain"
    return [str(REPOSITORY / word) if word.startswith("recipes/") else word for word in words]


def run_python(code: str, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_blocks_are_found() -> None:
    pages = (REPOSITORY / "docs").glob("*.md")
    assert {page.name: len(blocks(page.name)) for page in pages if blocks(page.name)} == {"python.md": 2, "training.md": 2}


def test_features_of_a_layer_are_those_among_all_hidden_states(tmp_path: Path) -> None:
    path = tmp_path / "exp/tiny/checkpoints/step-000000400.pt"
    path.parent.mkdir(parents=True)
    save_model(path, HubertModel(HubertConfig.tiny()))
    for name, samples in (("a", 16000), ("b", 12000)):
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * torch.randn(samples).numpy(), 16000)
    checks = """
for row, count in enumerate(counts):
    assert torch.equal(hidden[layer - 1][row, :count], frames[row, :count])
assert [len(feature) for feature in features] == [49, 37] and rate == 50.0 and not frames.requires_grad
assert len(hidden) == sum(model.config.encoder.num_layers)
"""
    run_python(blocks("python.md")[0] + checks, tmp_path)


def test_recognition_finds_what_was_said(reader: Any, tmp_path: Path) -> None:
    path = tmp_path / "exp/both/checkpoints/step-000010000.pt"
    path.parent.mkdir(parents=True)
    shutil.copy(reader.checkpoint, path)
    for number, name in enumerate(("a.wav", "b.wav")):
        shutil.copy(reader.audio(number), tmp_path / name)
    block = blocks("python.md")[1]
    checks = "\nassert len(times) == len(best.tokens) and 0 < times[0] < times[-1] < len(audio[1]) / 16000\n"
    said = run_python(block + checks, tmp_path).splitlines()
    assert said == reader.texts()[:2]
    of_ctc = block.replace("if model.transducer is not None:", "if False:")
    assert of_ctc != block and run_python(of_ctc + checks, tmp_path).splitlines() == reader.texts()[:2]


STEPS = ("--data.min-seconds", "0.5", "--data.num-workers", "0", "--preflight.run", "False", "--trainer.tensorboard", "False")


def label_by_time(sounds: Any, folder: Path, num_classes: int, rate: float) -> None:
    """Labels that count up, so that every class occurs."""
    cuts = list(read_cuts(sounds.cuts()))
    lineage = Lineage("mfcc", {"num_ceps": 13}, "centres", None, cut_list_hash(cuts))
    with LabelShardWriter(folder, 0, 1, num_classes, rate, lineage, sampling_rate=16000) as writer:
        for cut in cuts:
            writer.write(cut.id, np.arange((cut.num_samples - 400) // round(16000 / rate) + 1) % num_classes)
    merge_shards(folder)


def test_several_label_sets_are_predicted_by_a_head_each(sounds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(sounds.cuts(), "cuts_train.jsonl.gz")
    label_by_time(sounds, tmp_path / "labels/mfcc", 100, 100.0)
    label_by_time(sounds, tmp_path / "labels/layer6", 20, 50.0)
    options = ["--trainer.max-steps", "1", "--trainer.log-every", "1", "--device", "cpu", "--quiet", "True"]
    assert pretrain.main([*command(blocks("training.md")[0]), *STEPS, *options]) == 0
    model = load_model("exp/two/checkpoints/step-000000001.pt")
    assert (len(model.heads), model.config.head.num_classes, model.label_rate) == (2, (100, 20), (100.0, 50.0))
    train = next(line for line in map(json.loads, Path("exp/two/metrics.jsonl").read_text().splitlines()) if line["kind"] == "train")
    assert {"loss_masked", "loss_masked_1"} <= set(train)


def test_a_run_goes_on_with_other_data_and_takes_all_of_its_checkpoint_along(
    sounds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert pretrain.main(sounds.command(Path("exp/base"), *STEPS, "--trainer.max-steps", "3", "--trainer.keep.save-every", "1")) == 0
    old = Path("exp/base/checkpoints/step-000000003.pt")
    words = [word.replace("step-000216000.pt", old.name).replace("300000", "4") for word in command(blocks("training.md")[1])]
    shutil.copy(sounds.cuts("valid"), "cuts_more.jsonl.gz")
    sounds.label(tmp_path / "labels/more", "valid")
    capsys.readouterr()
    assert pretrain.main(words) == 0
    said = capsys.readouterr().out
    assert "note: data.cuts is " in said and "note: lineage.labels[0].cuts_sha256 is " in said and "at step 3" in said
    before, after = load_checkpoint(old), load_checkpoint(Path("exp/more/checkpoints/step-000000004.pt"))
    assert after["step"] == 4 and after["progress"]["epoch"] >= before["progress"]["epoch"]
    assert pretrain.main(words) == 0 and "nothing was left to do" in capsys.readouterr().out


def test_every_file_of_a_run_is_in_the_table_of_the_page(sounds: Any, tmp_path: Path) -> None:
    words = sounds.command(tmp_path / "run", *sounds.VALIDATED, *STEPS, "--trainer.max-steps", "1", "--trainer.tensorboard", "True")
    assert pretrain.main(words) == 0
    page = (REPOSITORY / "docs/training.md").read_text(encoding="utf-8")
    section = page.partition("## What is in OUTPUT")[2].partition("\n## ")[0]
    told = {name.split("/")[0] for name in re.findall(r"^\| `([^`]+)`", section, flags=re.MULTILINE)}
    made = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")}
    assert "card.json" in made and made <= told
