"""A trace of the steps that were asked for, and of no others."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

import pytest
import torch

from k2ssl.train import profiler
from k2ssl.train.profiler import profile_steps


def train(folder: Path, first: int, last: int, steps: range, fails_at: int | None = None) -> None:
    weight = torch.ones(17, 17)
    with profile_steps(folder, first, last) as before_step:
        for step in steps:
            before_step(step)
            torch.addmm(weight[step], weight, weight)
            if step == fails_at:
                raise ArithmeticError


def traced(path: Path) -> tuple[list[int], int]:
    """The steps marked in a trace, and how many matrix products lie within them."""
    events = json.loads(path.read_text())["traceEvents"]
    marks = {}
    for event in events:
        if (found := re.fullmatch(r"optimizer step (\d+)", event.get("name", ""))) and event.get("ph") == "X":
            marks[int(found[1])] = (event["ts"], event["ts"] + event["dur"])
    products = [event["ts"] for event in events if event.get("name") == "aten::addmm"]
    assert all(marks[step][1] <= marks[step + 1][0] for step in marks if step + 1 in marks)
    assert all(any(start <= at <= end for start, end in marks.values()) for at in products)
    return sorted(marks), len(products)


def test_the_trace_holds_the_steps_asked_for_with_the_shapes_of_their_operands(tmp_path: Path) -> None:
    train(tmp_path / "new", 3, 4, range(1, 8))
    assert os.listdir(tmp_path / "new") == ["trace-steps-3-4.json"]
    path = tmp_path / "new" / "trace-steps-3-4.json"
    assert traced(path) == ([3, 4], 2)
    assert "[17, 17]" in path.read_text()


def test_it_is_there_as_soon_as_the_last_step_is_over(tmp_path: Path) -> None:
    with profile_steps(tmp_path, 1, 1) as before_step:
        before_step(1)
        torch.ones(2) + 1
        assert not os.listdir(tmp_path)
        before_step(2)
        assert os.listdir(tmp_path) == ["trace-steps-1-1.json"]


def test_a_run_that_ends_or_fails_early_leaves_the_steps_it_came_to(tmp_path: Path) -> None:
    train(tmp_path / "ends", 2, 9, range(1, 4))
    assert traced(tmp_path / "ends" / "trace-steps-2-3.json") == ([2, 3], 2)
    with pytest.raises(ArithmeticError):
        train(tmp_path / "fails", 2, 9, range(1, 9), fails_at=4)
    assert traced(tmp_path / "fails" / "trace-steps-2-4.json") == ([2, 3, 4], 3)


def test_a_run_resumed_within_the_range_traces_the_rest(tmp_path: Path) -> None:
    train(tmp_path, 2, 6, range(5, 9))
    assert traced(tmp_path / "trace-steps-5-6.json") == ([5, 6], 2)


@pytest.mark.parametrize("steps", [range(7, 10), range(1, 2), range(1, 3)])
def test_steps_that_do_not_come_by_are_told_and_leave_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: range) -> None:
    with caplog.at_level(logging.WARNING):
        train(tmp_path, 3, 4, steps)
    assert caplog.messages == ["steps 3 to 4 did not come by: nothing was profiled"]
    assert not os.listdir(tmp_path)
    train(tmp_path, 1, 1, range(1, 3))  # and another profile can be made
    assert traced(tmp_path / "trace-steps-1-1.json") == ([1], 1)


def test_only_rank_0_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "is_main", lambda: False)
    train(tmp_path / "new", 1, 2, range(1, 4))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("first", "last"), [(0, 2), (3, 2)])
def test_an_impossible_range_is_refused(tmp_path: Path, first: int, last: int) -> None:
    with pytest.raises(ValueError, match=f"profile_steps: steps {first} to {last}, allowed is 1 <= first <= last"):
        train(tmp_path, first, last, range(1, 3))
