"""The program train_ngram: what it writes and prints, perplexities, and every refusal."""

from __future__ import annotations

import errno
import gzip
import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lhotse import MonoCut, SupervisionSegment
from lhotse.testing.dummies import dummy_recording

from k2ssl.bin import train_ngram
from k2ssl.bin.sentences import Sentences
from k2ssl.bin.train_ngram import perplexity
from k2ssl.data.cuts import write_cuts
from k2ssl.data.tokenizer import LetterTokenizer, NormalizationConfig
from k2ssl.decode.arpa import read_arpa
from k2ssl.decode.kneser_ney import kneser_ney
from k2ssl.decode.lm import NgramLm
from k2ssl.decode.ngram_counts import NgramCounter

TEXT = ["the cat sat on the mat", "the  dog sat", "", "a cat and a dog", "the dog sat on the cat"]
WORDS = [line.split() for line in TEXT if line]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TEXT), encoding="utf-8")
    return path


def manifest(path: Path, texts: list[str]) -> Path:
    supervised = [[SupervisionSegment(f"s{i}", "recording", 0.0, 1.0, text=text)] for i, text in enumerate(texts)]
    write_cuts([MonoCut(f"cut{i}", 0.0, 1.0, 0, s, recording=dummy_recording(i)) for i, s in enumerate(supervised)], path)
    return path


def run(output: Path, *options: object) -> int:
    return train_ngram.main(["--output", str(output), *map(str, options)])


def entries(path: Path) -> dict[str, tuple[float, float]]:
    model = read_arpa(path)
    tables = [(model.text(n + 1, row), table, row) for n, table in enumerate(model.orders) for row in range(len(table.log_prob))]
    return {ngram: (table.log_prob[row], table.backoff[row]) for ngram, table, row in tables}


