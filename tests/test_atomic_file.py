"""Files that are whole or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from k2ssl.atomic_file import atomic_file, save_atomically, writable_folder


def test_a_file_appears_whole_and_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for content in (b"first", b"second"):
        with atomic_file(path) as file:
            file.write(content)
            assert not path.exists() or path.read_bytes() == b"first"
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt()])
def test_an_exception_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    with pytest.raises(type(error)), atomic_file(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_up_is_named_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a.pt"
    save_atomically(path, {"x": torch.ones(2)})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match=r"No space left on device.*a\.pt"):
            save_atomically(path, {"x": torch.zeros(2)})
    assert torch.load(path, weights_only=True)["x"].tolist() == [1, 1] and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("buffering", [0, 8192])
def test_what_torch_hides_of_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffering: int) -> None:
    monkeypatch.setattr("k2ssl.atomic_file.open", lambda path, mode: open("/dev/full", mode, buffering=buffering), raising=False)  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left on device: .*km\.pt"):
        save_atomically(tmp_path / "km.pt", {"x": torch.randn(1000, 60)})


def test_a_folder_is_made_and_tried(tmp_path: Path) -> None:
    assert writable_folder(tmp_path / "a/b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/c: cannot write into this folder"):
        writable_folder(tmp_path / "file/c")
    assert list((tmp_path / "a/b").iterdir()) == []
