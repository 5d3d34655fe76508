"""Learning rates of parts of the model, as a settings file writes them, for each encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from k2ssl.bin.finetune import Finetune
from k2ssl.config import load
from k2ssl.models.asr import AsrConfig, AsrModel
from k2ssl.models.frontend import WaveformConfig
from k2ssl.models.transformer import TransformerConfig
from k2ssl.optim.build import OptimConfig, build_optimizer, build_schedule

TRANSFORMER = TransformerConfig(num_layers=3, dim=16, feedforward_dim=16, num_heads=2, conv_pos_kernel=4, conv_pos_groups=2)
MODELS = {
    "zipformer": AsrConfig.tiny(7, "both"),
    "transformer": AsrConfig(7, "ctc", frontend=WaveformConfig(channels=8), encoder=TRANSFORMER),
}
SETTINGS = """
[optim]
lr = 0.001
[optim.lr_scales]
"frontend." = 0.1
"encoder" = 0.5
"""
LAYERS = {"zipformer": '"encoder.stacks.0." = 0.4\n"encoder.stacks.1.layers.0" = 0.8\n', "transformer": '"encoder.layers.1" = 0.4\n'}


def job(folder: Path, text: str) -> Finetune:
    (folder / "rates.toml").write_text(text)
    return load(Finetune, [str(folder / "rates.toml"), "--data.cuts", "cuts.jsonl.gz", "--tokenizer", "tokenizer.pt", "--output", "run"])


@pytest.mark.parametrize("kind", MODELS)
def test_rates_are_written_layer_by_layer_for_any_encoder(kind: str, tmp_path: Path) -> None:
    model, settings = AsrModel(MODELS[kind]), job(tmp_path, SETTINGS + LAYERS[kind])
    optimizer = build_optimizer(settings.optim, model)
    rates = {name: group["lr"] / 0.001 for group in optimizer.param_groups for name in group["param_names"]}
    assert rates.keys() == dict(model.named_parameters()).keys()
    if kind == "zipformer":
        expected = {"encoder.stacks.0.": 0.2, "encoder.stacks.1.layers.0.": 0.4, "encoder.": 0.5, "frontend.": 0.1, "": 1.0}
    else:
        expected = {"encoder.layers.1.": 0.2, "encoder.": 0.5, "frontend.": 0.1, "": 1.0}
    found = dict.fromkeys(expected, 0)
    for name, rate in rates.items():
        longest = next(prefix for prefix in expected if name.startswith(prefix))
        found[longest] += 1
        assert rate == pytest.approx(expected[longest]), name
    assert all(found.values()), found
    schedule = build_schedule(settings.schedule, optimizer)
    schedule.advance(1000, 1)
    scaled = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert scaled["feature_norm.weight"] > 0
    assert scaled["frontend.layers.0.conv.weight"] == pytest.approx(0.1 * scaled["feature_norm.weight"])


@pytest.mark.parametrize(
    ("kind", "prefix", "said"),
    [
        ("zipformer", "encoder.layers.0", "names that begin with 'encoder.' go on with ['stacks']"),
        ("zipformer", "encoder.stacks.9.", "names that begin with 'encoder.stacks.' go on with ['0', '1', '2'"),
        ("transformer", "encoder.layers.3", "names that begin with 'encoder.layers.' go on with ['0', '1', '2']"),
        ("transformer", "transducer", "names begin with ['ctc', 'encoder', 'feature_norm', 'frontend', 'mask_embedding', 'projection']"),
        ("transformer", "", "names begin with"),
        ("transformer", "encode", "names begin with"),
    ],
)
def test_a_prefix_that_no_parameter_has_is_refused_with_what_there_is(kind: str, prefix: str, said: str) -> None:
    with torch.device("meta"):
        model = AsrModel(MODELS[kind])
    with pytest.raises(ValueError, match="begins no parameter's name") as refusal:
        build_optimizer(OptimConfig(lr_scales={prefix: 0.5}), model)
    assert f"lr_scales prefix {prefix!r}" in str(refusal.value) and said in str(refusal.value)


def test_a_scale_that_is_written_as_a_table_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optim\.lr_scales\.encoder: is .* float is needed"):
        job(tmp_path, SETTINGS.replace('"encoder"', "encoder.stacks.0"))
