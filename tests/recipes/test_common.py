"""recipes/common.sh and recipes/stages.sh: logs, times, flags after `--`, several processes and machines, signals, what stages need."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from k2ssl.train.trainer import TrainerConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parents[2] / "recipes"

HEAD = """#!/usr/bin/env bash
# Made up.
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
. "$(dirname "${BASH_SOURCE[0]}")/../stages.sh"
out=exp  # results
size=full  # full or mini
steps=20  # updates
averaged=10  # of the last ones
seed=42
device=auto
num_workers=1
quiet=False
parse_options "$@"
"""


def _hears() -> None:
    """Undo that signals are ignored where the tests run in the background, or behind `nohup`."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Made:
    """A recipe of one's own, beside copies of common.sh and stages.sh, whose python is a shell script that prints its arguments."""

    def __init__(self, folder: Path, body: str) -> None:
        self.folder, self.out = folder, folder / "my exp"
        (folder / "recipes" / "mine").mkdir(parents=True)
        for name in ("common.sh", "stages.sh"):
            shutil.copy(RECIPES / name, folder / "recipes")
        self.script = folder / "recipes" / "mine" / "run.sh"
        self.script.write_text(HEAD + body)
        self.python = folder / "env" / "bin" / "python"
        self.python.parent.mkdir(parents=True)
        self.program('printf "%s|" "$@"; echo')

    def program(self, body: str) -> None:
        self.python.write_text(f"#!/bin/sh\n{body}\n")
        self.python.chmod(0o755)

    def start(self, *options: str | Path, **environment: str) -> subprocess.Popen[str]:
        inherited = {
            key: value for key, value in os.environ.items() if key not in ("NODE_RANK", "SLURM_NODEID", "MASTER_ADDR", "MASTER_PORT")
        }
        return subprocess.Popen(
            ["bash", str(self.script), "--out", str(self.out), *map(str, options)],
            env={**inherited, "K2SSL_VENV": str(self.folder / "env"), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_hears,
        )

    def run(self, *options: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*options, **environment)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def table(self) -> list[list[str]]:
        return [line.split("\t") for line in (self.out / "logs" / "stages.tsv").read_text().splitlines()]


TWO_STAGES = """
if in_stages 1 "first"; then run sh -c 'echo to stdout; echo to stderr >&2'; fi
if in_stages 12 "second one"; then
    echo of the recipe itself
    run_extra sh -c 'exit "${1:-0}"' sh
fi
"""


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path, TWO_STAGES)


# --- logs and times


def test_what_programs_print_goes_where_it_went_and_into_the_stage_log_too(made: Made) -> None:
    done = made.run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["to stdout", "of the recipe itself"]
    assert "\nto stderr\n" in done.stderr and "to stdout\n" not in done.stderr
    written = (made.out / "logs" / "stage-01.log").read_text()
    assert "to stdout\n" in written and "to stderr\n" in written and "sh -c exit" not in written
    assert "sh -c exit" in (made.out / "logs" / "stage-12.log").read_text()
    made.run("--stop-stage", "1")
    assert (made.out / "logs" / "stage-01.log").read_text().count("to stdout\n") == 2


def test_each_stage_leaves_its_time_and_exit_status(made: Made) -> None:
    assert made.run().returncode == 0
    assert made.run("--stage", "12", "--stop-stage", "12", "--", "7").returncode == 7
    head, *rows = made.table()
    assert head == ["stage", "title", "start", "seconds", "exit_status"]
    assert [(row[0], row[1], row[4]) for row in rows] == [("1", "first", "0"), ("12", "second one", "0"), ("12", "second one", "7")]
    for row in rows:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", row[2]) and 0 <= int(row[3]) < 60


def test_ends_of_stages_and_of_the_whole_are_told_and_a_failure_names_the_log(made: Made) -> None:
    done = made.run()
    assert re.search(r"stage 1 \(first\) done in 0:00:\d\d, exit status 0$", done.stderr, re.MULTILINE)
    assert re.search(r"all done in 0:00:\d\d$", done.stderr, re.MULTILINE)
    failed = made.run("--stage", "12", "--stop-stage", "12", "--", "7")
    told = rf"stage 12 \(second one\) failed after 0:00:\d\d, exit status 7; see {re.escape(str(made.out))}/logs/stage-12.log$"
    assert re.search(told, failed.stderr, re.MULTILINE) and "all done" not in failed.stderr
    assert "failed after" in (made.out / "logs" / "stage-12.log").read_text()


