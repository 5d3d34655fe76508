"""Scoring from the command line."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from k2ssl.bin.score import main
from k2ssl.decode.compare import compare
from k2ssl.decode.results import Result, to_line
from k2ssl.decode.scoring import TextRule, score, score_content

PAGE = Path(__file__).parents[2] / "docs" / "scoring.md"


def decoding(seed: int, wrong: float = 0.2) -> list[Result]:
    """Forty utterances of two speakers; the references are always the same."""
    said, heard = random.Random(0), random.Random(seed)
    found = []
    for i in range(40):
        words = [said.choice(["the", "Cat", "sat", "on", "über"]) for _ in range(said.randint(1, 8))]
        hyp = [heard.choice(["hat", "cat", "the"]) if heard.random() < wrong else word for word in words]
        found.append(Result(f"utt{i:02d}", " ".join(hyp), -1.0, 2.0, " ".join(words), f"s{i % 2}"))
    return found


def write(path: Path, results: list[Result]) -> str:
    path.write_text("".join(to_line(result) + "\n" for result in results), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Two decodings, of which the second is better, in the working folder."""
    monkeypatch.chdir(tmp_path)
    write(Path("one.jsonl"), decoding(1, 0.3))
    write(Path("two.jsonl"), decoding(2, 0.1))
    return "one.jsonl", "two.jsonl"


def content(folder: str = "out") -> dict[str, object]:
    return json.loads(Path(folder, "wer.json").read_text(encoding="utf-8"))


