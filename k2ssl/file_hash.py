"""Which file is it: the hash of its content, by which checkpoints, manifests and labels are known wherever they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

_CHUNK_BYTES = 8 * 2**20


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file, in hexadecimal; the file is read in pieces.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