def test_a_command_can_be_copied_from_the_log_as_from_a_dry_run(tmp_path: Path) -> None:
    made = Made(tmp_path, 'if in_stages 1 "first"; then run ls "$out" "it\'s; $(printf "two\\nlines")"; fi\n')
    shown = made.run("--dry-run").stdout.splitlines()
    made.run()
    logged = re.findall(r"^[0-9-]+ [0-9:]+ (ls .*)$", (made.out / "logs" / "stage-01.log").read_text(), re.MULTILINE)
    assert logged == shown
    words = subprocess.run(["bash", "-c", f"printf '%s|' {logged[0]}"], capture_output=True, text=True, check=True).stdout
    assert words == f"ls|{made.out}|it's; two\nlines|"
    other = made.run("--nnodes", "2", "--stage", "1", "--stop-stage", "1", MASTER_ADDR="host", MASTER_PORT="1", NODE_RANK="1")
    assert f"left to the first machine: {shown[0]}\n" in other.stderr


def test_help_says_nothing_of_an_end(made: Made) -> None:
    done = made.run("--help")
    assert done.returncode == 0 and "--stop-stage VALUE" in done.stdout and done.stderr == ""


def test_a_dry_run_writes_nothing(made: Made) -> None:
    done = made.run("--dry-run")
    assert done.returncode == 0 and "sh -c " in done.stdout and "done in" not in done.stderr
    assert not made.out.exists()


# --- flags after --


def test_flags_after_two_dashes_reach_the_program_of_the_stage_and_no_option(made: Made) -> None:
    done = made.run("--stage", "12", "--stop-stage", "12", "--dry-run", "--", "--steps", "a b", "--", "-x")
    assert shlex.split(done.stdout.splitlines()[-1])[-4:] == ["--steps", "a b", "--", "-x"]


@pytest.mark.parametrize("options", [[], ["--stage", "1"], ["--stage", "1", "--stop-stage", "12"], ["--stop-stage", "12"]])
def test_flags_for_more_than_one_stage_are_refused(made: Made, options: list[str]) -> None:
    done = made.run(*options, "--", "--lr", "1")
    assert (done.returncode, done.stdout) == (2, "") and "flags after --: only with one stage" in done.stderr


def test_a_stage_that_takes_no_flags_says_so(made: Made) -> None:
    done = made.run("--stage", "1", "--stop-stage", "1", "--", "--lr", "1")
    assert done.returncode == 2 and "stage 1 (first) has no program that took the flags after --: --lr 1" in done.stderr
    assert made.table()[-1][4] == "2"


# --- processes and machines


@pytest.fixture
def launching(tmp_path: Path) -> Made:
    return Made(
        tmp_path, 'if in_stages 4 "train"; then launch k2ssl.bin.x --a 1; run echo "alone"; fi\nif in_stages 5 "more"; then run true; fi\n'
    )


ONE = ("--stage", "4", "--stop-stage", "4")


def test_one_process_is_a_plain_program_and_several_are_launched(launching: Made) -> None:
    assert launching.run(*ONE, "--", "--b", "2").stdout == "-m|k2ssl.bin.x|--a|1|--b|2|\nalone\n"
    assert launching.run("--ngpu", "3").stdout.splitlines()[0] == (
        "-m|torch.distributed.run|--standalone|--nproc-per-node|3|-m|k2ssl.bin.x|--a|1|"
    )


@pytest.mark.parametrize("variable", ["NODE_RANK", "SLURM_NODEID"])
def test_on_several_machines_each_launches_and_the_first_does_the_rest(launching: Made, variable: str) -> None:
    machines = {"MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    shown = [launching.run(*ONE, "--nnodes", "2", "--ngpu", "4", **machines, **{variable: rank}) for rank in "01"]
    for rank, done in enumerate(shown):
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0] == (
            f"-m|torch.distributed.run|--nnodes|2|--node-rank|{rank}|--master-addr|host|--master-port|29500|--nproc-per-node|4|-m|k2ssl.bin.x|--a|1|"
        )
    assert [done.stdout.count("alone") for done in shown] == [1, 0]
    assert sorted(path.name for path in (launching.out / "logs").iterdir()) == ["stage-04.log", "stage-04.machine1.log", "stages.tsv"]
    assert len(launching.table()) == 2


