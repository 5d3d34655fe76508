"""--help of every program says of every option what it is."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from k2ssl import config
from k2ssl.bin import decode, pretrain

REPOSITORY = Path(__file__).parents[2]
MODULES = sorted(path for path in (REPOSITORY / "k2ssl").rglob("*.py") if "\ndef main(" in path.read_text(encoding="utf-8"))
SCRIPTS = sorted(path for path in (REPOSITORY / "recipes").glob("*/*.py") if re.search(r"parse_args\(|parser\(", path.read_text("utf-8")))
RECIPES = sorted(path for path in (REPOSITORY / "recipes").glob("*/*.sh") if "parse_options" in path.read_text(encoding="utf-8"))
NO_TEXT = re.compile(r"(\w+: )?see\b[^;:]*", re.IGNORECASE)  # "see `X`." and nothing else


class _SeenError(Exception):
    """The options were seen, and nothing shall follow."""


def named(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def texts_of(path: Path) -> dict[str, str]:
    """Every option of a program or script, and what its --help says of it."""
    seen: dict[str, str] = {}

    def of_settings(table: Any, **_: Any) -> None:
        seen.update(texts_in(table))
        raise _SeenError

    def of_argparse(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        seen.update({"/".join(action.option_strings) or action.dest: action.help or "" for action in parser._actions})
        raise _SeenError

    beside = [str(path.parent), *sys.path]  # where python looks first for what a script imports
    with (
        contextlib.suppress(_SeenError),
        mock.patch.object(config.tyro, "cli", of_settings),
        mock.patch.object(argparse.ArgumentParser, "parse_args", of_argparse),
        mock.patch.object(sys, "path", beside),
        mock.patch.object(sys, "argv", [str(path), "--help"]),
    ):
        if path in MODULES:
            importlib.import_module(named(path).removesuffix(".py").replace("/", ".")).main(["--help"])
        else:
            runpy.run_path(str(path), run_name="__main__")
    return seen


def texts_in(table: Any, prefix: str = "--") -> Iterator[tuple[str, str]]:
    for name, hint in table.__annotations__.items():
        if hasattr(hint, "__metadata__"):
            yield f"{prefix}{name}", hint.__metadata__[0].help or ""
        else:
            yield from texts_in(hint, f"{prefix}{name}.")


def test_all_programs_and_scripts_are_looked_at() -> None:
    assert len(MODULES) >= 18 and len(SCRIPTS) >= 10 and len(RECIPES) >= 5


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=named)
def test_every_option_has_a_text_of_its_own(path: Path) -> None:
    texts = texts_of(path)
    assert texts
    assert [option for option, text in texts.items() if not text.strip() or NO_TEXT.fullmatch(text.strip())] == []
    # of two options that are told of in one breath, each alone is told of wrongly
    in_table = Counter((option.rpartition(".")[0], text) for option, text in texts.items() if not option.endswith(".kind"))
    assert [text for text, number in in_table.items() if number > 1] == []


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_every_option_of_a_recipe_has_a_text(path: Path) -> None:
    said = subprocess.run(["bash", path, "--help"], capture_output=True, text=True, check=True, timeout=60).stdout
    texts = re.findall(r"^  (--\S+) VALUE  \(.*?\)(.*)$", said, flags=re.MULTILINE)
    assert len(texts) >= 5
    assert [option for option, text in texts if not text.strip()] == []


def shown_by(program: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What --help prints, in one line; narrow enough for one column of boxes."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        program.main(["--help"])
    return " ".join(re.sub("[│─╭╮╰╯]|-{3,}", " ", capsys.readouterr().out).split())


def test_options_that_come_from_a_class_inherited_from_are_shown_with_their_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "worse than the best by more nats are dropped; none: 20. (default: None)" in shown_by(decode, capsys, monkeypatch)


def test_factors_on_rates_of_modules_are_told_of_where_the_optimizer_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = shown_by(pretrain, capsys, monkeypatch)
    assert "A settings file alone gives [optim.lr_scales]: prefix of parameter names" in said


def test_the_heading_of_settings_of_several_kinds_tells_them_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = shown_by(pretrain, capsys, monkeypatch)
    assert re.search(r"model\.frontend options waveform: .* logmel: .* --model\.frontend\.kind", said)
    assert "waveform: of every convolution, and of the frames. logmel: of each of the three convolutions." in said
