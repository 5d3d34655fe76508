"""Texts below each other: columns line up for eyes, whatever the script."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2ssl.decode.aligned_text import Column, aligned_text, columns_of, pad, text_width
from k2ssl.decode.wer import count_errors


def test_words_stand_below_words_and_errors_below_them() -> None:
    assert aligned_text("the cat sat on it", [("hyp", "the hat on it now")]).splitlines() == [
        "    ref  the  cat  sat  on  it  ***",
        "    hyp  the  hat  ***  on  it  now",
        "              S    D            I",
    ]


def test_a_right_hypothesis_has_no_line_of_errors() -> None:
    assert aligned_text("a cat", [("hyp", "a cat")]).splitlines() == ["    ref  a  cat", "    hyp  a  cat"]


def test_empty_texts_are_all_insertions_or_deletions() -> None:
    assert aligned_text("", [("hyp", "oh no")]).splitlines() == ["    ref  **  **", "    hyp  oh  no", "         I   I"]
    assert aligned_text("oh no", [("hyp", "")]).splitlines() == ["    ref  oh  no", "    hyp  **  **", "         D   D"]
    assert aligned_text("", [("hyp", "")]).splitlines() == ["    ref", "    hyp"]


def test_two_hypotheses_share_columns_and_only_the_one_that_errs_is_marked() -> None:
    text = aligned_text("a cat sat", [("first", "a big cat"), ("second", "oh my a hat sat")])
    assert text.splitlines() == [
        "    ref     **  **  a  ***  cat  sat",
        "    first           a  big  cat  ***",
        "                       I         D",
        "    second  oh  my  a       hat  sat",
        "            I   I           S",
    ]


def test_wide_characters_take_two_places_and_combining_ones_none() -> None:
    assert [text_width(text) for text in ("", "abc", "早上", "\uff71", "\uff21", "u\u0308", "a\u200db", "über", "→")] == [
        0,
        3,
        4,
        1,
        2,
        1,
        2,
        4,
        1,
    ]
    assert pad("早", 4) + "|" == "早  |" and pad("早", 4, right=True) == "  早"
    assert aligned_text("早上 好", [("hyp", "早安 u\u0308b 好")]).splitlines() == [
        "    ref  早上  **  好",
        "    hyp  早安  u\u0308b  好",
        "         S     I",
    ]


def test_characters_are_aligned_with_a_sign_for_spaces() -> None:
    assert aligned_text("ab c", [("hyp", "abc")], "char").splitlines() == ["    ref  a b ␣ c", "    hyp  a b * c", "             D"]


def test_long_texts_go_on_below() -> None:
    text = aligned_text("aa bb cc dd", [("hyp", "aa bb cc dx")], width=15)
    assert text.splitlines() == ["    ref  aa  bb", "    hyp  aa  bb", "", "    ref  cc  dd", "    hyp  cc  dx", "             S"]
    assert aligned_text("aa bb", [("hyp", "aa bb")], width=14).count("ref") == 2  # one place too few for both
    assert aligned_text("longer a", [("hyp", "longer a")], width=5).splitlines()[0] == "    ref  longer"


sentences = st.lists(st.sampled_from(["a", "b", "早", "long"]), max_size=7).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(sentences, st.lists(sentences, min_size=1, max_size=3))
def test_columns_hold_all_texts_and_all_errors(reference: str, hypotheses: list[str]) -> None:
    columns = columns_of(reference, hypotheses, "word")
    assert [c.reference for c in columns if c.reference is not None] == reference.split()
    for which, hypothesis in enumerate(hypotheses):
        assert [c.hypotheses[which] for c in columns if c.hypotheses[which] is not None] == hypothesis.split()
        marks = [c.mark(which) for c in columns]
        counts = count_errors(reference, hypothesis)
        assert (marks.count("S"), marks.count("I"), marks.count("D")) == (counts.substitutions, counts.insertions, counts.deletions)
    assert all(c.reference is not None or any(c.hypotheses) for c in columns)


@pytest.mark.parametrize(
    ("column", "marks"),
    [
        (Column("a", ("a", "b", None)), ["", "S", "D"]),
        (Column(None, ("a", None)), ["I", ""]),
    ],
)
def test_marks(column: Column, marks: list[str]) -> None:
    assert [column.mark(i) for i in range(len(marks))] == marks
