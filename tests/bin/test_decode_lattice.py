"""The searches on k2 as bin.decode offers them, and the file that carries scores to where k2 is."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from k2ssl.bin import decode, decode_lattice, doctor_checks, write_scores
from k2ssl.decode.ctc import greedy_search
from k2ssl.decode.results import read_results
from k2ssl.lattice.empty import EmptyLatticeError
from k2ssl.lattice.score_file import read_scores


@pytest.fixture
def command(reader: Any, tmp_path: Path) -> Callable[..., list[str]]:
    def make(method: str, *options: str, output: str = "out") -> list[str]:
        files = [
            str(reader.checkpoint),
            "--cuts",
            reader.words.cuts("valid"),
            "--output",
            str(tmp_path / output),
            "--loader.num-workers",
            "0",
        ]
        return [*files, "--device", "cpu", "--method", method, *options]

    return make


@pytest.mark.parametrize("method", decode_lattice.OPTIONS)
def test_without_k2_its_methods_say_why_and_what_would_do(
    command: Callable[..., list[str]], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_checks, "find_spec", lambda name: None)
    (tmp_path / "file").touch()
    files = ["--search.lexicon", str(tmp_path / "file"), "--search.lm", str(tmp_path / "file")] if method == "ctc-hlg" else []
    assert decode.main(command(method, *files)) == 2
    said = capsys.readouterr().err
    assert f"method is '{method}', which takes the package k2: not installed: the wheel that fits is built for torch " in said
    assert not (tmp_path / "out").exists()


def test_a_k2_that_does_not_load_is_named_with_its_error(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "k2.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor_checks, "find_spec", lambda name: object())
    assert decode.main(command("ctc-lattice")) == 2
    said = capsys.readouterr().err
    assert "cannot be used: ImportError: undefined symbol: _ZN3c10; the wheel that fits" in said


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("ctc-hlg", [], "search.lexicon is missing: with method 'ctc-hlg' it names the file of the words"),
        (
            "ctc-hlg",
            ["--search.lexicon", "x"],
            "search.lm is missing: with method 'ctc-hlg' it names the file of a language model over words",
        ),
        ("ctc-lattice", ["--search.lm", "x"], "search.lm is 'x', which has no effect with method 'ctc-lattice'"),
        ("ctc-lattice", ["--search.max-active", "0"], "SearchConfig: max_active is 0, allowed are whole numbers >= 1"),
        ("ctc-lattice", ["--search.search-beam", "0"], "SearchConfig: search_beam is 0.0, allowed is a number > 0"),
        ("fast-beam", ["--search.rescore-lm", "x"], "it has with ctc-hlg"),
        ("ctc-greedy", ["--search.max-states", "2"], "it has with fast-beam"),
    ],
)
def test_options_that_cannot_be_or_have_no_effect_are_refused(
    command: Callable[..., list[str]], method: str, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decode.main(command(method, *options)) == 2
    assert said in " ".join(capsys.readouterr().err.split())


class GreedyDecoder:
    """Stands for the decoder on k2: the best label of every frame, words of a lexicon in the order of their ids."""

    def __init__(self, num_tokens: int, words: Any = None, device: str = "cpu") -> None:
        self.num_tokens, self.words = num_tokens, words

    def lattice(self, log_probs: torch.Tensor, lens: torch.Tensor, pruning: Any, lm_scale: float) -> Any:
        assert log_probs.shape[2] == self.num_tokens and (pruning.search_beam, pruning.max_active) == (9.0, 50)
        if self.words is not None and self.words.drop_words:
            raise EmptyLatticeError([len(lens) - 1], "tried")
        return greedy_search(log_probs, lens)

    def choose(self, lattice: Any, number: int, rescore_paths: int) -> list[list[Any]]:
        return [[SimpleNamespace(outputs=(2, 1), tokens=one.tokens, frames=one.frames, score=one.score)] for one in lattice]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where k2 is not installed, the wiring is tested with a decoder of our own."""
    pruning = SimpleNamespace(Pruning=lambda search, output, least, most: SimpleNamespace(search_beam=search, max_active=most))
    parts = {
        "decoder": SimpleNamespace(CtcDecoder=GreedyDecoder, Words=lambda *given: SimpleNamespace(lexicon=given[0], drop_words=given[3]))
    }
    for name, content in {**parts, "search": pruning}.items():
        module = types.ModuleType(f"k2ssl.lattice.{name}")
        vars(module).update(vars(content))
        monkeypatch.setitem(sys.modules, f"k2ssl.lattice.{name}", module)
    monkeypatch.setattr(doctor_checks, "why_no_k2", lambda: "")


