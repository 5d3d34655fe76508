"""What the project does on a device that is not the CPU, on machines that have none; see other_device/apart.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
# tests of the programs, whose results must be the same there: every search, times, windows, scales, labels, both kinds of training
PROGRAMS = {
    "decode": ("every_method_reads_what_was_said", "a_language_model_over_tokens_takes_part"),
    "align": ("words_are_found_where_they_were_said",),
    "transcribe": ("a_long_recording_has_the_words",),
    "tune_lm": ("the_best_combination_is_written",),
    "train_lm": ("perplexity_of_held_out_text_falls",),
    "clustering_programs": ("labels_of_a_layer_are_those", "every_frame_of_every_cut", "a_stack_is_clustered"),
    "pretrain": ("checkpoints_hold_a_model", "run_trains_validates"),
    "finetune": ("raw_or_averaged",),
}


def _pytest(*arguments: str, plugin: str) -> str:
    paths = [str(REPOSITORY), str(REPOSITORY / "tests/other_device")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "pytest", "-p", plugin, "-p", "no:cacheprovider", "-q", *arguments]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _passed(output: str) -> int:
    found = re.search(r"(\d+) passed", output)
    return int(found[1]) if found else 0


def test_training_steps_there_are_those_of_the_cpu_and_wait_for_no_more_than_ctc() -> None:
    assert _passed(_pytest("tests/other_device/checks.py", plugin="apart")) == 15


def test_programs_do_there_what_they_do_on_the_cpu() -> None:
    files = [f"tests/bin/test_{program}.py" for program in PROGRAMS]
    names = " or ".join(name for names in PROGRAMS.values() for name in names)
    assert _passed(_pytest(*files, "-k", names, plugin="programs_there")) >= 20
