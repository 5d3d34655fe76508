"""Plain dictionaries to frozen dataclasses and back, strictly.

What is read from a TOML file or a checkpoint is a plain dictionary; what the code works with is a dataclass. An unknown key, a missing
one or a value of the wrong type is a `ValueError` that names the whole path of the key and what is allowed. Where a field may hold one of
several dataclasses, the dictionary says which under the key "kind": the name of the class without "Config", in lower case.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

Config = TypeVar("Config")

_KIND = "kind"


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested dictionaries of plain values, tuples as lists.

    Raises:
        ValueError: a field holds something that `from_dict` could not read back.
    """
    hints = typing.get_type_hints(type(config))
    return {field.name: _to_plain(getattr(config, field.name), hints[field.name], field.name) for field in dataclasses.fields(config)}


def from_dict(cls: type[Config], data: Mapping[str, Any], path: str = "") -> Config:
    """Build dataclass `cls` from `data`; keys that are absent take their defaults.

    Args:
        cls: a dataclass.
        data: nested mapping of plain values.
        path: where `data` lies in the whole, for messages.

    Raises:
        ValueError: unknown or missing key, wrong type, or a value that `cls` refuses.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{path or cls.__name__}: a table of keys is needed, not {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ValueError(f"{_join(path, key)}: unknown key; known keys are {', '.join(sorted(fields))}")
    for name, field in fields.items():
        if name not in data and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{_join(path, name)}: this key is missing and has no default")
    values = {key: _from_plain(hints[key], value, _join(path, key)) for key, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from error


def check_types(config: Any) -> None:
    """Refuse a dataclass made in Python whose fields hold values of other types than declared; called first in `__post_init__`.

    Raises:
        ValueError: naming the class, the field, the value and the type that is needed.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        _from_plain(hints[field.name], getattr(config, field.name), f"{type(config).__name__}: {field.name}")


def _from_plain(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and isinstance(value, get_args(hint) or hint):
        return value  # made in Python, and checked by its own class
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _from_union(get_args(hint), value, path)
    if origin is Literal:
        if value in get_args(hint):
            return value
        raise ValueError(f"{path}: is {value!r}, allowed are {', '.join(map(repr, get_args(hint)))}")
    if origin is tuple:
        return _tuple_from_plain(get_args(hint), value, path)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{path}: a table is needed, not {value!r}")
        return {str(key): _from_plain(get_args(hint)[1], item, _join(path, key)) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, path)
    return _scalar_from_plain(hint, value, path)


def _from_union(options: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    if len(options) == 1:
        return _from_plain(options[0], value, path)
    kinds = {_kind(option): option for option in options}
    if not isinstance(value, Mapping) or value.get(_KIND) not in kinds:
        found = value.get(_KIND) if isinstance(value, Mapping) else value
        raise ValueError(f"{_join(path, _KIND)}: is {found!r}, allowed are {', '.join(sorted(kinds))}")
    return from_dict(kinds[value[_KIND]], {key: item for key, item in value.items() if key != _KIND}, path)


def _tuple_from_plain(hints: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{path}: a list is needed, not {value!r}")
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = (hints[0],) * len(value)
    if len(hints) != len(value):
        raise ValueError(f"{path}: has {len(value)} entries, {len(hints)} are needed")
    return tuple(_from_plain(hint, item, f"{path}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True)))


def _scalar_from_plain(hint: Any, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is a subclass of int, but `layers = true` is a mistake
    if type(value) is not hint:
        raise ValueError(f"{path}: is {value!r} of type {type(value).__name__}, {getattr(hint, '__name__', hint)} is needed")
    return value


def _to_plain(value: Any, hint: Any, path: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = to_dict(value)
        classes = [option for option in get_args(hint) if option is not type(None)]
        return {_KIND: _kind(type(value)), **plain} if len(classes) > 1 else plain
    if isinstance(value, (tuple, list)):
        item_hint = get_args(hint)[0] if get_args(hint) else Any
        return [_to_plain(item, item_hint, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item, Any, _join(path, key)) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{path}: a {type(value).__name__} cannot be stored in a configuration")


def _kind(cls: type) -> str:
    return cls.__name__.removesuffix("Config").lower()


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
