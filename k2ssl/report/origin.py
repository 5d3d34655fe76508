"""Where a run comes from: code, manifests, labels, the model it began with."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import k2ssl
from k2ssl.file_hash import file_sha256

_GIT_SECONDS = 20  # a checkout on a slow network disk must not hold up training
_SUFFIXES = (".jsonl.gz", ".jsonl")


@dataclass(frozen=True)
class Code:
    """What was run.

    Attributes:
        k2ssl, torch, python: releases.
        commit: of the git checkout that the package lies in; None: it lies in none.
        dirty: whether files of it had been changed.
    """

    k2ssl: str | None
    commit: str | None
    dirty: bool | None
    torch: str | None
    python: str | None


@dataclass(frozen=True)
class Manifest:
    """A list of utterances: where it lay, the hash of the file, hours and utterances as the summary beside it says."""

    path: str
    sha256: str | None
    hours: float | None
    cuts: int | None


@dataclass(frozen=True)
class Labels:
    """A label store and what it says of its origin; None where it does not say or could not be read.

    Attributes:
        path: its folder.
        features: what was clustered.
        num_classes: how many classes there are.
        kmeans, checkpoint: files of the centres and of the model that gave the features, if one did.
        kmeans_sha256, checkpoint_sha256: their hashes.
        cuts_sha256: hash of the utterances that were labelled.
    """

    path: str
    features: str | None
    num_classes: int | None
    kmeans: str | None
    kmeans_sha256: str | None
    checkpoint: str | None
    checkpoint_sha256: str | None
    cuts_sha256: str | None


@dataclass(frozen=True)
class Init:
    """The model that a run began with: file, its hash, raw or averaged weights, and the run that the file says it is from."""

    path: str
    weights: str
    sha256: str | None
    run: str | None


def shown(path: Path) -> str:
    """A path for people: one below the current folder as seen from there, so that what is published does not tell of the machine."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def command_shown(command: Sequence[str]) -> tuple[str, ...]:
    """A command line with paths as `shown` and its first word, the interpreter, without the folder that it lies in."""
    words = (shown(Path(word)) if Path(word).is_absolute() else word for word in command[1:])
    return (*(Path(first).name for first in command[:1]), *words)


def code_version() -> Code:
    """Of this process."""
    commit, dirty = git_state(Path(k2ssl.__file__).resolve().parents[1])
    return Code(k2ssl.__version__, commit, dirty, str(torch.__version__), platform.python_version())


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Commit of the checkout whose root `folder` is, and whether tracked files differ from it; None where that is not known."""
    if not (folder / ".git").exists():
        return None, None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return (commit or None), (None if changes is None else bool(changes))


def manifests_of(settings: Mapping[str, Any], base: Path) -> tuple[Manifest, ...]:
    """The training manifests of a run.

    Args:
        settings: of the run.
        base: folder that relative paths begin at.
    """
    return tuple(manifest_at(path, base) for path in _list(settings, "data", "cuts"))


def manifest_at(path: str, base: Path) -> Manifest:
    """One manifest; of a file that is not there any more only the path is known."""
    file = base / path
    stem = next((file.name.removesuffix(suffix) for suffix in _SUFFIXES if file.name.endswith(suffix)), file.name)
    summary = _table(read_json(file.with_name(f"summary_{stem.removeprefix('cuts_')}.json")), "summary")
    hours, cuts = summary.get("hours"), summary.get("cuts")
    return Manifest(
        path,
        sha256_of(file) if file.is_file() else None,
        float(hours) if isinstance(hours, int | float) else None,
        cuts if isinstance(cuts, int) else None,
    )


def labels_of(settings: Mapping[str, Any], base: Path) -> tuple[Labels, ...]:
    """The label stores of a run; arguments as for `manifests_of`."""
    return tuple(labels_at(path, base) for path in _list(settings, "data", "labels"))


def labels_at(path: str, base: Path) -> Labels:
    """One label store."""
    folder = base / path
    contract, settings = read_json(folder / "contract.json"), read_json(folder / "settings.json")
    lineage = _table(contract, "lineage")
    classes = contract.get("num_classes")
    return Labels(
        path,
        _text(lineage.get("features")),
        classes if isinstance(classes, int) else None,
        _text(settings.get("kmeans")),
        _text(lineage.get("kmeans_sha256")),
        _text(settings.get("checkpoint")),
        _text(lineage.get("checkpoint_sha256")),
        _text(lineage.get("cuts_sha256")),
    )


def init_of(settings: Mapping[str, Any], base: Path) -> Init | None:
    """The model that a run began with; None: its weights were drawn. Arguments as for `manifests_of`."""
    path = settings.get("init")
    if not isinstance(path, str) or not path:
        return None
    file = base / path
    there = file.is_file()
    weights = _text(settings.get("init_weights")) or "raw"
    return Init(path, weights, sha256_of(file) if there else None, output_in(file) if there else None)


@cache
def output_in(model: Path) -> str | None:
    """The output folder of the run that wrote a checkpoint, or whose weights a model file holds; None: the file does not say.

    Weights are not read.
    """
    try:
        content = torch.load(model, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # what torch.load raises depends on the file's first bytes; a file that is no model says nothing
        return None
    return _text(_table(content, "job").get("output")) if isinstance(content, Mapping) else None


def sha256_of(path: Path) -> str:
    """Hash of a whole file, computed once as long as the file is the same.

    Raises:
        OSError: it cannot be read.
    """
    about = path.stat()
    return _sha256(path.resolve(), about.st_size, about.st_mtime_ns)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    return file_sha256(path)


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _list(settings: Mapping[str, Any], table: str, key: str) -> list[str]:
    value = _table(settings, table).get(key)
    return [item for item in value if isinstance(item, str)] if isinstance(value, list | tuple) else []


def _table(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
