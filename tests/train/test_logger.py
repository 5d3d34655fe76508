"""What a run tells: files read back, lines compared, a real pseudo-terminal."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import os
import pty
import struct
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from k2ssl.train import logger
from k2ssl.train.json_lines import read_json_lines
from k2ssl.train.logger import TrainingLog
from k2ssl.train.status_line import StatusLine, bar, clock_time

VALUES = {
    "loss": 5.12345,
    "accuracy_masked": 0.1234,
    "lr": 0.00045,
    "audio_hours": 1234.5,
    "hours_per_second": 0.167,
    "data_wait": 0.012,
    "memory_gib": 12.3,
}


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def opened(folder: Path | None, stream: Any = None, **changes: Any) -> TrainingLog:
    settings = {"total_steps": 1000, "resumed_at": 0, "quiet": False, "tensorboard": False, "clock": FakeClock()} | changes
    return TrainingLog(folder, stream=io.StringIO() if stream is None else stream, **settings)


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in lines]


def steps(folder: Path) -> list[tuple[str, int]]:
    return [(record["kind"], record["step"]) for record in records(folder)]


def test_every_line_of_the_file_is_an_object_with_the_values(tmp_path: Path) -> None:
    with opened(tmp_path / "new" / "run") as log:
        log.train(50, VALUES)
        log.valid(100, {"loss": float("nan"), "perplexity_predicted": 33.0})
        log.event(100, 'checkpoint "a"\nwritten')
    found = records(tmp_path / "new" / "run")
    times = [record.pop("time") for record in found]
    assert found == [
        {"kind": "train", "step": 50, **VALUES},
        {"kind": "valid", "step": 100, "loss": None, "perplexity_predicted": 33.0},
        {"kind": "event", "step": 100, "text": 'checkpoint "a"\nwritten'},
    ]
    assert all(len(time) == len("2026-01-01T00:00:00Z") and time.endswith("Z") for time in times)


def test_a_resumed_run_removes_what_came_after_its_checkpoint_but_no_events(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        for step in (50, 100, 150):
            log.train(step, {"loss": float(step)})
            log.valid(step, {"loss": 1.0})
        log.event(150, "interrupted")
    with opened(tmp_path, resumed_at=100) as log:
        log.train(150, {"loss": 7.0})
    assert steps(tmp_path) == [("train", 50), ("valid", 50), ("train", 100), ("valid", 100), ("event", 150), ("train", 150)]
    assert records(tmp_path)[-1]["loss"] == 7.0 and records(tmp_path)[2]["loss"] == 100.0


def test_a_torn_last_line_is_removed_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path) as log:
        log.train(50, {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "train", "st')
    with caplog.at_level(logging.WARNING), opened(tmp_path, resumed_at=50) as log:
        log.train(100, {"loss": 2.0})
    assert steps(tmp_path) == [("train", 50), ("train", 100)]
    assert caplog.messages == [f"{path}: 1 damaged lines are removed"]


def test_a_file_with_nothing_to_remove_is_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        log.train(50, {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    with opened(tmp_path, resumed_at=50):
        pass
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


def test_removing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as log:
        log.train(50, {"loss": 1.0})
        log.train(100, {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        opened(tmp_path, resumed_at=50)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before and os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_run_that_goes_back_rewinds_its_log(tmp_path: Path) -> None:
    with opened(tmp_path) as log:
        for step in (50, 100, 150):
            log.train(step, {"loss": float(step)})
        log.event(160, "rolled back")
        log.rewind(100)
        log.train(150, {"loss": 7.0})
    assert steps(tmp_path) == [("train", 50), ("train", 100), ("event", 160), ("train", 150)]


def test_without_a_folder_lines_are_shown_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stream = io.StringIO()
    with opened(None, stream, tensorboard=True) as log:
        log.train(50, VALUES)
        log.rewind(0)
        log.train(50, VALUES)
    assert stream.getvalue().count("\n") == 2 and not list(tmp_path.iterdir())


def test_only_rank_0_writes_and_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "is_main", lambda: False)
    stream = Terminal()
    with opened(tmp_path, stream, tensorboard=True) as log:
        log.train(50, VALUES)
        log.tick(51)
        log.valid(50, VALUES)
        log.event(50, "x")
    assert not stream.getvalue() and not list(tmp_path.iterdir())


def test_a_value_may_not_take_a_name_of_ours(tmp_path: Path) -> None:
    with opened(tmp_path) as log, pytest.raises(ValueError, match=r"TrainingLog.train: a value is named 'step', allowed are names other"):
        log.train(50, {"step": 3.0})
    assert not records(tmp_path)


def test_a_log_gets_plain_lines_with_everything_that_people_ask_for() -> None:
    stream, clock = io.StringIO(), FakeClock()
    with opened(None, stream, clock=clock, resumed_at=200) as log:
        clock.now += 100.0
        log.tick(249)
        log.train(250, VALUES)
        log.valid(250, {"loss": 4.0, "accuracy_masked": 0.25, "num_targets": 9.0, "dropped_batches": 0.0})
        log.event(250, "checkpoint")
    assert stream.getvalue().splitlines() == [
        "step 250 of 1,000 (25%), loss 5.123, masked accuracy 12.3%, lr 0.00045, 1,234.50 h of audio, 0.167 h/s, 0:25:00 left, "
        "1% waiting for data, 12.30 GiB",
        "step 250: validation, loss 4, masked accuracy 25.0%",
        "step 250: checkpoint",
    ]


def test_batches_left_out_of_the_sums_are_not_kept_from_people() -> None:
    stream = io.StringIO()
    with opened(None, stream, total_steps=None) as log:
        log.train(50, {"loss": 2.0, "dropped_batches": 1200.0, "data_wait": 0.5})
        log.valid(50, {"loss": 2.0, "dropped_batches": 3.0})
    assert stream.getvalue().splitlines() == [
        "step 50, loss 2, 1200 batches without a finite loss, 50% waiting for data",
        "step 50: validation, loss 2, 3 batches without a finite loss",
    ]


def test_without_a_known_end_no_remaining_time_is_shown() -> None:
    for unknown in (None, 0):
        stream = io.StringIO()
        with opened(None, stream, total_steps=unknown) as log:
            log.train(2500, {"loss": 2.0})
        assert stream.getvalue() == "step 2,500, loss 2\n"


def test_the_remaining_time_after_going_back_follows_the_steps_since_then() -> None:
    stream, clock = io.StringIO(), FakeClock()
    with opened(None, stream, clock=clock) as log:
        clock.now += 900.0
        log.train(900, {})
        log.rewind(500)
        clock.now += 20.0
        log.train(510, {})
    assert stream.getvalue().splitlines() == ["step 900 of 1,000 (90%), 0:01:40 left", "step 510 of 1,000 (51%), 0:16:20 left"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_that_moves_and_lines_that_stay_above_it() -> None:
    stream, clock = Terminal(), FakeClock()
    with opened(None, stream, clock=clock) as log:
        clock.now += 10.0
        log.train(100, {"loss": 2.0})
        for step in (101, 102, 103, 104):
            clock.now += 0.11
            log.tick(step)
        log.event(104, "skipped a step")
    shown = stream.getvalue().split("\r\x1b[K")[1:]
    assert shown == [
        "[##..................] step 100 of 1,000 (10%), loss 2, 0:01:30 left",
        "[##..................] step 102 of 1,000 (10%), loss 2, 0:01:30 left",
        "[##..................] step 104 of 1,000 (10%), loss 2, 0:01:30 left",
        "step 104: skipped a step\n",
        "[##..................] step 104 of 1,000 (10%), loss 2, 0:01:30 left\n",
    ]


def test_quiet_means_plain_lines_in_a_terminal_too() -> None:
    stream = Terminal()
    with opened(None, stream, quiet=True) as log:
        log.tick(1)
        log.train(50, {"loss": 2.0})
    assert stream.getvalue() == "step 50 of 1,000 (5%), loss 2, 0:00:00 left\n"


def test_in_a_real_terminal_the_bar_is_cut_to_its_width() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    with os.fdopen(theirs, "w") as stream, opened(None, stream) as log:
        log.train(500, VALUES)
    assert read_terminal(ours) == "\r\x1b[K[##########..........] step 500 of 1,00\r\n"


def read_terminal(ours: int) -> str:
    """All that was written to the other end, which is closed; a single read may return a part of it."""
    pieces = []
    with contextlib.suppress(OSError):  # EIO: nothing is left
        while piece := os.read(ours, 10000):
            pieces.append(piece)
    os.close(ours)
    return b"".join(pieces).decode()


def test_nothing_is_left_of_a_bar_that_was_never_drawn() -> None:
    stream = Terminal()
    StatusLine(stream).close()
    assert stream.getvalue() == ""
    assert [bar(share) for share in (-1.0, 0.5, 2.0)] == [f"[{'.' * 20}]", f"[{'#' * 10}{'.' * 10}]", f"[{'#' * 20}]"]
    assert [clock_time(seconds) for seconds in (0.4, 59.6, 3661, 360000)] == ["0:00:00", "0:01:00", "1:01:01", "100:00:00"]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = EventAccumulator(str(folder / "tensorboard"))
    files.Reload()
    return {tag: [(event.step, event.value) for event in files.Scalars(tag)] for tag in files.Tags()["scalars"]}


def test_tensorboard_shows_the_same_values_and_none_twice_after_a_resume(tmp_path: Path) -> None:
    with opened(tmp_path, tensorboard=True) as log:
        for step in (50, 100, 150):
            log.train(step, {"loss": step / 4, "lr": 0.5})
        log.valid(150, {"loss": 0.125})
        log.event(150, "checkpoint")
    with opened(tmp_path, tensorboard=True, resumed_at=100) as log:
        log.train(150, {"loss": 7.0, "lr": 0.25})
        log.rewind(100)
        log.train(150, {"loss": 8.0, "lr": 0.25})
    seen = curves(tmp_path)
    assert seen["train/loss"] == [(50, 12.5), (100, 25.0), (150, 8.0)]
    assert seen["train/lr"] == [(50, 0.5), (100, 0.5), (150, 0.25)]
    written = {(record["step"], record["loss"]) for record in records(tmp_path) if record["kind"] == "train"}
    assert written == set(seen["train/loss"])


def test_without_tensorboard_a_line_says_so_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    stream = io.StringIO()
    with opened(tmp_path, stream, tensorboard=True) as log:
        log.train(50, {"loss": 2.0})
        log.rewind(0)
    assert stream.getvalue().splitlines()[0] == "TensorBoard is not installed: curves are in metrics.jsonl only"
    assert stream.getvalue().count("TensorBoard") == 1 and os.listdir(tmp_path) == ["metrics.jsonl"]


def test_the_file_is_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    log = opened(tmp_path)
    log.train(50, {"loss": 2.0})
    assert read_json_lines(tmp_path / "metrics.jsonl")[0][0]["loss"] == 2.0
    log.close()
    log.close()
