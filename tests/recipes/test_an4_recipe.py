"""The AN4 recipe's run.sh: which commands it would run, and what it refuses; its programs have tests of their own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from k2ssl.bin.decode import Decode
from k2ssl.bin.decode_lattice import OPTIONS as ON_K2
from k2ssl.bin.decode_methods import Method
from k2ssl.bin.pretrain import Pretrain
from k2ssl.bin.score import ScoreJob
from k2ssl.bin.train_ngram import TrainNgram
from tests.command_lines import check

SCRIPT = Path(__file__).parents[2] / "recipes" / "an4" / "run.sh"
PROGRAMS = {"train_tokenizer", "pretrain", "average", "finetune", "decode", "score", "report"}


def recipe(*options: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "K2SSL_VENV": str(Path(sys.executable).parents[1])}
    return subprocess.run(["bash", SCRIPT, *map(str, options)], capture_output=True, text=True, env=environment)


def commands(*options: str | Path) -> list[list[str]]:
    done = recipe("--dry-run", *options)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_every_program_understands_the_options_that_it_is_given(tmp_path: Path) -> None:
    shown = commands("--corpus-dir", "an4", "--audio-dir", "some/books,more", "--out", tmp_path / "my exp", "--device", "cpu")
    read = [check(words) for words in shown]
    assert {words[2] for words in shown if words[1] == "-m"} == {f"k2ssl.bin.{name}" for name in PROGRAMS}
    (pre,) = [settings for settings in read if isinstance(settings, Pretrain)]
    assert [Path(path).name for path in pre.data.labels] == ["an4_clstk", "books", "more"]
    assert len(pre.data.cuts) == 3 and pre.device == "cpu"


def test_all_searches_are_those_of_both_kinds_of_heads_with_the_models_that_they_read(tmp_path: Path) -> None:
    shown = commands("--corpus-dir", "an4", "--out", tmp_path, "--searches", "all", "--stage", "6", "--stop-stage", "7")
    read = [check(words) for words in shown]
    letters, words = (settings for settings in read if isinstance(settings, TrainNgram))
    assert (letters.order, letters.tokenizer, words.order, words.tokenizer) == (6, str(tmp_path / "letters.pt"), 3, None)
    decoded = [settings for settings in read if isinstance(settings, Decode)]
    assert {settings.method for settings in decoded} == set(get_args(Method)) - set(ON_K2)
    models = {(one.method, Path(one.search.lm or "none").name, one.search.lm_scale) for one in decoded}
    assert models == {
        *((method, "none", None) for method in ("ctc-greedy", "ctc-prefix-beam", "ctc-lexicon", "greedy", "modified-beam")),
        *((method, "letters.arpa", None) for method in ("ctc-prefix-beam", "modified-beam")),
        *(("ctc-lexicon-free", "letters.arpa", 0.3), ("ctc-lexicon", "words.arpa", None), ("ctc-lexicon", "an4.lm", None)),
    }
    (scored,) = [settings for settings in read if isinstance(settings, ScoreJob)]
    assert len(decoded) == 2 * (7 + 5) == len(set(scored.hypotheses))
    assert {str(Path(one.output) / "hypotheses.jsonl") for one in decoded} == set(scored.hypotheses)


def test_scratch_and_pretrained_differ_in_nothing_but_where_the_encoder_begins() -> None:
    shown = commands("--corpus-dir", "an4", "--out", "exp", "--stage", "5", "--stop-stage", "5")
    assert len(shown) == 4
    for scratch, pretrained in ((shown[0], shown[1]), (shown[2], shown[3])):
        assert [word.replace("_scratch", "_pretrained") for word in scratch] == [
            word for i, word in enumerate(pretrained) if not {"--init", "--init-batch-count"} & {word, pretrained[i - 1]}
        ]
        assert pretrained[pretrained.index("--init") + 1] == "exp/pretrained.pt"


def test_weights_are_averaged_between_the_last_two_checkpoints(tmp_path: Path) -> None:
    options = ["--corpus-dir", "an4", "--out", tmp_path, "--pretrain-steps", "500", "--pretrain-averaged", "100"]
    options += ["--finetune-steps", "450", "--finetune-averaged", "200"]
    shown = commands(*options)
    (mean,) = [words for words in shown if "k2ssl.bin.average" in words]
    assert "step-000000400.pt" in mean[mean.index("--start") + 1] and "step-000000500.pt" in mean[mean.index("--end") + 1]
    decoded = [words for words in shown if "k2ssl.bin.decode" in words]
    assert len(decoded) == 6
    for words in decoded:
        assert words[3].endswith("step-000000450.pt") and words[words.index("--after") + 1].endswith("step-000000400.pt")


def test_systems_with_few_transcripts_have_names_of_their_own_and_see_no_others(tmp_path: Path) -> None:
    options = ["--corpus-dir", "an4", "--out", tmp_path, "--searches", "all"]
    every, few = commands(*options), commands(*options, "--transcribed-minutes", "10")
    (drawn,) = [words for words in few if words[1].endswith("prepare_limited.py")]
    limited, whole = str(tmp_path / "cuts/cuts_train_10min.jsonl.gz"), str(tmp_path / "cuts/cuts_train.jsonl.gz")
    assert drawn[2:] == ["--cuts", whole, "--minutes", "10", "--output", limited]
    few.remove(drawn)
    assert [[part.replace("_10min", "") for part in words] for words in few] == every
    assert {words[2] for words in few if limited in words} == {"k2ssl.bin.finetune", "k2ssl.bin.train_ngram"}
    written = [{words[words.index("--output") + 1] for words in shown if "--output" in words} for shown in (few, every)]
    assert {Path(path).name for path in set.intersection(*written)} == {"letters.pt", "pretrain", "pretrained.pt", "tables"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--corpus-dir"], "--corpus-dir needs a value"),
        (
            ["--corpus-dir", "x", "--pretrain-averaged", "1800"],
            "--pretrain-averaged is 1800, at least 1 and less than --pretrain-steps, 1800",
        ),
        (["--corpus-dir", "x", "--finetune-averaged", "0"], "--finetune-averaged is 0, at least 1"),
        (
            ["--corpus-dir", "x", "--pretrain-steps", "30", "--pretrain-averaged", "10"],
            "multiples of 20 (trainer.average_period of recipes/folder/conf/zipformer_logmel.toml), from 20 on; the next number of updates with which they do is 40;",
        ),
        (
            ["--corpus-dir", "x", "--finetune-steps", "2010"],
            "--finetune-averaged is 250 and --finetune-steps 2010: the average is taken between",
        ),
        (
            ["--corpus-dir", "x", "--pretrain-steps", "30", "--pretrain-averaged", "20", "--dry-run"],
            "between the checkpoints of updates 20 and 30,",
        ),
        (["--corpus-dir", "x", "--finetune-steps", "many"], "--finetune-steps is many, a whole number"),
        (["--corpus-dir", "x", "--transcribed-minutes", "2.5"], "--transcribed-minutes is 2.5, a whole number"),
        (["--corpus-dir", "x", "--steps", "4"], "unknown option --steps"),
        (["--corpus-dir", "x,y"], "--corpus-dir is x,y, and a comma separates folders of audio"),
        (["--corpus-dir", "x", "--searches", "beam"], "--searches is beam; allowed: greedy all"),
    ],
)
def test_options_that_cannot_be_are_refused(options: list[str], said: str) -> None:
    done = recipe(*options)
    assert done.returncode == 2 and said in done.stderr and not done.stdout


def test_a_missing_corpus_is_named_with_where_it_comes_from(tmp_path: Path) -> None:
    done = recipe("--corpus-dir", tmp_path / "none", "--out", tmp_path / "exp", "--stop-stage", "1")
    assert done.returncode == 1 and f"--corpus-dir is {tmp_path / 'none'}, and there is no such folder; Carnegie Mellon" in done.stderr


def test_a_stage_without_its_inputs_names_the_stage_that_makes_them(tmp_path: Path) -> None:
    for stage, missing, maker in ((4, "contract.json (frame labels)", 3), (5, "letters.pt (tokenizer)", 2), (8, "wer.json (scores)", 7)):
        done = recipe("--out", tmp_path, "--stage", str(stage))
        assert done.returncode == 1 and f"{missing} is missing; stage {maker} makes it" in done.stderr
