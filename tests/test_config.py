"""Settings from files and the command line: what wins, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from k2ssl.config import ConfigError, dump, load
from k2ssl.structure import from_dict


@dataclass(frozen=True)
class FlatConfig:
    """Frames as they come.

    Attributes:
        dim, rate: width in channels; frames per second,
            in Hz.
    """

    dim: int = 39
    rate: float = 100.0


@dataclass(frozen=True)
class DeepConfig:
    """Frames of a layer.

    Attributes:
        layer: which one, from 1.
        dim: width in words.
    """

    layer: int
    dim: str = "wide"


@dataclass(frozen=True)
class ClassesConfig:
    """How many.

    Attributes:
        num_classes: of the labels.
    """

    num_classes: int = 100

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"ClassesConfig: num_classes is {self.num_classes}, allowed is >= 2")


@dataclass(frozen=True)
class Shared:
    """What jobs have in common.

    Attributes:
        overwrite: replace what is there.
        quiet: say less.
    """

    quiet: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Job(Shared):
    """A job.

    Attributes:
        cuts: cut lists to read.
        seconds: of a window.
        overwrite: replace output.
        weights: name = number.
    """

    cuts: tuple[str, ...]
    features: FlatConfig | DeepConfig = field(default_factory=lambda: FlatConfig(rate=50.0))
    classes: ClassesConfig = field(default_factory=lambda: ClassesConfig(num_classes=7))
    extra: ClassesConfig | None = None
    seconds: float | None = 30.0
    overwrite: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_options_override_the_later_file_which_overrides_the_earlier(tmp_path: Path) -> None:
    first = write(tmp_path / "a.toml", 'cuts = ["a"]\nseconds = 1\noverwrite = false\n[classes]\nnum_classes = 11\n[weights]\nx = 2\n')
    second = write(tmp_path / "b.toml", "seconds = 2.0\noverwrite = true\n")
    job = load(Job, [first, second, "--seconds", "3", "--features.dim", "5"])
    assert job == Job(("a",), FlatConfig(5, 50.0), ClassesConfig(11), None, 3.0, True, {"x": 2.0})


def test_a_table_that_is_partly_given_keeps_the_defaults_of_the_field_not_of_its_class(tmp_path: Path) -> None:
    assert load(Job, ["--cuts", "a", "--features.dim", "4"]).features == FlatConfig(dim=4, rate=50.0)
    assert load(Job, [write(tmp_path / "a.toml", 'cuts = ["a"]\n[features]\ndim = 4\n')]).features == FlatConfig(dim=4, rate=50.0)


def test_another_kind_replaces_a_whole_table(tmp_path: Path) -> None:
    file = write(tmp_path / "a.toml", 'cuts = ["a"]\n[features]\nkind = "flat"\nrate = 3\n')
    assert load(Job, [file, "--features.kind", "deep", "--features.layer", "6"]).features == DeepConfig(6)
    assert load(Job, [file, "--features.kind", "flat"]).features == FlatConfig(rate=3.0)


def test_none_and_optional_tables_can_be_given() -> None:
    job = load(Job, ["--cuts", "a", "b", "--seconds", "None", "--extra.num-classes", "5"])
    assert (job.cuts, job.seconds, job.extra) == (("a", "b"), None, ClassesConfig(5))
    assert load(Job, ["--cuts", "a"]).extra is None


def test_what_dump_writes_is_read_back(tmp_path: Path) -> None:
    job = Job(("a",), DeepConfig(3), ClassesConfig(9), None, None, True, {"x": 0.5})
    assert load(Job, [write(tmp_path / "a.json", dump(job))]) == job
    assert from_dict(Job, json.loads(dump(job))) == job


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cats = 1", "cats: unknown key; known keys are classes, cuts"),
        ("[classes]\nnum_clases = 5", "classes.num_clases: unknown key; known keys are num_classes"),
        ("[classes]\nnum_classes = 1", "classes: ClassesConfig: num_classes is 1, allowed is >= 2"),
        ('[classes]\nnum_classes = "5"', "classes.num_classes: is '5' of type str"),
        ("overwrite = 0", "overwrite: is 0 of type int"),
        ('[features]\nkind = "odd"', "features.kind: is 'odd', allowed are deep, flat"),
        ("[features]\nlayer = 2", "features.layer: unknown key"),
        ("seconds = [", "Invalid value"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_path_and_the_file(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "job.toml", text if text.startswith("cuts") else f'cuts = ["a"]\n{text}\n')
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        load(Job, [file])
    assert file in str(error.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="cuts: this key is missing and has no default"):
        load(Job, [])
    with pytest.raises(ConfigError, match=r"features\.layer: this key is missing"):
        load(Job, ["--cuts", "a", "--features.kind", "deep"])


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load(Job, [str(tmp_path / "none.toml")])
    with pytest.raises(ConfigError, match="cuts: a settings file ends in"):
        load(Job, ["cuts", "--overwrite", "True"])
    with pytest.raises(ConfigError, match="a table of keys is needed"):
        load(Job, [write(tmp_path / "a.json", "[]")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--overwrite", "0"], "'True'"),
        (["--overwrite"], "Missing value"),
        (["--overwrite", "no"], "invalid choice"),
        (["--classes.num-clases", "5"], "--classes.num-classes"),
        (["--classes.num-classes", "many"], "many"),
        (["--seconds", "1", "job.toml"], "job.toml"),
    ],
)
def test_an_option_that_cannot_be_read_ends_with_status_2_and_says_why(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        load(Job, ["--cuts", "a", *options], program="job")
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert message in output.err and not output.out


def test_help_shows_every_option_with_its_text_and_its_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.toml", "seconds = 12.5")
    with pytest.raises(SystemExit) as stop:
        load(Job, [file, "--help"], program="job", description="Does the job.")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stop.value.code == 0
    for part in (
        "Does the job.",
        "--cuts [STR [STR ...]] cut lists to read. (required)",
        "--seconds {None}|FLOAT of a window. (default: 12.5)",
        "--features.kind {flat,deep} which of these settings (default: flat)",
        "frames per second, in Hz. (default: 50.0)",
        "--features.layer INT which one, from 1. (deep)",
        "flat: width in channels; frames per second, in Hz. deep: width in words. (default: 39)",
        "flat: Frames as they come. deep: Frames of a layer.",
        "A settings file alone gives [weights]: name = number.",
        "--quiet {True,False} say less. (default: False)",
        "--overwrite {True,False} replace output. (default: False)",
        "--classes.num-classes INT of the labels. (default: 7)",
    ):
        assert part in text, text
