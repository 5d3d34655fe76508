"""A report as a list of blocks, and how it is written as Markdown, HTML, LaTeX or plain text."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from urllib.parse import quote

_STYLE = """body { font: 15px/1.45 system-ui, sans-serif; color: #202020; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #d0d0d0; padding: .3rem .6rem; text-align: left; white-space: nowrap }
th { border-bottom: 2px solid #808080 } img { max-width: 100% } figure { margin: 1rem 0 } figcaption, .note { color: #505050; font-size: 13px }"""
_LATEX = {**{sign: f"\\{sign}" for sign in "&%$#_{}"}, "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
_LATEX |= {"≥": r"$\geq$", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\symbol{34}"}


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of lines."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Rows below a header, with notes under them; `name` is that of the LaTeX label."""

    name: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A PNG file beside the report."""

    file: str
    caption: str


Block = Heading | Text | Items | Table | Picture


def markdown(blocks: Sequence[Block]) -> str:
    """For reading as a file."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def web_page(blocks: Sequence[Block], pictures: Mapping[str, bytes]) -> str:
    """One file that needs no other: pictures, PNG by file name, are within it."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    body = "\n".join(_html(block, pictures) for block in blocks)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title>\n<style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def latex(blocks: Sequence[Block]) -> str:
    """The tables alone; they need the package booktabs."""
    title, parts = "", ["% Tables of k2ssl.bin.report; \\usepackage{booktabs}"]
    for block in blocks:
        if isinstance(block, Heading):
            title = block.text
        elif isinstance(block, Table):
            parts.append(_latex(block, title))
    return "\n\n".join(parts) + "\n"


def plain(table: Table, width: int | None = None) -> str:
    """For a terminal: columns side by side; with a width, the widest are broken between words until the table fits, if it can."""
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
    least = [max(len(word) for cell in column for word in [*cell.split(), ""]) for column in zip(table.header, *table.rows, strict=True)]
    while width is not None and sum(widths) + 2 * (len(widths) - 1) > width and widths != least:
        widths[max((room, column) for column, room in enumerate(widths) if room > least[column])[1]] -= 1
    lines = []
    for row in (table.header, *table.rows):
        cells = [textwrap.wrap(cell, max(room, 1), break_on_hyphens=False) for cell, room in zip(row, widths, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            lines.append("  ".join(part.ljust(room) for part, room in zip(parts, widths, strict=True)).rstrip())
    return "\n".join([*lines, *table.notes])


def csv_text(table: Table) -> str:
    """A table for programs."""
    import csv

    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([table.header, *table.rows])
    return out.getvalue()


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_escaped(block.text)}"
    if isinstance(block, Text):
        return _escaped(block.text)
    if isinstance(block, Items):
        return "\n".join(f"- {_escaped(line)}" for line in block.lines)
    if isinstance(block, Picture):
        return f"![{_escaped(block.caption)}]({quote(block.file)})"
    lines = [block.header, ("---",) * len(block.header), *block.rows]
    table = "\n".join("| " + " | ".join(cell if row is lines[1] else _escaped(cell) for cell in row) + " |" for row in lines)
    return "\n\n".join([table, *map(_escaped, block.notes)])


def _escaped(text: str) -> str:
    for sign in "\\|_*<`":
        text = text.replace(sign, f"\\{sign}")
    return text


def _html(block: Block, pictures: Mapping[str, bytes]) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Items):
        return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in block.lines) + "</ul>"
    if isinstance(block, Picture):
        data = base64.b64encode(pictures[block.file]).decode()
        caption = html.escape(block.caption)
        return f'<figure><img src="data:image/png;base64,{data}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.header)
    rows = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
    notes = "".join(f'\n<p class="note">{html.escape(note)}</p>' for note in block.notes)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>{notes}'


def _latex(table: Table, title: str) -> str:
    lines = [_protected(" & ".join(map(_in_latex, row))) + r" \\" for row in (table.header, *table.rows)]
    body = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
    caption = " ".join([f"{title}.", *table.notes])
    return (
        f"\\begin{{table}}\n\\centering\n\\caption{{{_in_latex(caption)}}}\n\\label{{tab:{table.name}}}\n"
        f"\\begin{{tabular}}{{{'l' * len(table.header)}}}\n{body}\n\\end{{tabular}}\n\\end{{table}}"
    )


def _protected(row: str) -> str:
    """A row that begins with one of these would be read as an argument of the line above."""
    return f"{{}}{row}" if row.startswith(("[", "*")) else row


def _in_latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)
