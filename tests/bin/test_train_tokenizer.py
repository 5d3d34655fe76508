"""The program train_tokenizer: what it writes and prints, that it repeats itself, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lhotse import MonoCut, SupervisionSegment
from lhotse.testing.dummies import dummy_recording

from k2ssl.bin import train_tokenizer
from k2ssl.data.cuts import write_cuts
from k2ssl.data.tokenizer import load_tokenizer

TEXTS = ["the cat sat on the mat", "a dog and the cat", "over the lazy fox's dog", "the dog sat on the cat"]


def write(path: Path, texts: list[str | None]) -> Path:
    """A manifest of cuts with these transcripts; None: without supervisions."""
    cuts = []
    for i, text in enumerate(texts):
        supervisions = [] if text is None else [SupervisionSegment(f"s{i}", "recording", 0.0, 1.0, text=text)]
        cuts.append(MonoCut(f"cut{i}", 0.0, 1.0, 0, supervisions, recording=dummy_recording(i)))
    write_cuts(cuts, path)
    return path


@pytest.fixture
def cuts(tmp_path: Path) -> Path:
    return write(tmp_path / "cuts_train.jsonl.gz", [*TEXTS])


def run(cuts: Path, output: Path, *options: str) -> int:
    return train_tokenizer.main(["--cuts", str(cuts), "--output", str(output), *options])


@pytest.mark.parametrize(
    "options", [("--kind", "bpe", "--vocab-size", "30"), ("--kind", "unigram", "--vocab-size", "26"), ("--kind", "letters")]
)
def test_the_same_command_writes_the_same_file_again(cuts: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    assert run(cuts, tmp_path / "one.pt", *options) == 0 and run(cuts, tmp_path / "two.pt", *options) == 0
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()
    tokenizer = load_tokenizer(tmp_path / "one.pt")
    assert tokenizer.kind == options[1] and all(tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS)
    settings = json.loads((tmp_path / "one.pt.json").read_text())
    assert settings["kind"] == options[1] and settings["text"] == {"case": "none", "allowed": "", "others": "refuse"}


def test_the_settings_file_repeats_the_run(cuts: Path, tmp_path: Path) -> None:
    assert run(cuts, tmp_path / "one.pt", "--kind", "letters", "--text.case", "upper") == 0
    assert train_tokenizer.main([str(tmp_path / "one.pt.json"), "--output", str(tmp_path / "two.pt")]) == 0
    assert load_tokenizer(tmp_path / "two.pt").sha256 == load_tokenizer(tmp_path / "one.pt").sha256
    assert load_tokenizer(tmp_path / "two.pt").decode(load_tokenizer(tmp_path / "two.pt").encode("dog")) == "DOG"


def test_the_table_tells_how_transcripts_come_out(
    cuts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    check = write(tmp_path / "cuts_dev.jsonl.gz", ["the cat", "quick dogs", None])
    assert run(cuts, tmp_path / "letters.pt", "--kind", "letters", "--check-cuts", str(check)) == 0
    heading, _, train, dev, written = capsys.readouterr().out.splitlines()
    letters = set("".join(TEXTS)) - {" "}
    assert heading.startswith(f"letters: {3 + len(letters)} symbols of {len(letters)} characters; blank is 0")
    words, characters = sum(len(text.split()) for text in TEXTS), sum(map(len, TEXTS))
    assert train.split() == [str(cuts), "4", str(words), f"{characters / words:.3f}", "0.000%", "23", "in", "cut2"]
    unknown = sum(character not in letters for character in "thecatquickdogs")
    assert unknown == 4 and dev.split() == [str(check), "2", "4", f"{17 / 4:.3f}", f"{unknown / 15:.3%}", "10", "in", "cut1"]
    assert written.startswith(f"{tmp_path / 'letters.pt'}: sha256 ")
    assert "cuts_dev.jsonl.gz: 1 cuts without a transcript are left out: 'cut2'" in caplog.text


def test_cuts_without_a_transcript_are_counted_and_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    cuts = write(tmp_path / "cuts.jsonl", [*TEXTS, *[None] * 4, " ", "", "?"])
    options = ("--kind", "letters", "--text.allowed", "abcdefghijklmnopqrstuvwxyz'", "--text.others", "space")
    assert run(cuts, tmp_path / "letters.pt", *options) == 0
    assert caplog.text.count("without a transcript") == 1
    assert "7 cuts without a transcript are left out: 'cut4', 'cut5', 'cut6', 'cut7', 'cut8' and 2 more" in caplog.text
    assert capsys.readouterr().out.splitlines()[2].split()[1] == "4"


def test_several_manifests_are_learnt_from(cuts: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "cuts_other.jsonl", ["quick"])
    assert train_tokenizer.main(["--cuts", str(cuts), str(other), "--kind", "letters", "--output", str(tmp_path / "t.pt")]) == 0
    assert load_tokenizer(tmp_path / "t.pt").outside("quick cat") == ""


def test_a_file_that_exists_is_replaced_only_on_request(cuts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "letters.pt"
    output.write_text("mine")
    assert run(cuts, output, "--kind", "letters") == 2 and output.read_text() == "mine"
    assert "exists; --overwrite True replaces it" in capsys.readouterr().err
    assert run(cuts, output, "--kind", "letters", "--overwrite", "True") == 0 and load_tokenizer(output).kind == "letters"


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--vocab-size", "5000"), 1, "vocab_size is 5000, which SentencePiece cannot make of this text"),
        ((), 1, "vocab_size is 500, which"),
        (("--text.allowed", "abc"), 1, "utterance 'cut0': the transcript 'the cat sat on the mat' holds 'e', 'h', 'm'"),
        (("--kind", "letters", "--vocab-size", "30"), 2, "takes neither vocab_size"),
        (("--text.allowed", "aa"), 2, "allowed holds 'a' twice"),
        (("--cuts", "nowhere.jsonl"), 2, "nowhere.jsonl: there is no such file"),
        (("--check-cuts", "nowhere.jsonl"), 2, "check_cuts: nowhere.jsonl: there is no such file"),
        (("--cuts",), 2, "cuts names no manifest"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(
    cuts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], status: int, message: str
) -> None:
    output = tmp_path / "out" / "t.pt"
    assert run(cuts, output, *options) == status
    assert message in capsys.readouterr().err
    assert not output.exists() and not output.with_name("t.pt.json").exists()


def test_a_folder_as_output_and_a_manifest_without_transcripts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cuts = write(tmp_path / "cuts.jsonl", [None, ""])
    assert run(cuts, tmp_path) == 2 and "which is a folder" in capsys.readouterr().err
    assert run(cuts, tmp_path / "t.pt", "--kind", "letters") == 1 and "no transcripts" in capsys.readouterr().err
