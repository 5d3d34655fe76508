"""The configurations of the recipes: parsed by the program they are for, and the published ones equal to what was published."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from k2ssl.bin.finetune import Finetune
from k2ssl.bin.pretrain import Pretrain, expected_steps
from k2ssl.bin.pretrain_remarks import asr_settings_without_effect, settings_without_effect
from k2ssl.config import load
from k2ssl.models.asr import AsrConfig, AsrModel
from k2ssl.models.frontend import WaveformConfig
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.masking import MaskingConfig
from k2ssl.models.transformer import TransformerConfig
from k2ssl.optim.build import OptimConfig, ScheduleConfig
from k2ssl.structure import to_dict

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(RECIPES.glob("*/conf/*.toml"))
FINETUNING = sorted(RECIPES.glob("*/conf/finetune/*.toml"))
ASKED = ["--output", "exp/run", "--data.cuts", "cuts_train.jsonl.gz", "--data.labels", "labels/train"]


def parsed(name: str) -> Pretrain:
    (path,) = RECIPES.glob(f"*/conf/{name}.toml")
    return load(Pretrain, [str(path), *ASKED])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_configuration_says_what_it_is_and_what_to_expect_and_is_understood(path: Path) -> None:
    first, second, third = path.read_text().splitlines()[:3]
    assert first.startswith("# ") and "s per update" in first
    assert second.startswith("# Expected") and not third.startswith("#")
    job = load(Pretrain, [str(path), *ASKED])
    # what needs validation data is told of while there is none
    assert [text for text in settings_without_effect(job) if "data.valid_cuts" not in text] == []


def test_every_published_model_has_a_configuration() -> None:
    assert {path.stem for path in FILES} >= {
        "zipformer_base",
        "zipformer_large",
        "hubert_base",
        "hubert_large",
        "zipformer_tiny",
        "hubert_tiny",
    }


@pytest.mark.parametrize("name", ["zipformer_base", "zipformer_large", "hubert_base", "hubert_large"])
def test_published_models_are_built(name: str) -> None:
    job = parsed(name)
    assert to_dict(job.model) == to_dict(getattr(HubertConfig, name)())
    # mask probability 0.8, spans of 10, no channels masked; 504 classes; penalty 10; loss over masked frames only
    assert job.model.masking == MaskingConfig(0.8, 10, 2, 0.0, 10)
    assert (job.model.head.num_classes, job.model.head.temperature, job.model.feature_penalty) == ((504,), 0.1, 10.0)
    assert (job.model.masked_weight, job.model.unmasked_weight) == (1.0, 0.0)
    assert (job.data.min_seconds, job.data.max_seconds) == (2.0, 15.625)


@pytest.mark.parametrize(
    ("name", "gpus", "seconds", "plan"),
    [
        ("zipformer_base", 8, 600.0, 4800.0),
        ("zipformer_large", 32, 350.0, 11200.0),
        ("hubert_base", 32, 87.5, 2800.0),
        ("hubert_large", 128, 56.25, 7200.0),
    ],
)
def test_published_updates_take_so_many_gpus_times_so_much_audio(name: str, gpus: int, seconds: float, plan: float) -> None:
    batch = parsed(name).trainer.batch
    assert (batch.seconds_per_update, batch.seconds_per_micro_batch) == (plan, seconds) and gpus * seconds == plan
    assert batch.reference_seconds == 600.0


# normalize: do_normalize of whole utterances; gradient scale and dropout of the frontend: feature-grad-mult and dropout-input
@pytest.mark.parametrize(
    ("name", "normalize", "norm", "gradient_scale", "input_dropout"),
    [
        ("zipformer_base", False, "group", 0.1, 0.1),
        ("zipformer_large", True, "layer", 1.0, 0.0),
        ("hubert_base", False, "group", 0.1, 0.1),
        ("hubert_large", True, "layer", 1.0, 0.0),
    ],
)
def test_published_frontends(name: str, normalize: bool, norm: str, gradient_scale: float, input_dropout: float) -> None:
    job = parsed(name)
    frontend: Any = job.model.frontend
    assert (job.data.normalize, frontend.norm, frontend.gradient_scale, job.model.input_dropout) == (
        normalize, norm, gradient_scale, input_dropout,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "epochs", "steps"), [("zipformer_base", 300, 0), ("zipformer_large", 20, 250_000)])
def test_published_optimisation_of_zipformer(name: str, epochs: int, steps: int) -> None:
    job = parsed(name)
    assert job.optim == OptimConfig(
        name="scaled_adam", lr=0.045, betas=(0.9, 0.98), eps=1e-8, clipping_scale=2.0, clipping_update_period=100,
        scalar_lr_scale=0.1, param_min_rms=1e-5, param_max_rms=3.0, scalar_max=10.0, size_update_period=4,
    )  # fmt: skip
    assert job.schedule == ScheduleConfig(name="eden", lr_batches=7500.0, lr_epochs=10.5, warmup_batches=5000.0, warmup_start=0.0)
    assert (job.trainer.max_epochs, job.trainer.max_steps, job.trainer.average_period, job.seed) == (epochs, steps, 200, 42)


def test_base_takes_about_the_published_number_of_steps() -> None:
    # 300 epochs of 961 h, about 216 thousand steps of at most 4800 s
    assert expected_steps(parsed("zipformer_base").trainer, 961 * 3600.0) == pytest.approx(216_000, rel=0.01)


def test_large_crops_count_more_than_their_seconds() -> None:
    assert parsed("zipformer_large").data.quadratic_duration == 1024.0
    assert [parsed(name).data.quadratic_duration for name in ("zipformer_base", "hubert_base", "hubert_large")] == [None] * 3


@pytest.mark.parametrize(("name", "lr", "clip"), [("hubert_base", 5e-4, 10.0), ("hubert_large", 1.5e-3, 1.0)])
def test_published_optimisation_of_hubert(name: str, lr: float, clip: float) -> None:
    job = parsed(name)
    assert job.optim == OptimConfig(name="adamw", lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, max_grad_norm=clip)
    assert job.schedule == ScheduleConfig(name="polynomial", warmup_batches=32_000, max_batches=400_000, power=1.0, end_scale=0.0)
    assert job.trainer.max_steps == 400_000
    dim = {"hubert_base": 256, "hubert_large": 768}[name]
    assert (job.model.head.similarity, job.model.head.code_dim) == ("cosine", dim)


@pytest.mark.parametrize(("name", "millions"), [("zipformer_tiny", 0.68), ("hubert_tiny", 0.09)])
def test_tiny_models_are_as_small_as_their_file_says(name: str, millions: float) -> None:
    job = parsed(name)
    parameters = sum(parameter.numel() for parameter in HubertModel(job.model).parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.01)
    (path,) = RECIPES.glob(f"*/conf/{name}.toml")
    said = float(path.read_text().split(" M)")[0].split("(")[-1].split(",")[-1])
    assert said == pytest.approx(millions, abs=0.06)
    assert job.model.label_rate == (100.0,) and job.model.head.num_classes == (100,)


# --- fine-tuning -------------------------------------------------------------------------------------------------------------------------

TRANSCRIBED = ["--output", "exp/run", "--data.cuts", "cuts_train.jsonl.gz", "--data.valid-cuts", "cuts_dev.jsonl.gz", "--tokenizer", "t.pt"]


@functools.cache
def parsed_finetuning(path: Path) -> Finetune:
    return load(Finetune, [str(path), *TRANSCRIBED])


def finetuning(recipe: str, name: str) -> Finetune:
    return parsed_finetuning(RECIPES / recipe / "conf/finetune" / f"{name}.toml")


@pytest.mark.parametrize("path", FINETUNING, ids=lambda path: f"{path.parts[-4]}-{path.stem}")
def test_a_fine_tuning_configuration_says_what_it_is_and_what_to_expect_and_its_model_is_as_large_as_it_says(path: Path) -> None:
    first, second, third = path.read_text().splitlines()[:3]
    assert first.startswith("# ") and "s per update" in first
    assert second.startswith("# Expected") and not third.startswith("#")
    job = parsed_finetuning(path)
    assert list(asr_settings_without_effect(job)) == []
    with torch.device("meta"):
        model = AsrModel(job.model)
    (said,) = re.findall(r"\((\d+\.\d) M\)", first)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(float(said), abs=0.05 + 1e-6)
    if steps := re.search(r"(\d+) steps|([\d.]+) k steps", first):
        expected = int(steps[1]) if steps[1] else round(1000 * float(steps[2]))
        hours = 961 if "960h" in path.stem else 100
        in_epochs = round(hours * 3600 / job.trainer.batch.seconds_per_update) * job.trainer.max_epochs
        assert (job.trainer.max_steps or in_epochs) == pytest.approx(expected, rel=0.005)


def test_every_published_way_of_fine_tuning_has_a_configuration() -> None:
    heads = ("ctc_letters", "transducer_bpe")
    assert {f"{path.parts[-4]}/{path.stem}" for path in FINETUNING} >= {
        *(f"librispeech/{head}_{hours}" for head in heads for hours in ("100h", "960h")),
        *(f"librilight/{hours}_{head}" for head in heads for hours in ("10h", "1h", "10min")),
        *("librispeech/ctc_letters_100h_hubert", "folder/ctc_tiny", "folder/transducer_tiny"),
    }


@pytest.mark.parametrize(
    "name", ["ctc_letters_100h", "ctc_letters_960h", "transducer_bpe_100h", "transducer_bpe_960h", "ctc_letters_100h_hubert"]
)
def test_published_fine_tuning(name: str) -> None:
    job = finetuning("librispeech", name)
    ctc = name.startswith("ctc")
    # letters: 26, apostrophe, word delimiter, blank, unknown; prune range 5, predictor and joiner of 512, scales 1 -> 0.5 and 0.1 -> 1 over
    # 2000 steps; mask probability 0.65, no channels; gradient scale of the frontend and dropouts as in pre-training
    expected = AsrConfig(30, "ctc") if ctc else AsrConfig(500, "transducer")
    if name.endswith("hubert"):
        expected = replace(expected, encoder=TransformerConfig())
    assert job.model == expected
    assert (expected.masking, expected.frontend) == (MaskingConfig(0.65, 10, 2, 0.0, 10), WaveformConfig(gradient_scale=0.1))
    assert (expected.simple_scale, expected.warmup_steps, expected.ctc.dropout, expected.output_downsampling) == (0.5, 2000, 0.1, 1)
    assert (expected.transducer.prune_range, expected.transducer.predictor_dim, expected.transducer.joiner_dim) == (5, 512, 512)
    assert (expected.freeze_frontend_steps, expected.freeze_encoder_steps) == (0, 0)
    # base rate 0.001, Eden 100 000 / 100 without warm-up, 8 x 600 s, 222 epochs; no SpecAugment, no other speeds
    assert job.optim == OptimConfig(lr=0.001, clipping_scale=2.0)
    assert job.schedule == ScheduleConfig(name="eden", lr_batches=100_000.0, lr_epochs=100.0, warmup_batches=0.0)
    batch = job.trainer.batch
    assert (job.trainer.max_epochs, job.trainer.max_steps, batch.seconds_per_update, batch.seconds_per_micro_batch) == (
        222,
        0,
        4800.0,
        600.0,
    )
    assert not job.data.speeds and not job.data.spec_augment.hides and job.init_weights == "raw"
    # 100 h at 8 x 600 s: 75 updates an epoch, 16.7 thousand in 222 epochs
    assert expected_steps(job.trainer, 100 * 3600.0) == 75 * 222 == 16_650


# as wav2vec 2.0 has them: steps, and the shares of frames and channels at which spans begin times their lengths, 10 and 64
@pytest.mark.parametrize(
    ("hours", "steps", "frames", "channels"), [("10h", 20, 0.65, 0.25), ("1h", 13, 0.75, 0.25), ("10min", 12, 0.75, 0.5)]
)
@pytest.mark.parametrize("head", ["ctc_letters", "transducer_bpe"])
def test_fine_tuning_on_limited_sets(hours: str, head: str, steps: int, frames: float, channels: float) -> None:
    job = finetuning("librilight", f"{hours}_{head}")
    assert job.model.heads == head.split("_")[0] and (job.model.vocab_size == 30) == (head == "ctc_letters")
    assert job.model.masking == MaskingConfig(frames, 10, 2, channels, 64)
    assert (job.model.frontend.gradient_scale, job.model.freeze_encoder_steps) == (0.0, 10_000)
    assert job.schedule == ScheduleConfig(name="tri_stage", max_batches=1000.0 * steps, phase_ratio=(0.1, 0.4, 0.5), final_scale=0.05)
    assert (job.optim, job.trainer.max_steps) == (OptimConfig(lr=0.001), 1000 * steps)
    seconds = {"10h": 36_000, "1h": 3600, "10min": 600}[hours]
    assert expected_steps(replace(job.trainer, max_steps=0), seconds) >= job.trainer.max_steps, "epochs must not end training before"
    assert job.trainer.batch.seconds_per_update <= seconds
