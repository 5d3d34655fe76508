"""The program train_lm: how well it learns, that it goes on exactly, what it refuses; and its model in k2ssl.bin.decode."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from k2ssl.bin import decode, train_lm
from k2ssl.bin.decode_methods import load_lm
from k2ssl.bin.folder_lock import alone_in
from k2ssl.data.tokenizer import LetterTokenizer, NormalizationConfig
from k2ssl.decode.lm import NgramLm
from k2ssl.models.language_model import LanguageModel
from k2ssl.train.checkpoint import load_checkpoint
from k2ssl.train.ledger import total

SMALL = ["--dim", "16", "--num-layers", "1", "--dropout", "0", "--tokens-per-update", "128", "--optim.lr", "0.03"]
SMALL += ["--schedule.warmup-batches", "5", "--device", "cpu", "--quiet", "True", "--log-every", "20"]
TOKENIZER = LetterTokenizer("abc", NormalizationConfig())


def sentence(draw: random.Random) -> str:
    """2 or 4 letters, every other one an a, and the others alike."""
    first = draw.choice("abc")
    return f"a{first}" * draw.choice([1, 2])


# what nobody can predict: the first free letter, one of three, and after it whether the sentence ends halfway
NATS_PER_SENTENCE = math.log(3) + math.log(2)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    for name, number in (("train.txt", 600), ("check.txt", 150)):
        Path(name).write_text("\n".join(sentence(draw) for _ in range(number)))
    TOKENIZER.save("tokenizer.pt")
    return tmp_path


def run(*options: object, output: str = "lm") -> int:
    files = ["--text", "train.txt", "--tokenizer", "tokenizer.pt", "--output", output]
    return train_lm.main([*files, *SMALL, *map(str, options)])


def newest(output: str = "lm") -> Path:
    return max(Path(output, "checkpoints").glob("step-*.pt"))


def test_the_perplexity_of_held_out_text_falls_to_what_nobody_can_predict(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--check-text", "check.txt", "--max-epochs", 9, "--valid-every", 40) == 0
    out = capsys.readouterr().out
    lengths = [len(line) for line in Path("check.txt").read_text().split()]
    targets = sum(lengths) + len(lengths)
    assert "text: 600 sentences with " in out and f"text to check: 150 sentences with {sum(lengths)} tokens" in out
    found = re.search(r"perplexity of the text to check: (\S+) over (\S+) tokens and ends", out)
    assert found is not None and int(found[2].replace(",", "")) == targets
    limit = math.exp(len(lengths) * NATS_PER_SENTENCE / targets)
    assert 0.97 * limit < float(found[1]) < 1.06 * limit
    lines = [json.loads(line) for line in Path("lm/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "valid"]
    assert len(losses) > 2 and losses[0] > 1.05 * losses[-1] and math.exp(losses[-1]) == pytest.approx(float(found[1]), abs=0.006)
    used = total("lm")
    assert used.sessions == {"done": 1} and list(used.by_program) == ["train_lm"] and used.steps == lines[-1]["step"]


def test_a_run_goes_on_exactly_and_a_finished_one_is_left_alone(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--dropout", 0.3, "--keep.save-every", 5)
    assert run(*options, "--max-steps", 30, output="whole") == 0
    for steps in (7, 25, 30):
        shutil.move("train.txt", f"text{steps}.txt")  # the name may change, the text may not
        Path("train.txt").write_bytes(Path(f"text{steps}.txt").read_bytes())
        assert run(*options, "--max-steps", steps, output="parts") == 0
    assert "going on from parts/checkpoints/step-000000025.pt at step 25" in capsys.readouterr().out
    whole, parts = load_checkpoint(newest("whole")), load_checkpoint(newest("parts"))
    assert whole["progress"]["epoch"] > 0 and whole["step"] == parts["step"] == 30
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())
    assert whole["loader"] == parts["loader"]


def test_a_checkpoint_says_its_size_and_its_tokenizer(corpus: Path) -> None:
    assert run("--max-steps", 2) == 0
    content = load_checkpoint(newest())
    assert content["config"] == {"kind": "language-model", "vocab_size": 6, "dim": 16, "num_layers": 1, "dropout": 0.0}
    assert content["tokenizer_sha256"] == TOKENIZER.sha256
    lm = load_lm(str(newest()), TOKENIZER)
    assert isinstance(lm, LanguageModel) and lm.vocab_size == TOKENIZER.vocab_size
    again = train_lm.main(["lm/settings.json", "--output", "again"])
    weights = load_checkpoint(newest("again"))["model"]
    assert again == 0 and all(torch.equal(value, content["model"][name]) for name, value in weights.items())


def test_the_end_names_the_last_checkpoint_and_the_best(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--max-steps", 4) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"last checkpoint: {newest()}"
    assert run("--max-steps", 4, "--check-text", "check.txt", output="checked") == 0
    last, best = capsys.readouterr().out.splitlines()[-2:]
    assert last == f"last checkpoint: {newest('checked')}" and best.startswith(f"best checkpoint: {newest('checked')} (")
    assert run("--max-steps", 4) == 0
    assert "nothing was left to do: the run had come to its end before" in capsys.readouterr().out


def test_a_run_that_ends_while_its_rate_still_rises_is_warned_of(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run("--max-steps", 5) == 0
    said = "schedule.warmup_batches is 5, and the run has 5 updates: it ends before the learning rate is what optim.lr says"
    assert said in caplog.text
    caplog.clear()
    assert run("--max-steps", 6) == 0
    assert "warmup_batches" not in caplog.text
    few = ["--max-epochs", 1, "--tokens-per-update", 16384, "--schedule.warmup-batches", 500]
    assert run(*few, output="other") == 0
    assert "schedule.warmup_batches is 500, and the run has 1 updates" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--dim", 8), r"of a run with other settings: dim is 16 .*8.*Choose another output folder$"),
        (("--text", "check.txt"), r"lineage\.text_sha256 is "),
        (("--tokenizer", "other.pt"), r"lineage\.tokenizer_sha256 is "),
        (("--check-text", "check.txt"), r"lineage\.check_sha256 is "),
    ],
)
def test_another_run_is_not_gone_on_with(
    corpus: Path, capsys: pytest.CaptureFixture[str], change: tuple[object, ...], message: str
) -> None:
    LetterTokenizer("bac", NormalizationConfig()).save("other.pt")
    assert run("--max-steps", 2) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("lm").rglob("*") if path.is_file() and path.name != ".lock"}
    capsys.readouterr()
    assert run("--max-steps", 4, *change) == 2
    error = capsys.readouterr().err
    assert re.search(message, error.strip()) and "accept" not in error
    assert before == {path: path.stat().st_mtime_ns for path in Path("lm").rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text",), "text and cuts name no file"),
        (("--tokens-per-update", 1), "tokens_per_update is 1, a whole number >= 2 is needed"),
        (("--tokens-per-update", 2), "the text has no sentence of at most 1 tokens"),
        (("--dropout", 1), "dropout is 1.0, allowed is 0 <= dropout < 1"),
        (("--max-epochs", 0), "max_epochs is 0"),
        (("--seed", -1), "seed is -1"),
        (("--seed", 2**63), "TrainLm: seed is 9223372036854775808, a whole number from 0 to 2^63 - 1 is needed"),
        (("--check-text", "none.txt"), "check_text: none.txt: there is no such file"),
        (("--check-text", "blank.txt"), "there is no sentence in blank.txt; at least one is needed"),
        (("--text", "tokenizer.pt"), "tokenizer.pt, line 1: text must be UTF-8"),
        (("--tokenizer", "train.txt"), "train.txt: a k2ssl-tokenizer file is needed"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    corpus: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...], message: str
) -> None:
    Path("blank.txt").write_text("\n\n")
    assert run(*options) == 2
    assert message in capsys.readouterr().err and not Path("lm").exists()


def test_a_folder_that_cannot_be_had_is_refused_as_other_settings_are(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    assert run(output="file/lm") == 2 and "cannot write into this folder" in capsys.readouterr().err
    with alone_in(Path("lm")):
        assert run() == 2 and "another process works in this folder" in capsys.readouterr().err


def test_several_processes_are_refused(corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert run() == 2
    assert "2 processes were started, this program runs in one" in capsys.readouterr().err and not Path("lm").exists()


def test_long_sentences_are_left_out_of_training_and_told_of_but_not_out_of_the_check(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("train.txt", "a") as file:
        file.write("\n" + "ab" * 200 + "\nxyz")
    Path("long.txt").write_text("ab" * 200)
    assert run("--max-steps", 1, "--check-text", "long.txt") == 0
    out = capsys.readouterr().out
    assert "602 sentences" in out and "3 characters that the tokenizer does not have; 1 sentences longer than tokens_per_update" in out
    assert "over 401 tokens and ends" in out


# --- decoding with it ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tones_lm(reader: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model that has read nothing but words without D."""
    folder = tmp_path_factory.mktemp("tones")
    draw = random.Random(0)
    words = ["".join(draw.choices("ABC", k=2)) for _ in range(400)]
    (folder / "text.txt").write_text("\n".join(" ".join(words[i : i + 2]) for i in range(0, 400, 2)))
    reader_tokenizer(reader).save(folder / "tokenizer.pt")
    files = ["--text", folder / "text.txt", "--tokenizer", folder / "tokenizer.pt", "--output", folder / "lm", "--max-steps", "40"]
    assert train_lm.main([*map(str, files), *SMALL]) == 0
    return newest(str(folder / "lm"))


