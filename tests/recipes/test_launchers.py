"""The Slurm template with made-up `srun` and `scontrol`: what it runs where, what becomes of a signal, and when the job goes back into the queue."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TEMPLATE = REPOSITORY / "recipes" / "launch" / "slurm.sbatch"

# one task a machine; like Slurm's, it ends when all tasks have, with the highest status, and passes SIGTERM on to their first processes alone
SRUN = """#!/usr/bin/env bash
set -u
printf '%s\\n' "$*" >>"$HERE/srun"
while [[ $1 == --* ]]; do
    [[ $1 != --ntasks ]] || tasks=$2
    [[ $1 == *=* ]] && shift || shift 2
done
pids=()
for ((i = 0; i < tasks; i++)); do
    SLURM_NODEID=$i "$@" &
    pids+=($!)
done
printf '%s\\n' "${pids[@]}" >"$HERE/tasks"
trap 'for pid in "${pids[@]}"; do kill -TERM "$pid"; done' TERM
highest=0
for pid in "${pids[@]}"; do
    wait "$pid"
    status=$?
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; status=$?; done
    wait "$pid"
    status=$?
    [ "$status" -le "$highest" ] || highest=$status
done
exit "$highest"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
show) printf '%s\\n' gpu-07 gpu-08 ;;
*) echo "$*" >>"$HERE/scontrol" ;;
esac
"""
# stands for run.sh with a program that writes a checkpoint when it is told to stop
RECIPE = """#!/usr/bin/env bash
echo "$MASTER_ADDR $MASTER_PORT $SLURM_NODEID $*" >>"$HERE/recipe"
setsid python3 - "$HERE" "$SLURM_NODEID" <<'END' & # a session of its own, as torchrun gives it
import os, signal, sys, time
here, machine = sys.argv[1:]
def stop(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(0.5)
    open(f"{here}/saved-{machine}", "w").close()
    sys.exit(int(os.environ.get("WHEN_STOPPED", "130")))
signal.signal(signal.SIGTERM, stop)
open(f"{here}/started-{machine}", "w").close()
ends = time.monotonic() + 100  # whatever becomes of the test
while os.environ["LENGTH"] == "long" and time.monotonic() < ends:
    time.sleep(0.05)
sys.exit(int(os.environ.get("WHEN_DONE", "0")))
END
wait $!
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two machines."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (tmp_path / "run.sh").write_text(RECIPE)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))}
    return inherited | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "HERE": str(tmp_path),
        "SLURM_JOB_ID": "412345",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "gpu-[07-08]",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "64",
        "LENGTH": "short",
    }


def job(slurm: dict[str, str], *options: str, **more: str) -> subprocess.Popen[str]:
    words = ["bash", str(TEMPLATE), *options]
    return subprocess.Popen(
        words, env=slurm | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=REPOSITORY
    )


def read(slurm: dict[str, str], name: str) -> str:
    path = Path(slurm["HERE"]) / name
    return path.read_text() if path.exists() else ""


