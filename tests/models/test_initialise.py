"""An encoder is taken over bit by bit, or refused by name with nothing changed; a file says which of our models it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k2ssl.models.asr import AsrConfig, AsrModel
from k2ssl.models.frontend import LogMelConfig, WaveformConfig
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.initialise import load_encoder
from k2ssl.models.load import load_model, save_model
from k2ssl.models.transformer import TransformerConfig
from k2ssl.models.zipformer import ZipformerConfig

HUBERT = HubertConfig.tiny()
ASR = AsrConfig.tiny(6, "both")
ZIPFORMER = ZipformerConfig.tiny()
ENCODERS: dict[str, Any] = {"zipformer": ZIPFORMER, "transformer": TransformerConfig.tiny()}
HEADS = ("ctc.", "transducer.")


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def checkpoint(path: Path, saved: HubertModel | AsrModel, **changes: Any) -> Path:
    """A file of the model `saved` in which these keys are changed."""
    save_model(path, saved)
    content = torch.load(path, weights_only=True)
    torch.save({**content, **changes}, path)
    return path


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_encoder_of_a_pretrained_model_is_taken_over_bit_by_bit(encoder: str, tmp_path: Path) -> None:
    pretrained, model = HubertModel(replace(HUBERT, encoder=ENCODERS[encoder])), AsrModel(replace(ASR, encoder=ENCODERS[encoder]))
    before, theirs = state_of(model), state_of(pretrained)
    assert load_encoder(model, checkpoint(tmp_path / "hubert.pt", pretrained)) == ("heads.0.projection.weight", "heads.0.projection.bias")
    for name, value in state_of(model).items():
        assert torch.equal(value, before[name] if name.startswith(HEADS) else theirs[name]), name
    audio = torch.randn(2, 4000)
    frames = [each.eval().encode(audio).output.frames for each in (pretrained, model)]
    assert torch.equal(*frames)


def test_averaged_weights_are_taken_on_request(tmp_path: Path) -> None:
    pretrained, model = HubertModel(HUBERT), AsrModel(ASR)
    average = {name: value.double() + 1e-9 + 1 for name, value in state_of(pretrained).items()}
    path = checkpoint(tmp_path / "checkpoint.pt", pretrained, format="of a trainer", average={"step": 200, "model": average})
    load_encoder(model, path, "average")
    assert all(torch.equal(value, average[name].float()) for name, value in state_of(model).items() if not name.startswith(HEADS))
    load_encoder(model, path)
    assert torch.equal(model.mask_embedding, pretrained.mask_embedding)
    with pytest.raises(ValueError, match="holds no averaged weights"):
        load_encoder(model, checkpoint(tmp_path / "raw.pt", pretrained), "average")


def test_the_encoder_of_a_recognition_model_is_taken_over_too(tmp_path: Path) -> None:
    first, second = AsrModel(ASR), AsrModel(replace(ASR, vocab_size=9, heads="ctc"))
    left = load_encoder(second, checkpoint(tmp_path / "asr.pt", first))
    assert left and all(name.startswith(HEADS) for name in left)
    assert torch.equal(
        second.encoder.state_dict()["stacks.0.layers.0.norm.bias"], first.encoder.state_dict()["stacks.0.layers.0.norm.bias"]
    )


def test_settings_of_training_may_differ(tmp_path: Path) -> None:
    frontend = replace(HUBERT.frontend, gradient_scale=0.0)
    zipformer = AsrModel(replace(ASR, frontend=frontend, encoder=replace(ZIPFORMER, dropout=(0.0, 0.0), warmup=1.0)))
    load_encoder(zipformer, checkpoint(tmp_path / "zipformer.pt", HubertModel(HUBERT)))
    regularised = replace(TransformerConfig.tiny(), dropout=0.3, layer_drop=0.2, attention_dropout=0.3, activation_dropout=0.1)
    transformer = AsrModel(replace(ASR, encoder=regularised))
    load_encoder(transformer, checkpoint(tmp_path / "transformer.pt", HubertModel(replace(HUBERT, encoder=TransformerConfig.tiny()))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": TransformerConfig.tiny()}, "encoder is a TransformerConfig there, a ZipformerConfig here"),
        ({"frontend": LogMelConfig(channels=(2, 4, 8), output_dim=32)}, "frontend is a LogMelConfig there, a WaveformConfig here"),
        (  # the shapes are the same
            {"encoder": replace(ZIPFORMER, downsampling=(1, 4, 8), pos_dim=18)},
            r"encoder\.downsampling is \(1, 4, 8\) there, \(1, 2, 4\) here; encoder\.pos_dim is 18 there, 16 here",
        ),
        (
            {"frontend": WaveformConfig(channels=32, normalize_audio=True)},
            r"frontend\.normalize_audio is True there, None here",
        ),
    ],
)
def test_another_architecture_is_refused_by_the_settings_that_differ(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "hubert.pt", HubertModel(replace(HUBERT, **change)))
    model = AsrModel(ASR)
    before = state_of(model)
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(model, path)
    assert str(path) in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in state_of(model).items())


def test_weights_that_are_not_those_of_the_encoder_are_refused_by_name(tmp_path: Path) -> None:
    pretrained = HubertModel(HUBERT)
    state = state_of(pretrained)
    model = AsrModel(ASR)
    before = state_of(model)
    without = {name: value for name, value in state.items() if name != "feature_norm.bias"}
    for weights, message in (
        (without, "do not fit: feature_norm.bias is missing"),
        ({**state, "encoder.extra": torch.ones(1)}, "do not fit: encoder.extra is unknown"),
        ({**state, "projection.bias": torch.ones(3)}, r"projection.bias is \(3,\) there, \(48,\) here"),
        ({**state, "projection.bias": 3}, r"projection.bias is \(\) there"),
        ({name: value for name, value in state.items() if not name.startswith("encoder.")}, "holds no encoder under 'model'"),
        ({}, "holds no encoder under 'model'"),
        (3, "holds no encoder under 'model'"),
    ):
        path = checkpoint(tmp_path / "hubert.pt", pretrained, model=weights)
        with pytest.raises(ValueError, match=message) as caught:
            load_encoder(model, path)
        assert str(path) in str(caught.value)
    path = checkpoint(tmp_path / "hubert.pt", pretrained, config={"kind": "lm"})
    with pytest.raises(ValueError, match=r"config\.kind: is 'lm'"):
        load_encoder(model, path)
    (tmp_path / "text.pt").write_text("no model")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_encoder(model, tmp_path / "text.pt")
    assert all(torch.equal(value, before[name]) for name, value in state_of(model).items())


# --- files of either kind ---


@pytest.mark.parametrize("heads", ["transducer", "ctc", "both"])
def test_a_saved_recognition_model_comes_back_as_what_it_was(heads: str, tmp_path: Path) -> None:
    model = AsrModel(replace(ASR, heads=heads, output_downsampling=2))
    save_model(tmp_path / "asr.pt", model)
    for loaded in (load_model(tmp_path / "asr.pt", of=AsrModel), load_model(tmp_path / "asr.pt", of=None)):
        assert isinstance(loaded, AsrModel) and loaded.config == model.config
        assert state_of(loaded).keys() == state_of(model).keys()
        assert all(torch.equal(value, state_of(model)[name]) for name, value in state_of(loaded).items())


def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    asr, hubert, odd = (tmp_path / name for name in ("asr.pt", "hubert.pt", "odd.pt"))
    save_model(asr, AsrModel(ASR))
    save_model(hubert, HubertModel(HUBERT))
    content = torch.load(hubert, weights_only=True)
    assert "kind" not in content["config"]  # as files have always been
    assert isinstance(load_model(hubert, of=None), HubertModel)
    torch.save({**content, "config": {"kind": "hubert", **content["config"]}}, odd)
    assert load_model(odd).config == HUBERT
    for config, message in (
        ({"kind": "lm"}, r"config\.kind: is 'lm', allowed are 'asr', 'hubert'"),
        (3, "a table of keys is needed, not 3"),
    ):
        torch.save({**content, "config": config}, odd)
        with pytest.raises(ValueError, match=message):
            load_model(odd, of=None)
    with pytest.raises(ValueError, match=r"asr\.pt: holds a recognition model, .*; a pre-trained model, .*, is needed"):
        load_model(asr)
    with pytest.raises(ValueError, match=r"hubert\.pt: holds a pre-trained model, .*; a recognition model, .*, is needed"):
        load_model(hubert, of=AsrModel)
