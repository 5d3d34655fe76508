"""What all tests share: seeds, recorded arrays, and real speech where there is some."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GOLDEN = Path(__file__).parent / "golden"
collect_ignore = ["k2"]  # they have an environment of their own: scripts/test_k2.sh


@pytest.fixture(autouse=True)
def _same_draws_every_time() -> None:
    """Every test starts from the same global random states, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def golden() -> Callable[[str], dict[str, Tensor]]:
    """`golden(name)` reads tests/golden/NAME.npz as a dictionary of tensors."""

    def load(name: str) -> dict[str, Tensor]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
            return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}

    return load


class Agreement:
    """Compares with recorded or reference values and remembers how close it was, for the table of `--agreement`."""

    measured: ClassVar[dict[str, tuple[float, float]]] = {}  # what -> the largest difference seen, the difference allowed

    def absolute(self, what: str, ours: Tensor, theirs: Tensor, asked: float) -> None:
        """The largest absolute difference is at most `asked`."""
        self.note(what, (ours.detach().double() - theirs.double()).abs().max().item(), asked)

    def relative(self, what: str, ours: Tensor, theirs: Tensor, asked: float) -> None:
        """The norm of the difference is at most `asked` times the norm of `theirs`; for numbers that is the relative difference."""
        difference = torch.linalg.vector_norm(ours.detach().double() - theirs.double())
        self.note(what, (difference / torch.linalg.vector_norm(theirs.double())).item(), asked)

    def note(self, what: str, difference: float, asked: float) -> None:
        """`difference` is at most `asked`; of several under one name the table shows the largest."""
        before, _ = self.measured.get(what, (0.0, asked))
        self.measured[what] = (max(before, difference), asked)
        assert difference <= asked, f"{what}: differs by {difference:.2g}, allowed is {asked:.2g}"


@pytest.fixture(scope="session")
def agreement() -> Agreement:
    """`agreement.absolute(what, ours, theirs, asked)` and so on: assertions that `--agreement` shows in a table."""
    return Agreement()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--agreement", action="store_true", help="print how closely reference values were met, beside what is asked for")


@pytest.fixture(scope="session")
def real_speech() -> Path:
    """A folder of real speech corpora; tests that ask for it are skipped where there is none.

    The folder is named by the environment variable K2SSL_TEST_DATA, else it is ../shared/data beside the repository.
    """
    named = os.environ.get("K2SSL_TEST_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        if named:
            raise ValueError(f"K2SSL_TEST_DATA is {named}, which is not a folder")
        pytest.skip("no real speech here: set K2SSL_TEST_DATA to a folder of corpora")
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of `--agreement`, and which checks failed before pytest ran (scripts/test.sh says so), just above the closing line."""
    if terminalreporter.config.getoption("--agreement"):
        terminalreporter.section("agreement with reference values")
        for what, (difference, asked) in sorted(Agreement.measured.items()):
            terminalreporter.write_line(f"{what:70} asked {asked:7.1g}   measured {difference:7.1e}")
    if failed := os.environ.get("K2SSL_FAILED_CHECKS"):
        terminalreporter.section("other checks failed", red=True)
        terminalreporter.write_line(f"failed before pytest: {failed}")


class _NoQuestions(TorchDispatchMode):
    """Fails on operations whose result the host must wait for."""

    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "bincount", "_unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        boolean_index = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        assert name not in self.forbidden and not boolean_index, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_questions() -> type[TorchDispatchMode]:
    """A mode under which operations that wait for the device fail."""
    return _NoQuestions
