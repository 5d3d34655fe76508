"""The Libri-Light recipe: its limited sets, which commands run.sh would run, and what it refuses; the programs have tests of their own."""

from __future__ import annotations

import importlib.util
import io
import os
import shlex
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile

from k2ssl.bin.finetune import Finetune
from k2ssl.bin.pretrain import Pretrain
from k2ssl.config import load
from k2ssl.data.cuts import read_cuts
from tests.command_lines import check

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "librilight"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"librilight_{name}", RECIPE / f"{name}.py")
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # where dataclasses look for it
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def limited(tmp_path: Path) -> Path:
    """The published layout, with two utterances in each folder of clean and one in each of other."""
    corpus = tmp_path / "librispeech_finetuning"
    for i, folder in enumerate([*(f"1h/{number}" for number in range(6)), "9h"]):
        for style, count in (("clean", 2), ("other", 1)):
            speaker = 100 + 10 * i + count
            chapter = corpus / folder / style / str(speaker) / "7"
            chapter.mkdir(parents=True)
            names = [f"{speaker}-7-{number:04d}" for number in range(count)]
            for name in names:
                soundfile.write(chapter / f"{name}.flac", np.random.default_rng(i).uniform(-0.1, 0.1, 1600 * (count + 2)), 16000)
            (chapter / f"{speaker}-7.trans.txt").write_text("".join(f"{name} WORD {name[-1]}\n" for name in names))
    return corpus


def prepare_limited(corpus: Path, out: Path, *options: str) -> int:
    return module("prepare_limited").main(["--corpus-dir", str(corpus), "--out", str(out), "--num-jobs", "1", "--quiet", *options])


def test_limited_sets_are_nested_as_published(limited: Path, tmp_path: Path) -> None:
    assert prepare_limited(limited, tmp_path / "out") == 0
    cuts = {name: {cut.id: cut for cut in read_cuts(tmp_path / f"out/cuts_{name}.jsonl.gz")} for name in ("10min", "1h", "10h")}
    assert {name: len(found) for name, found in cuts.items()} == {"10min": 3, "1h": 18, "10h": 21}
    assert cuts["10min"].keys() == {"102-7-0000", "102-7-0001", "101-7-0000"}  # the first of the six, clean and other
    assert cuts["10min"].keys() < cuts["1h"].keys() < cuts["10h"].keys()
    assert cuts["10h"].keys() - cuts["1h"].keys() == {"162-7-0000", "162-7-0001", "161-7-0000"}  # 9h
    (supervision,) = cuts["10h"]["162-7-0001"].supervisions
    assert (supervision.text, supervision.speaker, supervision.language) == ("WORD 1", "162", "English")


def test_limited_sets_can_be_chosen_and_what_is_missing_is_named(limited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (limited / "9h").rename(tmp_path / "elsewhere")
    assert prepare_limited(limited, tmp_path / "out", "--sets", "10min", "1h") == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("cuts_*")) == ["cuts_10min.jsonl.gz", "cuts_1h.jsonl.gz"]
    assert prepare_limited(limited, tmp_path / "out", "--sets", "10h") == 1
    assert "there is no 9h" in capsys.readouterr().err and not (tmp_path / "out/cuts_10h.jsonl.gz").exists()
    (limited / "1h/3").rename(tmp_path / "third")
    assert prepare_limited(limited, tmp_path / "new", "--sets", "1h") == 1  # five of six would be 50 minutes under the name 1h
    assert "there is no 1h/3" in capsys.readouterr().err
    assert prepare_limited(limited, tmp_path / "new", "--sets", "10min") == 0


# --- run.sh


def recipe(*options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "K2SSL_VENV": str(Path(sys.executable).parents[1])}
    return subprocess.run(["bash", RECIPE / "run.sh", *map(str, options)], capture_output=True, text=True, env=environment)


def commands(*options: object) -> list[list[str]]:
    done = recipe("--dry-run", *options)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def called(shown: list[list[str]], script: str) -> list[list[str]]:
    return [words for words in shown if script in "/".join(Path(words[1]).resolve().parts[-2:])]


