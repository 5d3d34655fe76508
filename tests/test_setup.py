"""The shell around the package: options of recipes, what set-up accepts and refuses, and that versions are pinned. Installs nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import k2ssl

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[1]
RECIPES = sorted((REPOSITORY / "recipes").glob("*/run.sh"))
SCRIPTS = sorted(path for folder in ("recipes", "scripts") for end in ("sh", "sbatch") for path in (REPOSITORY / folder).rglob(f"*.{end}"))
SCRIPTS.append(REPOSITORY / ".ci" / "run")


def shell(*command: str | Path, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with the variables that steer our scripts unset, save those given."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("K2SSL_")}
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=60, check=False
    )


# --- recipes/common.sh


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of two stages in a tree of its own."""
    (tmp_path / "recipes" / "mine").mkdir(parents=True)
    shutil.copy(REPOSITORY / "recipes" / "common.sh", tmp_path / "recipes")
    script = tmp_path / "recipes" / "mine" / "run.sh"
    script.write_text(
        """#!/usr/bin/env bash
# What this recipe is for.
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
num_steps=20  # how long
name="a b"
parse_options "$@"
internal=1
if in_stages 0 "first"; then run echo "$num_steps" "$name"; fi
if in_stages 1 "second"; then run sh -c 'exit 3'; fi
echo "not reached"
"""
    )
    return script


def test_every_variable_before_parse_options_is_an_option(recipe: Path) -> None:
    done = shell("bash", recipe, "--num-steps", "7", "--name", "c  d", "--stop-stage", "0")
    assert done.stdout.splitlines() == ["7 c  d", "not reached"]


def test_defaults_hold_where_no_option_is_given(recipe: Path) -> None:
    assert shell("bash", recipe, "--stop-stage", "0").stdout.splitlines()[0] == "20 a b"


