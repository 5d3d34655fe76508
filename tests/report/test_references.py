"""Rows of the literature: each has a source and a tag, and only some may be called a claim of the publication."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2ssl.report.references import read_references, reference_tables

FILE = Path(__file__).parents[2] / "recipes/librispeech/reference_results.toml"
ROW = '[[result]]\nsystem = "A"\nsource = "B"\ntag = "third-party"\nnumbers = { "WER %" = 1.5 }\n'


def test_the_claims_of_the_paper_are_those_of_its_abstract_alone() -> None:
    claims = [row for row in read_references(FILE) if row.tag == "published claim"]
    assert sorted(number for row in claims for number in row.numbers.values()) == [0.625, 3.5, 32.4, 34.8]
    assert all("2411.17100, abstract" in row.source for row in claims)


def test_reconstructed_numbers_follow_from_the_others() -> None:
    rows = read_references(FILE)
    hours = {row.system: row.numbers["V100-hours"] for row in rows if "V100-hours" in row.numbers}
    assert round(hours["HuBERT Base, second iteration"] / 3.5) == hours["Zipformer Base"]
    quoted = next(row.numbers["test-other WER %"] for row in rows if row.tag == "commonly quoted, unverified" and row.search == "CTC")
    made = next(row.numbers["test-other WER %"] for row in rows if row.tag == "reconstructed" and row.search == "CTC")
    assert made == round(quoted * (1 - 0.324), 1)


def test_hours_of_other_gpus_are_told_by_others() -> None:
    rows = [row for row in read_references(FILE) if any("H100" in name or "A100" in name for name in row.numbers)]
    assert sorted(hours for row in rows for hours in row.numbers.values()) == [192, 240, 385]
    assert {row.tag for row in rows} == {"third-party"}


def test_a_table_shows_the_tag_and_what_is_not_told(tmp_path: Path) -> None:
    file = tmp_path / "rows.toml"
    file.write_text(ROW)
    (table,) = reference_tables(read_references(file)).values()
    assert table.rows == (("A", "WER % 1.5", "third-party", *("not told",) * 3, "", "B"),)


def test_rows_with_and_without_a_language_model_are_in_tables_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "rows.toml"
    models = ("none", "4-gram", "", "does not apply")
    file.write_text("".join(ROW.replace('"A"', f'"{number}"') + f'lm = "{lm}"\n' for number, lm in enumerate(models)))
    tables = reference_tables(read_references(file))
    assert [[row[0] for row in table.rows] for table in tables.values()] == [["0"], ["1"], ["2"], ["3"]]
    assert list(tables) == ["without a language model", "with a language model", "language model not told", "cost and others"]
    assert len({table.name for table in tables.values()}) == 4
    shipped = reference_tables(read_references(FILE))
    assert {row[4] for row in shipped["without a language model"].rows} == {"none"} and "with a language model" not in shipped


def test_a_row_may_be_measured_with_this_toolkit(tmp_path: Path) -> None:
    file = tmp_path / "rows.toml"
    file.write_text(ROW.replace("third-party", "ours measured"))
    assert read_references(file)[0].tag == "ours measured"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('source = "B"', ""), r"result\[0\].source"),
        (('source = "B"', 'source = ""'), "source is empty"),
        (("third-party", "surely true"), "'surely true', allowed are 'published claim'"),
        (("1.5", '"few"'), "WER %"),
        (("system", "sistem"), "sistem: unknown key"),
        (("[[result]]", "[[result]"), "rows.toml"),
    ],
)
def test_a_row_that_is_not_whole_is_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    file = tmp_path / "rows.toml"
    file.write_text(ROW.replace(*change))
    with pytest.raises(ValueError, match=message) as caught:
        read_references(file)
    assert str(caught.value).startswith(str(file))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.toml: cannot be read"):
        read_references(tmp_path / "none.toml")
