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
    content, advice = (_read_safetensors(path), "") if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds no dictionary, which a checkpoint is{'. ' + advice if isinstance(content, _Inert) else ''}")
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return {str(key): value for key, value in content.items()}
    state = content.get(weights)
    if not isinstance(state, Mapping) or not state:
        usable = [str(key) for key, value in content.items() if isinstance(value, Mapping) and _is_state(value)]
        raise ValueError(f"{path}: entry {weights!r} holds no weights; entries that do: {', '.join(usable) or 'none'}")
    if not _is_state(state):
        others = [f"{key} ({type(value).__name__})" for key, value in state.items() if not isinstance(value, Tensor)]
        raise ValueError(f"{path}: entry {weights!r} holds not only tensors: {', '.join(others[:10])}. {advice}")
    return {str(key): value for key, value in state.items()}


def _is_state(content: Mapping[str, Any]) -> bool:
    return bool(content) and all(isinstance(value, Tensor) for value in content.values())


def _read_torch(path: Path) -> tuple[Any, str]:
    """What `torch.save` wrote, with `_Inert` for everything beyond tensors and plain values; and advice if that is not enough."""
    archive = _is_archive(path)
    try:
        names = _foreign_names(path)
    except Exception as error:  # what is raised for a file that is no checkpoint depends on the file's first bytes
        raise _unreadable(path, f"{load_failure(error).rstrip('.')}. {_ask_or_fetch(error)}") from error
    advice = _advice(names)
    try:
        stand_ins = [(_Inert, name) for name in names]
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]  # (stand-in, name) pairs are allowed
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive), advice
    except Exception as error:
        refused = _is_refusal(error) or _runs_things(names)
        raise _unreadable(path, f"{load_failure(error).rstrip('.')}. {advice if refused else _FETCH}") from error


_FETCH = "If it is a checkpoint, it is cut short or damaged: fetch it again"
_ASK = "ask whoever made it for the weights alone, as a .safetensors file"
_RUNNING = {"os", "posix", "nt", "sys", "subprocess", "pty", "runpy", "importlib", "shutil", "socket", "ctypes"}
_RUNNING |= {f"builtins.{name}" for name in ("eval", "exec", "compile", "open", "__import__")}


def _ask_or_fetch(error: Exception) -> str:
    """Advice about a file of which it cannot be told what it names."""
    return f"If it is a checkpoint, {_ASK}" if _is_refusal(error) else _FETCH


class _NamesError(Exception):
    """Names things in a way that torch does not read without running them."""


def _is_refusal(error: Exception) -> bool:
    """Whether the file is whole but holds what is not loaded; torch raises pickle's error then, and nothing here imports pickle."""
    return isinstance(error, _NamesError) or type(error).__name__ == "UnpicklingError"


def _runs_things(names: list[str]) -> list[str]:
    """Those of the names that no checkpoint needs, and that run or open something."""
    return [name for name in names if name in _RUNNING or name.partition(".")[0] in _RUNNING]


def _advice(names: list[str]) -> str:
    """What to do about a file with such names in it."""
    if running := _runs_things(names):
        return f"It names {', '.join(running)}, which loading it would run: do not load it by other means, {_ASK}"
    return (
        "If it is a checkpoint and you trust who made it, save the weights alone in the environment that made it, and import those: "
        "python -c \"import torch; torch.save(torch.load('FILE', weights_only=False, map_location='cpu')['model'], 'WEIGHTS')\""
    )


def _is_archive(path: Path) -> bool:
    """Whether the file is a zip archive, as torch writes them, or may be what torch before 1.6 wrote.

    Raises:
        ValueError: it is neither, or an archive of another kind; says what it looks like.
    """
    with path.open("rb") as file:
        begins = file.read(24)
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile as error:
            raise _unreadable(path, f"{error}. {_FETCH}") from error
        if any(name.endswith("/constants.pkl") for name in names):
            raise _unreadable(path, "it is a TorchScript program, not a checkpoint")
        return True
    if not begins:
        raise _unreadable(path, "it is empty (0 bytes); fetch it again")
    if begins.startswith(b"PK"):
        raise _unreadable(path, "the end of the archive is missing, so it is cut short; fetch it again")
    if not begins.startswith(b"\x80"):  # a pickle's first byte
        raise _unreadable(path, f"it begins with {begins!r}, as no file of torch.save does; fetch the file with the weights")
    return False


def _unreadable(path: Path, why: str) -> ValueError:
    return ValueError(f"{path}: cannot be read as a checkpoint: {why}")


def _foreign_names(path: Path) -> list[str]:
    """Names of classes and functions in the file that torch does not allow; found without loading it."""
    if zipfile.is_zipfile(path):
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    found = set()
    with path.open("rb") as file:
        for _ in range(4):  # before torch 1.6: magic number, version, system, content
            for code, argument, _ in pickletools.genops(file):
                if code.name in ("INST", "STACK_GLOBAL"):  # torch reads neither
                    raise _NamesError(f"names things by {code.name}, which torch does not read without running them")
                if code.name == "GLOBAL":
                    found.add(str(argument))  # "module name"
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
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:  # nested too deeply: RecursionError
        raise ValueError(f"{path}: not a safetensors file, or one cut short: {error!r}") from error


def _tensor(content: bytearray, start: int, dtype: str, shape: list[int], begin: int, end: int) -> Tensor:
    kind = _SAFETENSORS[dtype]
    if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"shape of a tensor is {shape!r}, a list of whole numbers >= 0 is needed")
    size = math.prod(shape)
    if not 0 <= begin <= end <= len(content) - start or end - begin != size * kind.itemsize:
        raise ValueError(f"byte range {begin} to {end} does not hold {shape} of {dtype}")
    if size == 0:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(content, dtype=kind, count=size, offset=start + begin).view(shape)
