"""The folder of a run is one process' own."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from k2ssl.bin.folder_lock import alone_in
from k2ssl.train.checkpoint import CheckpointFolder, KeepConfig
from k2ssl.train.ledger import Ledger

_HOLDS = """
import sys
from pathlib import Path
from k2ssl.bin.folder_lock import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_gone_even_when_it_was_killed(tmp_path: Path) -> None:
    output = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", _HOLDS, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another process works in this folder"), alone_in(output):
        pass
    first.kill()
    first.communicate()
    with alone_in(output):
        pass


def test_a_process_that_was_forked_meanwhile_does_not_hold_the_folder(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with alone_in(tmp_path / "run"):
        child = os.fork()
        if not child:
            os.write(writing, b"!")
            signal.pause()
        os.read(reading, 1)
        (tmp_path / "run/file").touch()
    try:
        with alone_in(tmp_path / "run"), pytest.raises(ValueError, match="another process works"), alone_in(tmp_path / "run"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_one_after_the_other_is_fine(tmp_path: Path) -> None:
    for _ in range(2):
        with alone_in(tmp_path):
            pass


def test_a_folder_in_which_nothing_was_written_is_left_as_it_was_found(tmp_path: Path) -> None:
    def open_files(output: Path) -> None:
        CheckpointFolder(output / "checkpoints", KeepConfig())
        Ledger(output, "train", torch.device("cpu"), 1)

    with pytest.raises(KeyError), alone_in(tmp_path / "new/run"):
        open_files(tmp_path / "new/run")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with alone_in(tmp_path / "mine"):
        open_files(tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize("name", ["settings.json", "checkpoints/step-000000000.pt", "ledger.jsonl"])
def test_a_folder_in_which_something_was_written_keeps_all(tmp_path: Path, name: str) -> None:
    output = tmp_path / "run"
    with alone_in(output):
        CheckpointFolder(output / "checkpoints", KeepConfig())
        Ledger(output, "train", torch.device("cpu"), 1)
        (output / name).write_text("x")
    assert {path.name for path in output.iterdir()} >= {".lock", "ledger.jsonl", "checkpoints", name.partition("/")[0]}
    assert (output / name).read_text() == "x"


def test_a_lock_that_its_holder_removed_between_opening_and_locking_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    flock = fcntl.flock

    def remove_first(file: Any, how: int) -> None:
        opened.append(file.fileno())
        if len(opened) == 1:
            (tmp_path / ".lock").unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with alone_in(tmp_path):
        assert len(opened) == 2 and (tmp_path / ".lock").exists()
        with pytest.raises(ValueError, match="another process"), alone_in(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()  # who is refused takes nothing away