def interrupted(slurm: dict[str, str], *options: str, tasks: bool = False, **more: str) -> tuple[int, str]:
    """Status and standard error of a job that gets SIGTERM when all programs are under way.

    Its batch shell alone does, as --signal=B: has it, or the first process of each of its tasks alone, as when its machines are taken away.
    """
    process = job(slurm, *options, LENGTH="long", **more)
    try:
        deadline = time.monotonic() + 60
        while not all((Path(slurm["HERE"]) / f"started-{machine}").exists() for machine in range(2)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        for _ in range(2):  # the time limit, and somebody who takes the machines away: a second signal cuts nothing short
            for pid in map(int, read(slurm, "tasks").split()) if tasks else [process.pid]:
                os.kill(pid, signal.SIGTERM)
            time.sleep(0.1)
        _, error = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, error


def recipe(slurm: dict[str, str]) -> str:
    return str(Path(slurm["HERE"]) / "run.sh")


def test_a_recipe_runs_on_every_machine_and_meets_at_the_first(slurm: dict[str, str]) -> None:
    process = job(slurm, recipe(slurm), "--stage", "3", "--out", "my exp")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert sorted(read(slurm, "recipe").splitlines()) == [
        f"gpu-07 32345 {machine} --nnodes 2 --ngpu 8 --stage 3 --out my exp" for machine in range(2)
    ]
    (step,) = read(slurm, "srun").splitlines()
    assert step.startswith(
        "--nodes 2 --ntasks 2 --ntasks-per-node 1 --kill-on-bad-exit=0 --wait 0 --cpus-per-task 64 bash recipes/launch/task.sh"
    )
    assert not read(slurm, "scontrol")


def test_a_signal_to_the_batch_shell_reaches_programs_on_all_machines_and_the_job_goes_back_into_the_queue(slurm: dict[str, str]) -> None:
    status, error = interrupted(slurm, recipe(slurm))
    assert (Path(slurm["HERE"]) / "saved-0").exists() and (Path(slurm["HERE"]) / "saved-1").exists()
    assert status == 130 and "interrupted, exit status 130" in error
    assert read(slurm, "scontrol") == "requeue 412345\n"


def test_a_program_that_ends_all_the_same_when_it_is_told_to_stop_is_not_repeated(slurm: dict[str, str]) -> None:
    status, _ = interrupted(slurm, recipe(slurm), WHEN_STOPPED="0")
    assert status == 0 and not read(slurm, "scontrol")


def test_a_signal_that_reaches_the_tasks_alone_puts_the_job_back_into_the_queue_too(slurm: dict[str, str]) -> None:
    process = job(slurm, recipe(slurm), WHEN_DONE="130")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted, exit status 130" in error
    assert read(slurm, "scontrol") == "requeue 412345\n"


def test_so_does_one_of_which_torchrun_makes_a_failure(slurm: dict[str, str]) -> None:
    status, error = interrupted(slurm, recipe(slurm), tasks=True, WHEN_STOPPED="1")
    assert (Path(slurm["HERE"]) / "saved-0").exists() and (Path(slurm["HERE"]) / "saved-1").exists()
    assert status == 130 and "interrupted, exit status 130" in error
    assert read(slurm, "scontrol") == "requeue 412345\n"


def test_a_task_runs_where_the_temporary_folder_of_the_login_node_is_not(slurm: dict[str, str]) -> None:
    process = job(slurm, recipe(slurm), TMPDIR="/nonexistent")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0 and len(read(slurm, "recipe").splitlines()) == 2, error


def test_a_failure_is_no_interruption(slurm: dict[str, str]) -> None:
    process = job(slurm, recipe(slurm), WHEN_DONE="1")
    process.communicate(timeout=60)
    assert process.returncode == 1 and not read(slurm, "scontrol")


@pytest.mark.parametrize(
    ("missing", "said"),
    [("SLURM_JOB_NUM_NODES", "submit this file with sbatch"), ("SLURM_GPUS_ON_NODE", "give --gpus-per-node")],
)
def test_what_slurm_does_not_set_is_named(slurm: dict[str, str], missing: str, said: str) -> None:
    del slurm[missing]
    process = job(slurm, recipe(slurm))
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0 and missing in error and said in error and not read(slurm, "srun")


def test_a_job_without_a_recipe_says_how_to_submit_one(slurm: dict[str, str]) -> None:
    process = job(slurm)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "sbatch [SBATCH OPTIONS]" in error and not read(slurm, "srun")


def test_the_scheduler_is_asked_for_a_signal_before_the_limit_for_requeue_and_one_task_a_machine() -> None:
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", TEMPLATE.read_text(), re.MULTILINE))
    assert asked["signal"] == "B:TERM@300" and asked["requeue"] == "" and asked["open-mode"] == "append"
    assert asked["ntasks-per-node"] == "1" and asked["nodes"] == "1"