def reader_tokenizer(reader: Any) -> Any:
    from k2ssl.data.tokenizer import tokenizer_from_dict

    return tokenizer_from_dict(load_checkpoint(reader.checkpoint)["tokenizer"])


def decoded(reader: Any, output: Path, method: str, *options: str) -> int:
    files = [str(reader.checkpoint), "--cuts", str(reader.words.cuts("valid")), "--output", str(output), "--method", method]
    return decode.main([*files, "--loader.num-workers", "0", "--device", "cpu", "--quiet", "True", *options])


def number_of_d(output: Path) -> int:
    return sum(json.loads(line)["hyp"].count("D") for line in (output / "hypotheses.jsonl").read_text().splitlines())


@pytest.mark.parametrize("method", ["ctc-prefix-beam", "modified-beam"])
def test_a_checkpoint_takes_part_in_decoding_whatever_its_name(reader: Any, tones_lm: Path, tmp_path: Path, method: str) -> None:
    shutil.copy(tones_lm, tmp_path / "lm.arpa")
    assert decoded(reader, tmp_path / "none", method) == 0
    assert decoded(reader, tmp_path / "with", method, "--search.lm", str(tmp_path / "lm.arpa"), "--search.lm-scale", "2") == 0
    assert number_of_d(tmp_path / "with") < 0.7 * number_of_d(tmp_path / "none")
    record = json.loads((tmp_path / "with/decode.json").read_text())
    assert list(record["what"]["files"]) == ["search.lm"]


