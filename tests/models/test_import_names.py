"""The published names and sizes of every source, without values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchaudio.models import hubert_base, hubert_large

from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.import_names import SOURCES, guess_source, translate
from k2ssl.models.import_state import import_state_dict

GOLDEN = Path(__file__).parents[1] / "golden"
State = dict[str, Tensor]


def shapes(name: str) -> State:
    """A recorded list of names and shapes as tensors without values."""
    return {key: torch.empty(shape, device="meta") for key, shape in json.loads((GOLDEN / f"{name}.json").read_text()).items()}


def on_meta(config: HubertConfig) -> HubertModel:
    with torch.device("meta"):
        return HubertModel(config)


@pytest.mark.parametrize("size", ["base", "large"])
def test_the_published_zipformers_load_with_nothing_missing_and_nothing_left_over(size: str) -> None:
    state = shapes(f"upstream_keys_{size}")
    assert guess_source(state) == "icefall"
    config = {"base": HubertConfig.zipformer_base, "large": HubertConfig.zipformer_large}[size]()
    report = import_state_dict(on_meta(config), state, "icefall")
    assert report.missing == report.left_over == ()
    num_layers = sum(config.encoder.num_layers)  # type: ignore[arg-type]
    assert len(report.dead) == num_layers + 1  # the layers' own scales, and the bias of a downsampling that is never called
    assert len(report.matched) + len(report.dead) == len(state)


@pytest.mark.parametrize("size", ["base", "large"])
def test_the_published_huberts_of_hugging_face_load_but_for_the_head_that_they_lack(size: str) -> None:
    state = shapes(f"huggingface_keys_{size}")
    assert guess_source(state) == "huggingface"
    config = {"base": HubertConfig.hubert_base, "large": HubertConfig.hubert_large}[size]()
    report = import_state_dict(on_meta(config), state, "huggingface", allow_missing=("heads.",))
    assert report.missing == ("heads.0.codes", "heads.0.projection.weight", "heads.0.projection.bias")
    assert report.left_over == report.dead == ()


def test_torchaudios_published_sizes_load_with_nothing_left_over() -> None:
    for build, config in ((hubert_base, HubertConfig.hubert_base()), (hubert_large, HubertConfig.hubert_large())):
        with torch.device("meta"):
            state = build().state_dict()
        assert guess_source(state) == "torchaudio"
        report = import_state_dict(on_meta(config), state, "torchaudio", allow_missing=("heads.", "mask_embedding"))
        assert report.left_over == ()
        assert report.missing == ("mask_embedding", "heads.0.codes", "heads.0.projection.weight", "heads.0.projection.bias")


@pytest.mark.parametrize("size", ["base", "large"])
def test_torchaudios_pre_training_sizes_load_with_nothing_missing_and_nothing_left_over(size: str) -> None:
    config = {"base": HubertConfig.hubert_base, "large": HubertConfig.hubert_large}[size]()
    with torch.device("meta"):  # which the factories of the pre-training models refuse
        state = {f"wav2vec2.{key}": value for key, value in {"base": hubert_base, "large": hubert_large}[size]().state_dict().items()}
        dim, code_dim = config.encoder.dim, config.head.code_dim  # type: ignore[union-attr]
        state |= {
            "mask_generator.mask_embedding": torch.empty(dim),
            "logit_generator.label_embeddings": torch.empty(504, code_dim),
            "logit_generator.final_proj.weight": torch.empty(code_dim, dim),
            "logit_generator.final_proj.bias": torch.empty(code_dim),
        }
    report = import_state_dict(on_meta(config), state, "torchaudio")
    assert report.missing == report.left_over == report.dead == ()


def test_unknown_names_have_no_place() -> None:
    for key in ("encoder.layers.0.self_attn.qkv_proj.weight", "mask_embX", "encoder.encoders.0.layers.0.feed_forward4.in_proj.weight"):
        assert all(translate(key, source) is None for source in SOURCES)
