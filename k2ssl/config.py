"""Settings of a program: TOML or JSON files, then command-line overrides, strictly.

    settings = load(FitKMeans, ["conf/mfcc.toml", "--kmeans.num-clusters", "50"], program="fit_kmeans")

Arguments before the first that begins with `-` are files; a later file overrides an earlier one key by key, the command line overrides them
all. What results goes through `structure.from_dict`: an unknown key, a missing one or a value of the wrong type is an error that names the
whole path of the key. The only file that imports the command-line library.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, TypeVar, Union, get_args, get_origin

import tyro

from k2ssl.structure import from_dict, to_dict

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Config = TypeVar("Config")

_KIND = "kind"


class ConfigError(ValueError):
    """The settings are wrong; nothing has been done yet. Programs exit with status 2."""


def load(cls: type[Config], argv: Sequence[str], *, program: str = "", description: str = "") -> Config:
    """Read an instance of dataclass `cls` from files and overrides.

    Args:
        cls: a dataclass whose fields `structure.from_dict` can read.
        argv: files, then options such as `--kmeans.num-clusters 100`; a truth value is written out, `--overwrite True`.
        program: name for the usage text.
        description: shown above the options by `--help`, which ends the process with status 0.

    Raises:
        ConfigError: a file cannot be read, or the settings that result are refused.
        SystemExit: with status 2 and a message on stderr for options that do not exist or cannot be parsed; with 0 after `--help`.
    """
    files, options = _split(argv)
    settings = _default_settings(cls)
    for file in files:
        settings = _merged(settings, _read(file), _fields_of(cls))
    given = _parse(cls, options, settings, program, description)
    try:
        return from_dict(cls, _merged(settings, given, _fields_of(cls)))
    except ValueError as error:
        source = ", ".join([*files, *(["command line"] if options else [])]) or "no settings given"
        raise ConfigError(f"{error} ({source})") from error


def dump(config: Any) -> str:
    """The settings as JSON text that `load` reads back, every default written out."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    first_option = next((i for i, argument in enumerate(argv) if argument.startswith("-")), len(argv))
    return list(argv[:first_option]), list(argv[first_option:])


def _read(file: str) -> Mapping[str, Any]:
    if Path(file).suffix not in (".toml", ".json"):
        raise ConfigError(f"{file}: a settings file ends in .toml or .json; options begin with --")
    try:
        text = Path(file).read_text(encoding="utf-8")
        content = json.loads(text) if file.endswith(".json") else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{file}: a table of keys is needed, not a {type(content).__name__}")
    return content


# --- defaults and merging, on plain dictionaries -------------------------------------------------------------------------------------------


def _fields_of(hint: Any) -> dict[str, Any]:
    """Type hints of the fields that the table of a dataclass, or of any of several dataclasses, may hold."""
    found: dict[str, Any] = {}
    options = _dataclasses_in(hint)
    for option in options:
        for name, field_hint in typing.get_type_hints(option).items():
            found[name] = found[name] | field_hint if name in found and found[name] != field_hint else field_hint
    return {_KIND: Literal[tuple(_kind(option) for option in options)], **found} if len(options) > 1 else found


def _dataclasses_in(hint: Any) -> list[type]:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [option for option in options if dataclasses.is_dataclass(option) and isinstance(option, type)]


def _default_settings(cls: type) -> dict[str, Any]:
    """Defaults as plain values. A field's default instance may differ from its class's defaults, so it counts, not the class."""
    settings: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif len(_dataclasses_in(hints[field.name])) == 1 and dataclasses.is_dataclass(hints[field.name]):
            settings[field.name] = _default_settings(hints[field.name])
            continue
        else:
            continue
        plain = to_dict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
        if isinstance(plain, dict) and len(_dataclasses_in(hints[field.name])) > 1:
            plain = {_KIND: _kind(type(value)), **plain}
        settings[field.name] = plain
    return settings