@pytest.mark.parametrize(
    ("options", "environment", "told"),
    [
        (["--nnodes", "2"], {}, "--nnodes 2: only with one stage"),
        ([*ONE, "--nnodes", "2"], {}, "the environment variable MASTER_ADDR is missing"),
        ([*ONE, "--nnodes", "2"], {"MASTER_ADDR": "a"}, "MASTER_PORT is missing"),
        ([*ONE, "--nnodes", "2"], {"MASTER_ADDR": "a", "MASTER_PORT": "1"}, "NODE_RANK or SLURM_NODEID is missing"),
        ([*ONE, "--nnodes", "2"], {"MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "2"}, "is 2, a whole number from 0 to 1"),
        (["--ngpu", "0"], {}, "--ngpu is 0, at least 1"),
        (["--nnodes", "0"], {}, "--nnodes is 0, at least 1"),
        (["--ngpu", "two"], {}, "--ngpu is two, a whole number"),
    ],
)
def test_machines_that_cannot_be_are_refused(launching: Made, options: list[str], environment: dict[str, str], told: str) -> None:
    done = launching.run(*options, **environment)
    assert (done.returncode, done.stdout) == (2, "") and told in done.stderr


# --- signals

WAITS = """trap 'echo saved; exit 130' HEARD
echo started
for _ in 1 2 3 4 5 6 7 8 9 10; do sleep 1 & wait $!; done
echo not stopped"""


@pytest.mark.parametrize(
    ("number", "whole_group", "heard"),
    [(signal.SIGTERM, True, "TERM"), (signal.SIGINT, True, "INT"), (signal.SIGTERM, False, "TERM"), (signal.SIGHUP, False, "TERM")],
)
def test_a_signal_to_the_group_or_to_the_shell_alone_lets_the_program_save_and_ends_the_recipe(
    launching: Made, number: signal.Signals, whole_group: bool, heard: str
) -> None:
    launching.program(WAITS.replace("HEARD", heard))
    process = launching.start()
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    (os.killpg if whole_group else os.kill)(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == "saved\n"
    assert "stage 4 (train) interrupted after" in stderr and "the same command goes on" in stderr
    assert "saved" in (launching.out / "logs" / "stage-04.log").read_text()
    assert [row[4] for row in launching.table()[1:]] == ["130"]


def test_a_program_that_ends_well_in_spite_of_a_signal_does_not_lead_on_to_the_next_stage(launching: Made) -> None:
    launching.program("trap '' TERM; echo started; sleep 1; echo finished")
    process = launching.start()
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "finished\n"), stderr
    assert "stage 5" not in stderr


@pytest.mark.parametrize(("told", "status", "named"), [(True, 130, "interrupted after"), (False, 1, "failed after")])
def test_a_program_that_fails_when_its_task_was_told_to_stop_is_interrupted(
    launching: Made, tmp_path: Path, told: bool, status: int, named: str
) -> None:
    launching.program("exit 1")  # what torchrun makes of 130
    if told:
        (tmp_path / "stopped").touch()
    done = launching.run(K2SSL_STOPPED=str(tmp_path / "stopped"))
    assert done.returncode == status and f"stage 4 (train) {named}" in done.stderr
    assert [row[4] for row in launching.table()[1:]] == [str(status)]


def test_nothing_more_is_begun_once_the_task_was_told_to_stop(launching: Made, tmp_path: Path) -> None:
    launching.program('echo "$@"; touch "$K2SSL_STOPPED"')
    done = launching.run(K2SSL_STOPPED=str(tmp_path / "stopped"))
    assert done.returncode == 130 and done.stdout.count("\n") == 1, "the first program ended well, the second was not begun"
    assert "stage 4 (train) interrupted after" in done.stderr and "stage 5" not in done.stderr


def test_where_the_shell_must_ignore_term_torchrun_must_too(launching: Made) -> None:
    command = f"trap '' TERM; exec bash {shlex.quote(str(launching.script))} --ngpu 2 --dry-run"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "K2SSL_VENV": "/none"})
    assert "torch.distributed.run --signals-to-handle SIGINT\\,SIGHUP\\,SIGQUIT --standalone" in done.stdout, done.stderr


# --- what stages need, and options


def test_a_missing_input_names_the_stage_that_makes_it_with_the_options_given(tmp_path: Path) -> None:
    made = Made(tmp_path, 'if in_stages 3 "use"; then need_file "$out/a.pt" "model" 2; run echo used; fi')
    done = made.run("--stage", "3", "--size", "a b", "--stop-stage", "4")
    assert (done.returncode, done.stdout) == (1, "")
    path = made.out / "a.pt"
    assert f"{path} (model) is missing; stage 2 makes it: bash " in done.stderr
    command = shlex.split(done.stderr.partition("makes it: ")[2].splitlines()[0])
    assert command == ["bash", str(made.script), "--stage", "2", "--stop-stage", "2", "--out", str(made.out), "--size", "a b"]
    assert made.table()[-1][4] == "1"
    assert made.run("--dry-run").returncode == 0
    path.touch()
    assert made.run().stdout == "used\n"


