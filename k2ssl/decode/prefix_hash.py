"""Names for token prefixes, by which beam searches find equal ones on the device."""

from __future__ import annotations

from torch import Tensor


def hash_on(prefix: Tensor, token: Tensor) -> Tensor:
    """Hash of a prefix with one more token; 64 bits, wrapping around; int64 tensors that broadcast.

    Among a beam's few prefixes two different ones collide with a probability of about 2^-64 per pair. The odd multiplier is that of
    splitmix64; shifting lets high bits reach the low ones.
    """
    mixed = (prefix ^ (token + 1)) * -0x40A7B892E31B1A47
    return mixed ^ (mixed >> 31)