def test_one_file_is_scored(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([files[0], "--output", "out"]) == 0
    scored = score(decoding(1, 0.3))
    assert content() == {
        "format": "k2ssl-wer",
        "version": 1,
        "casing": "as-is",
        "unicode": "nfc",
        "unit": "word",
        "bootstrap": {"draws": 1000, "seed": 0, "share": 0.95},
        "files": [{"path": "one.jsonl", **score_content(scored, "word")}],
        "comparison": None,
    }
    report = Path("out/report.txt").read_text(encoding="utf-8")
    assert report.startswith("Texts are compared as they are, so that case counts, in Unicode form NFC.")
    assert scored.word.text() in report and "Comparison" not in report and "hypotheses  " not in report
    assert capsys.readouterr().out == f"one.jsonl\n{scored.word.text()}\nreport in out/report.txt\n"
    assert sorted(path.name for path in Path("out").iterdir()) == ["report.txt", "wer.json"]


def test_several_files_are_scored_each_and_have_a_table(files: tuple[str, str]) -> None:
    assert main(["--hypotheses", *files, "--output", "out"]) == 0
    report = Path("out/report.txt").read_text(encoding="utf-8")
    assert [entry["path"] for entry in content()["files"]] == list(files)  # type: ignore[attr-defined]
    assert content()["files"][1]["word"]["rate"] == score(decoding(2, 0.1)).word.rate  # type: ignore[index]
    for name in files:
        assert f"\n{name}\n=========\n" in report and report.count(f"\n{name} ") == 1


@pytest.mark.parametrize("unit", ["word", "char"])
def test_two_systems_are_compared(files: tuple[str, str], capsys: pytest.CaptureFixture[str], unit) -> None:
    assert main([*files, "--compare", "True", "--output", "out", "--seed", "4", "--unit", unit]) == 0
    expected = compare(score(decoding(1, 0.3)), score(decoding(2, 0.1)), unit, seed=4)
    assert expected.difference < 0 and content()["comparison"] == expected.to_dict()
    assert content()["bootstrap"]["seed"] == 4  # type: ignore[index]
    assert expected.text() in Path("out/report.txt").read_text(encoding="utf-8") and expected.text() in capsys.readouterr().out


def test_the_settings_reach_the_score(files: tuple[str, str]) -> None:
    Path("conf.toml").write_text('casing = "upper"\nunit = "char"\n')
    assert main(["conf.toml", files[0], "--output", "out", "--unicode", "as-is", "--top", "1", "--worst", "2", "--seed", "9"]) == 0
    expected = score(decoding(1, 0.3), TextRule("upper", "as-is"), 9)
    assert expected.word.rate != score(decoding(1, 0.3)).word.rate
    assert content()["files"] == [{"path": "one.jsonl", **score_content(expected, "char")}]
    assert (content()["casing"], content()["unicode"], content()["unit"]) == ("upper", "as-is", "char")
    report = Path("out/report.txt").read_text(encoding="utf-8")
    assert report.startswith("Texts are compared in upper case, code point by code point.")
    assert "Speakers (1 of 2, highest CER first)" in report and "Utterances with the most errors (2 of " in report


def test_names_that_end_in_json_are_hypotheses_if_they_hold_some_and_settings_if_not(files: tuple[str, str]) -> None:
    Path("two.json").write_bytes(Path(files[1]).read_bytes())
    Path("conf.json").write_text('{"casing": "upper"}')
    assert main(["conf.json", files[0], "two.json", "--output", "out"]) == 0
    assert [entry["path"] for entry in content()["files"]] == [files[0], "two.json"]  # type: ignore[attr-defined]
    assert content()["casing"] == "upper"


def test_the_order_of_the_lines_changes_nothing(files: tuple[str, str]) -> None:
    assert main([*files, "--compare", "True", "--output", "out"]) == 0
    for name in files:
        lines = Path(name).read_text(encoding="utf-8").splitlines(keepends=True)
        Path(name).write_text("".join(reversed(lines)), encoding="utf-8")
    assert main([*files, "--compare", "True", "--output", "again"]) == 0
    for name in ("report.txt", "wer.json"):
        assert Path("again", name).read_bytes() == Path("out", name).read_bytes()


def test_files_are_replaced_only_when_asked(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([files[0], "--output", "out"]) == 0
    before = Path("out/wer.json").read_bytes()
    assert main([files[1], "--output", "out"]) == 2
    assert "out/report.txt exists; --overwrite True replaces it" in capsys.readouterr().err and Path("out/wer.json").read_bytes() == before
    assert main([files[1], "--output", "out", "--overwrite", "True"]) == 0
    assert Path("out/wer.json").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "out"], "hypotheses"),
        (["--hypotheses", "--output", "out"], "hypotheses names no file, at least one is needed"),
        (["none.jsonl", "--output", "out"], "hypotheses: none.jsonl is not a file"),
        (["one.jsonl", "./one.jsonl", "--output", "out"], "./one.jsonl is the same file as one.jsonl"),
        (["one.jsonl", "--compare", "True", "--output", "out"], "compare is True with 1 files in hypotheses, two are needed"),
        (["one.jsonl", "--worst", "-1", "--output", "out"], "worst is -1, allowed is >= 0"),
        (["one.jsonl", "--hypotheses", "two.jsonl", "--output", "out"], "one.jsonl: a settings file ends in .toml or .json"),
    ],
)
def test_wrong_settings_are_refused(files: tuple[str, str], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err and not Path("out").exists()


def test_wrong_files_are_refused_by_name_and_nothing_is_written(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    same = decoding(1)[:2]
    write(Path("twice.jsonl"), [*same, same[0]])
    write(Path("less.jsonl"), decoding(1)[1:])
    write(Path("silent.jsonl"), [Result("a", "x", 0.0, 1.0)])
    Path("torn.jsonl").write_text(to_line(same[0]) + '\n{"id": "b", "hy')
    for arguments, message in [
        (["twice.jsonl"], "score: twice.jsonl, line 3: utterance 'utt00' is also in line 1; ids must differ"),
        (["torn.jsonl"], "score: torn.jsonl, line 2: not JSON"),
        (["one.jsonl", "silent.jsonl"], "score: silent.jsonl: none of 1 utterances has a reference, at least one is needed"),
        (
            ["one.jsonl", "less.jsonl", "--compare", "True"],
            "score: first one.jsonl, second less.jsonl: the first has and the second lacks references of 1 utterances: 'utt00'",
        ),
    ]:
        assert main([*arguments, "--output", "out"]) == 1
        assert message in capsys.readouterr().err and not Path("out").exists()


def test_an_interrupted_run_leaves_nothing_half_written(
    files: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(number: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("k2ssl.atomic_file.os.fsync", interrupt)
    assert main([files[0], "--output", "out"]) == 130
    assert not list(Path("out").iterdir()) and "interrupted" in capsys.readouterr().err


def test_the_example_of_the_page_is_what_the_program_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = dict(re.findall(r"^<!-- (\S+) -->\n```\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE))
    Path("one.jsonl").write_text(blocks["one.jsonl"], encoding="utf-8")
    assert main(["one.jsonl", "--output", "out", "--top", "3", "--worst", "1"]) == 0
    assert Path("out/report.txt").read_text(encoding="utf-8") == blocks["report.txt"]


def test_the_page_names_every_key_of_the_content(files: tuple[str, str]) -> None:
    assert main([*files, "--compare", "True", "--output", "out"]) == 0
    page = PAGE.read_text(encoding="utf-8")
    found = content()
    entry = found["files"][0]  # type: ignore[index]
    keys = [*found, *entry, *entry["word"], *entry["speakers"][0], *found["comparison"]]  # type: ignore[misc]
    assert not [key for key in keys if f"`{key}`" not in page and f"`.{key}`" not in page and f"`files[].{key}`" not in page]
