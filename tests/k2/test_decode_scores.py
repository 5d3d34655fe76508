"""The program that searches scores of a file."""

from __future__ import annotations

import json
from pathlib import Path as File

import numpy as np
import pytest
import torch
import toys

from k2ssl.lattice.decode_scores import main
from k2ssl.lattice.decoder import CtcDecoder, Words
from k2ssl.lattice.score_file import Scores, write_scores

LENS = (9, 0, 14, 3)


@pytest.fixture
def files(tmp_path: File) -> dict[str, str]:
    """Scores of four utterances, one of which has no frame; a lexicon and two models."""
    scores = Scores(
        ids=np.array([f"u{number}" for number in range(4)]),
        refs=np.array(["A AB", "BEE", "", "CC YAK"]),
        has_ref=np.array([True, True, False, True]),
        seconds=np.array([0.2, 0.01, 0.3, 0.1]),
        lens=np.array(LENS),
        log_probs=toys.random_log_probs(1, sum(LENS), len(toys.SYMBOLS)).numpy(),
        symbols=np.array(toys.SYMBOLS),
        delimiter="|",
    )
    with open(tmp_path / "scores.npz", "wb") as file:
        write_scores(file, scores)
    (tmp_path / "words.txt").write_text("A a\nAB a b\nBEE b\nBEE c b\n\nCC c c\n")
    lms = [toys.ngram_model(tmp_path, order, seed=1).path for order in (2, 3)]
    return {"scores": str(tmp_path / "scores.npz"), "lexicon": str(tmp_path / "words.txt"), "lm": lms[0], "larger": lms[1]}


def run(folder: File, *options: str) -> list[dict[str, object]]:
    assert main([*options, "--output", str(folder / "found.jsonl"), "--overwrite"]) == 0
    return [json.loads(line) for line in (folder / "found.jsonl").read_text().splitlines()]


def test_hypotheses_are_those_of_the_decoder_in_the_order_of_the_file(
    files: dict[str, str], tmp_path: File, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--lexicon", files["lexicon"], "--lm", files["lm"], "--rescore-lm", files["larger"], "--nbest", "2", "--oracle"]
    found = run(tmp_path, files["scores"], *words)
    decoder = CtcDecoder(len(toys.SYMBOLS), Words(toys.lexicon("|"), toys.read_arpa(files["lm"]), toys.read_arpa(files["larger"])))
    parts = toys.random_log_probs(1, sum(LENS), len(toys.SYMBOLS)).split(LENS)
    assert [line["id"] for line in found] == ["u0", "u1", "u2", "u3"]
    assert [line["ref"] for line in found] == ["A AB", "BEE", None, "CC YAK"]
    for line, part in zip(found, parts):
        if len(part):
            (paths,) = decoder.choose(decoder.lattice(part[None], torch.tensor([len(part)])), 2)
            expected = [{"hyp": toys.lexicon("|").text(path.outputs), "score": path.score} for path in paths]
            assert line["nbest"] == expected and {key: line[key] for key in ("hyp", "score")} == expected[0]
        else:
            assert line["hyp"] == "" and line["nbest"] == []
    told = capsys.readouterr().out
    assert "4 utterances, 0.6 s; 1 without a frame give no words" in told and "oracle: " in told and " errors in 4 words" in told
    assert run(tmp_path, files["scores"], *words, "--batch", "1") == found


def test_without_a_lexicon_tokens_are_put_together(files: dict[str, str], tmp_path: File) -> None:
    found = run(tmp_path, files["scores"])
    parts = toys.random_log_probs(1, sum(LENS), len(toys.SYMBOLS)).split(LENS)
    for line, part in zip(found, parts):
        spelled = "".join(toys.SYMBOLS[token] for token in toys.collapsed(tuple(part.argmax(-1).tolist())))
        assert line["hyp"] == " ".join(spelled.replace("|", " ").split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lm", "LM"], "--lexicon and --lm go together"),
        (["--oracle"], "--rescore-lm and --oracle have an effect with"),
        (["--nbest", "0"], "--nbest is 0, at least 1"),
        (["--lexicon", "nowhere", "--lm", "LM"], "nowhere: cannot be read"),
        (["--lexicon", "LEXICON", "--lm", "nowhere"], "nowhere: there is no such file"),
        (["--search-beam", "0"], "search_beam is 0.0"),
    ],
)
def test_what_does_not_fit_is_refused(
    files: dict[str, str], tmp_path: File, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [{"LM": files["lm"], "LEXICON": files["lexicon"]}.get(word, word) for word in options]
    assert main([files["scores"], *given, "--output", str(tmp_path / "found.jsonl")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "found.jsonl").exists()
