"""The whole quickstart, small: from a synthesiser to tables, with real programs and no network."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from k2ssl.report.card import read_card

SCRIPT = Path(__file__).parents[2] / "recipes" / "quickstart" / "run.sh"
SMALL = {
    "train-minutes": "2",
    "dev-minutes": "0.6",
    "test-minutes": "0.3",
    "pretrain1-steps": "20",
    "pretrain2-steps": "20",
    "finetune-steps": "20",
    "averaged": "10",
    "scratch": "False",
    "quiet": "True",
}
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")


def quickstart(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    small = [word for name, value in SMALL.items() for word in (f"--{name}", value)]
    environment = {**os.environ, **NO_NETWORK, "PIP_NO_INDEX": "1", "K2SSL_VENV": sys.prefix}
    command = ["bash", str(SCRIPT), "--out", str(out), *small, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished quickstart and what it printed."""
    pytest.importorskip("espeakng_loader", reason="the speech synthesiser of the quickstart is not installed")
    out = tmp_path_factory.mktemp("quickstart") / "exp"
    done = quickstart(out)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    shutil.copy(out / "logs" / "stages.tsv", out.parent)  # a later test gives a stage again, which adds a line
    return out, done.stdout


def test_every_stage_ends_and_says_how_long_it_took(finished: tuple[Path, str]) -> None:
    out, _ = finished
    with open(out.parent / "stages.tsv") as file:
        stages = list(csv.DictReader(file, delimiter="\t"))
    assert [int(row["stage"]) for row in stages] == list(range(13))
    assert {row["exit_status"] for row in stages} == {"0"}


def test_the_tables_hold_every_system_and_search_with_the_scores_counted(finished: tuple[Path, str]) -> None:
    out, printed = finished
    with open(out / "report" / "wer.csv") as file:
        rows = list(csv.DictReader(file))
    scored = {Path(entry["path"]).parts[-4:-2] for entry in json.loads((out / "score" / "wer.json").read_text())["files"]}
    assert scored == {
        *(("ctc", search) for search in ("ctc-greedy", "ctc-prefix-beam", "ctc-prefix-beam-lm")),
        *(("transducer", search) for search in ("greedy", "modified-beam", "modified-beam-lm")),
    }
    assert len(rows) == len(scored)
    assert "ctc" in printed and f"{out / 'report' / 'report.md'} and report.html" in printed
    assert (out / "report" / "loss_curves.png").stat().st_size > 10_000


def test_every_run_leaves_a_card_with_what_it_cost_and_where_it_comes_from(finished: tuple[Path, str]) -> None:
    out, _ = finished
    cards = {name: read_card(out / name / "card.json") for name in ("iter1", "iter2", "ctc", "transducer")}
    assert [card.updates for card in cards.values()] == [20] * 4
    assert all(card.command is not None and card.usage.cpu_hours + card.usage.gpu_hours > 0 for card in cards.values())
    assert [len(card.results) for card in cards.values()] == [0, 0, 3, 3]
    begins = {name: None if card.init is None else Path(card.init.path).name for name, card in cards.items()}
    assert begins == {"iter1": None, "iter2": None, "ctc": "iter2.pt", "transducer": "iter2.pt"}
    assert [Path(label.path).parts[-3] for name in ("iter1", "iter2") for label in cards[name].labels] == ["mfcc", "layer"]


def test_a_stage_again_finds_its_work_done(finished: tuple[Path, str]) -> None:
    out, _ = finished
    before = (out / "decode" / "ctc" / "ctc-greedy" / "test-clean-quick" / "hypotheses.jsonl").stat().st_mtime_ns
    again = quickstart(out, "--stage", "9", "--stop-stage", "9")
    assert again.returncode == 0 and again.stderr.count("is there already") == 2
    assert (out / "decode" / "ctc" / "ctc-greedy" / "test-clean-quick" / "hypotheses.jsonl").stat().st_mtime_ns == before


def test_half_a_corpus_is_not_taken_and_its_stage_is_one_of_this_recipe(tmp_path: Path) -> None:
    (tmp_path / "exp" / "corpus" / "train-clean-quick").mkdir(parents=True)
    done = quickstart(tmp_path / "exp", "--stage", "1", "--stop-stage", "1")
    assert done.returncode == 1 and "corpus.json (mark of a finished corpus) is missing; stage 0 makes it" in done.stderr
    assert "recipes/quickstart/run.sh --stage 0" in done.stderr


def test_a_stage_without_its_inputs_names_the_stage_that_makes_them(tmp_path: Path) -> None:
    done = quickstart(tmp_path / "none", "--stage", "7", "--stop-stage", "7")
    assert done.returncode == 1 and "cuts_train-clean-quick.jsonl.gz" in done.stderr and "stage 1 makes it" in done.stderr


@pytest.mark.parametrize("steps", ["pretrain1-steps", "pretrain2-steps", "finetune-steps"])
def test_steps_over_whose_end_no_average_can_be_taken_are_refused_before_anything_runs(tmp_path: Path, steps: str) -> None:
    done = quickstart(tmp_path / "exp", f"--{steps}", "25", "--averaged", "12")
    assert done.returncode == 2 and not (tmp_path / "exp").exists()
    assert f"--averaged is 12 and --{steps} 25: the average is taken between the checkpoints of updates 24 and 25" in done.stderr
