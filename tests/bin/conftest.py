"""A corpus of synthetic sounds with labels and the command that pre-trains a tiny model on it; and a tiny model that reads words of tones."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import soundfile

from k2ssl.bin import finetune
from k2ssl.data.cuts import read_cuts
from k2ssl.data.labels import LabelShardWriter, Lineage, cut_list_hash, merge_shards
from k2ssl.data.prepare_cuts import prepare_folder

RATE = 16000
NUM_CLASSES = 8


class Sounds:
    """Two splits, `train` and `valid`, of tones of eight pitches, 0.6 to 1.5 s; the label of a frame is the pitch."""

    SECONDS_PER_UPDATE = 8
    UPDATES_PER_EPOCH: int
    # Zipformer of 2 x 1 layers; updates of two micro-batches
    MODEL: ClassVar[list[str]] = [
        *("--model.frontend.channels", "16", "--model.input-dropout", "0", "--model.head.num-classes", str(NUM_CLASSES)),
        *("--model.encoder.num-layers", "1", "1", "--model.encoder.downsampling", "1", "2", "--model.encoder.dim", "16", "24"),
        *("--model.encoder.feedforward-dim", "32", "48", "--model.encoder.unmasked-dim", "16", "16", "--model.encoder.num-heads", "2", "2"),
        *("--model.encoder.kernel", "5", "5", "--model.encoder.query-head-dim", "8", "--model.encoder.value-head-dim", "4"),
        *("--model.encoder.pos-dim", "8"),
    ]
    TRAINING: ClassVar[list[str]] = [
        *("--trainer.batch.seconds-per-update", str(SECONDS_PER_UPDATE), "--trainer.batch.seconds-per-micro-batch", "4"),
        *("--trainer.batch.reference-seconds", "0.1", "--trainer.log-every", "1", "--trainer.average-period", "2"),
        *("--trainer.keep.save-every", "4", "--trainer.tensorboard", "False", "--schedule.warmup-batches", "5"),
        *("--data.min-seconds", "0.5", "--data.max-seconds", "1", "--data.num-buckets", "2", "--data.num-workers", "2"),
        *("--preflight.batches", "5", "--device", "cpu", "--quiet", "True"),
    ]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for split, num in (("train", 30), ("valid", 7)):
            seconds = self._write(split, num)
            if split == "train":
                self.UPDATES_PER_EPOCH = math.ceil(seconds / self.SECONDS_PER_UPDATE)
        self.VALIDATED = ["--data.valid-cuts", str(self.cuts("valid")), "--data.valid-labels", str(self.labels("valid"))]
        self.VALIDATED += ["--trainer.valid-every", "4"]

    def cuts(self, split: str = "train") -> Path:
        return self.folder / f"cuts_{split}.jsonl.gz"

    def labels(self, split: str = "train") -> Path:
        return self.folder / "labels" / split

    def command(self, output: Path, *options: str, cuts: Path | None = None, labels: Path | None = None) -> list[str]:
        files = ["--data.cuts", str(cuts or self.cuts()), "--data.labels", str(labels or self.labels()), "--output", str(output)]
        return [*files, *self.MODEL, *self.TRAINING, *options]

    def label(self, folder: Path, split: str = "train", num_classes: int = NUM_CLASSES, frame_rate: float = 50.0, extra: int = 0) -> Path:
        """A label store in `folder`; `extra` labels too many for every cut."""
        cuts = list(read_cuts(self.cuts(split)))
        lineage = Lineage("mfcc", {"num_ceps": 13}, "centres", None, cut_list_hash(cuts))
        shift = round(RATE / frame_rate)
        with LabelShardWriter(folder, 0, 1, num_classes, frame_rate, lineage, sampling_rate=RATE) as writer:
            for cut in cuts:
                pitch = np.repeat(np.arange(99), RATE // 5)[: cut.num_samples : shift] + int(Path(cut.recording.sources[0].source).stem[1:])
                count = (cut.num_samples - 400) // shift + 1 + extra
                writer.write(cut.id, np.resize(pitch % num_classes, count))
        merge_shards(folder)
        return folder

    def _write(self, split: str, num: int) -> float:
        """Audio, manifest and labels of a split; returns its seconds."""
        draw = np.random.default_rng(num)
        audio = self.folder / split
        audio.mkdir()
        seconds = 0.0
        for i in range(num):
            time = np.arange(int(RATE * (0.6 + 0.9 * i / num))) / RATE
            pitch = 200 * 2 ** (((time // 0.2) + i) % NUM_CLASSES / 2)
            sound = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / RATE) + 0.02 * draw.standard_normal(len(time))
            soundfile.write(audio / f"{split[0]}{i:02d}.wav", sound, RATE)
            seconds += len(time) / RATE
        prepare_folder(audio, self.folder, split=split, progress=False)
        self.label(self.labels(split), split)
        return seconds


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Sounds:
    return Sounds(tmp_path_factory.mktemp("sounds"))


@dataclass(frozen=True)
class Reader:
    """A tiny model with both heads that has learnt to read words of tones, see `Words` in test_finetune.py.

    Attributes:
        words: its corpus, of which split "valid" was not trained on.
        checkpoints: of steps 40 and 80; the second one reads well.
    """

    LEAD: ClassVar[float] = 0.1  # seconds of silence before the first tone
    TONE: ClassVar[float] = 0.12  # that a tone lasts
    STEP: ClassVar[float] = 0.15  # from the beginning of a tone to that of the next

    words: Any
    checkpoints: tuple[Path, Path]

    @property
    def checkpoint(self) -> Path:
        return self.checkpoints[-1]

    def texts(self, split: str = "valid") -> list[str]:
        return [cut.supervisions[0].text for cut in read_cuts(self.words.cuts(split))]

    def tones(self, text: str) -> list[tuple[str, float, float]]:
        """Every letter with its begin and end in the audio, in seconds."""
        begins = (self.LEAD + i * self.STEP for i in range(len(text)))
        return [(letter, begin, begin + self.TONE) for letter, begin in zip(text, begins, strict=True) if letter != " "]

    def words_in(self, text: str) -> list[tuple[str, float, float]]:
        """Every word with the begin of its first letter and the end of its last one."""
        rest = iter(self.tones(text))
        letters = [(word, [next(rest) for _ in word]) for word in text.split(" ")]
        return [(word, tones[0][1], tones[-1][2]) for word, tones in letters]

    def audio(self, number: int, split: str = "valid") -> Path:
        return self.words.folder / f"{split}{number:02d}.wav"


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    spec = importlib.util.spec_from_file_location("words_of_tones", Path(__file__).with_name("test_finetune.py"))
    assert spec is not None and spec.loader is not None
    tones = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tones)
    folder = tmp_path_factory.mktemp("reader")
    words = tones.Words(folder)
    (folder / "tiny.toml").write_text(f'{tones.TINY}cuts = ["{words.cuts("train")}"]\n')
    options = ["--model.heads", "both", "--model.ctc-scale", "1", "--model.output-downsampling", "2", "--model.warmup-steps", "20"]
    options += ["--trainer.batch.seconds-per-micro-batch", "20", "--trainer.valid-every", "0", "--preflight.run", "False", "--seed", "1"]
    options += [
        "--trainer.log-every",
        "40",
        "--trainer.keep.save-every",
        "80",
        "--trainer.keep.keep-last",
        "9",
        "--trainer.max-steps",
        "160",
    ]
    assert finetune.main(words.command(folder / "run", *options)) == 0
    one, two = (folder / f"run/checkpoints/step-{step:09d}.pt" for step in (80, 160))
    return Reader(words, (one, two))
