"""The report program on a hand-made output folder, on a run of the training program, and on bad input."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from k2ssl.bin import pretrain
from k2ssl.bin.report import main
from k2ssl.bin.score import main as score
from k2ssl.report.card import read_card

FILES = {"report.md", "report.html", "tables.tex", "wer.csv", "cost.csv", "loss_curves.png", "wer_by_hours.png", "labels_train.png"}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """See tests/report/conftest.py."""
    spec = importlib.util.spec_from_file_location("report_world", Path(__file__).parents[1] / "report/conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module.World(tmp_path)


def rows(path: Path) -> dict[str, dict[str, str]]:
    with path.open() as file:
        return {row["system"]: row for row in csv.DictReader(file)}


def test_one_command_makes_all_tables_and_pictures(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(["out/decode/ssl-greedy/hypotheses.jsonl", "out/decode/scratch-greedy/hypotheses.jsonl", "--output", "out/score"]) == 0
    capsys.readouterr()
    assert main(["out", "--output", "tables", "--baseline", "scratch", "--title", "My title"]) == 0
    told = capsys.readouterr().out
    assert {path.name for path in Path("tables").iterdir()} == FILES
    scored = [file["word"] for file in json.loads(Path("out/score/wer.json").read_text())["files"]]
    found = rows(Path("tables/wer.csv"))
    for name, word in zip(("ssl", "scratch"), scored, strict=True):
        assert [float(found[name][key]) for key in ("wer", "low", "high", "errors", "words")] == [
            word[key] for key in ("rate", "low", "high", "errors", "reference")
        ]
    assert float(rows(Path("tables/cost.csv"))["ssl"]["total_cpu_hours"]) == pytest.approx(0.38)
    for text in ("11.11", "33.33", "66.7 %", "0.26x", "0.380 CPU-h"):  # (3 - 1) / 3, and 0.1 h / 0.38 h
        assert text in told and text in Path("tables/report.md").read_text()
    assert Path("tables/report.md").read_text().startswith("# My title\n") and "My title" in Path("tables/report.html").read_text()


def test_cards_get_their_error_rates_unless_they_are_only_read(world: Any) -> None:
    assert main(["out", "--output", "tables", "--cards", "False"]) == 0
    assert not list(world.out.rglob("card.json"))
    assert main(["out", "--output", "tables", "--overwrite", "True"]) == 0
    card = read_card(world.out / "ssl/card.json")
    assert [(wer.errors, wer.words) for wer in card.results] == [(1, 9)] and card.usage.cpu_hours == 0.05


def test_several_baselines_have_tables_of_their_own(world: Any) -> None:
    assert main(["out", "--output", "tables", "--baseline", "scratch", "ssl"]) == 0
    text, tex = Path("tables/report.md").read_text(), Path("tables/tables.tex").read_text()
    for name, reduction in (("scratch", "66.7 %"), ("ssl", "-200.0 %")):
        assert reduction in text.partition(f"## Against {name}, without a language model")[2].partition("\n## ")[0]
    assert tex.count(r"\label{tab:compared-no-lm}") == tex.count(r"\label{tab:compared-no-lm-2}") == 1


def test_a_second_report_is_the_same(world: Any) -> None:
    assert main(["out", "--output", "one"]) == main(["out", "--output", "two"]) == 0
    for name in FILES:
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes(), name


def test_a_report_below_the_experiments_is_not_one_of_them(world: Any) -> None:
    assert main(["out", "--output", "out/report"]) == main(["out", "--output", "out/report", "--overwrite", "True"]) == 0
    assert len(rows(Path("out/report/wer.csv"))) == 2


def test_rows_of_the_literature_are_apart_and_marked(world: Any) -> None:
    Path("rows.toml").write_text('[[result]]\nsystem = "Theirs"\nsource = "Paper"\ntag = "third-party"\nnumbers = { "WER %" = 1.5 }\n')
    assert main(["out", "--output", "tables", "--references", "rows.toml"]) == 0
    before, _, after = Path("tables/report.md").read_text().partition("## From the literature, not measured here")
    assert "Theirs" not in before and "| Theirs | WER % 1.5 | third-party |" in after and "Theirs" not in Path("tables/wer.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: there is no such folder"),
        (["out/cuts"], "out/cuts: no runs"),
        (["out", "--baseline", "best"], "baseline is 'best', allowed are those with results: scratch, ssl"),
        (["out", "--references", "none.toml"], "none.toml: cannot be read"),
        ([], "experiments"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    world: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    try:
        status = main([*arguments, "--output", "tables"])
    except SystemExit as end:
        status = int(str(end.code))
    assert status == 2 and not Path("tables").exists() and not list(world.out.rglob("card.json"))
    assert message in capsys.readouterr().err


def test_a_report_that_exists_is_kept(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("tables").mkdir()
    Path("tables/report.md").write_text("mine")
    assert main(["out", "--output", "tables"]) == 2
    assert "--overwrite True" in capsys.readouterr().err and Path("tables/report.md").read_text() == "mine"
    assert [path.name for path in Path("tables").iterdir()] == ["report.md"]


def test_a_damaged_card_is_named_and_made_anew(world: Any, caplog: pytest.LogCaptureFixture) -> None:
    (world.out / "ssl/card.json").write_text('{"format": "k2ssl-card", "version": 7}')
    assert main(["out", "--output", "tables"]) == 0
    assert "ssl/card.json: version is 7" in caplog.text and read_card(world.out / "ssl/card.json").results


def test_what_is_passed_over_is_warned_of_and_in_the_report(world: Any, caplog: pytest.LogCaptureFixture) -> None:
    (world.out / "decode/ssl-greedy/decode.json").write_text("{")
    assert main(["out", "--output", "tables"]) == 0
    assert "decode.json: damaged" in caplog.text and "decode.json: damaged" in Path("tables/report.md").read_text()


def test_a_training_run_leaves_its_card_and_a_report_takes_it_over(sounds: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretrain.main(sounds.command(run, "--trainer.max-steps", "2", "--preflight.run", "False", "--data.num-workers", "0")) == 0
    card = read_card(run / "card.json")
    assert card.program == "pretrain" and card.updates == 2 and card.usage.steps == 2 and card.usage.sessions == {"done": 1}
    assert card.settings == json.loads((run / "settings.json").read_text()) and card.command and card.parameters and card.code.k2ssl
    assert card.data[0].cuts == 30 and card.data[0].sha256 and card.labels[0].features == "mfcc" and card.init is None
    assert main([str(run), "--output", str(tmp_path / "tables")]) == 0
    assert read_card(run / "card.json") == card
    (row,) = rows(tmp_path / "tables/cost.csv").values()
    assert int(row["parameters"]) == card.parameters and int(row["updates"]) == 2