def test_an_arpa_file_is_one_whatever_its_name(reader: Any, tmp_path: Path) -> None:
    tokenizer = reader_tokenizer(reader)
    words = [f"-1\t{word}" for word in ("<s>", "</s>", *tokenizer.symbols[1:])]
    text = "\n".join(["\\data\\", f"ngram 1={len(words)}", "", "\\1-grams:", *words, "", "\\end\\", ""])
    (tmp_path / "step-000000001.pt").write_text(text)
    assert isinstance(load_lm(str(tmp_path / "step-000000001.pt"), tokenizer), NgramLm)


def test_models_that_do_not_fit_are_refused_before_decoding(
    reader: Any, tones_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = dict(torch.load(tones_lm, weights_only=True))
    torch.save({**content, "tokenizer_sha256": TOKENIZER.sha256}, tmp_path / "other.pt")
    (tmp_path / "cut.pt").write_bytes(tones_lm.read_bytes()[:2000])
    cases = {
        ("other.pt", "modified-beam"): r"other\.pt: the language model is of another tokenizer than the recognition model",
        ("cut.pt", "ctc-prefix-beam"): r"cut\.pt: damaged, cut short",
        (str(reader.checkpoint), "modified-beam"): r"\.pt: holds no language model; an ARPA file or a checkpoint of k2ssl.bin.train_lm",
        (str(tones_lm), "ctc-lexicon-free"): r"a checkpoint; this method takes a file of KenLM, others take checkpoints: ctc-prefix-beam",
    }
    for (name, method), message in cases.items():
        assert decoded(reader, tmp_path / "out", method, "--search.lm", str(tmp_path / name)) == 2, name
        assert re.search(message, capsys.readouterr().err) and not (tmp_path / "out").exists()