def test_an_absent_environment_and_an_absent_corpus_are_told(tmp_path: Path) -> None:
    made = Made(tmp_path, 'need_environment\nif in_stages 3 "use"; then need_corpus size "$size" "ask for it"; run echo used; fi')
    absent = made.run(K2SSL_VENV=str(tmp_path / "none"))
    assert absent.returncode == 1 and "none/bin/python: run scripts/setup.sh first" in absent.stderr
    done = made.run("--size", tmp_path / "none")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"--size is {tmp_path / 'none'}, and there is no such folder; ask for it\n" in done.stderr
    assert made.run("--size", tmp_path / "none", "--dry-run").returncode == 0
    assert made.run("--size", tmp_path).stdout == "used\n"


def test_presets_set_what_is_not_given_and_values_are_held_against_a_list(tmp_path: Path) -> None:
    made = Made(
        tmp_path,
        'need_one_of size full mini\n[ "$size" = full ] || { unless_given steps 3; unless_given averaged 1; }\n'
        'if in_stages 1 "show"; then run echo "$steps" "$averaged"; fi',
    )
    assert made.run().stdout == "20 10\n"
    assert made.run("--size", "mini").stdout == "3 1\n"
    assert made.run("--size", "mini", "--steps", "20").stdout == "20 1\n"
    done = made.run("--size", "huge")
    assert done.returncode == 2 and "--size is huge; allowed: full mini" in done.stderr


# --- recipes/stages.sh


@pytest.fixture
def staged(tmp_path: Path) -> Made:
    return Made(
        tmp_path,
        """
if in_stages 1 "tokenizer"; then make_tokenizer "$out/letters.pt" --cuts a; fi
if in_stages 2 "labels"; then make_labels "$out/mfcc" --audio-dir a; fi
if in_stages 3 "train"; then pretrain run "a b.toml,c.toml" "$steps" "$averaged" --data.cuts a; fi
if in_stages 4 "average"; then average "$out/mean.pt" run "$steps" "$averaged"; fi
""",
    )


def only(number: int) -> tuple[str, ...]:
    return "--stage", str(number), "--stop-stage", str(number)


def test_a_tokenizer_that_is_there_is_not_made_again(staged: Made) -> None:
    first = staged.run(*only(1))
    assert first.stdout.startswith("-m|k2ssl.bin.train_tokenizer|--output|")
    (staged.out / "letters.pt").touch()
    again = staged.run(*only(1))
    assert (again.returncode, again.stdout) == (0, "") and "letters.pt is there already" in again.stderr


def test_a_file_that_was_made_with_other_flags_is_refused_and_the_same_flags_find_it(staged: Made) -> None:
    flags = ("--", "--kind", "bpe 'x'")
    assert staged.run(*only(1), *flags).returncode == 0
    (staged.out / "letters.pt").touch()
    other = staged.run(*only(1))
    assert (other.returncode, other.stdout) == (1, "")
    assert f"{staged.out}/letters.pt was made with other settings ('--cuts' 'a' '--kind'" in other.stderr
    assert "not with '--cuts' 'a'; remove it, or give another --out" in other.stderr
    same = staged.run(*only(1), *flags)
    assert (same.returncode, same.stdout) == (0, "") and "letters.pt is there already" in same.stderr


def test_an_empty_folder_for_everything_is_refused(staged: Made) -> None:
    done = staged.run("--out", "", "--dry-run")
    assert (done.returncode, done.stdout) == (2, "") and "--out is empty, a folder is needed" in done.stderr


def test_training_keeps_the_checkpoint_behind_which_the_average_begins(staged: Made) -> None:
    words = staged.run(*only(3), "--steps", "45").stdout.split("|")
    assert words[2:4] == ["a b.toml", "c.toml"]
    options = dict(zip(words[4:-1:2], words[5::2], strict=True))
    expected = {"--trainer.max-steps": "45", "--trainer.keep.save-every": "10", "--trainer.keep.keep-every": "40", "--data.cuts": "a"}
    assert {name: options[name] for name in expected} == expected and options["--output"] == f"{staged.out}/run"
    open_end = staged.run(*only(3), "--steps", "").stdout
    assert "--trainer.max-steps" not in open_end and "--trainer.keep.keep-every|10|" in open_end
    refused = staged.run(*only(3), "--averaged", "20")
    assert refused.returncode == 2 and "averaged over the last 20 of 20 updates" in refused.stderr


