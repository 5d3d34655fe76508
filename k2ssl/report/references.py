"""Rows of the literature, from a TOML file, to be shown apart from what was measured here."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from k2ssl.report.document import Table
from k2ssl.structure import from_dict

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Tag = Literal["published claim", "third-party", "commonly quoted, unverified", "reconstructed", "ours measured"]

NOT_OF_RECOGNITION = "does not apply"  # as `lm` and `search` of a cost, for instance


@dataclass(frozen=True)
class Reference:
    """One row.

    Attributes:
        system: what was measured.
        numbers: values by what they are, with the unit in the name.
        source: paper, thread or page.
        tag: how far it is to be trusted: claimed by the publication itself, told by others, quoted without having been looked up,
            computed from settings that were published, or measured with this toolkit elsewhere.
        data: trained on, and what was transcribed.
        lm: language model; none: without; does not apply: no recognition; empty: the source does not say.
        search: of the recognition.
        conditions: everything else that must be known to use the numbers.
    """

    system: str
    numbers: Mapping[str, float]
    source: str
    tag: Tag
    data: str = ""
    lm: str = ""
    search: str = ""
    conditions: str = ""

    def __post_init__(self) -> None:
        for name in ("system", "source", "numbers"):
            if not getattr(self, name):
                raise ValueError(f"Reference: {name} is empty, every row of the literature needs one")


@dataclass(frozen=True)
class References:
    """A file of them."""

    result: tuple[Reference, ...]


def read_references(path: Path) -> tuple[Reference, ...]:
    """
    Raises:
        ValueError: the file cannot be read, or a row lacks something or has an unknown key or tag; names them.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        return from_dict(References, content).result
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def reference_tables(rows: tuple[Reference, ...]) -> dict[str, Table]:
    """All of them by what the language model lets stand beside each other, with what each rests on; those of a kind without rows are left out."""
    kinds = {
        "without a language model": [row for row in rows if row.lm == "none"],
        "with a language model": [row for row in rows if row.lm not in ("", "none", NOT_OF_RECOGNITION)],
        "language model not told": [row for row in rows if not row.lm],
        "cost and others": [row for row in rows if row.lm == NOT_OF_RECOGNITION],
    }
    return {kind: _table(f"references-{number}", some) for number, (kind, some) in enumerate(kinds.items(), 1) if some}


def _table(name: str, rows: Sequence[Reference]) -> Table:
    header = ("System", "Numbers", "Kind", "Data", "Language model", "Search", "Conditions", "Source")
    cells = [
        (
            *(row.system, "; ".join(f"{name} {value:.10g}" for name, value in row.numbers.items()), row.tag),
            *(row.data or "not told", row.lm or "not told", row.search or "not told", row.conditions, row.source),
        )
        for row in rows
    ]
    return Table(name, header, tuple(cells))
