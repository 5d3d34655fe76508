"""Look at the environment and the machine: what is there, what is wrong, and which command mends it.

    python -m k2ssl.bin.doctor
    python -m k2ssl.bin.doctor --folder exp --json doctor.json

Each check gives a line: ok, warning (works, with a loss that is told) or error; below it the command that mends it. Changes nothing and asks
no network. A check that fails itself is an error with its message. Exit status: 0 no errors, 1 errors, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from k2ssl.atomic_file import atomic_file
from k2ssl.bin import doctor_checks, doctor_machine
from k2ssl.bin.doctor_checks import Finding, NotCheckedError, NotLoadingError, first_line

# Name of a line -> what gives it. The settings library stays away: it is among what may be broken.
Checks = Mapping[str, Callable[[], Iterator[Finding]]]


_OTHERS = {
    "numpy": "numpy",
    "matplotlib": "matplotlib",
    "sentencepiece": "sentencepiece",
    "PIL": "pillow",
    "tqdm": "tqdm",
    "tyro": "tyro",
    "urllib3": "urllib3",
    "tensorboard": "tensorboard",
}


def checks(folder: Path) -> Checks:
    """All checks in the order in which they are told; disk space is looked at where `folder` lies."""
    return {
        "python": doctor_checks.python,
        "k2ssl": doctor_checks.package,
        "torch": doctor_checks.torch,
        "torchaudio": doctor_checks.torchaudio,
        "gpu": doctor_checks.gpus,
        "exchange": doctor_checks.exchange,
        "triton": doctor_checks.triton,
        "audio": doctor_checks.audio,
        "kaldialign": doctor_checks.scoring,
        **{name: functools.partial(doctor_checks.other_package, name, distribution) for name, distribution in _OTHERS.items()},
        "flashlight": doctor_checks.flashlight,
        "k2": doctor_checks.k2,
        "versions": doctor_checks.versions,
        "disk": functools.partial(doctor_machine.disk, folder),
        "memory": doctor_machine.memory,
        "shm": doctor_machine.shared_memory,
        "files": doctor_machine.open_files,
        "cores": doctor_machine.cores,
    }


def examine(all_checks: Checks) -> Iterator[tuple[str, Finding]]:
    """Findings with the names of their checks; one that breaks is an error with its message."""
    for name, check in all_checks.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of packages; what matters here is found by its effect
                for finding in check():
                    yield name, finding
        except NotCheckedError as error:
            yield name, Finding("warning", f"not looked at: {error}")
        except NotLoadingError as error:
            yield name, Finding("error", str(error), error.fix)
        except Exception as error:
            yield name, Finding("error", f"the check itself failed: {type(error).__name__}: {first_line(error)}")


def doctor(folder: Path, report: Path | None) -> int:
    """Print all findings, write them to `report` as JSON; returns the exit status."""
    found = []
    for name, finding in examine(checks(folder)):
        found.append({"check": name, **asdict(finding)})
        print(
            f"{finding.status:8} {name:13} {finding.text}", *([f"{'':22} mend: {finding.fix}"] if finding.fix else []), sep="\n", flush=True
        )
    errors, warned = (sum(entry["status"] == status for entry in found) for status in ("error", "warning"))
    print(f"\n{errors} errors, {warned} warnings")
    if report is not None:
        with atomic_file(report) as file:
            file.write((json.dumps({"errors": errors, "warnings": warned, "findings": found}, indent=2) + "\n").encode())
    return 1 if errors else 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    head, _, details = (__doc__ or "").partition("\n\n")
    options = argparse.ArgumentParser(
        prog="python -m k2ssl.bin.doctor", description=head, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--folder", type=Path, default=Path("."), help="where disk space is looked at (default: this folder)")
    options.add_argument("--json", type=Path, metavar="FILE", help="write all findings to FILE, too")
    given = options.parse_args(argv)
    try:
        return doctor(given.folder, given.json)
    except KeyboardInterrupt:
        print("doctor: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"doctor: {given.json} cannot be written: {error.strerror or error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
