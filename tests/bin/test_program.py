"""Exit statuses and error lines that scripts can trust, and how progress is shown."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from k2ssl.bin.program import one_line, run_program
from k2ssl.bin.progress import AudioProgress
from k2ssl.config import ConfigError


@dataclass(frozen=True)
class Job:
    """A job.

    Attributes:
        number: of things.
    """

    number: int


def run(main: Callable[[Job], None], *argv: str) -> int:
    return run_program(main, Job, argv, "job", "Does it.")


def failing(error: BaseException) -> Callable[[Job], None]:
    def main(job: Job) -> None:
        raise error

    return main


def test_a_job_that_ends_well_has_status_0_and_got_its_settings() -> None:
    seen: list[Job] = []
    assert run(seen.append, "--number", "3") == 0
    assert seen == [Job(3)]


class LibsndfileError(RuntimeError):
    """Known by its name, so that audio libraries need not be imported."""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("labels: num_classes is 0\n  allowed is >= 1"), 1, "job: labels: num_classes is 0 allowed is >= 1\n"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.wav"), 1, "job: a.wav: No such file or directory\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x.pt"), 1, "job: x.pt: No space left on device; make room and run the same"),
        (LibsndfileError("bad file"), 1, "job: bad file\n"),
        (
            ModuleNotFoundError("No module", name="sound.file"),
            1,
            "job: the package sound.file is not installed; python -m k2ssl.bin.doctor",
        ),
        (
            RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:17"),
            1,
            "job: another rank does not answer, most likely it has ended, see its message ([../gloo/transport/tcp/pair.cc:547] Connection",
        ),
        (
            RuntimeError("DataLoader worker (pid 389) is killed by signal: Killed. "),
            1,
            "job: DataLoader worker (pid 389) is killed by signal: Killed. A process that reads data was ended from outside",
        ),
        (ConfigError("cuts: unknown key"), 2, "job: cuts: unknown key\n"),
        (KeyboardInterrupt(), 130, "job: interrupted; the same command goes on, or begins again where nothing was kept\n"),
    ],
)
def test_an_error_for_people_is_one_line_and_a_status(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(failing(error), "--number", "3") == status
    output = capsys.readouterr()
    assert output.err.startswith(line) and output.err.count("\n") == 1 and not output.out


def test_wrong_settings_have_status_2_before_the_job_begins(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(failing(AssertionError("begun"))) == 2
    assert capsys.readouterr().err.startswith("job: number: this key is missing and has no default")


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    for error in (KeyError("x"), RuntimeError("shapes differ"), ModuleNotFoundError("No module", name="k2ssl.nothing")):
        with pytest.raises(type(error)):
            run(failing(error), "--number", "3")


def test_one_of_several_ranks_says_which(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    assert run(failing(ValueError("no")), "--number", "3") == 1
    assert capsys.readouterr().err == "job (rank 2): no\n"


def test_the_traceback_of_a_loader_worker_is_left_out() -> None:
    error = ValueError(
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "a.py", line 1, in f\n    g()\nValueError: cut 7: the file is damaged: 3 of 9 samples\n'
    )
    assert one_line(error) == "cut 7: the file is damaged: 3 of 9 samples"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_a_plain_line_now_and_then_with_hours_speed_and_remaining_time() -> None:
    clock, stream = FakeClock(), io.StringIO()
    with AudioProgress("label", 7200.0, stream=stream, clock=clock, line_every=30.0) as progress:
        for _ in range(9):
            clock.now += 10.0
            progress.add(600.0)
    assert stream.getvalue().splitlines() == [
        "label: 0.50 of 2.00 h (25%), 60 x real time, 0:01:30 left",
        "label: 1.00 of 2.00 h (50%), 60 x real time, 0:01:00 left",
        "label: 1.50 of 2.00 h (75%), 60 x real time, 0:00:30 left",
        "label: 1.50 h in 0:01:30, 60 x real time",
    ]


def test_a_terminal_gets_one_line_that_is_redrawn() -> None:
    clock, stream = FakeClock(), Terminal()
    with AudioProgress("label", 3600.0, stream=stream, clock=clock) as progress:
        for _ in range(4):
            clock.now += 0.15
            progress.add(450.0, "note")
    shown = stream.getvalue()
    assert shown.count("\r\x1b[K") == 3 and shown.count("\n") == 1 and shown.endswith("note\n")
    assert "label: [#####...............] 0.25 of 1.00 h (25%), 3,000 x real time, 0:00:01 left, note" in shown


def test_quiet_means_plain_lines_in_a_terminal_too() -> None:
    clock, stream = FakeClock(), Terminal()
    with AudioProgress("label", None, quiet=True, stream=stream, clock=clock) as progress:
        clock.now += 31.0
        progress.add(62.0)
    assert stream.getvalue() == "label: 0.02 h, 2 x real time\nlabel: 0.02 h in 0:00:31, 2 x real time\n"