def test_every_command_is_understood_by_its_program() -> None:
    shown = commands("--finetune-sets", "10h,100h", "--lm", "3-gram.pruned.1e-7", "--ctc-steps", 2000)
    settings = [check([relative(word) for word in words]) for words in shown]
    (job,) = [found for found in settings if isinstance(found, Pretrain)]
    assert [Path(path).name for path in job.data.cuts] == ["cuts_small.jsonl.gz", "cuts_medium.jsonl.gz", "cuts_large.jsonl.gz"]
    assert [Path(path).name for path in job.data.labels] == ["small", "medium", "large"]
    # the published length, and no checkpoints kept for good: an average is not taken
    assert (job.trainer.max_steps, job.trainer.keep.save_every, job.trainer.keep.keep_every) == (250_000, 5000, 0)
    (labels,) = called(shown, "folder/label.sh")
    assert (value(labels, "--features"), value(labels, "--num-clusters"), value(labels, "--checkpoint")) == (
        "layer9", "500", "exp/librispeech/iter2",
    )  # fmt: skip
    (fetched, _, model) = [words for words in shown if "download.py" in words[1] and "limited" not in words]
    assert fetched[-3:] == ["small", "medium", "large"]
    assert model[model.index("--lm") + 1 :] == ["3-gram.pruned.1e-7", "vocab"]  # recognition needs its list of words too


def relative(word: str) -> str:
    return str(Path(word).resolve().relative_to(ROOT)) if "/../" in word or word.startswith(str(ROOT / "recipes")) else word


def test_each_set_is_fine_tuned_by_the_recipe_of_librispeech_from_the_last_weights() -> None:
    shown = commands("--pretrain-steps", 400, "--systems", "ctc", "--finetune-sets", "10min,960h", "--stage", 4)
    inner = called(shown, "librispeech/run.sh")
    assert [(Path(value(words, "--out")).name, value(words, "--stage")) for words in inner] == [
        ("10min", "2"), ("960h", "2"), ("10min", "7"), ("960h", "7"), ("10min", "9"), ("10min", "10"), ("960h", "9"), ("960h", "10"),
        ("10min", "11"), ("960h", "11"),
    ]  # fmt: skip
    for words in inner:
        assert value(words, "--stage") == value(words, "--stop-stage") and value(words, "--systems") == "ctc"
        assert value(words, "--pretrained") == "exp/librilight/pretrain/checkpoints/step-000000400.pt"
        folder = value(words, "--out")
        sets = {"10min": "10min", "960h": "train-clean-100,train-clean-360,train-other-500"}[Path(folder).name]
        assert value(words, "--finetune-sets") == sets and value(words, "--ctc-conf") == f"{folder}/ctc.json"
        assert value(words, "--vocab-size") == {"10min": "100", "960h": "500"}[Path(folder).name]
    scripts = [Path(words[1]).name for words in shown]
    assert scripts.index("finetune_conf.py") > scripts.index("run.sh")  # what the next stages look for comes last
    made = {value(words, "--output"): Path(value(words, "--conf")).name for words in called(shown, "finetune_conf.py")}
    assert made == {
        "exp/librilight/finetune/10min/ctc.json": "10min_ctc_letters.toml",
        "exp/librilight/finetune/960h/ctc.json": "ctc_letters_960h.toml",
    }
    (limited,) = called(shown, "prepare_limited.py")
    assert (value(limited, "--sets"), value(limited, "--out")) == ("10min", "exp/librilight/finetune/10min/cuts")
    trained = [words[words.index("--parts") + 1 : words.index("--out")] for words in called(shown, "librispeech/prepare_cuts.py")]
    tests = ["dev-clean", "dev-other", "test-clean", "test-other"]
    assert trained == [tests, [*tests, "train-clean-100", "train-clean-360", "train-other-500"]]


def test_flags_after_the_dashes_reach_the_program_within_the_recipe_of_librispeech() -> None:
    shown = commands("--stage", 5, "--stop-stage", 5, "--finetune-sets", "10min", "--", "--trainer.log-every", 7)
    assert [words[-3:] for words in shown] == [["--", "--trainer.log-every", "7"]] * 2
    assert [value(words, "--stage") for words in shown] == ["7", "8"]


