"""A trained model in one file: what to build, and its weights. Whoever reads it needs no architecture flag.

The file is a `torch.save` of plain values and tensors: {"format": "k2ssl-model", "version": 1, "config": ..., "model": ...}. The key "kind" in
"config" says which of our models it is: "asr", or "hubert", which may be left out. A training checkpoint holds the same "config" and "model"
among its other keys, so it can be read as a model too, and may hold averaged weights under "average": {"step": optimizer step of the last
update, "model": float64 weights}.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch

from k2ssl.atomic_file import save_atomically
from k2ssl.models.asr import AsrConfig, AsrModel
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.structure import from_dict, to_dict

FORMAT = "k2ssl-model"
VERSION = 1

AnyModel = HubertModel | AsrModel
AnyConfig = HubertConfig | AsrConfig
Weights = Literal["raw", "average"]
Model = TypeVar("Model", HubertModel, AsrModel)
_CONFIGS: Mapping[str, type[HubertConfig] | type[AsrConfig]] = {"hubert": HubertConfig, "asr": AsrConfig}


_KINDS = {
    HubertModel: "a pre-trained model, as k2ssl.bin.pretrain makes it",
    AsrModel: "a recognition model, as k2ssl.bin.finetune makes it",
}


def config_to_dict(config: AnyConfig) -> dict[str, Any]:
    """What a file holds under "config", for `config_from` to read back."""
    return to_dict(config) if isinstance(config, HubertConfig) else {"kind": "asr", **to_dict(config)}


def config_from(content: Mapping[str, Any], path: str | Path) -> AnyConfig:
    """The configuration in what `read_content(path)` returned.

    Raises:
        ValueError: it is of no model of ours, or has keys or values that this release does not know.
    """
    table = content["config"]
    try:
        kind = table.get("kind", "hubert") if isinstance(table, Mapping) else "hubert"
        if not isinstance(kind, str) or kind not in _CONFIGS:
            raise ValueError(f"config.kind: is {kind!r}, allowed are {', '.join(map(repr, sorted(_CONFIGS)))}")
        keys = {key: value for key, value in table.items() if key != "kind"} if isinstance(table, Mapping) else table
        return from_dict(_CONFIGS[kind], keys, "config")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_model(path: str | Path, model: AnyModel) -> None:
    """Write configuration and weights; the file appears under its name only when it is whole, and replaces an older one then.

    Raises:
        OSError: the folder does not exist or cannot be written to, or the disk is full.
    """
    content = {"format": FORMAT, "version": VERSION, "config": config_to_dict(model.config), "model": model.state_dict()}
    save_atomically(path, content)


@overload
def load_model(path: str | Path, map_location: torch.device | str = "cpu", weights: Weights = "raw") -> HubertModel: ...


@overload
def load_model(path: str | Path, map_location: torch.device | str = "cpu", weights: Weights = "raw", *, of: type[Model]) -> Model: ...


@overload
def load_model(path: str | Path, map_location: torch.device | str = "cpu", weights: Weights = "raw", *, of: None) -> AnyModel: ...


def load_model(
    path: str | Path, map_location: torch.device | str = "cpu", weights: Weights = "raw", *, of: type[Any] | None = HubertModel
) -> AnyModel:
    """Build the model that `save_model` or a training checkpoint describes, with its weights, in training mode as every new module.

    Draws nothing from the global random state.

    Args:
        path: model file or training checkpoint.
        map_location: where the model shall be.
        weights: "raw", as the last optimizer step left them, or "average", the running average that a training checkpoint holds.
        of: the class that the model must have, or None if any of ours will do.

    Raises:
        ValueError: the file cannot be read, is not one of ours, was written by a later version, holds a model of another class, has no
            averaged weights when these are asked for, or its parts contradict each other.
    """
    return model_from(read_content(path), path, weights, of=of).to(map_location)


@overload
def model_from(content: Mapping[str, Any], path: str | Path, weights: Weights = "raw") -> HubertModel: ...


@overload
def model_from(content: Mapping[str, Any], path: str | Path, weights: Weights = "raw", *, of: type[Model]) -> Model: ...


@overload
def model_from(content: Mapping[str, Any], path: str | Path, weights: Weights = "raw", *, of: type[AnyModel] | None) -> AnyModel: ...


def model_from(content: Mapping[str, Any], path: str | Path, weights: Weights = "raw", *, of: type[Any] | None = HubertModel) -> AnyModel:
    """The same from what `read_content(path)` returned, on the CPU.

    Raises:
        ValueError: as for `load_model`.
    """
    key, state = weights_in(content, path, weights)
    config = config_from(content, path)
    found = HubertModel if isinstance(config, HubertConfig) else AsrModel
    if of is not None and found is not of:
        raise ValueError(f"{path}: holds {_KINDS[found]}; {_KINDS[of]}, is needed")
    with torch.random.fork_rng(devices=[]):  # the values drawn at construction are overwritten
        try:
            model = HubertModel(config) if isinstance(config, HubertConfig) else AsrModel(config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: the weights under '{key}' do not fit the model under 'config': {error}") from error
    return model


def read_content(path: str | Path) -> Mapping[str, Any]:
    """All that a model file or training checkpoint holds, on the CPU.

    Raises:
        ValueError: the file cannot be read, is not one of ours, or was written by a later version.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises for a file that is no checkpoint depends on the file's first bytes
        raise ValueError(f"{path}: cannot be read as a checkpoint: {load_failure(error)}") from error
    if isinstance(content, Mapping) and content.get("format") == "k2ssl-tokenizer":
        raise ValueError(f"{path}: is a tokenizer, a model is needed")
    if not isinstance(content, Mapping) or not {"config", "model"} <= set(content):
        found = ", ".join(map(str, list(content)[:6])) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(
            f"{path}: not a model of ours, which has the keys 'config' and 'model'; it holds {found or 'nothing'}. "
            "Checkpoints of other projects: scripts/import_checkpoint.py"
        )
    if content.get("format") == FORMAT and content.get("version") != VERSION:
        raise ValueError(f"{path}: version is {content.get('version')!r}, this release reads version {VERSION}")
    return content


def weights_in(content: Mapping[str, Any], path: str | Path, weights: Weights) -> tuple[str, Any]:
    """The key under which the weights lie in what `read_content(path)` returned, and the weights.

    Raises:
        ValueError: averaged weights are asked for, and there are none.
    """
    if weights == "raw":
        return "model", content["model"]
    if weights != "average":
        raise ValueError(f"{path}: weights is {weights!r}, allowed are 'raw', 'average'")
    average = content.get("average")
    if not isinstance(average, Mapping):
        raise ValueError(f"{path}: holds no averaged weights, only raw ones")
    if average.get("step") == 0:
        raise ValueError(f"{path}: its running average has never been updated; take a later checkpoint, or the raw weights")
    return "average", average.get("model")


def load_failure(error: Exception) -> str:
    """In one line why `torch.load` failed, without its advice to load unsafely."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Check the documentation")]
    if not lines:
        return repr(error)
    line = lines[-1] if lines[0].startswith("Weights only load failed") else lines[0]
    return f"{type(error).__name__}: {line.removeprefix('WeightsUnpickler error: ').partition('. Please use')[0]}"
