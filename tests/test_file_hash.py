"""The hash by which a file is known."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from k2ssl import file_hash
from k2ssl.file_hash import file_sha256


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 5000])
def test_a_file_read_in_pieces_has_the_hash_of_its_whole_content(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hash, "_CHUNK_BYTES", 1000)
    content = bytes(i * 31 % 251 for i in range(size))
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_file_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing"):
        file_sha256(tmp_path / "nothing")
