"""The program tune_lm on words of tones: it counts as decode does, and decode takes what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lhotse import CutSet

from k2ssl.bin import decode, tune_lm
from k2ssl.train.ledger import total

METHOD = ["--method", "ctc-prefix-beam"]


@pytest.fixture
def files(reader: Any) -> list[str]:
    options = ["--cuts", reader.words.cuts("valid"), "--loader.num-workers", "0", "--device", "cpu", "--quiet", "True"]
    return [str(reader.checkpoint), *options]


def test_the_best_combination_is_written_and_its_errors_are_those_that_decode_counts(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = tmp_path / "best.json"
    grid = ["--token-scores", "-40", "0", "40", "--search.beam", "3"]
    assert tune_lm.main([*files, *METHOD, *grid, "--output", str(best)]) == 0
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines()[:4])
    assert header == ["token_score", "WER", "sub", "del", "ins"]
    assert rows[0][0] == "0" and {row[0] for row in rows} == {"-40", "0", "40"}
    errors = [sum(map(int, row[2:])) for row in rows]
    assert errors == sorted(errors) and errors[0] < errors[1]
    assert json.loads(best.read_text()) == {"method": "ctc-prefix-beam", "search": {"beam": 3, "token_score": 0.0}}
    assert total(tmp_path).by_program.keys() == {"tune_lm"}
    assert decode.main([str(best), *files, "--output", str(tmp_path / "best")]) == 0
    assert json.loads((tmp_path / "best/decode.json").read_text())["result"]["words"]["errors"] == errors[0]
    assert decode.main([*files, *METHOD, *grid[-2:], "--search.token-score", rows[2][0], "--output", str(tmp_path / "worst")]) == 0
    assert json.loads((tmp_path / "worst/decode.json").read_text())["result"]["words"]["errors"] == errors[2]


def test_words_of_an_utterance_without_a_frame_are_missed_as_decode_misses_them(
    reader: Any, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cuts = [
        cut.truncate(duration=0.01).with_id(cut.id) if i == 0 else cut for i, cut in enumerate(CutSet.from_file(files[2]).subset(first=3))
    ]
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    command = [*files, "--cuts", str(tmp_path / "cuts.jsonl.gz"), *METHOD]
    assert tune_lm.main([*command, "--token-scores", "0", "1", "--output", str(tmp_path / "best.json")]) == 0
    errors = {row[0]: [int(number) for number in row[2:]] for row in (line.split() for line in capsys.readouterr().out.splitlines()[1:3])}
    assert decode.main([*command, "--search.token-score", "1", "--output", str(tmp_path / "one")]) == 0
    words = json.loads((tmp_path / "one/decode.json").read_text())["result"]["words"]
    assert errors["1"] == [words["substitutions"], words["deletions"], words["insertions"]]
    assert words["deletions"] >= len(reader.texts()[0].split()) > 0


def test_every_combination_is_tried() -> None:
    job = tune_lm.TuneLm(
        ("c",), "o.json", "ctc-prefix-beam", search=tune_lm.SearchConfig(lm="x"), lm_scales=(0.1, 0.2), token_scores=(1.0, 2.0)
    )
    assert [(one.lm_scale, one.token_score) for one in job.candidates()] == [(0.1, 1.0), (0.1, 2.0), (0.2, 1.0), (0.2, 2.0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--token-scores", "0"], "there is nothing to choose from"),
        (["--lm-scales", "0.1", "0.2"], "search.lm_scale is 0.1, which has no effect without search.lm"),
        (["--word-scores", "0", "1"], "search.word_score is 0.0, which has no effect with method 'ctc-prefix-beam'"),
        (["--token-scores", "0", "1", "--output", "best.toml"], "output is 'best.toml', a name that ends in .json"),
    ],
)
def test_settings_without_sense_are_refused(
    files: list[str], options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune_lm.main([*files, *METHOD, "--output", str(tmp_path / "best.json"), *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "best.json").exists()


def test_a_file_that_exists_is_kept_and_transcripts_are_needed(
    reader: Any, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = tmp_path / "best.json"
    command = [*files, *METHOD, "--token-scores", "0", "1", "--output", str(best)]
    best.write_text("mine")
    assert tune_lm.main(command) == 2 and best.read_text() == "mine"
    CutSet.from_cuts(cut.drop_supervisions() for cut in CutSet.from_file(files[2])).to_file(tmp_path / "bare.jsonl.gz")
    best.unlink()
    assert tune_lm.main([*command, "--cuts", str(tmp_path / "bare.jsonl.gz")]) == 1
    assert "has no transcript, a development set needs one" in capsys.readouterr().err and not best.exists()
