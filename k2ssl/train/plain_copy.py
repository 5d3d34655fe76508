"""What a checkpoint holds, out of reach of a training that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def plain_copy(value: Any, path: str, copies: dict[tuple[Any, ...], Tensor] | None = None) -> Any:
    """A copy in the host's memory that shares nothing with the original. A tensor that occurs twice is copied once.

    Args:
        value: nested mappings, lists and tuples of str, int, float, bool, None and tensors on any device.
        path: what `value` is called in messages.
        copies: the tensors copied so far, by where the original lies in memory.

    Raises:
        ValueError: something else is in it, named by its keys.
    """
    copies = {} if copies is None else copies
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise ValueError(f"{path}: has the key {key!r} of type {type(key).__name__}, allowed are str and int")
        return {key: plain_copy(item, f"{path}[{key!r}]", copies) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain_copy(item, f"{path}[{number}]", copies) for number, item in enumerate(value))
    if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_meta and not value.is_quantized:
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if place not in copies:
            copies[place] = value.detach().to("cpu", copy=True)  # of a view only what it shows
        return copies[place]
    raise ValueError(
        f"{path}: is of type {type(value).__name__}; a checkpoint holds mappings, lists and tuples of str, int, float, bool, None and"
        " plain dense tensors, all of exactly these types"
    )