@pytest.fixture
def averaging(tmp_path: Path) -> Made:
    (tmp_path / "ten.toml").write_text("[trainer]  # average_period = 7\naverage_period = 1_0  # not 20\nmax_steps = 0\n")
    (tmp_path / "long.json").write_text('{"trainer": {\n  "max_steps": 105,\n  "average_period": 10\n}}')
    (tmp_path / "never.toml").write_text("[trainer]\naverage_period = 0\n")
    return Made(tmp_path, 'need_average steps averaged "$size"\nif in_stages 3 "train"; then run_extra true; run echo trains; fi')


@pytest.mark.parametrize(
    ("steps", "averaged", "conf", "last", "next_one"),
    [
        ("30", "20", "twenty", "20 and 30", 40),  # nothing is added between the two
        ("2010", "250", "twenty", "2000 and 2010", 2020),
        ("30", "10", "twenty", "20 and 30", 40),
        ("38", "19", "twenty", "19 and 38", 40),  # nor before the first
        ("15", "8", "ten", "8 and 15", 20),
        ("", "26", "long", "104 and 105", 110),
    ],
)
def test_a_number_of_updates_over_whose_end_no_average_can_be_taken_is_refused_before_training(
    averaging: Made, steps: str, averaged: str, conf: str, last: str, next_one: int
) -> None:
    (averaging.folder / "twenty.toml").write_text("[model]\n[trainer]\nmax_epochs = 3\naverage_period = 20")
    path = averaging.folder / f"{conf}.{'json' if conf == 'long' else 'toml'}"
    options = ["--averaged", averaged, "--size", path]
    done = averaging.run("--steps", steps, *options)
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1
    assert f"--averaged is {averaged} and " in done.stderr and f"between the checkpoints of updates {last}, which must lie" in done.stderr
    assert f"multiples of {20 if conf == 'twenty' else 10} (trainer.average_period of " in done.stderr
    assert f"the next number of updates with which they do is {next_one};" in done.stderr
    assert averaging.run("--steps", str(next_one), *options, "--dry-run").stdout == "true \necho trains \n"
    assert averaging.run("--steps", str(next_one - 1), *options, "--dry-run").returncode == 2


def test_numbers_of_updates_with_an_average_are_accepted(averaging: Made) -> None:
    ten, long, never = (averaging.folder / name for name in ("ten.toml", "long.json", "never.toml"))
    for options in (
        ("--steps", "20", "--averaged", "10", "--size", ten),
        ("--steps", "20", "--averaged", "5", "--size", ten),
        ("--steps", "", "--averaged", "10", "--size", ten),  # its end is not known
        ("--steps", "", "--averaged", "30", "--size", long),
        ("--steps", "15", "--averaged", "8", "--size", averaging.folder / "not there yet.json"),
        (*("--steps", "30", "--averaged", "20", "--size", f"{never},{ten}", *only(3)), "--", "--trainer.average-period", "5"),
        (*("--steps", "32", "--averaged", "20", "--size", ten, *only(3)), "--", "--trainer.average_period=1"),
    ):
        done = averaging.run(*options)
        assert (done.returncode, done.stdout) == (0, "trains\n"), done.stderr
    for options, said in (
        (("--steps", "20", "--averaged", "0", "--size", ten), "--averaged is 0, at least 1 and less than --steps, 20, is needed"),
        (("--steps", "0", "--averaged", "1", "--size", ten), "--averaged is 1, at least 1 and less than --steps, 0, is needed"),
        (("--steps", "", "--averaged", "200", "--size", long), "--averaged is 200, at least 1 and less than the number of updates of "),
        (("--size", f"{ten},{never}"), "trainer.average_period is 0 in "),
    ):
        done = averaging.run(*options)
        assert done.returncode == 2 and said in done.stderr


def test_settings_are_read_from_every_configuration_as_the_programs_read_them(tmp_path: Path) -> None:
    files = sorted(RECIPES.glob("*/conf/**/*.toml"))
    shown = 'echo "$(_setting_of "$conf" average_period 200) $(_setting_of "$conf" max_steps 0)"'
    made = Made(tmp_path, f'while IFS= read -r conf; do {shown}; done <"$size"\nif in_stages 1 "none"; then :; fi')
    (tmp_path / "files").write_text("".join(f"{path}\n" for path in files))
    defaults = TrainerConfig()
    expected = []
    for path in files:
        trainer = tomllib.loads(path.read_text()).get("trainer", {})
        found = (trainer.get(name, getattr(defaults, name)) for name in ("average_period", "max_steps"))
        expected.append(" ".join(map(str, found)))
    assert len(files) > 20 and made.run("--size", tmp_path / "files").stdout.splitlines() == expected


