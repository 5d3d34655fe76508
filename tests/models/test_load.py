from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from k2ssl.models.frontend import LogMelConfig
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.load import load_model, save_model
from k2ssl.models.prediction_head import HeadConfig
from k2ssl.models.transformer import TransformerConfig

TINY = HubertConfig.tiny()
CONFIGS = {
    "zipformer": TINY,
    "transformer": replace(
        TINY,
        encoder=TransformerConfig.tiny(),
        head=HeadConfig(num_classes=(16, 9), similarity="cosine", code_dim=8),
        label_rate=(50.0, 25.0),
        unmasked_weight=0.5,
    ),
    "logmel": replace(TINY, frontend=LogMelConfig(channels=(2, 4, 8), output_dim=16)),
}


def state_of(model: HubertModel) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def content_of(model: HubertModel, path: Path) -> dict[str, object]:
    save_model(path, model)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_model_comes_back_with_its_configuration_and_weights(name: str, tmp_path: Path) -> None:
    model = HubertModel(CONFIGS[name])
    save_model(tmp_path / "model.pt", model)
    loaded = load_model(str(tmp_path / "model.pt"))
    assert loaded.config == CONFIGS[name]
    assert state_of(loaded).keys() == state_of(model).keys()
    assert all(torch.equal(value, state_of(loaded)[key]) for key, value in state_of(model).items())
    audio = 0.1 * torch.randn(2, 4000)
    with torch.no_grad():
        frames = [each.eval().encode(audio).output.frames for each in (model, loaded)]
    assert torch.equal(*frames)


def test_loading_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    save_model(tmp_path / "model.pt", HubertModel(TINY))
    before = torch.get_rng_state()
    load_model(tmp_path / "model.pt")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_is_loaded_onto_the_device_asked_for(tmp_path: Path) -> None:
    save_model(tmp_path / "model.pt", HubertModel(TINY))
    assert {parameter.device.type for parameter in load_model(tmp_path / "model.pt", map_location="meta").parameters()} == {"meta"}


def test_a_training_checkpoint_with_other_keys_is_read_as_a_model(tmp_path: Path) -> None:
    model = HubertModel(TINY)
    content = content_of(model, tmp_path / "model.pt")
    checkpoint = {"format": "of a trainer", "version": 7, "config": content["config"], "model": content["model"], "optimizer": {"step": 3}}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    assert torch.equal(load_model(tmp_path / "checkpoint.pt").mask_embedding, model.mask_embedding)


def test_averaged_weights_are_read_from_a_training_checkpoint_on_request(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    model = HubertModel(TINY)
    content = content_of(model, path)
    average = {name: value.double() + 1e-9 + 1 for name, value in state_of(model).items()}
    torch.save({**content, "format": "of a trainer", "average": {"step": 200, "model": average}}, path)
    loaded = state_of(load_model(path, weights="average"))
    assert all(torch.equal(value, average[name].float()) for name, value in loaded.items())
    assert all(value.dtype == torch.float32 for value in loaded.values())
    raw = state_of(load_model(path, weights="raw"))
    assert all(torch.equal(value, state_of(model)[name]) for name, value in raw.items())
    assert torch.equal(load_model(path).mask_embedding, model.mask_embedding)


def test_averaged_weights_that_are_not_there_are_refused_by_path(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    content = content_of(HubertModel(TINY), path)
    for change, weights, message in (
        ({}, "average", "holds no averaged weights, only raw ones"),
        ({"average": None}, "average", "holds no averaged weights, only raw ones"),
        ({"average": {"step": 0, "model": content["model"]}}, "average", "has never been updated"),
        ({"average": {"step": 200, "model": {}}}, "average", r"the weights under 'average' do not fit"),
        ({"average": {"step": 200}}, "average", r"the weights under 'average' do not fit"),
        ({}, "best", "weights is 'best', allowed are 'raw', 'average'"),
    ):
        torch.save({**content, **change}, path)
        with pytest.raises(ValueError, match=message) as caught:
            load_model(path, weights=weights)  # type: ignore[arg-type]
        assert str(path) in str(caught.value)


def test_the_file_is_whole_or_absent_and_replaces_an_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    first, second = HubertModel(TINY), HubertModel(TINY)
    save_model(path, first)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            save_model(path, second)
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(load_model(path).mask_embedding, first.mask_embedding)
    save_model(path, second)
    assert torch.equal(load_model(path).mask_embedding, second.mask_embedding)


def test_the_file_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_model(tmp_path / "model.pt", HubertModel(TINY))
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "model.pt").stat().st_mode & 0o777 == 0o640


def test_files_that_cannot_be_read_are_refused_by_path(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    with pytest.raises(ValueError, match=r"file\.pt: cannot be read"):
        load_model(path)
    for content in (b"", b"not a checkpoint", b"\x80\x02cos\nsystem\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"file\.pt: cannot be read"):
            load_model(path)
    save_model(path, HubertModel(TINY))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"file\.pt: cannot be read"):
        load_model(path)
    torch.save({"config": argparse.Namespace(), "model": {}}, path)
    with pytest.raises(ValueError, match=r"file\.pt: cannot be read .*argparse\.Namespace") as caught:
        load_model(path)
    assert "weights_only" not in str(caught.value)  # torch's advice to load it unsafely


def test_foreign_and_contradictory_files_are_refused_by_path(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    content = content_of(HubertModel(TINY), path)
    config, weights = content["config"], content["model"]
    assert isinstance(config, dict) and isinstance(weights, dict)
    for wrong, message in (
        ({"model": weights, "optimizer": {}}, r"it holds model, optimizer\. .*scripts/import_checkpoint\.py"),
        ([1, 2], r"it holds list"),
        ({}, r"it holds nothing"),
        ({**content, "version": 2}, r"version is 2, this release reads version 1"),
        ({**content, "config": {**config, "colour": 1}}, r"config\.colour: unknown key"),
        ({**content, "config": {**config, "input_dropout": "x"}}, r"config\.input_dropout"),
        ({**content, "config": 3}, r"config: a table"),
        ({**content, "config": {**config, "head": {"num_classes": [17]}}}, r"weights under 'model' do not fit .*(.|\n)*heads\.0"),
        ({**content, "model": {**weights, "extra": torch.zeros(1)}}, r"do not fit .*(.|\n)*extra"),
        ({**content, "model": {key: weights[key] for key in list(weights)[1:]}}, r"do not fit .*(.|\n)*Missing"),
        ({**content, "model": 3}, r"do not fit"),
        ({**content, "model": {**weights, "mask_embedding": "x"}}, r"do not fit"),
    ):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match=message) as caught:
            load_model(path)
        assert str(path) in str(caught.value)


def test_a_tokenizer_is_told_from_a_model(tmp_path: Path) -> None:
    torch.save({"format": "k2ssl-tokenizer", "version": 1}, tmp_path / "t.pt")
    with pytest.raises(ValueError, match=r"t\.pt: is a tokenizer, a model is needed"):
        load_model(tmp_path / "t.pt")


@pytest.mark.parametrize("kind", [["asr"], {"asr": 1}, 3, None])
def test_a_kind_that_is_no_name_is_refused(kind: object, tmp_path: Path) -> None:
    torch.save({"config": {"kind": kind}, "model": {}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: config\.kind: is .*, allowed are 'asr', 'hubert'"):
        load_model(tmp_path / "x.pt")
