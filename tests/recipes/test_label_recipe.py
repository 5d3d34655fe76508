"""The folder recipe's label.sh: from a folder of sounds to labels and a report in one command, idempotent, and what it refuses."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

SCRIPT = Path(__file__).parents[2] / "recipes" / "folder" / "label.sh"


def label(
    *options: str | Path, python: str = str(Path(sys.executable).parents[1]), folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "K2SSL_VENV": python, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", SCRIPT, *map(str, options)], capture_output=True, text=True, env=environment, cwd=folder)


def test_one_command_leads_from_sounds_to_a_report_and_the_next_skips_what_is_there(tmp_path: Path) -> None:
    audio = tmp_path / "my sounds"
    audio.mkdir()
    draw = np.random.default_rng(0)
    for i in range(4):
        soundfile.write(audio / f"{i}.flac", 0.1 * draw.standard_normal(16000 + 3000 * i), 16000)
    options = ["--audio-dir", audio, "--out", tmp_path / "exp", "--num-clusters", "4", "--max-batches", "2", "--num-workers", "0"]
    options += ["--device", "cpu", "--quiet", "True"]
    done = label(*options)
    assert done.returncode == 0, done.stderr
    assert "hours" in done.stdout and "perplexity" in done.stdout
    labels = tmp_path / "exp" / "labels" / "my sounds"
    assert json.loads((labels / "quality.json").read_text())["usage"]["num_utterances"] == 4
    results = [tmp_path / "exp" / "cuts" / "cuts_my sounds.jsonl.gz", tmp_path / "exp" / "kmeans.pt"]
    before = [path.stat().st_mtime_ns for path in results]
    again = label(*options, "--stop-stage", "2")
    assert again.returncode == 0, again.stderr
    assert "kmeans.pt is there already" in again.stdout
    other = label(*options, "--num-clusters", "3", "--stop-stage", "2")
    assert other.returncode != 0 and "kmeans.num_clusters is 4 there, 3 here" in other.stderr
    (tmp_path / "elsewhere" / "my sounds").mkdir(parents=True)
    moved = label("--audio-dir", tmp_path / "elsewhere" / "my sounds", *options[2:], "--stop-stage", "1")
    assert moved.returncode != 0 and "exists, made with source" in moved.stderr
    assert [path.stat().st_mtime_ns for path in results] == before


def test_a_folder_whose_name_begins_with_a_dash_is_no_option(tmp_path: Path) -> None:
    (tmp_path / "-x").mkdir()
    soundfile.write(tmp_path / "-x" / "a.flac", np.zeros(16000), 16000)
    for given in ("./-x", "-x"):
        done = label("--audio-dir", given, "--out", given.strip("./-"), "--stop-stage", "1", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "x" / "cuts" / "cuts_-x.jsonl.gz").is_file()
        assert (tmp_path / "x" / "cuts" / "summary_-x.json").is_file()


def test_a_dry_run_shows_every_command_and_does_nothing(tmp_path: Path) -> None:
    options = [
        "--audio-dir",
        "data/one,data/two",
        "--out",
        tmp_path / "exp",
        "--dry-run",
        "--num-processes",
        "8",
        "--previous",
        "old/labels",
    ]
    done = label(*options, "--features", "layer6", "--checkpoint", "model.pt")
    assert done.returncode == 0, done.stderr
    commands = done.stdout.splitlines()
    assert [command.split()[1].split("/")[-1] for command in commands[:2]] == ["prepare_cuts.py"] * 2
    assert len(commands) == 5 and all("--nproc-per-node 8 -m k2ssl.bin." in command for command in commands[2:])
    assert "--features.checkpoint model.pt --features.layer 6" in commands[2] and "cuts_one.jsonl.gz" in commands[2]
    assert "cuts_two.jsonl.gz" in commands[2]
    assert "--checkpoint model.pt --compare.previous old/labels/two" in commands[4]
    assert not (tmp_path / "exp").exists()


def test_the_share_that_may_be_skipped_is_told_to_both_programs(tmp_path: Path) -> None:
    for given, told in (([], "0.01"), (["--max-skipped", "0.1"], "0.1"), (["--max-skipped", ".25"], ".25"), (["--max-skipped", "1"], "1")):
        done = label("--audio-dir", "a", "--out", tmp_path / "exp", "--dry-run", *given)
        assert done.returncode == 0, done.stderr
        shown = [shlex.split(line) for line in done.stdout.splitlines()]
        programs = [(words[2], words[words.index("--max-skipped") + 1]) for words in shown if "--max-skipped" in words]
        assert programs == [("k2ssl.bin.fit_kmeans", told), ("k2ssl.bin.label", told)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--audio-dir is missing"),
        (["--audio-dir", "a", "--max-skipped", "10%"], "--max-skipped is 10%, a share from 0 to 1 is needed"),
        (["--audio-dir", "a", "--max-skipped", "1.5"], "--max-skipped is 1.5, a share from 0 to 1 is needed"),
        (["--audio-dir", "a/x,b/x"], "two folders called x"),
        (["--audio-dir", "./a,../recordings/a"], "two folders called a"),
        (["--audio-dir", "/"], "--audio-dir is /, which has no name"),
        (["--audio-dir", "a", "--cuts", "cuts_a.jsonl.gz"], "--audio-dir and --cuts are both given"),
        (["--cuts", "train.jsonl.gz"], "--cuts is train.jsonl.gz, a file named cuts_SPLIT.jsonl.gz"),
        (["--cuts", "x/cuts_a.jsonl.gz,y/cuts_a.jsonl.gz"], "two manifests called cuts_a.jsonl.gz"),
        (["--audio-dir", "x/talk one,y/talk one"], "two folders called talk one"),
        (["--audio-dir", "a", "--s.ed", "3"], "unknown option --s.ed"),
        (["--audio-dir", "a", "--ngpu", "08"], "--ngpu is 08, a whole number >= 0 is needed (without zeros before it)"),
        (["--audio-dir", "a", "--features", "layer6"], "needs --checkpoint"),
        (["--audio-dir", "a", "--features", "fbank"], "mfcc, layerN and stackN are known"),
        (["--audio-dir", "a", "--checkpoint", "m.pt"], "of no use with --features mfcc"),
        (["--audio-dir", "a", "--clusters", "5"], "unknown option --clusters"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(options: list[str], message: str) -> None:
    done = label(*options, "--dry-run")
    assert done.returncode == 2
    assert message in done.stderr and not done.stdout


@pytest.mark.parametrize("given", ["a,b", "x/a,b,c", "other,deep,er/a"])
def test_a_folder_with_a_comma_in_its_path_is_refused_and_named(tmp_path: Path, given: str) -> None:
    made = {"a,b": "a,b", "x/a,b,c": "b,c", "other,deep,er/a": "deep,er/a"}[given]
    (tmp_path / made).mkdir(parents=True)
    done = label("--audio-dir", given, "--out", "exp", "--dry-run", folder=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert f"--audio-dir is {given}: there is a folder {made}, but a comma separates folders here; rename it" in done.stderr


def test_folders_that_are_there_are_taken_although_another_has_both_names(tmp_path: Path) -> None:
    for name in ("a", "b", "a,b"):
        (tmp_path / name).mkdir()
    done = label("--audio-dir", "a,b", "--out", "exp", "--dry-run", folder=tmp_path)
    assert done.returncode == 0 and "--split=a " in done.stdout and "--split=b " in done.stdout


@pytest.mark.parametrize(("given", "split"), [(".", "here"), ("./", "here"), ("..", "there"), ("../here/", "here"), ("link", "link")])
def test_a_split_has_the_name_of_its_folder_however_that_is_given(tmp_path: Path, given: str, split: str) -> None:
    folder = tmp_path / "there" / "here"
    folder.mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path)
    done = label("--audio-dir", given, "--out", tmp_path / "exp", "--dry-run", folder=folder)
    assert done.returncode == 0, done.stderr
    assert f"--split={split} " in done.stdout and f"/cuts_{split}.jsonl.gz" in done.stdout and f"/labels/{split} " in done.stdout


def test_a_folder_may_have_the_name_of_a_word_in_anothers_name(tmp_path: Path) -> None:
    done = label("--audio-dir", "x/talk one,y/one,z/talk", "--out", tmp_path / "exp", "--dry-run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(f"labels/{split}" in done.stdout for split in ("one", "talk", "talk\\ one"))


def test_manifests_that_are_there_take_the_place_of_folders(tmp_path: Path) -> None:
    manifests = [tmp_path / "one" / "cuts_train-x.jsonl.gz", tmp_path / "two" / "cuts_dev.jsonl.gz"]
    done = label("--cuts", ",".join(map(str, manifests)), "--out", tmp_path / "exp", "--dry-run")
    assert done.returncode == 0, done.stderr
    kmeans, *stores = [shlex.split(line) for line in done.stdout.splitlines()]
    assert kmeans[kmeans.index("--cuts") + 1 :][:2] == [str(path) for path in manifests]
    found = [(words[words.index("--cuts") + 1], words[words.index("--output") + 1]) for words in stores]
    assert found == [(str(path), str(tmp_path / "exp/labels" / split)) for path, split in zip(manifests, ("train-x", "dev"), strict=True)]


def test_a_stage_without_its_inputs_names_the_stage_that_makes_them(tmp_path: Path) -> None:
    for stage, missing in ((2, "cuts_a.jsonl.gz (manifest of the audio)"), (3, "kmeans.pt (k-means centres)")):
        done = label("--audio-dir", "a", "--out", tmp_path, "--stage", str(stage))
        assert done.returncode == 1 and f"{missing} is missing; stage {stage - 1} makes it" in done.stderr


def test_without_an_environment_it_says_what_to_do(tmp_path: Path) -> None:
    done = label("--audio-dir", tmp_path, "--out", tmp_path / "exp", python=str(tmp_path / "none"))
    assert done.returncode == 1
    assert "run scripts/setup.sh first" in done.stderr and not (tmp_path / "exp").exists()
