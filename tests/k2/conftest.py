"""What the tests with k2 share: seeds, and what our own code computed in its own environment (scripts/test_k2.sh)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _same_draws_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ours() -> Callable[[str], dict[str, Tensor]]:
    """`ours(name)` reads the arrays NAME.npz of tests/k2/record_ours.py."""
    folder = os.environ.get("K2SSL_K2_ARRAYS")
    if folder is None:
        raise ValueError("K2SSL_K2_ARRAYS names the folder that tests/k2/record_ours.py wrote; scripts/test_k2.sh does both")

    def load(name: str) -> dict[str, Tensor]:
        with np.load(Path(folder) / f"{name}.npz", allow_pickle=False) as arrays:
            return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}

    return load