def test_the_file_holds_the_estimate_of_text_and_transcripts_together(text: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.txt.gz"
    half.write_bytes(gzip.compress("\n".join(TEXT[:2]).encode()))
    cuts = manifest(tmp_path / "cuts.jsonl.gz", [TEXT[3], "", TEXT[4]])
    assert run(tmp_path / "one.arpa", "--text", text, "--order", 3, "--prune", 0, 0, 1) == 0
    assert run(tmp_path / "two.arpa.gz", "--text", half, "--cuts", cuts, "--order", 3, "--prune", 0, 0, 1) == 0
    assert (tmp_path / "two.arpa.gz").read_bytes()[:2] == b"\x1f\x8b"
    found = entries(tmp_path / "one.arpa")
    assert found == entries(tmp_path / "two.arpa.gz") and "the dog sat" in found and "the cat sat" not in found
    counter = NgramCounter(3)
    for sentence in WORDS:
        counter.add(sentence)
    model = kneser_ney(counter.counts(), (0, 0, 1))
    for n, table in enumerate(model.orders, start=1):
        for row in range(len(table.log_prob)):
            assert found.pop(model.text(n, row)) == pytest.approx((table.log_prob[row], table.backoff[row]), abs=1e-6)
    assert not found


def test_the_settings_file_repeats_the_run_to_the_byte(text: Path, tmp_path: Path) -> None:
    for name in ("one.arpa", "one.arpa.gz"):
        assert run(tmp_path / name, "--text", text, "--order", 2, "--normalization.case", "upper") == 0
        assert train_ngram.main([str(tmp_path / f"{name}.json"), "--output", str(tmp_path / f"again.{name}")]) == 0
        assert (tmp_path / name).read_bytes() == (tmp_path / f"again.{name}").read_bytes()
    assert "THE DOG" in entries(tmp_path / "one.arpa")
    assert json.loads((tmp_path / "one.arpa.json").read_text())["order"] == 2


def test_a_model_of_tokens_knows_all_of_the_tokenizer(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = LetterTokenizer("acdehmnotzs", NormalizationConfig(case="lower"))  # no g, nothing has a z
    tokenizer.save(tmp_path / "letters.pt")
    assert run(tmp_path / "lm.arpa", "--text", text, "--order", 4, "--tokenizer", tmp_path / "letters.pt") == 0
    assert "of 4 sentences with 70 tokens, 3 characters that the tokenizer does not have" in capsys.readouterr().out
    found = entries(tmp_path / "lm.arpa")
    assert "<s> t h e" in found and "d o <unk> |" in found and found["z"][0] < found["a"][0]
    lm = NgramLm.load(tmp_path / "lm.arpa", tokenizer.symbols)
    row = lm.log_probs(lm.start(1, torch.device("cpu")))[0] / math.log(10)
    t, z = tokenizer.symbols.index("t"), tokenizer.symbols.index("z")
    assert row[t].item() == pytest.approx(found["<s> t"][0], abs=1e-5)
    assert row[z].item() == pytest.approx(found["<s>"][1] + found["z"][0], abs=1e-5)


def test_perplexity_is_that_of_the_probabilities(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check, empty = tmp_path / "check.txt", tmp_path / "empty.txt"
    check.write_text("the cat\nthe zebra sat on\ndog\n")
    empty.write_text("\n\n")
    cuts = manifest(tmp_path / "check.jsonl.gz", ["the cat sat"])
    options = ("--order", 2, "--check-text", check, empty, "--check-cuts", cuts)
    assert run(tmp_path / "lm.arpa", "--text", text, *options) == 0
    found = entries(tmp_path / "lm.arpa")

    def log10(sentence: str) -> list[float]:
        words = ["<s>", *sentence.split(), "</s>"]
        pairs = pairwise(words)
        return [found[f"{h} {w}"][0] if f"{h} {w}" in found else found[h][1] + found[w][0] for h, w in pairs]

    all_of = [*log10("the cat"), *log10("the <unk> sat on"), *log10("dog")]
    known = [value for i, value in enumerate(all_of) if i != 4]
    lines = capsys.readouterr().out.splitlines()
    row = re.fullmatch(rf"perplexity of {check}: (\S+) \((\S+) with 1 unknown words\); 3 sentences, 7 words", lines[-3])
    assert row is not None
    assert float(row[1]) == pytest.approx(10 ** (-sum(known) / 9), abs=0.006)
    assert float(row[2]) == pytest.approx(10 ** (-sum(all_of) / 10), abs=0.006)
    assert lines[-2] == f"perplexity of {empty}: it holds no sentence"
    assert f"perplexity of {cuts}: {10 ** (-sum(log10('the cat sat')) / 4):.2f} (" in lines[-1]


def test_many_sentences_are_summed_over_all_groups(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = NgramCounter(2)
    for sentence in WORDS:
        counter.add(sentence)
    model = kneser_ney(counter.counts())
    pieces = ("<blk>", "<unk>", *model.words[3:])
    whole = perplexity(NgramLm(model, pieces), pieces, WORDS)
    monkeypatch.setattr(train_ngram, "_AT_ONCE", 2)
    parts = perplexity(NgramLm(model, pieces), pieces, WORDS)
    assert (parts.sentences, parts.words, parts.unknown) == (whole.sentences, whole.words, whole.unknown) == (4, 20, 0)
    assert parts.log_prob == pytest.approx(whole.log_prob) and parts.all == parts.known == pytest.approx(math.exp(-whole.log_prob / 24))


def test_the_table_tells_what_was_left_out(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "lm.arpa", "--text", text, "--order", 2, "--prune", 0, 1) == 0
    lines = capsys.readouterr().out.splitlines()
    model = read_arpa(tmp_path / "lm.arpa")
    pairs = {pair for words in WORDS for pair in zip(["<s>", *words], [*words, "</s>"], strict=True)}
    assert lines[0].endswith("lm.arpa: of 4 sentences with 20 words")
    assert [line.split() for line in lines[2:4]] == [["1", "11", "11"], ["2", str(len(pairs)), str(len(model.orders[1].log_prob))]]
    assert len(model.orders[1].log_prob) < len(pairs)
    assert lines[4].startswith("perplexity of the text itself, which it knows: ")


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--order", "0"), 2, "order is 0, allowed are whole numbers >= 1"),
        (("--prune", "1"), 2, "prune is 1; allowed are 0, then numbers none smaller"),
        (("--prune", "0", "2", "1"), 2, "prune is 0 2 1; allowed"),
        (("--order", "2", "--prune", "0", "0", "0"), 2, "at most 2 (order) in all"),
        (("--tokenizer", "nowhere.pt"), 2, "tokenizer: nowhere.pt: there is no such file"),
        (("--tokenizer", "t.pt", "--normalization.case", "upper"), 2, "normalization is set, but the tokenizer has its own"),
        (("--check-text", "nowhere.txt"), 2, "check_text: nowhere.txt: there is no such file"),
        (("--text",), 2, "text and cuts name no file"),
        (("--order", "9"), 1, "no sentence is long enough for an n-gram of 9 words"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], status: int, message: str
) -> None:
    output = tmp_path / "out" / "lm.arpa"
    assert run(output, "--text", text, *options) == status
    assert message in capsys.readouterr().err
    assert not output.exists() and not output.with_name("lm.arpa.json").exists()


def test_text_that_cannot_be_used_is_refused_with_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.txt"
    for content, message in [
        (b"fine\nthe <s> cat\n", "bad.txt, line 2: holds the word <s>"),
        (b"fine\n\ncaf\xe9\n", "bad.txt, line 3: text must be UTF-8"),
        (b"\n \n", "there is no sentence to count"),
    ]:
        bad.write_bytes(content)
        assert run(tmp_path / "lm.arpa", "--text", bad, "--order", 1) == 1
        assert message in capsys.readouterr().err
    torn = tmp_path / "torn.txt.gz"
    torn.write_bytes(gzip.compress(b"some words here\n" * 99)[:-12])
    assert run(tmp_path / "lm.arpa", "--text", torn, "--order", 1) == 1
    assert "torn.txt.gz: the compressed file is damaged or cut off" in capsys.readouterr().err
    cuts = manifest(tmp_path / "cuts.jsonl.gz", ["fine", "no </s>"])
    assert run(tmp_path / "lm.arpa", "--cuts", cuts, "--order", 1) == 1
    assert "cuts.jsonl.gz, cut 'cut1': holds the word </s>" in capsys.readouterr().err
    assert not (tmp_path / "lm.arpa").exists()


def test_text_to_check_is_read_before_the_work_begins_and_the_model_is_written_last(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, cuts = tmp_path / "bad.txt", manifest(tmp_path / "cuts.jsonl.gz", ["fine", "no </s>"])
    bad.write_bytes(b"fine\nthe <s> cat\n")
    (tmp_path / "no.jsonl").write_text("no cut\n")
    with monkeypatch.context() as patch:
        patch.setattr(train_ngram, "_count", None)
        for options, message in (
            (("--check-text", text, bad), "bad.txt, line 2: holds the word <s>"),
            (("--check-cuts", cuts), "cuts.jsonl.gz, cut 'cut1': holds the word </s>"),
            (("--check-cuts", tmp_path / "no.jsonl"), "no.jsonl"),
            (("--cuts", tmp_path / "no.jsonl"), "no.jsonl"),
        ):
            assert run(tmp_path / "lm.arpa", "--text", text, "--order", 2, *options) == 2
            assert message in capsys.readouterr().err

    def full(*arguments: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train_ngram, "_perplexities", full)
    assert run(tmp_path / "lm.arpa", "--text", text, "--order", 2) == 1
    assert not list(tmp_path.glob("*lm.arpa*"))


def test_a_file_that_exists_is_replaced_only_on_request(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "lm.arpa"
    output.write_text("mine")
    assert run(output, "--text", text, "--order", 2) == 2 and output.read_text() == "mine"
    assert "exists; --overwrite True replaces it" in capsys.readouterr().err
    assert run(tmp_path, "--text", text) == 2 and "which is a folder" in capsys.readouterr().err
    assert run(output, "--text", text, "--order", 2, "--overwrite", True) == 0 and "the cat" in entries(output)


def test_no_text_is_written_over(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = text.read_text(encoding="utf-8")
    other = tmp_path / "other.txt"
    other.write_text(before, encoding="utf-8")
    for option in ("--text", "--check-text"):
        given = [text] if option == "--text" else [other, option, text]
        assert run(text, "--text", *given, "--order", 2, "--overwrite", True) == 2
        assert text.read_text(encoding="utf-8") == before
        assert f"which is read ({option[2:].replace('-', '_')}: {text})" in capsys.readouterr().err


def test_unknown_characters_are_counted_anew_in_every_pass(text: Path) -> None:
    sentences = Sentences((str(text),), (), tokenizer=LetterTokenizer("acdehmnots", NormalizationConfig()))
    for _ in range(2):
        assert len(list(sentences)) == 4 and sentences.unknown == 3


def test_words_that_look_like_symbols_of_a_tokenizer_are_words_and_a_mark_of_the_encoding_is_none(tmp_path: Path) -> None:
    for name, content in (("plain", "a b <unk> c\na b\nb <blk> a\n"), ("marked", "\ufeffa b <UNK> c\na b\nb <blk> a\n")):
        (tmp_path / f"{name}.txt").write_text(content, encoding="utf-8")
        assert run(tmp_path / f"{name}.arpa", "--text", tmp_path / f"{name}.txt", "--order", 2) == 0
    assert (tmp_path / "plain.arpa").read_bytes() == (tmp_path / "marked.arpa").read_bytes()
    assert {"a", "b", "c", "<blk>", "<unk>"} < set(entries(tmp_path / "marked.arpa"))
