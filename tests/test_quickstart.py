"""The quickstart's synthetic audio and its verdict."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "recipes" / "quickstart" / "pretrain_tiny.py"


@pytest.fixture(scope="module")
def tiny() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain_tiny", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_audio_is_drawn_from_the_generator_alone(tiny: ModuleType) -> None:
    first = tiny.synthesise(torch.Generator().manual_seed(5), 2, 40)
    torch.manual_seed(99)
    again = tiny.synthesise(torch.Generator().manual_seed(5), 2, 40)
    other = tiny.synthesise(torch.Generator().manual_seed(6), 2, 40)
    assert torch.equal(first.audio, again.audio)
    assert torch.equal(first.labels[0], again.labels[0])
    assert not torch.equal(first.audio, other.audio)


def test_labels_are_on_a_grid_of_320_samples_and_segments_last_60_to_200_ms(tiny: ModuleType) -> None:
    batch = tiny.synthesise(torch.Generator().manual_seed(5), 4, 500)
    assert batch.audio.shape == (4, 500 * 320)
    assert batch.labels[0].shape == (4, 500)
    assert batch.audio.abs().max() < 1.0
    assert set(batch.labels[0].flatten().tolist()) == set(range(tiny.NUM_SOUNDS))
    for labels in batch.labels[0].tolist():
        changes = [0, *(t for t in range(1, 500) if labels[t] != labels[t - 1])]
        lengths = [end - begin for begin, end in itertools.pairwise(changes)]
        assert min(lengths) >= 3
        assert max(lengths) <= 10


def test_labels_tell_what_is_heard_in_their_own_frames(tiny: ModuleType) -> None:
    """Frames of equal labels have spectra closer to their own label's mean than to any other's, nearly always."""
    batch = tiny.synthesise(torch.Generator().manual_seed(5), 4, 500)
    frames = batch.audio.reshape(-1, 320) * torch.hann_window(320)
    bands = torch.fft.rfft(frames).abs().square()[:, :160].reshape(len(frames), 32, 5).sum(dim=2).add(1e-3).log()
    labels = batch.labels[0].flatten()
    means = torch.stack([bands[labels == sound].mean(dim=0) for sound in range(tiny.NUM_SOUNDS)])
    nearest = torch.cdist(bands, means).argmin(dim=1)
    assert (nearest == labels).double().mean() > 0.9
    shifted = torch.cdist(bands, means).argmin(dim=1).roll(5)
    assert (shifted == labels).double().mean() < 0.5


def test_a_run_too_short_to_learn_fails_and_says_so() -> None:
    command = [sys.executable, str(SCRIPT), "--steps", "1", "--batch-size", "2", "--num-frames", "50"]
    repository = str(SCRIPT.parents[2])
    done = subprocess.run(
        command, env={"PYTHONPATH": repository, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "did not learn" in done.stderr
    assert "| training, last steps | held out | always the most frequent sound |" in done.stdout


@pytest.mark.parametrize(("option", "value"), [("--steps", "0"), ("--num-frames", "9"), ("--seed", "-1")])
def test_options_out_of_range_are_refused(tiny: ModuleType, option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tiny.parse_options([option, value])
    assert f"{option} is {value}, allowed are whole numbers >=" in capsys.readouterr().err
