"""Tensors out of files that other projects wrote, without running anything that such a file may name.

Checkpoints of icefall and fairseq hold paths, options and enumerations beside the weights, which `weights_only=True` refuses. They are of no
use here, so every class or function that torch does not allow is replaced by one inert stand-in before the file is read: the weights come
out, the rest comes out as nothing, and no code but torch's own runs.
"""

from __future__ import annotations

import json
import math
import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2ssl.models.load import load_failure

_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LARGEST_HEADER = 100_000_000  # bytes; the format's own limit


class _Inert:
    """Takes the place of whatever a file names: accepts any arguments and any state, and keeps nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_foreign_state(path: str | Path, weights: str = "model") -> dict[str, Tensor]:
    """The state dictionary in a checkpoint of another project, on the CPU.

    Args:
        path: a file written by `torch.save` (of a state dictionary, or of a dictionary that holds one), or a .safetensors file.
        weights: which entry of a dictionary holds the weights: "model" (icefall, fairseq), "model_avg" (icefall's running average), or
            another. Of no consequence where the file is a state dictionary itself.

    Raises:
        ValueError: the file cannot be read, or has no such entry; the message says what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder, a file is needed' if path.is_dir() else 'no such file'}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds no dictionary, which a checkpoint is. {_HELP}")
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return {str(key): value for key, value in content.items()}
    state = content.get(weights)
    if not isinstance(state, Mapping) or not state:
        usable = [str(key) for key, value in content.items() if isinstance(value, Mapping) and _is_state(value)]
        raise ValueError(f"{path}: entry {weights!r} holds no weights; entries that do: {', '.join(usable) or 'none'}")
    if not _is_state(state):
        others = [f"{key} ({type(value).__name__})" for key, value in state.items() if not isinstance(value, Tensor)]
        raise ValueError(f"{path}: entry {weights!r} holds not only tensors: {', '.join(others[:10])}. {_HELP}")
    return {str(key): value for key, value in state.items()}


_HELP = (
    "If it is a checkpoint, save the weights alone in the environment that made it, and import those: "
    "python -c \"import torch; torch.save(torch.load('FILE', weights_only=False, map_location='cpu')['model'], 'WEIGHTS')\""
)


def _is_state(content: Mapping[str, Any]) -> bool:
    return bool(content) and all(isinstance(value, Tensor) for value in content.values())


def _read_torch(path: Path) -> Any:
    """What `torch.save` wrote, with `_Inert` for everything beyond tensors and plain values."""
    try:
        stand_ins = [(_Inert, name) for name in _foreign_names(path)]
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]  # (stand-in, name) pairs are allowed
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # what is raised for a file that is no checkpoint depends on the file's first bytes
        raise ValueError(f"{path}: cannot be read as a checkpoint: {load_failure(error)}. {_HELP}") from error


def _foreign_names(path: Path) -> list[str]:
    """Names of classes and functions in the file that torch does not allow; found without loading it."""
    if zipfile.is_zipfile(path):
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    found = set()
    with path.open("rb") as file:
        for _ in range(4):  # before torch 1.6: magic number, version, system, content
            found |= {str(argument) for code, argument, _ in pickletools.genops(file) if code.name == "GLOBAL"}  # "module name"
    return sorted(
        {_present_name(*full.split(" ", 1)) for full in found}
    )  # names that torch allows keep their meaning: it looks there first


def _present_name(module: str, name: str) -> str:
    """Such files call things as Python 2 did; torch translates these names before it looks them up."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Header length (8 bytes, little-endian), JSON header name -> dtype, shape and byte range, then the bytes."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 0 < length <= min(_LARGEST_HEADER, len(content) - 8):
        raise ValueError(f"{path}: not a safetensors file, or one cut short")
    try:
        header = json.loads(content[8 : 8 + length])
        return {
            name: _tensor(content, 8 + length, entry["dtype"], entry["shape"], *entry["data_offsets"])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a safetensors file, or one cut short: {error!r}") from error


def _tensor(content: bytearray, start: int, dtype: str, shape: list[int], begin: int, end: int) -> Tensor:
    kind = _SAFETENSORS[dtype]
    size = math.prod(shape)
    if not 0 <= begin <= end <= len(content) - start or end - begin != size * kind.itemsize:
        raise ValueError(f"byte range {begin} to {end} does not hold {shape} of {dtype}")
    if size == 0:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(content, dtype=kind, count=size, offset=start + begin).view(shape)
