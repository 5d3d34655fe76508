"""The forms of a report: nothing in a text may be taken for markup, and the web page needs no other file."""

from __future__ import annotations

import base64
import csv
import io
import re

from k2ssl.report.document import Heading, Items, Picture, Table, Text, csv_text, latex, markdown, plain, web_page

NASTY = "a_b|c*d <b>&%$#{}~^\\"
TABLE = Table("name", ("System", "WER"), ((NASTY, "1"), ("x", "22")), ("a note_",))
PICTURE = b"\x89PNG and more"


def test_markdown_takes_no_text_for_markup() -> None:
    lines = markdown([Heading("t_1", 1), TABLE, Items(("one", "two")), Picture("p.png", "c")]).split("\n")
    assert lines[0] == "# t\\_1" and lines[2] == "| System | WER |" and lines[3] == "| --- | --- |"
    assert lines[4] == "| a\\_b\\|c\\*d \\<b>&%$#{}~^\\\\ | 1 |"
    assert "a note\\_" in lines and "- two" in lines and "![c](p.png)" in lines


def test_a_web_page_holds_its_pictures_and_takes_no_text_for_markup() -> None:
    page = web_page([Heading("A <title>", 1), Text(NASTY), TABLE, Items((NASTY,)), Picture("p.png", "c")], {"p.png": PICTURE})
    assert "<title>A &lt;title&gt;</title>" in page and "<b>" not in page and page.count("a_b|c*d &lt;b&gt;&amp;%") == 3
    found = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert [base64.b64decode(link.removeprefix("data:image/png;base64,")) for link in found] == [PICTURE]


def test_latex_holds_the_tables_with_every_sign_escaped() -> None:
    text = latex([Heading("Title & more"), Text("left out"), TABLE])
    assert r"a\_b\textbar{}c*d \textless{}b\textgreater{}\&\%\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{} & 1 \\" in text
    assert r"\caption{Title \& more. a note\_}" in text and r"\begin{tabular}{ll}" in text and "left out" not in text
    assert text.count("{") == text.count("}") and r"\label{tab:name}" in text
    assert r"$\geq$ 3" in latex([Table("t", ("≥ 3",), ())])


def test_no_row_of_latex_is_read_as_an_argument_of_the_line_above() -> None:
    rows = [line for line in latex([Table("t", ("WER",), (("[a] 1",), ("*b",), ('"c"',)))]).split("\n") if line.endswith("\\\\")]
    assert rows == [r"WER \\", r"{}[a] 1 \\", r"{}*b \\", r"\symbol{34}c\symbol{34} \\"]


def test_columns_of_a_terminal_stand_below_each_other() -> None:
    assert plain(Table("t", ("System", "WER"), (("longer name", "1"), ("x", "22")), ("note",))) == (
        "System       WER\nlonger name  1\nx            22\nnote"
    )


def test_a_table_that_is_too_wide_is_broken_between_words() -> None:
    table = Table("t", ("System", "What it is", "WER"), (("a", "one two three four", "1"), ("name-with-hyphens", "x", "")))
    assert plain(table, 34) == (
        "System             What it is  WER\na                  one two     1\n                   three four\nname-with-hyphens  x"
    )
    assert plain(table, 10).count("\n") == 6 and "name-with-hyphens" in plain(table, 10)  # no word is broken
    assert plain(table, 200) == plain(table)


def test_the_name_of_a_picture_is_a_link_whatever_is_in_it() -> None:
    assert markdown([Picture("labels_a b(1).png", "c")]) == "![c](labels_a%20b%281%29.png)\n"


def test_csv_is_read_back() -> None:
    assert list(csv.reader(io.StringIO(csv_text(Table("t", ("a", "b"), (('x, "y"\n', ""),)))))) == [["a", "b"], ['x, "y"\n', ""]]