def test_several_machines_pre_train_through_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, setting in (("MASTER_ADDR", "host-a"), ("MASTER_PORT", "29500"), ("NODE_RANK", "3")):
        monkeypatch.setenv(name, setting)
    (words,) = commands("--stage", 3, "--stop-stage", 3, "--nnodes", 4, "--ngpu", 8)
    assert words[1:3] == ["-m", "torch.distributed.run"] and words[words.index("--nproc-per-node") + 2 :][:2] == [
        "-m",
        "k2ssl.bin.pretrain",
    ]
    assert [value(words, name) for name in ("--nnodes", "--node-rank", "--master-addr", "--nproc-per-node")] == ["4", "3", "host-a", "8"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--finetune-sets", "5h"], "--finetune-sets names 5h; 10min, 1h, 10h, 100h, 960h are known"),
        (["--systems", "rnnt"], "--systems is rnnt; ctc, transducer or both"),
        (["--parts", ""], "--parts is empty"),
        (["--pretrain-conf", "none.toml"], "--pretrain-conf: there is no file none.toml"),
        (["--pretrain-steps", "many"], "--pretrain-steps is many, a whole number"),
        (["--nnodes", "2"], "only with one stage"),
        (
            ["--finetune-sets", "10min", "--ctc-steps", "5100"],
            "--finetune-averaged is 1000 and --ctc-steps 5100: the average is taken between",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(options: list[str], said: str) -> None:
    done = recipe("--dry-run", *options)
    assert done.returncode == 2 and said in done.stderr and not done.stdout


@pytest.mark.parametrize(
    ("stage", "status", "said"),
    [
        (1, 1, "librilight/small (part of Libri-Light; --corpus-dir names one that is there) is missing; stage 0 makes it"),
        (2, 1, "cuts_small.jsonl.gz (manifest of cuts) is missing; stage 1 makes it"),
        (3, 1, "labels/small/contract.json (labels) is missing; stage 2 makes it"),
        (5, 1, "(mark of pre-training that came to its end) is missing; stage 3 makes it"),
        (9, 1, "wer.json (scores) is missing; stage 8 makes it"),
    ],
)
def test_a_stage_without_its_inputs_says_which_stage_makes_them(stage: int, status: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "exp/pretrain/checkpoints").mkdir(parents=True)
    (tmp_path / "exp/pretrain/checkpoints/step-000005000.pt").touch()  # of a run that is half done
    done = recipe("--download-dir", tmp_path, "--out", tmp_path / "exp", "--parts", "small", "--stage", stage, "--stop-stage", stage)
    assert done.returncode == status and said in done.stderr


@pytest.mark.parametrize(("stage", "option"), [(1, "--corpus-dir"), (4, "--limited-dir"), (4, "--librispeech-dir")])
def test_a_corpus_that_is_named_and_not_there_is_not_said_to_be_made_by_a_stage(stage: int, option: str, tmp_path: Path) -> None:
    done = recipe(option, tmp_path / "none", "--out", tmp_path / "exp", "--stage", stage, "--stop-stage", stage)
    assert (
        done.returncode == 1 and f"{option} is {tmp_path / 'none'}, and there is no such folder; without it, stage 0 fetches" in done.stderr
    )


def test_a_folder_without_the_parts_is_told_what_is_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "light/audio").mkdir(parents=True)
    options = ["--corpus-dir", str(tmp_path / "light"), "--parts", "small", "large", "--out", str(tmp_path / "cuts")]
    assert module("prepare_cuts").main(options) == 1
    assert "light: expected the folders small, large; found audio/" in capsys.readouterr().err


def test_a_label_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cuts").mkdir()
    (tmp_path / "cuts/cuts_small.jsonl.gz").touch()
    done = recipe("--out", tmp_path, "--parts", "small", "--stage", 2, "--stop-stage", 2, "--label-model", tmp_path / "base.pt")
    assert done.returncode == 1 and f"--label-model is {tmp_path}/base.pt, and there is no such file or folder" in done.stderr


# --- configurations for fine-tuning


@pytest.mark.parametrize(
    ("name", "base"),
    [("zipformer_large", "librilight/conf/finetune/1h_ctc_letters"), ("hubert_large", "librispeech/conf/finetune/transducer_bpe_100h")],
)
def test_a_configuration_is_fitted_to_the_pre_trained_encoder_and_else_left_alone(name: str, base: str, tmp_path: Path) -> None:
    conf, pretrained = ROOT / "recipes" / f"{base}.toml", RECIPE / "conf" / f"{name}.toml"
    output = tmp_path / "new" / "ctc.json"
    assert module("finetune_conf").main(["--conf", str(conf), "--pretrain-conf", str(pretrained), "--output", str(output)]) == 0
    asked = ["--output", "x", "--tokenizer", "t.pt", "--data.cuts", "cuts.jsonl.gz"]
    before, after = load(Finetune, [str(conf), *asked]), load(Finetune, [str(output), *asked])
    encoder = load(Pretrain, [str(pretrained), "--output", "x", "--data.cuts", "c", "--data.labels", "l"]).model
    assert after.model.encoder == encoder.encoder != before.model.encoder
    assert after.model.frontend == replace(encoder.frontend, gradient_scale=before.model.frontend.gradient_scale)
    assert after.data == replace(before.data, normalize=True) and not before.data.normalize
    assert replace(after, model=before.model, data=before.data) == before
    assert replace(after.model, frontend=before.model.frontend, encoder=before.model.encoder) == before.model


def test_a_configuration_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conf = str(RECIPE / "conf/hubert_large.toml")
    assert module("finetune_conf").main(["--conf", conf, "--pretrain-conf", conf, "--output", str(tmp_path / "ctc.json")]) == 1
    assert "head" in capsys.readouterr().err and not list(tmp_path.iterdir())


# --- download.py


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The limited sets and a part, as the server has them."""
    root = tmp_path / "server"
    root.mkdir()
    for name, mode, inside in (
        ("small.tar", "w", "small/1/b/c.flac"),
        ("librispeech_finetuning.tgz", "w:gz", "librispeech_finetuning/9h/x"),
    ):
        with tarfile.open(root / name, mode) as tar:  # type: ignore[call-overload]
            info = tarfile.TarInfo(inside)
            info.size = 5
            tar.addfile(info, io.BytesIO(b"audio"))
    serving = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(root)))
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{serving.server_port}/"
    serving.shutdown()
    thread.join()
    serving.server_close()


def test_a_part_is_fetched_and_unpacked_and_then_passed_over(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    download = module("download")
    monkeypatch.setitem(download.PARTS, "small", replace(download.PARTS["small"], num_bytes=5))
    options = ["--out", str(tmp_path / "data"), "--parts", "small", "--base-url", server, "--quiet"]
    assert download.main(options) == 0
    assert (tmp_path / "data/librilight/small/1/b/c.flac").read_bytes() == b"audio"
    assert not list((tmp_path / "data").glob("*.tar*"))
    assert download.main([*options[:-2], "http://127.0.0.1:1/", "--quiet"]) == 0  # nobody is asked
    assert "small is there already" in capsys.readouterr().out


def test_limited_sets_that_are_not_the_published_ones_are_refused(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", str(tmp_path / "data"), "--parts", "limited", "--base-url", server, "--quiet"]
    assert module("download").main(options) == 1
    assert "sha256" in capsys.readouterr().err and not (tmp_path / "data/librispeech_finetuning").exists()


def test_too_little_room_is_told_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    download = module("download")
    monkeypatch.setattr(download.need_space.__globals__["shutil"], "disk_usage", lambda _: SimpleNamespace(free=5 * 10**12))
    assert download.main(["--out", str(tmp_path), "--parts", "large", "--base-url", "http://127.0.0.1:1", "--quiet"]) == 1
    assert "large take 5681.1 GiB, 4656.6 GiB are free" in capsys.readouterr().err  # the archive beside what is unpacked from it
