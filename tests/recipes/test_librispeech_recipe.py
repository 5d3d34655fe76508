"""The LibriSpeech recipe's run.sh: which commands it would run, what it refuses, and what it does not take for done."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from k2ssl.bin.finetune import Finetune
from k2ssl.bin.pretrain import Pretrain
from tests.command_lines import check

RECIPE = Path(__file__).parents[2] / "recipes" / "librispeech"
PROGRAMS = {"train_tokenizer", "pretrain", "average", "finetune", "train_ngram", "tune_lm", "decode", "score", "report"}


def recipe(*options: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "K2SSL_VENV": str(Path(sys.executable).parents[1])}
    return subprocess.run(["bash", RECIPE / "run.sh", *map(str, options)], capture_output=True, text=True, env=environment)


def commands(*options: str | Path) -> list[list[str]]:
    done = recipe("--dry-run", *options)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def of(program: str, shown: list[list[str]]) -> list[list[str]]:
    return [words for words in shown if words[1:3] == ["-m", f"k2ssl.bin.{program}"]]


def after(word: str, words: list[str]) -> str:
    return words[words.index(word) + 1]


def between(word: str, words: list[str]) -> list[str]:
    """The values of an option that takes several."""
    rest = words[words.index(word) + 1 :]
    return rest[: next((i for i, value in enumerate(rest) if value.startswith("--")), len(rest))]


@pytest.mark.parametrize("options", [[], ["--subset", "mini", "--scratch", "True", "--device", "cpu"]], ids=["full", "mini"])
def test_every_program_understands_the_options_that_it_is_given(tmp_path: Path, options: list[str]) -> None:
    shown = commands(*options, "--out", tmp_path / "my exp")
    # of commands with the same options one is enough: reading them takes a second each
    kinds = {
        (words[1], *words[2:4], *(word for word in words if word.startswith("--"))): words for words in shown if "decode" not in words[2]
    }
    kinds |= {(after("--output", words).split("/")[-2],): words for words in of("decode", shown)}
    trained = ("k2ssl.bin.pretrain", "k2ssl.bin.finetune")
    read = [check(words) for words in kinds.values() if not options or words[2] in trained]  # the others have the same options
    assert {words[2].removeprefix("k2ssl.bin.") for words in shown if words[1] == "-m"} == PROGRAMS
    assert {Path(words[1]).name for words in shown if words[1] != "-m"} == {"download.py", "prepare_cuts.py", "label.sh"}
    first, second = [settings for settings in read if isinstance(settings, Pretrain)]
    assert [Path(folder).parts[-3] for folder in (first.data.labels[0], second.data.labels[0])] == ["mfcc", "layer"]
    assert len(first.data.cuts) == len(second.data.cuts) == (1 if options else 3)
    tuned = [settings for settings in read if isinstance(settings, Finetune)]
    assert [bool(settings.init) for settings in tuned] == ([True, False, True, False] if options else [True, True])
    assert not (tmp_path / "my exp").exists()


def test_the_whole_recipe_pretrains_on_960_hours_and_tests_on_four_sets() -> None:
    shown = commands("--out", "exp")
    assert (
        between("--parts", shown[0])[-3:] == ["train-clean-100", "train-clean-360", "train-other-500"]
        and len(between("--parts", shown[0])) == 7
    )
    cluster, validate = [words for words in shown if words[1].endswith("label.sh") and after("--out", words) == "exp/layer"]
    assert (
        after("--num-clusters", cluster) == "500" and after("--features", cluster) == "layer6" and after("--cuts", cluster).count(",") == 2
    )
    assert after("--checkpoint", cluster) == "exp/iter1/checkpoints/step-LAST.pt"  # as published, not averaged
    assert after("--stage", validate) == after("--stop-stage", validate) == "3"  # centres are not learned from it
    assert after("--cuts", validate) == "exp/cuts/cuts_dev-clean.jsonl.gz"
    for words in of("finetune", shown):
        assert after("--init", words) == "exp/iter2/checkpoints/step-LAST.pt" and "100h" in words[3]
        assert between("--data.valid-cuts", words) == ["exp/cuts/cuts_dev-clean.jsonl.gz", "exp/cuts/cuts_dev-other.jsonl.gz"]
    # two systems, two searches and one with a language model, four sets
    assert len(of("decode", shown)) == 2 * 3 * 4
    (scored,) = of("score", shown)
    assert sum(word.endswith("hypotheses.jsonl") for word in scored) == 24
    assert {str(Path(word).parent) for word in scored if word.endswith(".jsonl")} == {
        after("--output", words) for words in of("decode", shown)
    }


def test_what_is_given_stands_above_the_subset() -> None:
    shown = commands("--subset", "mini", "--test-sets", "other", "--vocab-size", "77", "--ctc-steps", "900", "--finetune-averaged", "300")
    assert between("--parts", shown[0]) == ["dev-clean-2", "other", "train-clean-5"]
    ctc, transducer = of("finetune", shown)
    assert after("--trainer.max-steps", ctc) == "900" and "--trainer.max-steps" not in transducer
    assert after("--model.vocab-size", transducer) == "77" and after("--vocab-size", of("train_tokenizer", shown)[1]) == "77"
    assert ctc[3].endswith("ctc_letters_mini.toml") and after("--init-batch-count", ctc) == "20000"
    assert after("--init", ctc).endswith("/iter2.pt") and len(of("average", shown)) == 4  # averaged weights go on
    mean = next(words for words in of("average", shown) if after("--output", words).endswith("/ctc.pt"))
    assert "step-000000600.pt" in after("--start", mean) and "step-000000900.pt" in after("--end", mean)


def test_scratch_and_pretrained_differ_in_nothing_but_where_the_encoder_begins() -> None:
    shown = of(
        "finetune", commands("--scratch", "True", "--stage", "7", "--stop-stage", "8", "--ctc-steps", "5000", "--transducer-steps", "5000")
    )
    assert len(shown) == 4
    for pretrained, scratch in ((shown[0], shown[1]), (shown[2], shown[3])):
        assert [word.replace("_scratch", "") for word in scratch] == [
            word for i, word in enumerate(pretrained) if not {"--init", "--init-batch-count"} & {word, pretrained[i - 1]}
        ]


def test_systems_searches_and_language_models_can_be_chosen() -> None:
    shown = commands("--systems", "ctc", "--ctc-methods", "ctc-greedy", "--lm", "none", "--stage", "7")
    assert len(of("finetune", shown)) == len(of("average", shown)) == 1 and len(of("decode", shown)) == 4
    assert not of("tune_lm", shown) and not of("train_ngram", shown)
    shown = commands("--lm", "3-gram.pruned.1e-7", "--download-dir", "dl", "--systems", "ctc", "--corpus-dir", "LS")
    assert between("--lm", shown[0]) == ["3-gram.pruned.1e-7", "vocab"] and "--parts" not in shown[0]
    (tuned,) = of("tune_lm", shown)
    assert after("--method", tuned) == "ctc-lexicon" and after("--search.lm", tuned) == "dl/lm/3-gram.pruned.1e-7.arpa.gz"
    assert after("--search.lexicon", tuned) == "dl/lm/librispeech-vocab.txt" and between("--word-scores", tuned) == ["0", "0.5"]
    assert between("--cuts", tuned) == ["exp/librispeech/cuts/cuts_dev-clean.jsonl.gz", "exp/librispeech/cuts/cuts_dev-other.jsonl.gz"]
    check(tuned)
    assert after("--output", tuned) == "exp/librispeech/lm/ctc.ctc-lexicon.json"  # not where scales of other searches lie
    assert sum(words[3] == after("--output", tuned) for words in of("decode", shown)) == 4
    shown = commands("--lm-text", "a.txt,b.txt", "--stage", "10", "--stop-stage", "10")
    assert [between("--text", words) for words in of("train_ngram", shown)] == [["a.txt", "b.txt"]] * 2


def test_published_labels_take_the_place_of_stages_3_to_5() -> None:
    shown = commands("--pretrained-labels", "published", "--corpus-dir", "LS", "--stop-stage", "6")
    imported = [words for words in shown if words[1].endswith("import_labels.py")]
    assert [Path(after("--output", words)).name for words in imported] == ["train-clean-100", "train-clean-360", "train-other-500"]
    (pre,) = of("pretrain", shown)
    assert between("--data.labels", pre) == [after("--output", words) for words in imported] and "--data.valid-labels" not in pre
    for words in (*imported, pre):
        check(words)
    assert not [words for words in shown if words[1].endswith("label.sh")]


def test_a_model_from_elsewhere_is_fine_tuned_and_nothing_is_pretrained(tmp_path: Path) -> None:
    shown = commands("--pretrained", "large.pt")
    assert [after("--init", words) for words in of("finetune", shown)] == ["large.pt"] * 2
    assert not of("pretrain", shown) and not [words for words in shown if words[1].endswith("label.sh")]
    for name in ("cuts/cuts_train-clean-100.jsonl.gz", "cuts/cuts_dev-clean.jsonl.gz", "cuts/cuts_dev-other.jsonl.gz", "letters.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    run = tmp_path / "my iter2"
    (run / "checkpoints").mkdir(parents=True)
    for step in (20, 100, 90):
        (run / "checkpoints" / f"step-{step:09d}.pt").touch()
    one = ("--pretrained", run, "--stage", "7", "--stop-stage", "7")
    done = recipe("--out", tmp_path, *one)
    assert done.returncode == 1 and f"{run}: a folder of training that has not come to its end" in done.stderr
    (run / "finished").touch()
    assert after("--init", commands(*one)[0]) == f"{run}/checkpoints/step-000000100.pt"
    done = recipe("--out", tmp_path, "--pretrained", tmp_path / "no.pt", "--stage", "7", "--stop-stage", "7")
    assert done.returncode == 1 and f"--pretrained is {tmp_path / 'no.pt'}, and there is no such file" in done.stderr


def test_another_number_of_classes_reaches_the_model_too() -> None:
    first, second = of("pretrain", commands("--layer-clusters", "300", "--stage", "4", "--stop-stage", "6"))
    assert after("--model.head.num-classes", second) == "300" and "--model.head.num-classes" not in first


def test_language_models_and_scales_are_not_taken_for_those_of_other_settings(tmp_path: Path) -> None:
    python, out = tmp_path / "env" / "bin" / "python", tmp_path / "exp"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    for name in ("lm/letters.arpa.gz", "ctc.pt", "lm/ctc.ctc-prefix-beam.json", "cuts/cuts_dev.jsonl.gz"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)

    def stage(*options: str) -> tuple[int, list[str], str]:
        command = ["bash", RECIPE / "run.sh", "--out", out, "--systems", "ctc", "--dev-sets", "dev", "--test-sets", "dev", "--ctc-methods"]
        command += ["ctc-greedy", "--stage", "10", "--stop-stage", "10", *options]
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env={**os.environ, "K2SSL_VENV": str(tmp_path / "env")}
        )
        return done.returncode, [line.split()[1].rpartition(".")[2] for line in done.stdout.splitlines()], done.stderr

    for name in ("cuts/cuts_dev.jsonl.gz", "ctc.pt"):
        (out / name).touch()
    assert stage()[:2] == (0, ["train_ngram", "decode", "tune_lm", "decode"])
    for i, name in enumerate(("ctc.pt", "lm/letters.arpa.gz", "lm/ctc.ctc-prefix-beam.json")):
        (out / name).touch()
        os.utime(out / name, (i, i))
    assert stage()[:2] == (0, ["decode", "decode"])
    for option, value, name in (("--lm-order", "3", "letters.arpa.gz"), ("--lm-scales", "1,2", "ctc.ctc-prefix-beam.json")):
        status, _, said = stage(option, value)
        assert status == 1 and f"{name} was made with other settings" in said
    for newer in ("ctc.pt", "lm/letters.arpa.gz"):  # the scales are of another model
        os.utime(out / newer, (5, 5))
        assert stage()[:2] == (0, ["decode", "tune_lm", "decode"])
        os.utime(out / newer, (1, 1))
    out = out.rename(tmp_path / "moved")
    assert stage()[:2] == (0, ["decode", "decode"])


def test_checkpoints_of_pretraining_may_lie_anywhere_where_no_average_is_taken_between_them() -> None:
    for options in (["--pretrain2-steps", "20100"], ["--systems", "ctc", "--transducer-steps", "5100"]):
        assert of("pretrain", commands(*options))


def test_held_out_speakers_become_the_sets_to_develop_and_to_test_on() -> None:
    shown = commands("--corpus-dir", "LS", "--pretrain-sets", "train-clean-100", "--held-out-speakers", "26,27")
    assert between("--held-out-speakers", shown[0]) == ["26", "27"] and between("--parts", shown[0]) == ["train-clean-100"]
    assert {Path(after("--cuts", words)).name for words in of("decode", shown)} == {"cuts_held-out-test.jsonl.gz"}
    assert after("--cuts", of("tune_lm", shown)[0]).endswith("cuts_held-out-dev.jsonl.gz")
    check(shown[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--subset", "tiny"], "--subset is tiny; allowed: full mini"),
        (["--systems", "rnnt"], "--systems is rnnt; ctc, transducer or both"),
        (["--systems", ""], "--systems is empty"),
        (["--lm", "2-gram"], "--lm is 2-gram; allowed: none transcripts 3-gram.pruned.1e-7"),
        (["--ctc-steps", "many"], "--ctc-steps is many, a whole number"),
        (["--ctc-conf", "none.toml"], "--ctc-conf is none.toml, and there is no such file"),
        (["--test-sets", ""], "--test-sets is empty"),
        (["--pretrained", "a.pt", "--pretrained-labels", "b"], "--pretrained and --pretrained-labels are both given"),
        (["--steps", "3"], "unknown option --steps"),
        (
            ["--ctc-steps", "5100"],
            "--finetune-averaged is 1000 and --ctc-steps 5100: the average is taken between the checkpoints of updates 5000 and 5100",
        ),
        (["--transducer-steps", "1000"], "--finetune-averaged is 1000, at least 1 and less than --transducer-steps, 1000, is needed"),
        (["--subset", "mini", "--pretrain2-steps", "210"], "--pretrain-averaged is 200 and --pretrain2-steps 210"),
        (
            ["--subset", "mini", "--pretrain-averaged", "2000"],
            "less than the number of updates of recipes/folder/conf/zipformer_logmel.toml, 1800, is",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(options: list[str], said: str) -> None:
    done = recipe(*options)
    assert done.returncode == 2 and said in done.stderr and not done.stdout


@pytest.mark.parametrize(
    ("stage", "missing", "made_by"),
    [
        ("1", "part of the corpus", 0),
        ("2", "cuts_train-clean-100.jsonl.gz", 1),
        ("3", "cuts_train-clean-100.jsonl.gz", 1),
        ("4", "mfcc/labels/train-clean-100/contract.json", 3),
        ("6", "layer/labels/train-clean-100/contract.json", 5),
        ("7", "cuts_train-clean-100.jsonl.gz", 1),
        ("9", "ctc/finished", 7),
        ("11", "hypotheses.jsonl", 10),
        ("12", "score/wer.json", 11),
    ],
)
def test_a_stage_without_its_inputs_says_which_stage_makes_them(tmp_path: Path, stage: str, missing: str, made_by: int) -> None:
    done = recipe("--out", tmp_path / "exp", "--download-dir", tmp_path / "none", "--stage", stage, "--stop-stage", stage)
    assert done.returncode == 1 and missing in done.stderr and f"stage {made_by} makes it" in done.stderr, done.stderr


def test_a_corpus_of_which_a_part_was_not_fetched_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "data/LibriSpeech/dev-clean").mkdir(parents=True)
    options = ("--pretrain-sets", "dev-clean", "--finetune-sets", "dev-other", "--dev-sets", "dev-clean", "--test-sets", "dev-clean")
    done = recipe("--out", tmp_path / "exp", "--download-dir", tmp_path / "data", *options, "--stage", "1", "--stop-stage", "1")
    assert done.returncode == 1 and not (tmp_path / "exp/cuts").exists()
    assert "LibriSpeech/dev-other (part of the corpus; --corpus-dir names one that is there) is missing; stage 0 makes it" in done.stderr


def test_a_corpus_that_is_named_and_not_there_is_not_said_to_be_made_by_a_stage(tmp_path: Path) -> None:
    done = recipe("--out", tmp_path / "exp", "--corpus-dir", tmp_path / "none", "--stage", "1", "--stop-stage", "1")
    assert done.returncode == 1 and f"--corpus-dir is {tmp_path / 'none'}, and there is no such folder" in done.stderr
