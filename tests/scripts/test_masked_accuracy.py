"""Accuracy by distance from the visible frames, on a model whose predictions are known."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch
from lhotse import Recording

from k2ssl.data.cuts import write_cuts
from k2ssl.data.labels import LabelShardWriter, Lineage, merge_shards
from k2ssl.models.asr import AsrConfig, AsrModel
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.load import save_model

FRAMES = 60


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    import masked_accuracy  # type: ignore[import-not-found]

    return masked_accuracy


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A model that always says code 3, two recordings, and labels of which every third is 3."""
    torch.manual_seed(0)
    model = HubertModel(HubertConfig.tiny())
    linear = [module for module in model.heads.modules() if isinstance(module, torch.nn.Linear)][-1]
    linear.weight.data.zero_()
    linear.bias.data = 10.0 * (torch.arange(16) == 3)
    save_model(tmp_path / "model.pt", model)
    generator, cuts = np.random.default_rng(0), []
    with LabelShardWriter(tmp_path / "labels", 0, 1, 16, 50.0, Lineage.unknown(), sampling_rate=16_000) as writer:
        for name in ("a", "b"):
            soundfile.write(tmp_path / f"{name}.wav", 0.1 * generator.standard_normal(400 + 320 * (FRAMES - 1)), 16_000)
            cuts.append(Recording.from_file(tmp_path / f"{name}.wav").to_cut())
            writer.write(cuts[-1].id, np.where(np.arange(FRAMES) % 3 == 0, 3, 5))
    merge_shards(tmp_path / "labels")
    write_cuts(cuts, tmp_path / "cuts.jsonl.gz")
    return ["--model", str(tmp_path / "model.pt"), "--cuts", str(tmp_path / "cuts.jsonl.gz"), "--labels", str(tmp_path / "labels")]


def test_distances_are_to_the_nearest_visible_frame_on_either_side(script: ModuleType) -> None:
    mask = torch.tensor([True, True, False, True, True, True, True, False, True])
    assert script.distances(mask).tolist() == [2, 1, 0, 1, 2, 2, 1, 0, 1]


def test_every_hidden_frame_counts_at_its_distance(script: ModuleType, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([*files, "--draws", "3", "--farthest", "4"]) == 0
    record = json.loads(capsys.readouterr().out)
    model = script.load_model(files[1])
    hidden, right = [0] * 5, [0] * 5
    for cut in range(2):
        for draw in range(3):
            model.clock.seed(cut, draw)
            mask = model.draw_mask(torch.zeros(1, 400 + 320 * (FRAMES - 1)))[0].tolist()
            visible = [frame for frame in range(FRAMES) if not mask[frame]]
            for frame in range(FRAMES):
                distance = min(min(abs(frame - other) for other in visible), 4)
                hidden[distance] += mask[frame]
                right[distance] += mask[frame] and frame % 3 == 0
    assert record["frames"] == hidden[1:] and record["hidden"] == sum(hidden[1:])
    assert record["by_distance"] == pytest.approx([r / h for r, h in zip(right[1:], hidden[1:], strict=True)], abs=1e-4)
    assert record["accuracy"] == pytest.approx(sum(right) / sum(hidden[1:]), abs=1e-4)


def test_distances_that_no_frame_has_have_no_accuracy(script: ModuleType, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([*files, "--farthest", "100"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["frames"][99] == 0 and record["by_distance"][99] is None


def test_a_model_for_recognition_and_labels_of_other_cuts_are_refused(
    script: ModuleType, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = HubertConfig.tiny()
    save_model(tmp_path / "asr.pt", AsrModel(AsrConfig(vocab_size=5, heads="ctc", frontend=tiny.frontend, encoder=tiny.encoder)))
    assert script.main(["--model", str(tmp_path / "asr.pt"), *files[2:]]) == 1
    assert (
        "asr.pt: holds a recognition model, as k2ssl.bin.finetune makes it; a pre-trained model, as k2ssl.bin.pretrain makes it, is needed"
        in capsys.readouterr().err
    )
    with LabelShardWriter(tmp_path / "others", 0, 1, 16, 50.0, Lineage.unknown(), sampling_rate=16_000) as writer:
        writer.write("c", np.zeros(FRAMES, dtype=int))
    merge_shards(tmp_path / "others")
    assert script.main([*files[:4], "--labels", str(tmp_path / "others")]) == 1
    assert "2 of 2 cuts of the cut list have no labels" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main([*files, "--draws", "0"])
    assert "--draws is 0" in capsys.readouterr().err
