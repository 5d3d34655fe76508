"""Each head learns twenty utterances of synthetic speech by heart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.cut import MonoCut
from scipy.signal import lfilter

from k2ssl.bin import finetune
from k2ssl.data.tokenizer import LetterTokenizer, NormalizationConfig

RATE = 16000
# formants of vowels in Hz (Peterson and Barney 1952, men), and the band of a fricative's noise
SOUNDS = {"A": (730, 1090, 2440), "E": (530, 1840, 2480), "I": (270, 2290, 3010), "O": (570, 840, 2410), "U": (300, 870, 2240)}
NOISES = {"S": 6000, "X": 2500}
CONF = """
device = "cpu"
quiet = true
[model]
vocab_size = 10
input_dropout = 0.0
output_downsampling = 2
warmup_steps = 20
[model.masking]
probability = 0.0
[model.frontend]
kind = "logmel"
channels = [4, 8, 16]
output_dim = 64
num_bins = 40
[model.encoder]
kind = "transformer"
num_layers = 2
dim = 64
feedforward_dim = 128
num_heads = 4
conv_pos_kernel = 16
conv_pos_groups = 4
dropout = 0.0
attention_dropout = 0.0
layer_drop = 0.0
[model.transducer]
predictor_dim = 64
joiner_dim = 64
lm_scale = 0.0
[schedule]
lr_batches = 2000
warmup_batches = 10
warmup_start = 0.5
[trainer]
tensorboard = false
average_period = 10
[trainer.batch]
seconds_per_update = 10.0
seconds_per_micro_batch = 10.0
[preflight]
run = false
[data]
num_buckets = 1
num_workers = 0
min_seconds = 0.1
"""


def resonate(source: np.ndarray, frequency: float, bandwidth: float) -> np.ndarray:
    """A formant: two poles, with a gain of 1 at frequency 0 (Klatt 1980)."""
    radius, angle = np.exp(-np.pi * bandwidth / RATE), 2 * np.pi * frequency / RATE
    poles = [1.0, -2 * radius * np.cos(angle), radius**2]
    return lfilter([sum(poles)], poles, source)


def sound_of(letter: str, draw: np.random.Generator) -> np.ndarray:
    """A vowel at a drawn pitch and length, or a fricative, or silence."""
    num = int(RATE * draw.uniform(0.08, 0.14))
    if letter in NOISES:
        return 0.05 * resonate(draw.standard_normal(num), NOISES[letter], 800.0) * np.hanning(num)
    if letter not in SOUNDS:
        return np.zeros(num)
    pitch = draw.uniform(90, 200) * np.linspace(1.1, 0.9, num)
    pulses = np.diff(np.floor(np.cumsum(pitch) / RATE), prepend=0.0)
    for formant, bandwidth in zip(SOUNDS[letter], (60.0, 90.0, 120.0), strict=True):
        pulses = resonate(pulses, formant * draw.uniform(0.97, 1.03), bandwidth)
    return 0.3 * pulses / np.abs(pulses).max() * np.hanning(num) ** 0.5


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty utterances of two to four words."""
    folder, draw = tmp_path_factory.mktemp("speech"), np.random.default_rng(0)
    letters = [*SOUNDS, *NOISES]
    LetterTokenizer("".join(sorted(letters)), NormalizationConfig()).save(folder / "tokenizer.pt")
    cuts = []
    for number in range(20):
        text = " ".join("".join(draw.choice(letters, draw.integers(2, 5))) for _ in range(draw.integers(2, 5)))
        audio = np.concatenate([np.zeros(1600), *(sound_of(letter, draw) for letter in text), np.zeros(1600)])
        soundfile.write(folder / f"{number:02d}.wav", audio + 0.003 * draw.standard_normal(len(audio)), RATE)
        recording = Recording.from_file(folder / f"{number:02d}.wav")
        cut = MonoCut(recording.id, 0.0, recording.duration, 0, recording=recording)
        cut.supervisions = [SupervisionSegment(cut.id, recording.id, 0.0, recording.duration, text=text)]
        cuts.append(cut)
    CutSet.from_cuts(cuts).to_file(folder / "cuts.jsonl.gz")
    (folder / "conf.toml").write_text(CONF + f'cuts = ["{folder}/cuts.jsonl.gz"]\nvalid_cuts = ["{folder}/cuts.jsonl.gz"]\n')
    return folder


@pytest.mark.parametrize(("head", "steps"), [("ctc", 120), ("transducer", 400)])
def test_a_head_learns_twenty_utterances_by_heart(head: str, steps: int, speech: Path, tmp_path: Path) -> None:
    options = ["--model.heads", head, "--trainer.max-steps", str(steps), "--trainer.valid-every", str(steps)]
    command = [str(speech / "conf.toml"), "--tokenizer", str(speech / "tokenizer.pt"), "--output", str(tmp_path / "run"), *options]
    assert finetune.main(command) == 0
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (valid,) = [record for record in records if record["kind"] == "valid"]
    assert valid["num_words"] > 40
    assert valid["wer"] < 0.05
