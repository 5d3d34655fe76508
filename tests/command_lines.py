"""Command lines that are printed somewhere, held against the programs that they name; nothing is carried out but `bash SCRIPT --help`.

A program of ours or a Python script gets its arguments as from a shell, up to the point where they are read: all checks of the settings'
class are made, the work is not begun. Of a shell script the options are looked up in what its `--help` prints.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from k2ssl.bin import program
from k2ssl.config import load

REPOSITORY = Path(__file__).parents[1]

# What stands in documentation beside our own programs, in one or two words.
KNOWN = {"git clone", "pip install", "python -m pip", "python -m venv", "cd", "source", ".", "export", "cat", "cp", "ls", "mkdir", "less"}
KNOWN |= {"head", "tail", "wc", "kill", "ulimit", "nproc", "free", "df", "nvidia-smi", "tensorboard", "sbatch", "for", "done"}
_PREFIXES = ("do", "time", "nohup", "nice", "srun", "exec")
_PYTHON = re.compile(r"(\S*/)?(python3?|\$python|\$\{?python\}?)")


class RefusedError(AssertionError):
    """A command line that would not do; says why."""


class _ReadError(Exception):
    """Arguments were read, and nothing shall follow."""


def commands_in(text: str) -> list[list[str]]:
    """The commands of lines of shell, as words: without comments, redirections, assignments before them, and what strings them together."""
    found: list[list[str]] = [[]]
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines():
        words = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=";&|<>")
        words.whitespace_split = True
        skip = False
        for word in words:
            if skip:
                skip = False
            elif set(word) <= set("<>&") and set(word) & set("<>"):
                skip = True
                if found[-1] and found[-1][-1].isdigit():
                    found[-1].pop()
            elif set(word) <= set(";&|"):
                found.append([])
            else:
                found[-1].append(word)
        found.append([])
    return [words for words in map(_without_prefixes, found) if words]


def _without_prefixes(words: list[str]) -> list[str]:
    while words and (re.match(r"\w+=", words[0]) or words[0] in _PREFIXES):
        words = words[1:]
    return words


def check(words: Sequence[str], arguments: bool = True) -> Any:
    """Hold a command against the program that it names.

    Args:
        words: the command.
        arguments: False looks only whether the program is there.

    Returns:
        The settings that a program of `k2ssl.bin` read; None for other commands, and where a file that is to come holds some of them.

    Raises:
        RefusedError: there is no such program, file or option, or the settings are refused.
    """
    first, rest = words[0], list(words[1:])
    if rest[-1:] == ["..."]:
        arguments = False
    if first == "torchrun":
        at = next((i for i, word in enumerate(rest) if word == "-m"), None)
        if at is None:
            raise RefusedError(f"torchrun without -m: {' '.join(words)}")
        return _check_module(rest[at + 1], rest[at + 2 :], arguments)
    if _PYTHON.fullmatch(first):
        if rest[:1] == ["-m"] and rest[1].startswith("k2ssl."):
            return _check_module(rest[1], rest[2:], arguments)
        if rest and rest[0].endswith(".py"):
            return _check_script(rest[0], rest[1:], arguments)
        first = "python"
    if first == "bash" and rest and rest[0].endswith(".sh"):
        return _check_shell(rest[0], rest[1:], arguments)
    if first == "sbatch":
        _file(next((word for word in rest if not word.startswith("-")), "no file"))
    known = " ".join([first, *rest][: 3 if first == "python" else 2])
    if first not in KNOWN and known not in KNOWN:
        raise RefusedError(f"not a command that documentation may name: {' '.join(words)}")
    return None


def _file(name: str) -> Path:
    path = REPOSITORY / name
    if not path.is_file():
        raise RefusedError(f"there is no file {name}")
    return path


def _check_module(name: str, arguments: list[str], parse: bool) -> Any:
    if not (REPOSITORY / f"{name.replace('.', '/')}.py").is_file():
        raise RefusedError(f"there is no program {name}")
    module = importlib.import_module(name)
    if not hasattr(module, "main"):
        raise RefusedError(f"{name} is no program: it has no main")
    if not parse:
        return None
    kept = _without_files_to_come(arguments)
    try:
        with _reading_only(module) as settings:
            module.main(kept)
    except RefusedError as error:
        if len(kept) < len(arguments) and "is missing and has no default" in str(error):
            return None  # the file that is to come may say it
        raise
    if not settings:
        raise RefusedError(f"{name} does not read its arguments")
    return settings[0]


def _check_script(name: str, arguments: list[str], parse: bool) -> None:
    path = _file(name)
    if not parse or not arguments:
        return
    if not re.search(r"\bparse_args\(|\bArgumentParser\(|\bparser\(|run_program\(", path.read_text(encoding="utf-8")):
        raise RefusedError(f"{name} takes no arguments")
    beside = [str(path.parent), *sys.path]  # where python looks first for what a script imports
    with mock.patch.object(sys, "argv", [str(path), *arguments]), mock.patch.object(sys, "path", beside), _reading_only(program):
        runpy.run_path(str(path), run_name="__main__")


@contextlib.contextmanager
def _reading_only(module: Any) -> Iterator[list[Any]]:
    """Inside, programs end where their arguments are read; gives the settings that were read."""
    settings: list[Any] = []
    parse_args = argparse.ArgumentParser.parse_args

    def read(_main: Any, cls: type, argv: Sequence[str], *_: Any) -> int:
        settings.append(load(cls, argv))
        raise _ReadError

    def parsed(*args: Any, **kwargs: Any) -> None:
        settings.append(parse_args(*args, **kwargs))
        raise _ReadError

    said = io.StringIO()
    replaced = mock.patch.object(module, "run_program", read) if hasattr(module, "run_program") else contextlib.nullcontext()
    try:
        with replaced, mock.patch.object(argparse.ArgumentParser, "parse_args", parsed), contextlib.redirect_stderr(said):
            yield settings
    except _ReadError:
        pass
    except ValueError as error:
        raise RefusedError(str(error)) from error
    except SystemExit as error:
        raise RefusedError(said.getvalue() or f"ended with status {error.code} and no words") from error


def _without_files_to_come(arguments: list[str]) -> list[str]:
    """The arguments without settings files that only an earlier command makes; those of recipes/ must be there."""
    end = next((i for i, word in enumerate(arguments) if word.startswith("-") and word != "-"), len(arguments))
    kept = []
    for word in arguments[:end]:
        if word.startswith("recipes/"):
            kept.append(str(_file(word)))
        elif not word.endswith((".toml", ".json")) or Path(word).is_file():
            kept.append(word)
    return [*kept, *arguments[end:]]


def _check_shell(name: str, arguments: list[str], parse: bool) -> None:
    path = _file(name)
    if not parse:
        return
    options = _options_of(path) if arguments else {}
    given = iter(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    for word in given:
        if not word.startswith("--"):
            raise RefusedError(f"{name}: {word} is not an option")
        if word not in options:
            raise RefusedError(f"{name}: unknown option {word}; it has {' '.join(sorted(options))}")
        if options[word] and next(given, "--").startswith("--"):
            raise RefusedError(f"{name}: {word} needs a value")


@functools.cache
def _options_of(script: Path) -> dict[str, bool]:
    """The options that `--help` lists at the beginning of lines, and whether each takes a value."""
    done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise RefusedError(f"{script.name} --help: {done.stderr}")
    return {name: bool(value) for name, value in re.findall(r"^  (--[\w-]+)( [A-Z]+)?\b", done.stdout, flags=re.MULTILINE)}
