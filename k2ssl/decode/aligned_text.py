"""Reference and hypotheses below each other, word below word."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from k2ssl.decode.wer import Unit, align, split

_INDENT = "    "
_SPACE = "␣"  # how a space is shown where characters are aligned


@dataclass(frozen=True)
class Column:
    """One place of an alignment of several hypotheses with a reference.

    Attributes:
        reference: the unit that was said; None where some hypothesis has inserted one.
        hypotheses: what each has here; None: nothing.
    """

    reference: str | None
    hypotheses: tuple[str | None, ...]

    def mark(self, which: int) -> str:
        """The error of a hypothesis: S, D, I, or nothing."""
        found = self.hypotheses[which]
        if found == self.reference:
            return ""
        return "D" if found is None else "I" if self.reference is None else "S"


def columns_of(reference: str, hypotheses: Sequence[str], unit: Unit) -> list[Column]:
    """Align every hypothesis with the reference and line them up; insertions at the same place share columns."""
    said = split(reference, unit)
    inserted: list[list[list[str]]] = []  # for each hypothesis, before each unit of the reference and after the last
    heard: list[list[str | None]] = []  # for each hypothesis, at each unit of the reference
    for hypothesis in hypotheses:
        gaps: list[list[str]] = [[]]
        units: list[str | None] = []
        for left, right in align(said, split(hypothesis, unit)):
            if left is None:
                gaps[-1].append(str(right))
            else:
                units.append(right)
                gaps.append([])
        inserted.append(gaps)
        heard.append(units)
    columns = []
    for place in range(len(said) + 1):
        gaps_here = [gaps[place] for gaps in inserted]
        for k in range(max(map(len, gaps_here), default=0)):
            columns.append(Column(None, tuple(gap[k] if k < len(gap) else None for gap in gaps_here)))
        if place < len(said):
            columns.append(Column(said[place], tuple(units[place] for units in heard)))
    return columns


def aligned_text(reference: str, hypotheses: Sequence[tuple[str, str]], unit: Unit = "word", width: int = 120) -> str:
    """Lines of text with the reference, the hypotheses, and below each the kind of its errors: S, D or I.

    `***` stands where there is no unit but an error. Wide characters take two places and combining ones none, as in a terminal.

    Args:
        reference: what was said.
        hypotheses: name and text of each.
        unit: what is aligned.
        width: places in a line; a longer word has a line of its own.
    """
    names = ["ref", *(name for name, _ in hypotheses)]
    margin = max(map(text_width, names))
    gap = 2 if unit == "word" else 1
    lines: list[str] = []
    for block in _blocks(columns_of(reference, [text for _, text in hypotheses], unit), width - len(_INDENT) - margin - 2, gap):
        rows = [(names[0], [_reference_cell(column) for column in block])]
        for which, name in enumerate(names[1:]):
            rows.append((name, [_hypothesis_cell(column, which) for column in block]))
            rows.append(("", [column.mark(which) for column in block]))
        widths = [_column_width(column) for column in block]
        lines += [""] if lines else []
        for number, (name, cells) in enumerate(rows):
            body = (" " * gap).join(pad(cell, size) for cell, size in zip(cells, widths, strict=True))
            if number < 2 or name or body.strip():
                lines.append(f"{_INDENT}{pad(name, margin)}  {body}".rstrip())
    return "\n".join(lines)


def text_width(text: str) -> int:
    """Places that a text takes in a terminal: two for wide characters (East Asian Width W, F), none for combining and invisible ones."""
    if text.isascii():
        return len(text)
    return sum(_character_width(character) for character in text)


def pad(text: str, width: int, right: bool = False) -> str:
    """The text with spaces to `width` places; on the left of it with `right`."""
    spaces = " " * (width - text_width(text))
    return spaces + text if right else text + spaces


def shown(unit: str) -> str:
    """A word or character as reports show it: a space as a sign."""
    return _SPACE if unit == " " else unit


def _character_width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _column_width(column: Column) -> int:
    units = [unit for unit in (column.reference, *column.hypotheses) if unit is not None]
    return max(1, *(text_width(shown(unit)) for unit in units))


def _reference_cell(column: Column) -> str:
    return "*" * _column_width(column) if column.reference is None else shown(column.reference)


def _hypothesis_cell(column: Column, which: int) -> str:
    found = column.hypotheses[which]
    if found is not None:
        return shown(found)
    return "*" * _column_width(column) if column.mark(which) else ""


def _blocks(columns: Sequence[Column], width: int, gap: int) -> list[list[Column]]:
    """Columns in groups that fit into a line."""
    blocks: list[list[Column]] = [[]]
    used = 0
    for column in columns:
        size = _column_width(column) + gap
        if blocks[-1] and used + size - gap > width:
            blocks.append([])
            used = 0
        blocks[-1].append(column)
        used += size
    return blocks
