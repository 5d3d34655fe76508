"""One rule for all programs: what is refused before the work begins has status 2, and what was there is as it was."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from k2ssl.decode.results import Result, to_line

MINE = "mine, not to be replaced"

# Of every program that writes a file or reports into a folder: its command without --output, and which file it would write.
PROGRAMS: dict[str, tuple[str, str]] = {
    "align": ("MODEL --cuts CUTS --device cpu", "words.ctm"),
    "average": ("--checkpoints EARLIER MODEL", "mean.pt"),
    "fit_kmeans": ("--cuts CUTS --device cpu --kmeans.num-clusters 2 --loader.num-workers 0", "k.pt"),
    "label_report": ("--labels LABELS", "report.json"),
    "score": ("RESULTS", "out/report.txt"),
    "transcribe": ("MODEL AUDIO --device cpu", "talk.txt"),
    "train_ngram": ("--cuts CUTS --order 2", "words.arpa"),
    "train_tokenizer": ("--cuts CUTS --kind letters", "letters.pt"),
    "tune_lm": ("MODEL --cuts CUTS --method ctc-prefix-beam --token-scores 0 1 --device cpu", "best.json"),
    "decode": ("MODEL --cuts CUTS --method ctc-greedy --device cpu", "out/decode.json"),
}
INPUTS = ("CUTS", "MODEL", "LABELS")  # of the results that score reads the content is its work, not what it looks at before


@pytest.fixture
def inputs(reader: Any, tmp_path: Path) -> dict[str, str]:
    results = tmp_path / "results.jsonl"
    results.write_text(to_line(Result("a", "b", -1.0, 1.0, "b")) + "\n")
    files = {"CUTS": reader.words.cuts("valid"), "EARLIER": reader.checkpoints[0], "MODEL": reader.checkpoint, "RESULTS": results}
    return {**{name: str(path) for name, path in files.items()}, "AUDIO": str(reader.audio(0)), "LABELS": str(tmp_path / "labels")}


def run(program: str, inputs: dict[str, str], output: Path) -> int:
    words, name = PROGRAMS[program]
    folder = output.parent if "/" in name else output
    module = importlib.import_module(f"k2ssl.bin.{program}")
    status: int = module.main([*(inputs.get(word, word) for word in words.split()), "--output", str(folder)])
    return status


@pytest.mark.parametrize("program", PROGRAMS)
def test_output_that_exists_is_refused_with_status_2_and_kept(
    program: str, inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results" / PROGRAMS[program][1]
    output.parent.mkdir(parents=True)
    output.write_text(MINE)
    assert run(program, inputs, output) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{program}: ") and error.count("\n") == 1 and output.name in error
    assert ("exists; --overwrite True replaces it" in error) is (program != "decode"), "a folder of decode.json may be gone on with"
    assert [path.name for path in output.parent.iterdir()] == [output.name] and output.read_text() == MINE


@pytest.mark.parametrize("program", PROGRAMS)
def test_output_that_cannot_be_written_is_refused_with_status_2(
    program: str, inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text(MINE)
    assert run(program, inputs, tmp_path / "file" / PROGRAMS[program][1]) == 2
    assert "file" in capsys.readouterr().err and (tmp_path / "file").read_text() == MINE


@pytest.mark.parametrize(
    ("kind", "program"), [(kind, program) for program, (words, _) in PROGRAMS.items() for kind in INPUTS if kind in words]
)
def test_input_that_does_not_fit_is_refused_with_status_2_and_nothing_is_written(
    kind: str, program: str, inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text("nothing of the kind\n")
    output = tmp_path / "results" / PROGRAMS[program][1]
    assert run(program, {**inputs, kind: str(wrong)}, output) == 2
    error = capsys.readouterr().err
    assert "wrong.jsonl" in error and error.startswith(f"{program}: ") and not list(tmp_path.glob("results/**/*.*"))