def _merged(old: Mapping[str, Any], new: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """`new` over `old`, table by table; a table of another kind replaces the old one, whose keys it would not know."""
    result = dict(old)
    for key, value in new.items():
        before = result.get(key)
        same_kind = isinstance(before, Mapping) and isinstance(value, Mapping) and value.get(_KIND, before.get(_KIND)) == before.get(_KIND)
        is_table = key in hints and bool(_dataclasses_in(hints[key]))
        result[key] = _merged(before, value, _fields_of(hints[key])) if same_kind and is_table else value  # type: ignore[arg-type]
    return result


# --- the command line ----------------------------------------------------------------------------------------------------------------------


def _parse(cls: type, options: list[str], settings: Mapping[str, Any], program: str, description: str) -> dict[str, Any]:
    """The options that were given, as nested plain values."""
    usage = f"usage: {program} [SETTINGS.toml ...] [OPTIONS], where the options override what the files say"
    parsed = tyro.cli(
        _options(cls, settings, cls.__name__),
        args=options,
        prog=program or None,
        description="\n\n".join([description, usage, *_only_in_files(cls, "")]),
        config=(tyro.conf.FlagConversionOff,),
    )
    return _without_empty(parsed)


def _options(hint: Any, settings: Any, name: str, path: str = "") -> Any:
    """A TypedDict of the options that exist below a table; keys not given on the command line stay out of the result.

    Its text is the heading of the options in --help, and tells of the keys that a file alone can give. `path` is the table's own.
    """
    docs = _docs_of(hint)
    settings = settings if isinstance(settings, Mapping) else {}
    entries: dict[str, Any] = {}
    for key, field_hint in _fields_of(hint).items():
        if _dataclasses_in(field_hint):
            entries[key] = _options(field_hint, settings.get(key), key, f"{path}{key}.")
        elif not _holds_tables(field_hint):
            value = f"(default: {_shown(settings[key])})" if key in settings else _no_default(hint, key)
            text = docs.get(key) or ("which of these settings" if key == _KIND else "")
            entries[key] = Annotated[field_hint, tyro.conf.arg(help=text or None, help_behavior_hint=value)]
    table = TypedDict(name, entries, total=False)  # type: ignore[misc]
    table.__doc__ = " ".join([_told_by_kind({option: _summary(option) for option in _dataclasses_in(hint)}), *_only_in_files(hint, path)])
    return table


def _only_in_files(hint: Any, path: str) -> list[str]:
    docs = _docs_of(hint)
    keys = [key for key, field_hint in _fields_of(hint).items() if not _dataclasses_in(field_hint) and _holds_tables(field_hint)]
    return [f"A settings file alone gives [{path}{key}]: {docs.get(key, '')}" for key in keys]


def _docs_of(hint: Any) -> dict[str, str]:
    """What docstrings say of each field of a dataclass, or of several, where a field may be another thing in each."""
    docs = {option: _attribute_docs(option) for option in _dataclasses_in(hint)}
    names = dict.fromkeys(key for texts in docs.values() for key in texts)
    return {key: _told_by_kind({option: texts[key] for option, texts in docs.items() if key in texts}) for key in names}


def _told_by_kind(texts: Mapping[type, str]) -> str:
    """One text where all kinds of a table have the same, else each with the name of its kind."""
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return " ".join(f"{_kind(option)}: {text}" for option, text in texts.items())


def _holds_tables(hint: Any) -> bool:
    """Free tables and lists of tables can be given in a file only."""
    is_table = get_origin(hint) in (dict, Mapping) or bool(_dataclasses_in(hint))
    return is_table or any(_holds_tables(argument) for argument in get_args(hint))


def _no_default(hint: Any, key: str) -> str:
    """What help says of a key that the settings so far do not hold: it is required, or of another kind of table."""
    kinds = {_kind(option): option for option in _dataclasses_in(hint) if key in _names(option)}
    defaults = [_default_settings(option).get(key, dataclasses.MISSING) for option in kinds.values()]
    default = "" if dataclasses.MISSING in defaults else f"; default: {_shown(defaults[0])}"
    return "(required)" if len(_dataclasses_in(hint)) == 1 else f"({' or '.join(kinds)}{default})"


def _names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value) or "none"


def _without_empty(parsed: Mapping[str, Any]) -> dict[str, Any]:
    """Tables of which nothing was given would hide a default of None."""
    nested = {key: _without_empty(value) if isinstance(value, Mapping) else value for key, value in parsed.items()}
    return {key: value for key, value in nested.items() if value != {}}


def _summary(cls: type) -> str:
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())


def _attribute_docs(cls: type) -> dict[str, str]:
    """What the sections "Attributes:" of a class and of those it inherits from say of each field, the class itself before all others."""
    return {key: text for base in reversed(cls.__mro__) for key, text in _own_attribute_docs(base).items()}


def _own_attribute_docs(cls: type) -> dict[str, str]:
    """Of one docstring; `a, b: text` speaks of both."""
    section = re.search(r"^Attributes:\n((?:[ \t]+.*\n?|\n)+)", inspect.cleandoc(cls.__doc__ or ""), re.MULTILINE)
    docs: dict[str, str] = {}
    names: list[str] = []
    for line in section.group(1).splitlines() if section else []:
        entry = re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)
        names = entry.group(1).split(", ") if entry else names
        for name in names:
            docs[name] = f"{docs.get(name, '')} {(entry.group(2) if entry else line).strip()}".strip()
    return docs


def _kind(cls: type) -> str:
    return cls.__name__.removesuffix("Config").lower()
