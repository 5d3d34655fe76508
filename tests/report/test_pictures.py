"""Pictures: what is drawn is what was measured, and no text lies on another."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from k2ssl.bin.report import interval
from k2ssl.report import pictures
from k2ssl.report.chain import cost_of, follow
from k2ssl.report.experiments import find
from k2ssl.report.tables import System
from k2ssl.train.json_lines import read_json_lines


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn from now on."""
    figures: list[Any] = []
    plain = pictures._png
    monkeypatch.setattr(pictures, "_png", lambda figure: (figures.append(figure), plain(figure))[1])
    return figures


def systems(world: Any) -> list[System]:
    runs = find(["out"], interval).runs
    return [System(run.name, run.card, cost_of(follow(run, runs)), run.card.results) for run in runs.values()]


def assert_apart(figure: Any) -> None:
    """Titles, axis names and legends do not overlap, nor are they cut off."""
    renderer = figure.canvas.get_renderer()
    boxes = []
    for panel in figure.axes:
        texts = [panel.title, panel.xaxis.label, panel.yaxis.label, *([panel.get_legend()] if panel.get_legend() else [])]
        boxes += [text.get_window_extent(renderer) for text in texts if not hasattr(text, "get_text") or text.get_text()]
    width, height = figure.canvas.get_width_height()
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
    assert not any(one.overlaps(two) for one, two in combinations(boxes, 2))


def metrics(world: Any) -> dict[str, Any]:
    return {
        name: (program, read_json_lines(world.out / name / "metrics.jsonl")[0])
        for name, program in {"pretrain": "pretrain", "ssl": "finetune", "scratch": "finetune"}.items()
    }


def test_curves_show_every_run_with_its_validation(world: Any, drawn: list[Any], tmp_path: Path) -> None:
    picture = pictures.loss_curves(metrics(world))
    assert picture is not None
    (tmp_path / "x.png").write_bytes(picture)
    assert matplotlib.image.imread(tmp_path / "x.png").shape[0] > 300
    (figure,) = drawn
    loss, accuracy, _, wer = figure.axes
    assert [list(line.get_data()[1]) for line in loss.lines] == [[2.5, 2.0], [2.5]]
    assert [list(line.get_data()[1]) for line in accuracy.lines] == [[40.0, 40.0], [50.0]]
    assert [(list(line.get_data()[0]), list(line.get_data()[1])) for line in wer.lines] == [([50], [30.0])] * 2
    assert [text.get_text() for text in wer.get_legend().get_texts()] == ["ssl", "scratch"]
    assert_apart(figure)


def test_a_run_with_one_line_in_its_log_is_seen_too(drawn: list[Any]) -> None:
    for steps in ([50], [50, 100]):
        records = [{"kind": "train", "step": step, "loss_masked": 9.0, "loss": 9.0} for step in steps]
        assert pictures.loss_curves({"short": ("pretrain", records)}) is not None
    assert [figure.axes[0].lines[0].get_marker() for figure in drawn] == ["+", "None"]


def test_without_records_there_are_no_curves(world: Any) -> None:
    assert pictures.loss_curves({"a": ("pretrain", [])}) is None


def test_error_rates_stand_over_the_hours_of_the_whole_chain(world: Any, drawn: list[Any]) -> None:
    changes: dict[str, Any] = {"what": {"search": {"lm": "w.arpa", "lm_scale": 1.0}}, "settings": {"search": {"lm": "w.arpa"}}}
    world.decoding("lm", "ssl", ["a b"], ["a c"], **changes)
    assert pictures.wer_by_hours(systems(world)) is not None
    (figure,) = drawn
    assert [panel.get_title() for panel in figure.axes] == ["test, no language model", "test, with a language model"]
    plain, with_lm = (
        [[(round(x, 9), round(y, 6)) for x, y in line.get_xydata()] for line in panel.lines if len(line.get_xydata()) == 1]
        for panel in figure.axes
    )
    assert [(0.38, round(100 / 9, 6))] in plain and [(0.1, round(300 / 9, 6))] in plain
    assert [(0.38, 50.0)] in with_lm and not any(point[0][1] == 50.0 for point in plain)
    assert "CPU-hours" in figure.axes[0].get_xlabel()
    assert_apart(figure)


def test_systems_of_unknown_cost_are_not_drawn(world: Any) -> None:
    (world.out / "pretrained.pt").unlink()
    some = [system for system in systems(world) if system.name == "ssl"]
    assert some[0].results and pictures.wer_by_hours(some) is None


def test_many_systems_and_long_names_still_do_not_overlap(world: Any, drawn: list[Any]) -> None:
    for i in range(12):
        world.run(f"system_with_a_long_name_{i}", "finetune", seconds=(100.0 * (i + 1),), steps=50)
        search = {"beam": 100, "lexicon": "a_rather_long_lexicon.txt", "beam_threshold": 50.0 + i // 3}
        world.decoding(f"d{i}", f"system_with_a_long_name_{i}", ["a b"], ["a c"], what={"search": search})
    assert pictures.wer_by_hours(systems(world)) is not None
    records = {system.name: ("finetune", read_json_lines(world.out / system.name / "metrics.jsonl")[0]) for system in systems(world)}
    assert pictures.loss_curves(records) is not None
    for figure in drawn:
        assert_apart(figure)