def test_a_range_that_is_shorter_than_asked_for_is_said_before_training(staged: Made) -> None:
    assert "run: the average will be over the last 5 updates, not 10, since checkpoints" in staged.run(*only(3), "--steps", "45").stderr
    assert "the average will be" not in staged.run(*only(3), "--steps", "50").stderr


def test_an_average_begins_earlier_where_a_run_of_unknown_length_ends_right_after_a_checkpoint(staged: Made) -> None:
    run = staged.out / "run"
    (run / "checkpoints").mkdir(parents=True)
    for step in (10, 20, 30, 40, 45):
        (run / "checkpoints" / f"step-{step:09d}.pt").touch()
    (run / "finished").touch()

    def begins(period: int) -> int:
        (run / "settings.json").write_text(f'{{\n  "trainer": {{\n    "average_period": {period}\n  }}\n}}\n')
        words = staged.run(*only(4), "--steps", "").stdout.split("|")
        return int(words[words.index("--start") + 1].removesuffix(".pt")[-9:])

    assert [begins(period) for period in (5, 10, 20)] == [40, 30, 30]
    assert begins(30) == 40  # there is none that would do


def test_the_mean_is_taken_of_finished_runs_only_and_again_when_they_have_gone_on(staged: Made) -> None:
    checkpoints = staged.out / "run" / "checkpoints"
    staged.program(f'mkdir -p "{checkpoints}"; exit 3')
    assert staged.run(*only(3)).returncode == 3
    for step in (30, 40, 45):
        (checkpoints / f"step-{step:09d}.pt").touch()
    for steps in ("45", ""):
        unfinished = staged.run(*only(4), "--steps", steps)
        assert unfinished.returncode == 1 and "has not come to its end" in unfinished.stderr
    staged.program('printf "%s|" "$@"')
    for measures in (("--estimate", "True"), ("--estimate=True",), ("--diagnose=profile", "--seed", "1")):
        assert staged.run(*only(3), "--", *measures).returncode == 0
        assert staged.run(*only(4), "--steps", "45").returncode == 1
    assert staged.run(*only(3)).returncode == 0
    for steps in ("45", ""):
        shown = staged.run(*only(4), "--steps", steps).stdout
        assert f"--start|{checkpoints}/step-000000040.pt|--end|{checkpoints}/step-000000045.pt|--output|{staged.out}/mean.pt|" in shown
    mean = staged.out / "mean.pt"
    mean.touch()
    os.utime(checkpoints / "step-000000045.pt", (0, 0))
    assert staged.run(*only(4), "--steps", "45").stdout == ""
    os.utime(mean, (0, 0))
    (checkpoints / "step-000000045.pt").touch()
    assert staged.run(*only(4), "--steps", "45").stdout.endswith("|--overwrite|True|")
    (mean.parent / "mean.pt").touch()
    assert staged.run(*only(4), "--steps", "45").stdout == ""
    wider = staged.run(*only(4), "--steps", "45", "--averaged", "15").stdout  # other updates than those that it was taken over
    assert "step-000000030.pt|--end" in wider and wider.endswith("|--overwrite|True|")
    assert staged.run(*only(3), "--", "--estimate", "True").returncode == 0 and (staged.out / "run" / "finished").exists()
    assert staged.run(*only(4), "--steps", "60").returncode == 1
    staged.program("exit 3")
    assert staged.run(*only(3)).returncode == 3
    assert staged.run(*only(4), "--steps", "45").returncode == 1


def test_labels_on_several_machines_are_made_part_by_part(staged: Made) -> None:
    machines = {"MASTER_ADDR": "host", "MASTER_PORT": "29500", "NODE_RANK": "1"}
    shown = staged.run(*only(2), "--dry-run", "--nnodes", "2", **machines, **{}).stdout.splitlines()
    assert [line.split()[-6:] for line in shown] == [["--nnodes", "2", "--stage", part, "--stop-stage", part] for part in "123"]
    assert len(staged.run(*only(2), "--dry-run", "--ngpu", "2").stdout.splitlines()) == 1
