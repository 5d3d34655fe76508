"""Say which requirements of pyproject.toml the running interpreter's environment does not meet.

Usage: python scripts/missing_packages.py [EXTRA ...]

Prints one requirement a line, with what is installed instead, and exits with 1 if there is any. Changes nothing, asks no network.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"

try:
    # the two packages that reading requirements takes are requirements themselves
    from packaging.requirements import Requirement

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
except ModuleNotFoundError as error:
    print(f"{error.name} (not installed)")
    sys.exit(1)


def missing(extras: list[str]) -> list[str]:
    """Descriptions of the requirements, of the project and of `extras`, that are not met here."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    lines = list(project["dependencies"])
    known = project["optional-dependencies"]
    for extra in extras:
        if extra not in known:
            sys.exit(f"missing_packages: {extra} is no extra of the project, known are {', '.join(known)}")
        lines += known[extra]
    return [f"{requirement} ({state})" for requirement in map(Requirement, lines) if (state := _problem(requirement))]


def _problem(requirement: Requirement) -> str:
    if requirement.marker is not None and not requirement.marker.evaluate():
        return ""
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return "not installed"
    return "" if requirement.specifier.contains(installed, prereleases=True) else f"{installed} is installed"


if __name__ == "__main__":
    if {"--help", "-h"} & set(sys.argv[1:]):
        print((__doc__ or "").strip())
        sys.exit(0)
    found = missing(sys.argv[1:])
    print("\n".join(found), end="\n" if found else "")
    sys.exit(1 if found else 0)
