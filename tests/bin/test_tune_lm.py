"""The program tune_lm on words of tones: it counts as decode does, and decode takes what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lhotse import CutSet

from k2ssl.bin import decode, decode_methods, tune_lm
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
    errors = [sum(map(int, row[2:5])) for row in rows]
    assert [row[5:] for row in rows] == [["best"], [], []]
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
    errors = {row[0]: [int(number) for number in row[2:5]] for row in (line.split() for line in capsys.readouterr().out.splitlines()[1:3])}
    assert decode.main([*command, "--search.token-score", "1", "--output", str(tmp_path / "one")]) == 0
    words = json.loads((tmp_path / "one/decode.json").read_text())["result"]["words"]
    assert errors["1"] == [words["substitutions"], words["deletions"], words["insertions"]]
    assert words["deletions"] >= len(reader.texts()[0].split()) > 0


def job_with(**settings: Any) -> tune_lm.TuneLm:
    search = tune_lm.SearchConfig(lm="x")
    return tune_lm.TuneLm(cuts=("c",), output="o.json", method="ctc-prefix-beam", search=search, **settings)


def test_every_combination_is_tried() -> None:
    job = job_with(lm_scales=(0.1, 0.2), token_scores=(1.0, 2.0))
    assert [(one.lm_scale, one.token_score) for one in job.candidates()] == [(0.1, 1.0), (0.1, 2.0), (0.2, 1.0), (0.2, 2.0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--token-scores", "0"], "there is nothing to choose from"),
        (["--lm-scales", "0.1", "0.2"], "search.lm_scale is 0.1, which has no effect without search.lm"),
        (["--word-scores", "0", "1"], "search.word_score is 0.0, which has no effect with method 'ctc-prefix-beam'"),
        (["--token-scores", "0", "1", "--output", "best.toml"], "output is 'best.toml', a name that ends in .json"),
        (["--token-scores", "0", "1", "--num-trials", "3"], "num_trials is 3, allowed are whole numbers >= 2, with strategy random alone"),
        (["--strategy", "random", "--token-scores", "1", "0"], "token_scores is 1.0 0.0, with strategy random the least and the most"),
        (["--strategy", "random"], "there is nothing to choose from"),
        (["--token-scores", "1", "0", "1"], "token_scores is 1.0 0.0 1.0, every value is needed once"),
        (["--token-scores", "0", "nan"], "token_scores is 0.0 nan, finite numbers are needed"),
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


def test_random_combinations_lie_in_their_ranges_and_depend_on_the_seed_alone() -> None:
    drawn = job_with(strategy="random", lm_scales=(0.0, 1.0), token_scores=(-1.0, 2.0), num_trials=40).candidates()
    assert len(set(drawn)) == 40
    scales, scores = ([getattr(one, name) for one in drawn] for name in ("lm_scale", "token_score"))
    assert 0 <= min(scales) < 0.1 and 0.9 < max(scales) <= 1 and -1 <= min(scores) < -0.7 and 1.7 < max(scores) <= 2
    fewer = job_with(strategy="random", lm_scales=(0.0, 1.0), token_scores=(-1.0, 2.0), num_trials=7)
    assert fewer.candidates() == drawn[:7]
    other = job_with(strategy="random", lm_scales=(0.0, 1.0), token_scores=(-1.0, 2.0), seed=1)
    assert len(other.candidates()) == 30 and other.candidates()[:7] != drawn[:7]


def test_an_interrupted_tuning_goes_on_and_ends_as_one_that_was_not(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    best, plain, tried = tmp_path / "best.json", tune_lm.errors_of, []
    grid = [*METHOD, "--token-scores", "-40", "0", "1", "40"]

    def interrupted(method: Any, search: Any, *rest: Any) -> Any:
        if len(tried) == 2:
            raise KeyboardInterrupt
        tried.append(search.token_score)
        return plain(method, search, *rest)

    assert tune_lm.main([*files, *grid, "--output", str(tmp_path / "whole.json")]) == 0
    whole = capsys.readouterr().out.splitlines()[:5]
    with monkeypatch.context() as patch:
        patch.setattr(tune_lm, "errors_of", interrupted)
        assert tune_lm.main([*files, *grid[:-1], "--output", str(best)]) == 130
    kept = tmp_path / "best.json.trials.jsonl"
    kept.write_bytes(kept.read_bytes() + b'{"search": {"tok')  # as a kill may leave it
    assert tried == [-40, 0] and not best.exists()
    assert tune_lm.main([*files, *grid, "--output", str(best), "--search.beam", "3"]) == 2
    assert "best.json.trials.jsonl: of another tuning: search" in capsys.readouterr().err and kept.exists()
    monkeypatch.setattr(
        tune_lm, "errors_of", lambda method, search, *rest: tried.append(search.token_score) or plain(method, search, *rest)
    )
    assert tune_lm.main([*files, *grid, "--output", str(best), "--overwrite", "True"]) == 0  # which replaces best.json, had there been one
    assert tried == [-40, 0, 1, 40] and capsys.readouterr().out.splitlines()[:5] == whole
    assert best.read_text() == (tmp_path / "whole.json").read_text() and not kept.exists()
    last = [*files, *METHOD, "--token-scores", "0", "1", "--output", str(best), "--overwrite", "True"]
    kept.write_text('{"what": "other"}\n')
    assert tune_lm.main(last) == 0
    assert tried[4:] == [0, 1] and not kept.exists(), "what is left of another tuning is passed over"
    monkeypatch.setattr(tune_lm, "errors_of", interrupted)
    del tried[1:]
    assert tune_lm.main(last) == 130
    monkeypatch.setattr(tune_lm, "errors_of", plain)
    kept.write_bytes(kept.read_bytes() + b'{"search": {"beams": 3}, "counts": {}}\n')  # of another version
    assert tune_lm.main(last[:-2]) == 2 and "best.json exists" in capsys.readouterr().err
    best.unlink()
    assert tune_lm.main(last[:-2]) == 2 and "a trial that cannot be read" in capsys.readouterr().err
    assert tune_lm.main(last) == 0 and best.exists() and not kept.exists()


def test_a_language_model_is_read_once_for_all_combinations(
    reader: Any, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"-0.8\t{word}" for word in ("<s>", "</s>", "<unk>", "|", *"ABCD")]
    model = tmp_path / "tokens.arpa"
    model.write_text("\n".join(["\\data\\", f"ngram 1={len(lines)}", "", "\\1-grams:", *lines, "", "\\end\\", ""]))
    reads, plain = [], decode_methods.load_lm
    monkeypatch.setattr(decode_methods, "load_lm", lambda *arguments: reads.append(1) or plain(*arguments))
    options = ["--search.lm", str(model)]
    command = [*files, *METHOD, *options, "--output", str(tmp_path / "best.json"), "--lm-scales", "0", "3", "--token-scores", "0", "5"]
    assert tune_lm.main(command) == 0 and len(reads) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:5]]
    for number, (scale, score, *found) in enumerate(rows):
        folder = tmp_path / str(number)
        alone = [*options, "--search.lm-scale", scale, "--search.token-score", score, "--output", str(folder)]
        assert decode.main([*files, *METHOD, *alone]) == 0
        words = json.loads((folder / "decode.json").read_text())["result"]["words"]
        assert [int(value) for value in found[1:4]] == [words[name] for name in ("substitutions", "deletions", "insertions")]
    assert len({tuple(row[2:6]) for row in rows}) > 1, "the combinations must differ for this to say anything"


def test_more_audio_than_there_is_memory_for_is_refused(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune_lm.os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 1000)
    assert tune_lm.main([*files, *METHOD, "--token-scores", "0", "1", "--output", str(tmp_path / "best.json")]) == 2
    assert "of memory, this machine has 0.0 GiB" in capsys.readouterr().err and not list(tmp_path.iterdir())