@pytest.mark.parametrize("options", [("--bogus", "1"), ("--internal", "2"), ("--python", "x"), ("--num-step", "1")])
def test_an_unknown_option_is_refused_with_the_known_ones(recipe: Path, options: tuple[str, str]) -> None:
    done = shell("bash", recipe, *options)
    assert done.returncode == 2
    assert done.stdout == ""
    assert (
        f"unknown option {options[0]}; known options: --num-steps --name --stage --stop-stage --ngpu --nnodes --dry-run --help"
        in done.stderr
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-steps"], "--num-steps needs a value"),
        (["--num-steps", "--dry-run"], "--num-steps needs a value"),
        (["7"], "7 is not an option"),
        (["--stage", "one"], "--stage is one, a whole number >= 0 is needed"),
        (["--stage", "2", "--stop-stage", "1"], "--stage 2 is after --stop-stage 1"),
    ],
)
def test_malformed_options_are_refused_by_name(recipe: Path, options: list[str], message: str) -> None:
    done = shell("bash", recipe, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_stages_that_do_not_exist_are_no_success(recipe: Path) -> None:
    done = shell("bash", recipe, "--stage", "500")
    assert done.returncode == 2 and "no stage lies from --stage 500 to --stop-stage 1000" in done.stderr


@pytest.mark.parametrize("options", [("--finetune-steps", "abc"), ("--seed", "-1")])
def test_the_quickstart_refuses_what_is_no_number_before_it_sets_anything_up(options: tuple[str, str], tmp_path: Path) -> None:
    done = shell("bash", REPOSITORY / "recipes/quickstart/run.sh", *options, K2SSL_VENV=str(tmp_path / "none"))
    assert done.returncode == 2 and f"{options[0]} is {options[1]}, a whole number" in done.stderr


def test_set_up_takes_no_arguments() -> None:
    asked, wrong = (shell("bash", REPOSITORY / "scripts/setup.sh", argument) for argument in ("--help", "now"))
    assert (asked.returncode, asked.stdout) == (0, "") and "K2SSL_PYTHON" in asked.stderr
    assert (wrong.returncode, wrong.stdout) == (2, "") and "takes no arguments, not: now" in wrong.stderr


def test_a_failing_stage_stops_the_recipe_and_says_where(recipe: Path) -> None:
    done = shell("bash", recipe, "--stage", "1")
    assert done.returncode == 3
    assert "not reached" not in done.stdout
    assert "run.sh: stopped at line 9, exit status 3" in done.stderr
    assert re.search(r"stage 1 \(second\) failed after 0:00:0\d, exit status 3$", done.stderr, re.MULTILINE)


def test_a_dry_run_prints_commands_that_a_shell_would_read_the_same_way_and_runs_none(recipe: Path) -> None:
    done = shell("bash", recipe, "--dry-run")
    assert done.stdout.splitlines() == ["echo 20 a\\ b ", "sh -c exit\\ 3 ", "not reached"]
    assert done.returncode == 0


def test_help_shows_the_heading_the_options_and_their_defaults(recipe: Path) -> None:
    done = shell("bash", recipe, "--help")
    assert done.returncode == 0
    assert "What this recipe is for." in done.stdout
    assert "--num-steps VALUE  (20) how long" in done.stdout
    assert '--name VALUE  ("a b")' in done.stdout
    assert "not reached" not in done.stdout


@pytest.mark.parametrize("script", RECIPES, ids=lambda path: path.parent.name)
def test_every_recipe_dry_runs_and_explains_itself(script: Path) -> None:
    dry = shell("bash", script, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.strip()
    for line in dry.stdout.splitlines():
        for word in line.split():
            if word.startswith(str(REPOSITORY)) and word.endswith((".py", ".sh")):
                assert Path(word).is_file(), f"{script} would run {word}, which does not exist"
    assert shell("bash", script, "--help").returncode == 0
    assert shell("bash", script, "--no-such-option", "1").returncode == 2
    assert (script.parent / "README.md").is_file()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_shell_script_is_valid_shell(script: Path) -> None:
    done = shell("bash", "-n", script)
    assert (done.returncode, done.stderr) == (0, "")


def test_shellcheck_has_nothing_to_say() -> None:
    beside_python = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside_python) if beside_python.is_file() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = shell(shellcheck, *SCRIPTS)  # with .shellcheckrc
    assert (done.returncode, done.stdout) == (0, "")


def test_a_stage_without_its_environment_says_which_stage_makes_it(tmp_path: Path) -> None:
    out = tmp_path / "exp"  # in exp/quickstart there may be a corpus
    done = shell("bash", REPOSITORY / "recipes/quickstart/run.sh", "--stage", "1", "--out", out, K2SSL_VENV=str(tmp_path / "none"))
    assert done.returncode == 1
    assert "stage 0 makes it" in done.stderr


# --- scripts/setup.sh, in a copy of the tree whose PATH holds made-up interpreters


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what set-up reads, with a folder `bin` that is the whole PATH beside the shell's own tools."""
    tree = tmp_path / "tree"
    (tree / "scripts").mkdir(parents=True)
    for name in ("scripts/setup.sh", "scripts/missing_packages.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tree / name)
    (tree / "bin").mkdir()
    for tool in ("bash", "cat", "dirname", "flock", "mkdir", "mv", "realpath", "rm", "sed", "sha256sum", "sh"):
        found = shutil.which(tool)
        assert found, f"{tool} is not installed"
        (tree / "bin" / tool).symlink_to(found)
    return tree


def interpreter(path: Path, minor: int, venv: bool = True, body: str = "") -> None:
    """A shell script that answers set-up's questions as Python 3.MINOR would, and writes its `-m` calls to `calls` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"""#!/bin/sh
case "$*" in
*'"%d.%d"'*) echo 3.{minor} ;;
*'sys.exit(sys.version_info'*) [ {minor} -ge 10 ] ;;
*'import ensurepip'*) {"true" if venv else "false"} ;;
-m*) echo "$@" >>"${{0%/*}}/calls"; {body or "true"} ;;
*missing_packages*) {body or "true"} ;;
esac
"""
    )
    path.chmod(0o755)


def set_up(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return shell("bash", tree / "scripts" / "setup.sh", cwd=tree, PATH=str(tree / "bin"), **environment)


CREATE = 'if [ "$2" = venv ]; then mkdir -p "$3/bin" && sed s/MAKE/NONE/ "$0" >"$3/bin/python" && /bin/chmod +x "$3/bin/python"; fi'


def test_no_python_at_all_is_said_plainly(tree: Path) -> None:
    done = set_up(tree)
    assert done.returncode == 1
    assert "no usable Python on PATH; name one with K2SSL_PYTHON" in done.stderr


def test_a_python_that_is_too_old_or_cannot_make_environments_is_refused_with_the_reason(tree: Path) -> None:
    interpreter(tree / "bin" / "python3", 9)
    interpreter(tree / "bin" / "python3.12", 12, venv=False)
    done = set_up(tree)
    assert done.returncode == 1
    assert "python3 is Python 3.9, 3.10 or newer is needed" in done.stderr
    assert "python3.12 has no venv module (Debian and Ubuntu: apt-get install python3.12-venv)" in done.stderr
    assert not (tree / ".venv").exists()


@pytest.mark.parametrize("first", [9, None])
def test_a_suitable_python_further_down_is_found(tree: Path, first: int | None) -> None:
    if first is not None:
        interpreter(tree / "bin" / "python3", first)
    interpreter(tree / "bin" / "python3.11", 11, body=CREATE)
    done = set_up(tree)
    assert done.returncode == 0, done.stderr
    assert "creating" in done.stderr
    assert "with python3.11 (Python 3.11)" in done.stderr
    assert done.stdout == f"{tree}/.venv/bin/python\n"


def test_the_second_set_up_does_nothing_and_a_change_of_versions_installs_again(tree: Path) -> None:
    interpreter(tree / "bin" / "python3", 11, body=CREATE)
    calls = tree / ".venv" / "bin" / "calls"
    assert set_up(tree).returncode == 0
    first = calls.read_text()
    assert f"-c {tree}/constraints.txt" in first
    assert f"-e {tree}[dev,quickstart]" in first

    again = set_up(tree)
    assert (again.returncode, again.stderr, again.stdout) == (0, "", f"{tree}/.venv/bin/python\n")
    assert calls.read_text() == first

    (tree / "constraints.txt").write_text("torch==2.11.0\n")
    changed = set_up(tree)
    assert changed.returncode == 0
    assert "installing" in changed.stderr
    assert "creating" not in changed.stderr
    assert len(calls.read_text()) > len(first)


@pytest.mark.parametrize("wheel", [True, False])
def test_the_extra_of_which_there_may_be_no_wheel_is_installed_where_it_can_be_and_keeps_nobody_from_the_rest(
    tree: Path, wheel: bool
) -> None:
    body = f'{CREATE}; case "$*" in *"missing_packages.py lm") false ;; *"[lm]") {"true" if wheel else "false"} ;; esac'
    interpreter(tree / "bin" / "python3", 11, body=body)
    done = set_up(tree)
    assert (done.returncode, done.stdout) == (0, f"{tree}/.venv/bin/python\n"), done.stderr
    assert ("the extra lm cannot be installed here" in done.stderr) is not wheel
    (asked,) = [line for line in (tree / ".venv/bin/calls").read_text().splitlines() if line.endswith("[lm]")]
    assert "--only-binary flashlight-text" in asked and f"-c {tree}/constraints.txt" in asked
    assert set_up(tree).stderr == "", "it is not tried every time"


def test_an_interrupted_install_is_repeated(tree: Path) -> None:
    flag = tree / "network_is_up"
    interpreter(tree / "bin" / "python3", 11, body=f'{CREATE}; [ "$2" != pip ] || [ "$3" != install ] || [ -e {flag} ]')
    assert set_up(tree).returncode != 0
    flag.touch()
    repeated = set_up(tree)
    assert repeated.returncode == 0, repeated.stderr
    assert "installing" in repeated.stderr
    assert set_up(tree).stderr == ""


def test_versions_changed_and_changed_back_around_a_failed_install_are_installed_again(tree: Path) -> None:
    interpreter(tree / "bin" / "python3", 11, body=f'{CREATE}; [ "$2" != pip ] || [ "$3" != install ] || [ ! -e {tree / "down"} ]')
    assert set_up(tree).returncode == 0
    (tree / "down").touch()
    pins = (tree / "constraints.txt").read_text()
    (tree / "constraints.txt").write_text("")
    assert set_up(tree).returncode != 0
    (tree / "down").unlink()
    (tree / "constraints.txt").write_text(pins)
    assert "installing" in set_up(tree).stderr


def test_a_copied_or_broken_environment_is_not_taken_for_a_ready_one(tree: Path, tmp_path: Path) -> None:
    interpreter(tree / "bin" / "python3", 11, body=CREATE)
    assert set_up(tree).returncode == 0
    copy = tmp_path / "copy"
    shutil.copytree(tree, copy, symlinks=True)
    assert "installing" in set_up(copy).stderr

    (tree / ".venv" / "bin" / "python").unlink()
    broken = set_up(tree)
    assert broken.returncode == 0
    assert "broken or unfinished: creating it anew" in broken.stderr


def test_two_set_ups_at_once_wait_for_each_other(tree: Path) -> None:
    interpreter(tree / "bin" / "python3", 11, body=f"{CREATE}; /bin/sleep 0.3")
    environment = {"PATH": str(tree / "bin")}
    command = ["bash", str(tree / "scripts" / "setup.sh")]
    both = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert sum("installing" in error for error in errors) == 1
    assert sum("waiting" in error for error in errors) == 1


@pytest.mark.parametrize(
    ("minor", "venv", "message"),
    [(8, True, "is Python 3.8, 3.10 or newer is needed"), (12, False, "has no venv module"), (None, True, "does not run")],
)
def test_a_named_python_that_cannot_be_used_is_refused(tree: Path, minor: int | None, venv: bool, message: str) -> None:
    named = tree / "elsewhere" / "python"
    if minor is not None:
        interpreter(named, minor, venv=venv)
    interpreter(tree / "bin" / "python3", 11, body=CREATE)
    done = set_up(tree, K2SSL_PYTHON=str(named))
    assert done.returncode == 1
    assert f"K2SSL_PYTHON: {named} {message}" in done.stderr


def test_a_named_environment_is_used_as_it_is(tree: Path) -> None:
    interpreter(tree / "mine" / "bin" / "python", 12)
    done = set_up(tree, K2SSL_VENV="mine")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{tree}/mine/bin/python\n")
    assert not (tree / "mine" / "bin" / "calls").exists()
    assert not (tree / ".venv").exists()


def test_a_named_environment_that_lacks_packages_is_told_which_and_left_alone(tree: Path) -> None:
    interpreter(tree / "mine" / "bin" / "python", 12, body="echo 'tyro>=1.0 (not installed)'; false")
    done = set_up(tree, K2SSL_VENV=str(tree / "mine"))
    assert done.returncode == 1
    assert "tyro>=1.0 (not installed)" in done.stderr
    assert f"{tree}/mine/bin/python -m pip install -c {tree}/constraints.txt -e '{tree}[dev]'" in done.stderr
    assert not (tree / "mine" / "bin" / "calls").exists()


def test_a_named_environment_that_is_absent_is_refused(tree: Path) -> None:
    done = set_up(tree, K2SSL_VENV=str(tree / "absent"))
    assert done.returncode == 1
    assert f"K2SSL_VENV: there is no environment at {tree}/absent" in done.stderr


# --- scripts/test.sh


@pytest.mark.parametrize(
    ("failing", "broken_script", "status", "told"),
    [
        ("nothing", False, 0, ""),
        ("ruff check", False, 1, "ruff check"),
        ("mypy", True, 1, "mypy,bash -n"),
        ("pytest", False, 1, ""),
    ],
)
def test_every_check_runs_and_any_failure_fails_the_whole(tree: Path, failing: str, broken_script: bool, status: int, told: str) -> None:
    for script in ("test.sh", "test_k2.sh"):
        shutil.copy(REPOSITORY / "scripts" / script, tree / "scripts")
    (tree / ".ci").mkdir()
    shutil.copy(REPOSITORY / ".ci" / "run", tree / ".ci")
    (tree / "recipes").mkdir()
    (tree / "recipes" / "run.sh").write_text("if true; then\n" if broken_script else "true\n")
    python = tree / "mine" / "bin" / "python"
    interpreter(python, 12)
    answer = f'-m*) echo "$@ [$K2SSL_FAILED_CHECKS] $OMP_NUM_THREADS"; case "$*" in "-m {failing}"*) exit 1 ;; esac ;;'
    python.write_text(re.sub(r"^-m\*\).*$", lambda _: answer, python.read_text(), flags=re.MULTILINE))
    done = shell("bash", tree / ".ci" / "run", "-k", "one test", cwd=tree, K2SSL_VENV="mine", OMP_NUM_THREADS="3", K2SSL_K2_PYTHON="none")
    assert done.returncode == status, done.stderr
    assert "k2: not run: K2SSL_K2_PYTHON is none" in done.stdout.splitlines()
    calls = [line for line in done.stdout.splitlines() if line.startswith("-m")]
    assert calls == ["-m ruff check . [] 3", "-m ruff format --check . [] 3", "-m mypy [] 3", f"-m pytest -k one test [{told}] 3"]
    assert done.stdout.splitlines()[-1] == calls[-1]


# --- scripts/missing_packages.py, pyproject.toml, constraints.txt


def test_this_environment_misses_nothing() -> None:
    done = shell(sys.executable, REPOSITORY / "scripts" / "missing_packages.py", "dev")
    assert (done.returncode, done.stdout) == (0, "")


def test_missing_and_outdated_packages_are_named(tree: Path) -> None:
    text = (tree / "pyproject.toml").read_text().replace('"tyro>=1.0"', '"tyro>=1000", "no-such-package-k2ssl"')
    (tree / "pyproject.toml").write_text(text)
    done = shell(sys.executable, tree / "scripts" / "missing_packages.py", "dev")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"tyro>=1000 \(\S+ is installed\)", lines[0])
    assert lines[1] == "no-such-package-k2ssl (not installed)"


@pytest.fixture(scope="module")
def project() -> dict[str, object]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _requirements(project: dict[str, object]) -> list[Requirement]:
    lines: list[str] = list(project["dependencies"])  # type: ignore[call-overload]
    for extra in project["optional-dependencies"].values():  # type: ignore[attr-defined]
        lines += extra
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_requirement_has_a_lower_bound_and_one_exact_version_that_meets_it(project: dict[str, object], python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "platform_system": "Linux"}
    pins: dict[str, list[Version]] = {}
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (only,) = pin.specifier
            assert only.operator == "=="
            if pin.marker is None or pin.marker.evaluate(environment):
                pins.setdefault(pin.name, []).append(Version(only.version))
    for requirement in _requirements(project):
        assert [specifier.operator for specifier in requirement.specifier] == [">="]
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert len(pins[requirement.name]) == 1
            assert requirement.specifier.contains(pins[requirement.name][0])
    assert all(len(versions) == 1 for versions in pins.values())


def test_k2_is_never_a_requirement(project: dict[str, object]) -> None:
    assert "k2" not in {requirement.name for requirement in _requirements(project)}


def test_the_version_is_written_once(project: dict[str, object]) -> None:
    assert "version" not in project
    assert "version" in project["dynamic"]  # type: ignore[operator]
    assert Version(k2ssl.__version__)


def test_continuous_integration_runs_the_test_command() -> None:
    run = REPOSITORY / ".ci" / "run"
    assert os.access(run, os.X_OK)
    assert "scripts/test.sh" in run.read_text()
