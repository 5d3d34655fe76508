"""The tiny run of `toy_run.py`, imported by path: tests are no package."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOY_RUN = Path(__file__).with_name("toy_run.py")


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toy_run", TOY_RUN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_run"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def curve():
    """Reads (step, values) of the training lines of a run's metrics."""

    def read(folder: Path, *names: str) -> list[tuple[float, ...]]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], *(line[name] for name in names or ("loss",))) for line in lines if line["kind"] == "train"]

    return read
