"""Begin recognition with an encoder that has been trained before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2ssl.models.asr import AsrModel
from k2ssl.models.load import AnyConfig, Weights, config_from, read_content, weights_in

# What the encoder consists of. The mask embedding is part of it: the encoder has learnt what it stands for.
_PARTS = ("frontend.", "feature_norm.", "projection.", "encoder.", "mask_embedding")

# Settings of training, which may be other ones than in pre-training; all others decide what the weights mean.
_MAY_DIFFER = {
    "frontend.gradient_scale",
    "encoder.dropout",
    "encoder.attention_dropout",
    "encoder.activation_dropout",
    "encoder.layer_drop",
    "encoder.unmasked_dim",
    "encoder.warmup",
}


def load_encoder(model: AsrModel, path: str | Path, weights: Weights = "raw") -> tuple[str, ...]:
    """Give `model` the frontend, normalisation, projection, mask embedding and encoder of a model file or training checkpoint.

    Args:
        model: on any device; its heads stay as they are.
        path: of a model of either kind.
        weights: "raw", as the last optimizer step left them (as published), or "average".

    Returns:
        Names of the weights in the file that were not taken: those of its heads.

    Raises:
        ValueError: the file cannot be read, is not one of ours, has no averaged weights when these are asked for, is of another
            architecture (names the settings), or holds no encoder or not exactly the weights of ours (names them). The model has
            not been changed then.
    """
    content = read_content(path)
    config = config_from(content, path)
    key, state = weights_in(content, path, weights)
    if differing := list(_differences(config, model.config)):
        raise ValueError(f"{path}: holds another architecture: {'; '.join(differing)}")
    if not isinstance(state, Mapping) or not any(str(name).startswith("encoder.") for name in state):
        raise ValueError(f"{path}: holds no encoder under '{key}'")
    ours = {name: value for name, value in model.state_dict().items() if name.startswith(_PARTS)}
    theirs = {name: value for name, value in state.items() if name.startswith(_PARTS)}
    if wrong := list(_misfits(ours, theirs)):
        raise ValueError(f"{path}: the weights under '{key}' do not fit: {'; '.join(wrong)}")
    with torch.no_grad():
        for name, value in ours.items():
            value.copy_(theirs[name])
    return tuple(name for name in state if name not in theirs)


def _differences(there: AnyConfig, here: AnyConfig) -> Iterator[str]:
    for part in ("frontend", "encoder"):
        one, two = getattr(there, part), getattr(here, part)
        if type(one) is not type(two):
            yield f"{part} is a {type(one).__name__} there, a {type(two).__name__} here"
            continue
        others = asdict(two)
        for name, value in asdict(one).items():
            if value != others[name] and f"{part}.{name}" not in _MAY_DIFFER:
                yield f"{part}.{name} is {value!r} there, {others[name]!r} here"


def _misfits(ours: Mapping[str, Tensor], theirs: Mapping[str, Any]) -> Iterator[str]:
    for name in ours:
        if name not in theirs:
            yield f"{name} is missing"
        elif not isinstance(theirs[name], Tensor) or theirs[name].shape != ours[name].shape:
            yield f"{name} is {tuple(getattr(theirs[name], 'shape', ()))} there, {tuple(ours[name].shape)} here"
    yield from (f"{name} is unknown" for name in theirs if name not in ours)
