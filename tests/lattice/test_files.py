"""What the room of k2 reads without k2: n-gram models, lexicons, files of scores; and what it says where k2 does not load."""

from __future__ import annotations

import gzip
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from k2ssl.decode.lm import NgramLm
from k2ssl.decode.results import Alternative, read_results
from k2ssl.lattice.arpa import read_arpa
from k2ssl.lattice.decode_scores import main, write
from k2ssl.lattice.empty import EmptyLatticeError
from k2ssl.lattice.lexicon import lexicon_from_spellings, read_lexicon
from k2ssl.lattice.score_file import Scores, read_scores, write_scores

BIGRAMS = """a remark
\\data\\
ngram 1=5
ngram 2=3

\\1-grams:
-99\t<s>\t-0.3
-1.5\t<unk>
-0.5\tA\t-0.2
-0.7\tB\t-0.1
-0.9\t</s>

\\2-grams:
-0.2\t<s> A
-0.1\tA B
-0.3\tB </s>

\\end\\
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "lm.arpa"
    path.write_text(text)
    return path


def test_sentences_have_the_probabilities_of_the_file(tmp_path: Path) -> None:
    arpa = read_arpa(written(tmp_path, BIGRAMS))
    assert arpa.words == ["A", "B"] and arpa.order == 2
    ten = math.log(10)
    assert arpa.log_prob(["A", "B"]) == pytest.approx(ten * (-0.2 - 0.1 - 0.3))
    assert arpa.log_prob(["B", "A"]) == pytest.approx(ten * (-0.3 - 0.7 - 0.1 - 0.5 - 0.2 - 0.9))
    assert arpa.log_prob([]) == pytest.approx(ten * (-0.3 - 0.9))
    assert arpa.log_prob(["C"]) == -math.inf
    (tmp_path / "lm.gz").write_bytes(gzip.compress(BIGRAMS.encode()))
    assert read_arpa(tmp_path / "lm.gz").log_probs == arpa.log_probs


def test_sentences_have_the_probabilities_that_our_other_reader_gives(tmp_path: Path) -> None:
    path = written(tmp_path, BIGRAMS)
    arpa, model = read_arpa(path), NgramLm.load(path, ["<blank>", "<unk>", "A", "B"])
    for sentence in ([2, 3, 3], [3, 2, 2, 3], [3], []):
        state, total = model.start(1, torch.device("cpu")), 0.0
        for token in sentence:
            total += model.log_probs(state)[0, token].item()
            state = model.advance(state, torch.tensor([token]))
        total += model.final(state).item()
        assert arpa.log_prob(["?", "?", "A", "B"][token] for token in sentence) == pytest.approx(total, abs=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("\\data\\", "", "no ARPA file, it has no line"),
        ("ngram 1=5", "ngram 2=5", "line 3: 'ngram 1=COUNT' is needed here, not 'ngram 2=5'"),
        ("ngram 1=5", "ngram 1=6", "line 13: there are 5 1-grams, 6 were announced"),
        ("-0.1\tA B", "-0.1\tA", "line 15: a number, 2 words are needed, not"),
        ("-0.5\tA", "0.5\tA", "line 9: '0.5' is where a logarithm <= 0 is needed"),
        ("-0.2\n-0.7", "nan\n-0.7", "line 9: 'nan' is where a logarithm is needed"),
        ("A B", "<s> A", "line 15: '<s> A' is listed twice"),
        ("\\2-grams:", "\\3-grams:", r"line 13: \\2-grams: is needed here"),
        ("\n\\end\\\n", "", "line 16: the file ends among its 2-grams"),
    ],
)
def test_a_damaged_model_is_refused_with_the_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in BIGRAMS
    with pytest.raises(ValueError, match=said.replace("'<s> A'", "'<s> A'")):
        read_arpa(written(tmp_path, BIGRAMS.replace(old, new, 1)))


def test_a_model_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: there is no such file"):
        read_arpa(tmp_path / "nowhere")
    (tmp_path / "binary").write_bytes(b"\\data\\\n\xff\xfe\n")
    with pytest.raises(ValueError, match="cannot be read"):
        read_arpa(tmp_path / "binary")


SYMBOLS = ("<blank>", "<unk>", "|", "a", "b")


def test_damaged_compressed_models_and_plain_arrays_are_refused_by_name(tmp_path: Path) -> None:
    whole = gzip.compress(BIGRAMS.encode() * 20)
    (tmp_path / "lm.gz").write_bytes(whole[:20] + bytes(255 - byte for byte in whole[20:50]) + whole[50:])
    with pytest.raises(ValueError, match=r"lm\.gz, behind line \d+: cannot be read"):
        read_arpa(tmp_path / "lm.gz")
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"x\.npy: no file of scores"):
        read_scores(tmp_path / "x.npy")


def test_a_lexicon_numbers_words_and_leaves_the_delimiter_to_the_graph(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("\ufeffab\nAB a b |\n\nab b a\n", encoding="utf-8")  # with the mark that some editors put first
    lexicon = read_lexicon(tmp_path / "words.txt", SYMBOLS, "|")
    assert lexicon.words == ("ab", "AB") and lexicon.delimiter == 2
    assert lexicon.spellings == ((1, (3, 4)), (1, (4, 3)), (2, (3, 4)))
    assert lexicon.text([2, 1]) == "AB ab"


def test_spellings_that_are_shared_or_begin_others_are_marked() -> None:
    spellings = {"one": ["a"], "two": ["ab", "b"], "three": ["ab"], "four": ["bb"]}
    lexicon = lexicon_from_spellings({word: [list(way) for way in ways] for word, ways in spellings.items()}, SYMBOLS)
    assert lexicon.disambiguation() == [1, 1, 1, 2, 0]  # a, ab, b, ab, bb


@pytest.mark.parametrize(
    ("spellings", "delimiter", "said"),
    [
        ({}, "|", "lexicon: there is no word"),
        ({"x": [["|"]]}, "|", "'x' has an empty spelling"),
        ({"x": [["x", "a"]], "yy": [["y", "y"]]}, "|", "2 symbols of its spellings are none of the 5 tokens: 'x' in 'x', 'y' in 'yy'"),
        ({"x": [["<blank>"]]}, "|", "1 symbols of its spellings are none of the 5 tokens: '<blank>' in 'x'"),
        ({"x": [["a"]]}, "_", "the delimiter is '_', which is none of the 5 tokens"),
    ],
)
def test_a_lexicon_that_does_not_fit_is_refused(spellings: dict[str, list[list[str]]], delimiter: str, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("|", r"\|")):
        lexicon_from_spellings(spellings, SYMBOLS, delimiter)


def scores() -> Scores:
    return Scores(
        ids=np.array(["a", "b"]),
        refs=np.array(["é", ""]),
        has_ref=np.array([True, False]),
        seconds=np.array([0.1, 0.2]),
        lens=np.array([2, 1]),
        log_probs=np.arange(9, dtype=np.float32).reshape(3, 3),
        symbols=np.array(["<blank>", "x", "y"]),
    )


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    with open(tmp_path / "scores.npz", "wb") as file:
        write_scores(file, scores())
    read = read_scores(tmp_path / "scores.npz")
    assert read.ids.tolist() == ["a", "b"] and read.refs.tolist() == ["é", ""] and read.delimiter == ""
    assert [part.tolist() for part in read.frames()] == [[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], [[6.0, 7.0, 8.0]]]
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npz"]


def test_hypotheses_are_written_as_scoring_reads_them_and_each_text_once(tmp_path: Path) -> None:
    paths: list[Any] = [SimpleNamespace(tokens=tokens, score=score) for tokens, score in (((1,), -1.0), ((2, 1), -2.0), ((1,), -3.0))]
    write(str(tmp_path / "found.jsonl"), scores(), {0: paths}, None)
    heard, unheard = read_results(tmp_path / "found.jsonl")
    assert heard.nbest == (Alternative("x", -1.0), Alternative("yx", -2.0))
    assert (heard.id, heard.ref, heard.hyp, heard.score) == ("a", "é", "x", -1.0)
    assert (unheard.id, unheard.ref, unheard.hyp, unheard.nbest) == ("b", None, "", ())
    write(str(tmp_path / "found.jsonl"), scores(), {0: paths[:1]}, None)
    assert read_results(tmp_path / "found.jsonl")[0].nbest == ()


def test_files_that_hold_no_scores_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.npz"
    for content in (b"", b"PK\x03\x04 damaged"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"no file of scores of k2ssl.bin.write_scores"):
            read_scores(path)
    np.savez(path, ids=np.array([object()]))  # would take a pickle
    with pytest.raises(ValueError, match="no file of scores"):
        read_scores(path)
    with open(path, "wb") as file:
        write_scores(file, Scores(**{**vars(scores()), "lens": np.array([2, 2])}))
    with pytest.raises(ValueError, match=r"log_probs has shape \(3, 3\), \(4, 3\) is needed"):
        read_scores(path)


def test_an_empty_lattice_names_its_utterances() -> None:
    error = EmptyLatticeError([1, 2], "tried x")
    assert str(error) == "utterance 1, 2 of the batch: no path of the decoding graph is left: tried x"
    assert str(error.named(["a", "b", "c"])) == "utterance b, c: no path of the decoding graph is left: tried x"


@pytest.mark.parametrize("content", [None, "raise OSError('undefined symbol: _ZN3c10')"])
def test_the_room_says_why_k2_does_not_load_and_which_would(tmp_path: Path, content: str | None) -> None:
    if content is None:
        content = "raise ModuleNotFoundError(\"No module named 'k2'\")"
    (tmp_path / "k2.py").write_text(content)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import k2ssl.lattice, k2ssl.lattice.score_file; import k2ssl.lattice.search"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    why = content.partition("(")[2].strip("\"')")
    assert done.returncode == 1 and last.startswith(f"ImportError: k2 does not load: {why}"), done.stderr
    assert f"the wheel that fits is built for torch {torch.__version__.partition('+')[0]}" in last


def test_an_output_that_cannot_be_is_refused_before_the_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "found.jsonl").write_text("mine\n")
    assert main(["scores.npz", "--output", str(tmp_path / "found.jsonl")]) == 2
    assert "found.jsonl exists; --overwrite replaces it" in capsys.readouterr().err
    assert main(["scores.npz", "--output", str(tmp_path)]) == 2 and "a folder; a file is needed" in capsys.readouterr().err
    assert main(["scores.npz", "--output", str(tmp_path / "found.jsonl" / "more.jsonl")]) == 2
    assert "cannot be made" in capsys.readouterr().err and (tmp_path / "found.jsonl").read_text() == "mine\n"


def test_the_program_says_why_k2_does_not_load(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "k2", None)
    monkeypatch.delitem(sys.modules, "k2ssl.lattice.package", raising=False)
    assert main(["scores.npz", "--output", str(tmp_path / "new" / "found.jsonl")]) == 2
    assert capsys.readouterr().err.startswith("decode_scores: k2 does not load: ")
