"""The folder of a run is one process' own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from k2ssl.bin.run_folder import alone_in

_HOLDS = """
import sys
from pathlib import Path
from k2ssl.bin.run_folder import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_gone_even_when_it_was_killed(tmp_path: Path) -> None:
    output = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", _HOLDS, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another process is training in this folder"), alone_in(output):
        pass
    first.kill()
    first.communicate()
    with alone_in(output):
        pass


def test_one_after_the_other_is_fine(tmp_path: Path) -> None:
    for _ in range(2):
        with alone_in(tmp_path):
            pass
