"""What runs used, summed over sessions that ended in all ways."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from k2ssl.train import ledger
from k2ssl.train.ledger import Ledger, total

CPU = torch.device("cpu")


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def session(folder: Path, seconds: float, status: str | None = "done", program: str = "train", **used: Any) -> None:
    """One session that writes half-way and at its end; without a status it is killed after it wrote half-way."""
    clock = FakeClock()
    one = Ledger(folder, program, CPU, 2, clock=clock)
    one.add(audio_seconds=used.get("audio_seconds", 0.0) / 2, steps=used.get("steps", 0) // 2)
    clock.now += seconds / 2
    one.write()
    one.add(audio_seconds=used.get("audio_seconds", 0.0) / 2, steps=used.get("steps", 0) // 2)
    clock.now += seconds / 2
    if status is not None:
        one.close(status)  # type: ignore[arg-type]


def test_a_session_costs_wall_time_times_processes_times_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    session(tmp_path, 7200.0, audio_seconds=36000.0, steps=100)
    used = total(tmp_path)
    assert (used.wall_hours, used.cpu_hours, used.gpu_hours, used.audio_hours, used.steps) == (2.0, 12.0, 0.0, 10.0, 100)
    assert used.sessions == {"done": 1} and used.damaged_lines == 0
    assert list(used.by_program) == ["train"] and used.by_program["train"].cpu_hours == 12.0
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [line["real_time_factor"] for line in lines] == [0.2, 0.2]


def test_time_counts_from_a_reading_of_the_clock_that_came_before(tmp_path: Path) -> None:
    clock = FakeClock()
    began = clock.now
    clock.now += 1000.0
    with Ledger(tmp_path, "train", CPU, 1, clock=clock, since=began):
        clock.now += 800.0
    assert total(tmp_path).wall_hours == pytest.approx(0.5)


def test_without_audio_there_is_no_real_time_factor(tmp_path: Path) -> None:
    session(tmp_path, 10.0, steps=4)
    assert {json.loads(line)["real_time_factor"] for line in (tmp_path / "ledger.jsonl").read_text().splitlines()} == {None}


def test_a_gpu_run_counts_gpu_hours_and_no_cpu_hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([5 * 2**30, 3 * 2**30])  # the second time the peak had been reset
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    clock = FakeClock()
    one = Ledger(tmp_path, "train", torch.device("cuda", 0), 8, clock=clock)
    one.write()
    clock.now += 1800.0
    one.close()
    used = total(tmp_path)
    assert (used.gpu_hours, used.cpu_hours, used.peak_gpu_bytes, used.devices) == (4.0, 0.0, 5 * 2**30, ("8 x GPU of cuda:0",))
    assert (
        "4.00 GPU-hours; 0.00 h" in used.text()
        and "\n" not in used.text()
        and "CPU" not in used.text()
        and "5.00 GiB on the GPU" in used.text()
    )


def test_three_sessions_are_summed_and_the_killed_one_counts_up_to_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    session(tmp_path, 3600.0, "interrupted", audio_seconds=7200.0, steps=10)
    session(tmp_path, 7200.0, None, audio_seconds=14400.0, steps=20)  # one hour, two hours of audio and 10 steps were written
    with open(tmp_path / "ledger.jsonl", "ab") as file:
        file.write(b'{"session": "torn", "wall_sec')
    session(tmp_path, 1800.0, audio_seconds=3600.0, steps=6, program="label")
    used = total(tmp_path)
    assert (used.wall_hours, used.cpu_hours, used.audio_hours, used.steps) == (2.5, 5.0, 5.0, 26)
    assert used.sessions == {"done": 1, "interrupted": 1, "running": 1} and used.damaged_lines == 1
    assert {program: (part.wall_hours, part.steps) for program, part in used.by_program.items()} == {"train": (2.0, 20), "label": (0.5, 6)}


def test_the_text_tells_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(ledger, "_device_name", lambda device: "Some CPU")
    session(tmp_path, 3600.0, audio_seconds=7200.0, steps=1000)
    session(tmp_path, 3600.0, None, program="label")
    rows = total(tmp_path).text().splitlines()
    memory = f"peak memory {total(tmp_path).peak_host_bytes / 2**30:.2f} GiB"
    assert rows == [
        f"in all: 3.00 CPU-hours; 2.00 h of audio; 1,000 steps; {memory}; on 2 x Some CPU; sessions: 1 done, 1 running or killed",
        f"  label: 1.00 CPU-hours; 0.00 h of audio; {memory}; on 2 x Some CPU; sessions: 1 running or killed",
        f"  train: 2.00 CPU-hours; 2.00 h of audio; 1,000 steps; {memory}; on 2 x Some CPU; sessions: 1 done",
    ]


def test_memory_is_the_high_water_mark_of_the_process_in_bytes(tmp_path: Path) -> None:
    Ledger(tmp_path, "train", CPU, 1).close()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    now = int(peak.split()[1]) * 1024
    assert 0.9 * now <= total(tmp_path).peak_host_bytes <= 1.1 * now


def test_several_places_are_summed_and_a_session_in_two_of_them_counts_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        session(tmp_path / name, 3600.0, steps=4)
    copied = tmp_path / "copy.jsonl"
    copied.write_bytes((tmp_path / "a" / "ledger.jsonl").read_bytes().splitlines(keepends=True)[0])  # an early copy: half the steps
    assert total(tmp_path / "a", tmp_path / "b" / "ledger.jsonl", copied).steps == 8
    assert total(copied).steps == 2


@pytest.mark.parametrize(("error", "end"), [(None, "done"), (KeyboardInterrupt, "interrupted"), (RuntimeError, "failed")])
def test_the_way_a_block_ends_is_recorded(tmp_path: Path, error: type[BaseException] | None, end: str) -> None:
    try:
        with Ledger(tmp_path, "train", CPU, 1) as one:
            one.add(steps=3)
            if error is not None:
                raise error
    except (KeyboardInterrupt, RuntimeError):
        pass
    one.close("done")  # too late to change it
    assert total(tmp_path).sessions == {end: 1} and total(tmp_path).steps == 3
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 1


def test_every_line_is_forced_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda number: forced.append(number))
    session(tmp_path, 2.0)
    assert len(forced) == 2


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "is_main", lambda: False)
    session(tmp_path / "new", 2.0)
    assert not list(tmp_path.iterdir())


def test_lines_of_something_else_are_not_counted_but_told(tmp_path: Path) -> None:
    session(tmp_path, 3600.0, steps=4)
    with open(tmp_path / "ledger.jsonl", "ab") as file:
        file.write(b'{"session": "x", "steps": "many"}\n[]\n')
    assert total(tmp_path).steps == 4
    assert total(tmp_path).text().endswith("\n2 damaged lines are not counted")


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Ledger: num_devices is 0, allowed is >= 1"):
        Ledger(tmp_path, "train", CPU, 0)
    with pytest.raises(FileNotFoundError, match=r"ledger\.jsonl"):
        total(tmp_path)
    (tmp_path / "ledger.jsonl").touch()
    assert total(tmp_path).text() == "nothing was recorded"


_RUN = """
import itertools, sys
import torch
from k2ssl.train.ledger import Ledger
with Ledger(sys.argv[1], "train", torch.device("cpu"), 1) as ledger:
    for n in itertools.count():
        ledger.add(steps=1)
        ledger.write()
        if n == 20:
            print("going", flush=True)
"""


def test_a_process_killed_while_it_writes_keeps_what_it_had_written(tmp_path: Path) -> None:
    for starts in (1, 2):
        with subprocess.Popen([sys.executable, "-c", _RUN, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None and child.stdout.readline() == "going\n"
            child.send_signal(signal.SIGKILL)
        used = total(tmp_path)
        assert used.sessions == {"running": starts} and used.steps > 20 * starts and used.damaged_lines < starts + 1
    first = json.loads((tmp_path / "ledger.jsonl").read_text().splitlines()[0])
    assert first["program"] == "train" and first["device"] and first["num_devices"] == 1
