"""A plugin of pytest: the programs take "cpu" and "auto" for the device of apart.py, so that their own tests run there.

    PYTHONPATH=.:tests/other_device python -m pytest -p programs_there tests/bin/test_decode.py

Four tests of tests/bin cannot hold there: a killed run and its twin (the one that is killed is a process of its own, on the CPU), a run with
compiled chains (nothing compiles for this device), and that float16 is refused. What the host waited for goes, most frequent first, into the
file that K2SSL_WAITS names.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import apart
import torch
from torch.utils._pytree import tree_map

from k2ssl.bin import cluster_features
from k2ssl.nn import seeded
from k2ssl.train import checkpoint, plain_copy, precision

_choose_device, _choose_precision = cluster_features.choose_device, precision.choose_precision
_default_generator, _plain_copy, _save = seeded._default_generator, plain_copy.plain_copy, torch.save


def _to_host(value: Any) -> Any:
    """What torch writes of a tensor there, and what a checkpoint copies."""
    return value.detach().to("cpu", copy=True) if isinstance(value, apart.Apart) else value


def _copied(value: Any, path: str, copies: Any = None) -> Any:
    return _to_host(value) if isinstance(value, apart.Apart) else _plain_copy(value, path, copies)


def _precision(name: Any, device: torch.device) -> torch.dtype:
    """float32 where nothing is said, as on the CPU, for whose numbers the tests are made."""
    return torch.float32 if name == "auto" and device.type == apart.NAME else _choose_precision(name, device)


cluster_features.choose_device = lambda name: str(apart.DEVICE) if name in ("cpu", "auto") else _choose_device(name)
precision.choose_precision = _precision
seeded._default_generator = lambda device: torch.default_generator if device.type == apart.NAME else _default_generator(device)
checkpoint.plain_copy = plain_copy.plain_copy = _copied
torch.save = lambda content, *args, **options: _save(tree_map(_to_host, content), *args, **options)


def pytest_sessionfinish() -> None:
    if path := os.environ.get("K2SSL_WAITS"):
        Path(path).write_text("".join(f"{times} {what}\n" for what, times in apart.waits.most_common()))
