"""What programs that write one file refuse: an output that is one of their inputs, whatever it is called."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from k2ssl.bin.output_file import check_output
from k2ssl.config import ConfigError


@pytest.mark.parametrize(
    "named",
    [
        lambda folder: folder / "cuts.jsonl",
        lambda folder: folder / "more" / ".." / "cuts.jsonl",
        lambda folder: folder / "symbolic",
        lambda folder: folder / "hard",
    ],
)
def test_a_file_that_is_read_is_no_output_under_whatever_name(tmp_path: Path, named: Callable[[Path], Path]) -> None:
    cuts = tmp_path / "cuts.jsonl"
    cuts.write_text("mine")
    (tmp_path / "more").mkdir()
    (tmp_path / "symbolic").symlink_to(cuts)
    os.link(cuts, tmp_path / "hard")
    inputs = {"checkpoints": ("none.pt",), "after": None, "search.lm": str(cuts)}
    message = f"output is {named(tmp_path)}, which is read (search.lm: {cuts}); another file is needed"
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=re.escape(message)):
            check_output(named(tmp_path), overwrite, **inputs)
    with pytest.raises(ConfigError, match=re.escape(f"which is read (cuts: {cuts})")):
        check_output(named(tmp_path), True, cuts=("none.jsonl", str(cuts)))
    assert cuts.read_text() == "mine"


def test_another_file_with_the_same_content_is_an_output(tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text("same")
    assert check_output(tmp_path / "two.txt", True, text=(str(tmp_path / "one.txt"),)) == tmp_path / "two.txt"
