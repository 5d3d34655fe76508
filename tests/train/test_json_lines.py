"""Records that survive the death of who writes them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from k2ssl.train.json_lines import JsonLines, read_json_lines


def test_records_come_back_and_numbers_unknown_to_json_are_null(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with JsonLines(path) as lines:
        lines.append({"step": 1, "loss": 0.1 + 0.2, "text": "ein Satz\n", "x": None})
        lines.append({"nan": float("nan"), "inf": float("inf"), "most": -float("inf")})
    assert read_json_lines(path) == (
        [{"step": 1, "loss": 0.1 + 0.2, "text": "ein Satz\n", "x": None}, {"nan": None, "inf": None, "most": None}],
        0,
    )
    assert path.read_bytes().count(b"\n") == 2 and b"NaN" not in path.read_bytes()


def test_a_record_is_in_the_file_when_append_returns(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "a.jsonl")
    lines.append({"step": 1})
    assert read_json_lines(tmp_path / "a.jsonl") == ([{"step": 1}], 0)


def test_only_synchronised_files_are_forced_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda number: forced.append(number))
    for name, sync in (("a", False), ("b", True)):
        with JsonLines(tmp_path / name, sync=sync) as lines:
            lines.append({})
            lines.append({})
        assert len(forced) == (2 if sync else 0)


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3, "text": "\xc3', b"[1, 2]\n", b"\x00\x00\x00"])
def test_a_torn_line_is_passed_over_and_does_not_spoil_the_next(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step": 1}\n\n{"step": 2}\n' + torn)
    assert read_json_lines(path) == ([{"step": 1}, {"step": 2}], 1)
    with JsonLines(path) as lines:
        lines.append({"step": 4})
    assert read_json_lines(path) == ([{"step": 1}, {"step": 2}, {"step": 4}], 1)


def test_a_whole_line_without_its_end_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    assert read_json_lines(path) == ([{"step": 1}, {"step": 2}], 0)


def test_two_writers_share_a_file(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "a") as one, JsonLines(tmp_path / "a") as other:
        for number in range(4):
            (one if number % 2 else other).append({"n": number})
    with JsonLines(tmp_path / "a") as again:
        again.append({"n": 4})
    assert (tmp_path / "a").read_text() == "".join(f'{{"n": {number}}}\n' for number in range(5))


_WRITER = """
import itertools, sys
from k2ssl.train.json_lines import JsonLines
lines = JsonLines(sys.argv[1])
for n in itertools.count():
    lines.append({"n": n, "text": "x" * 100})
    if n == 50:
        print("going", flush=True)
"""


def test_a_writer_killed_in_the_middle_loses_at_most_the_line_it_was_writing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "going\n"
        child.send_signal(signal.SIGKILL)
    records, damaged = read_json_lines(path)
    assert [record["n"] for record in records] == list(range(len(records)))
    assert len(records) > 50 and damaged <= 1


def test_other_things_than_plain_values_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "a") as lines:
        with pytest.raises(TypeError):
            lines.append({"path": tmp_path})
        lines.append({"x": 1})
    assert json.loads((tmp_path / "a").read_text()) == {"x": 1}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_with_the_name_of_the_file() -> None:
    lines = JsonLines("/dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        lines.append({"x": 1})
