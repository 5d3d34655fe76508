"""Phones from CTM and TextGrid files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from k2ssl.labelling.alignments import SILENCE, Alignments, Interval, read_alignments, read_textgrid

LONG = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 0.5
tiers? <exists>
size = 3
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 0.5
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 0.5
            text = "say ""3"" 4 times"
    item [2]:
        class = "TextTier"
        name = "events"
        xmin = 0
        xmax = 0.5
        points: size = 1
        points [1]:
            number = 0.25
            mark = "click"
    item [3]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 0.5
        intervals: size = 3
        intervals [1]:
            xmin = 0
            xmax = 0.1
            text = ""
        intervals [2]:
            xmin = 0.1
            xmax = 0.30
            text = "AH0"
        intervals [3]:
            xmin = 0.30
            xmax = 5e-1
            text = "S"
"""
SHORT = """File type = "ooTextFile"
Object class = "TextGrid"

0
0.5
<exists>
1
"IntervalTier"
"phones"
0
0.5
3
0
0.1
""
0.1
0.30
"AH0"
0.30
0.5
"S"
"""
INTERVALS = [Interval(0.0, 0.1, SILENCE), Interval(0.1, 0.3, "AH0"), Interval(0.3, 0.5, "S")]


@pytest.mark.parametrize("text", [LONG, SHORT], ids=["long", "short"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_both_forms_of_a_textgrid_are_read_in_every_encoding(tmp_path: Path, text: str, encoding: str) -> None:
    (tmp_path / "a.TextGrid").write_text(text, encoding=encoding)
    assert read_textgrid(tmp_path / "a.TextGrid") == INTERVALS


def test_another_tier_can_be_named_and_a_missing_one_is_refused_with_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "a.TextGrid").write_text(LONG)
    assert read_textgrid(tmp_path / "a.TextGrid", "words") == [Interval(0.0, 0.5, 'say "3" 4 times')]
    with pytest.raises(ValueError, match=r"a\.TextGrid: no interval tier 'phone'; it has 'words', 'phones'"):
        read_textgrid(tmp_path / "a.TextGrid", "phone")


@pytest.mark.parametrize("text", ["", "hello", LONG[: len(LONG) // 2], LONG.replace("size = 3\nitem", "size = 4\nitem")])
def test_a_damaged_textgrid_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.TextGrid").write_text(text)
    with pytest.raises(ValueError, match=r"a\.TextGrid: cannot be read as a TextGrid file"):
        read_textgrid(tmp_path / "a.TextGrid")


def test_a_folder_of_textgrids_is_read_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "speaker").mkdir()
    (tmp_path / "speaker" / "utt-1.TextGrid").write_text(LONG)
    (tmp_path / "utt-2.textgrid").write_text(SHORT.replace('"S"', '"Z"'))
    found = read_alignments(tmp_path)
    assert sorted(found) == ["speaker/utt-1", "utt-2"] and len(found) == 2
    assert found.phones == (SILENCE, "AH0", "S", "Z")
    assert found.phones_at("utt-2", np.array([0.05, 0.1, 0.29, 0.3, 0.499, 0.5, 9.0])).tolist() == [0, 1, 1, 3, 3, -1, -1]
    with pytest.raises(ValueError, match="no alignment of utt-3"):
        found.phones_at("utt-3", np.array([0.0]))


def test_an_utterance_goes_by_the_end_of_its_path_where_no_other_has_its_last_part(tmp_path: Path) -> None:
    for folder, name in (("a", "1"), ("b", "1"), ("b", "2")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.TextGrid").write_text(SHORT.replace('"S"', f'"{folder}"'))
    found = read_alignments(tmp_path)
    times = np.array([0.4])
    assert found.phones[found.phones_at("a/1", times)[0]] == "a" and found.phones[found.phones_at("b/1", times)[0]] == "b"
    assert "1" not in found and "c/1" not in found
    assert "2" in found and found.phones[found.phones_at("corpus/b/2", times)[0]] == "b"
    assert "x/2" not in found  # another speaker's


def test_a_ctm_is_read_in_any_order_with_holes(tmp_path: Path) -> None:
    (tmp_path / "a.ctm").write_text(";; made by hand\nu1 1 0.20 0.1 B 0.9\nu1 1 0.0 0.10 A\n\nu2 A 0 1 C ;; the end\n")
    found = read_alignments(tmp_path / "a.ctm")
    assert found.phones == ("A", "B", "C")
    assert found.phones_at("u1", np.array([0.0, 0.05, 0.15, 0.25, 0.35])).tolist() == [0, 0, -1, 1, -1]
    assert "u2" in found and "u3" not in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("u1 1 0.0 0.1\n", "a.ctm:1: has 4 columns"),
        ("u1 1 0.0 0.1 A\nu1 1 x 0.1 A\n", "a.ctm:2: start 'x'"),
        ("u1 1 -1 0.1 A\n", "a.ctm:1: start -1.0 and duration"),
        ("u1 A 0 1 A\nu2 B 0 1 A\nu1 B 0 1 A\n", "a.ctm:3: u1 is on channels A and B"),
        ("u1 1 0 nan A\n", "duration nan"),
        (";; nothing\n", "this CTM file is empty"),
    ],
)
def test_a_damaged_ctm_is_refused_at_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.ctm").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_alignments(tmp_path / "a.ctm")


def test_what_is_no_alignment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this folder holds no"):
        read_alignments(tmp_path)
    (tmp_path / "a.wav").write_bytes(b"RIFF\xff\xfe\x80")
    with pytest.raises(ValueError, match="no CTM file"):
        read_alignments(tmp_path / "a.wav")
    with pytest.raises(FileNotFoundError):
        read_alignments(tmp_path / "none.ctm")


def test_a_tier_without_intervals_covers_nothing() -> None:
    assert Alignments({"u": [], "v": [Interval(0.0, 1.0, "A")]}).phones_at("u", np.array([0.0, 0.5])).tolist() == [-1, -1]
