"""In what two nested tables of plain values differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differences(saved: Any, present: Any, path: str = "", new_keys: bool = True) -> list[str]:
    """`key.path is A there and B here` for every value in which two nested tables of plain values differ; without `new_keys`, keys that
    `saved` lacks are passed over."""
    if isinstance(saved, Mapping) and isinstance(present, Mapping):
        keys = [*saved, *(key for key in present if key not in saved)]
        nothing = object()
        found = []
        for key in keys:
            there, here = saved.get(key, nothing), present.get(key, nothing)
            inner = f"{path}.{key}" if path else str(key)
            if there is nothing and not new_keys:
                continue
            if there is nothing or here is nothing:
                found.append(
                    f"{inner} is {'missing' if there is nothing else repr(there)} there, {'missing' if here is nothing else repr(here)} here"
                )
            else:
                found += differences(there, here, inner, new_keys)
        return found
    saved, present = _as_list(saved), _as_list(present)
    return [] if saved == present else [f"{path} is {saved!r} there, {present!r} here"]


def _as_list(value: Any) -> Any:
    return [_as_list(item) for item in value] if isinstance(value, (list, tuple)) else value
