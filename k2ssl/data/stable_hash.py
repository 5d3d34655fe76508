"""Random numbers that are a function of what they are for."""

from __future__ import annotations

import hashlib


def stable_hash(*parts: int | str) -> int:
    """64 bits that depend on `parts` only: not on the process, its hash seed, or the state of a generator."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def stable_index(num: int, *parts: int | str) -> int:
    """A number from 0 to num - 1, evenly distributed over different `parts` (to within num / 2^64)."""
    return stable_hash(*parts) * num >> 64