@pytest.mark.usefixtures("played")
def test_what_the_decoder_finds_is_written(command: Callable[..., list[str]], tmp_path: Path) -> None:
    beam = ["--search.search-beam", "9", "--search.max-active", "50", "--timestamps", "True"]
    assert decode.main(command("ctc-lattice", *beam)) == 0
    assert decode.main(command("ctc-greedy", "--timestamps", "True", output="greedy")) == 0
    lattice, greedy = read_results(tmp_path / "out" / "hypotheses.jsonl"), read_results(tmp_path / "greedy" / "hypotheses.jsonl")
    assert lattice == greedy
    found = json.loads((tmp_path / "out" / "decode.json").read_text())["what"]["search"]
    assert found == {"nbest": 1, "search_beam": 9.0, "output_beam": 8.0, "max_active": 50}


@pytest.mark.usefixtures("played")
def test_words_of_a_lexicon_are_written_and_an_utterance_without_a_path_is_named(
    reader: Any, command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    letters = sorted({letter for text in reader.texts() for letter in text if letter.strip()})
    (tmp_path / "words.txt").write_text(f"WORLD {letters[0]}\nHELLO {letters[1]}\n")
    (tmp_path / "lm.arpa").write_text("\\data\\\nngram 1=3\n\n\\1-grams:\n-1\tWORLD\n-1\tHELLO\n-1\t</s>\n\n\\end\\\n")
    files = ["--search.lexicon", str(tmp_path / "words.txt"), "--search.lm", str(tmp_path / "lm.arpa")]
    beam = ["--search.search-beam", "9", "--search.max-active", "50"]
    assert decode.main(command("ctc-hlg", *files, *beam)) == 0
    assert {one.hyp for one in read_results(tmp_path / "out" / "hypotheses.jsonl")} == {"HELLO WORLD"}
    assert decode.main(command("ctc-hlg", *files, *beam, "--search.drop-words", "True", output="empty")) == 1
    said = capsys.readouterr().err
    assert "utterance valid" in said and "no path of the decoding graph is left: tried" in said


def test_scores_are_those_of_the_head_in_the_order_of_the_manifest(
    reader: Any, command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(reader.checkpoint), "--cuts", reader.words.cuts("valid"), "--loader.num-workers", "0", "--device", "cpu"]
    assert write_scores.main([*files, "--output", str(tmp_path / "scores.npz")]) == 0
    assert decode.main(command("ctc-greedy")) == 0
    scores, greedy = read_scores(tmp_path / "scores.npz"), read_results(tmp_path / "out" / "hypotheses.jsonl")
    assert scores.ids.tolist() == [one.id for one in greedy] and scores.refs.tolist() == [one.ref for one in greedy]
    assert scores.seconds.tolist() == pytest.approx([one.duration for one in greedy]) and scores.has_ref.all()
    for log_probs, one in zip(scores.frames(), greedy, strict=True):
        (found,) = greedy_search(torch.from_numpy(log_probs)[None], torch.tensor([len(log_probs)]))
        text = "".join(scores.symbols[token] for token in found.tokens).replace(scores.delimiter, " ")
        assert " ".join(text.split()) == one.hyp and found.score == pytest.approx(one.score, abs=1e-4)
    assert write_scores.main([*files, "--output", str(tmp_path / "scores.npz")]) == 2
    assert "exists; --overwrite True replaces it" in capsys.readouterr().err
    twice = shutil.copy(reader.words.cuts("valid"), tmp_path / "cuts_again.jsonl.gz")
    files[2:3] = [files[2], str(twice)]
    assert write_scores.main([*files, "--output", str(tmp_path / "twice.npz")]) == 2
    assert "the id 'valid00' occurs twice; score the manifests apart" in capsys.readouterr().err and not list(tmp_path.glob("*twice*"))
