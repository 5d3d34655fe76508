"""The lines of hypotheses.jsonl: what is written is read again, and what is wrong is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2ssl.decode.results import Alternative, Result, Word, from_line, iterate_results, read_results, to_line

FULL = Result(
    "utt1",
    "a hat",
    -3.25,
    1.5,
    "a cat",
    "anna",
    (Word("a", 0.1, 0.25), Word("hat", 0.3, 0.7)),
    (Alternative("a hat", -3.25), Alternative("", -9.0)),
)

texts = st.text(max_size=12)  # any code points but lone surrogates
finite = st.floats(allow_nan=False, allow_infinity=False)
times = st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)).map(sorted)
results = st.builds(
    Result,
    id=st.text(min_size=1, max_size=8),
    hyp=texts,
    score=finite,
    duration=st.floats(0, 1e9),
    ref=st.none() | texts,
    speaker=st.none() | texts,
    words=st.lists(st.builds(lambda text, span: Word(text, *span), texts, times), max_size=3).map(tuple),
    nbest=st.lists(st.builds(Alternative, texts, finite), max_size=3).map(tuple),
)


@settings(max_examples=200, deadline=None)
@given(results)
def test_what_is_written_is_read_again(result: Result) -> None:
    line = to_line(result)
    assert from_line(line) == result
    assert b"\n" not in line.encode("utf-8")  # also for texts that hold one


def test_a_line_has_the_keys_that_the_format_names() -> None:
    assert json.loads(to_line(FULL)) == {
        "id": "utt1",
        "ref": "a cat",
        "hyp": "a hat",
        "score": -3.25,
        "duration": 1.5,
        "speaker": "anna",
        "timestamps": [["a", 0.1, 0.25], ["hat", 0.3, 0.7]],
        "nbest": [{"hyp": "a hat", "score": -3.25}, {"hyp": "", "score": -9.0}],
    }


def test_letters_of_all_scripts_stay_readable() -> None:
    assert '"hyp": "über 早上"' in to_line(Result("u", "über 早上", 0.0, 1.0))


def test_what_is_not_known_may_be_left_out() -> None:
    line = '{"id": "u", "hyp": "", "score": 0, "duration": 2}'
    assert from_line(line) == Result("u", "", 0.0, 2.0, None, None, (), ())
    assert from_line(line[:-1] + ', "ref": null, "speaker": null}') == from_line(line)
    assert from_line(line[:-1] + ', "ref": ""}').ref == ""  # nothing was said


def changed(**values: object) -> str:
    return json.dumps({**json.loads(to_line(FULL)), **values})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "not JSON"),
        ('{"id": "u", "hyp": ', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "3, an object in braces is needed"),
        ('{"id": "u", "score": 0, "duration": 0}', "key 'hyp' is missing"),
        (changed(refs="a"), "key 'refs' is unknown, allowed are id, ref, hyp, score, duration, speaker, timestamps, nbest"),
        (changed(id=""), "id is empty"),
        (changed(id=7), "id is 7, a text is needed"),
        (changed(hyp=None), "hyp is null, a text is needed"),
        (changed(ref=["a"]), 'ref is ["a"], a text is needed'),
        (changed(ref="\ud800"), "half a character"),
        (changed(score="0"), 'score is "0", a number is needed'),
        (changed(score=True), "score is true, a number is needed"),
        (changed(score=float("nan")), "score of 'utt1' is nan, a finite number is needed"),
        (changed(duration=-1), "duration of 'utt1' is -1.0 s, allowed is >= 0"),
        (changed(duration=float("inf")), "duration of 'utt1' is inf s, allowed is >= 0"),
        (changed(duration=10**400), "duration is 100000000000000000000000000000000000000000000000000000000..., which is too large"),
        (changed(timestamps={}), "timestamps is {}, a list is needed"),
        (changed(timestamps=[["a", 1]]), 'timestamps holds ["a", 1], [word, begin, end] is needed'),
        (changed(timestamps=[["a", "1", 2]]), 'begin of timestamps is "1", a number is needed'),
        (changed(timestamps=[["a", 2, 1]]), "'a' from 2.0 to 1.0 s, allowed are 0 <= begin <= end"),
        (changed(timestamps=[["a", -1, 1]]), "'a' from -1.0 to 1.0 s, allowed are 0 <= begin <= end"),
        (changed(timestamps=[["a", 1, float("inf")]]), "'a' from 1.0 to inf s"),
        (changed(nbest=[["a", 1]]), 'nbest holds ["a", 1], {"hyp": TEXT, "score": NUMBER} is needed'),
        (changed(nbest=[{"hyp": "a", "score": float("-inf")}]), "score is -inf, a finite number is needed"),
    ],
)
def test_a_wrong_line_is_refused_with_what_is_wrong(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        from_line(line)


def test_a_file_gives_its_results_in_order_and_empty_lines_nothing(tmp_path: Path) -> None:
    first, second = Result("b", "one\u2028two", 0.0, 1.0), Result("a", "x", 0.0, 1.0)
    path = tmp_path / "h.jsonl"
    path.write_text(f"{to_line(first)}\r\n\n  \n{to_line(second)}", encoding="utf-8")
    assert read_results(path) == [first, second]


def test_errors_of_a_file_name_it_and_the_line(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    good = to_line(FULL).encode()
    for content, message in [
        (good + b"\n{", "line 2: not JSON"),
        (b"\n" + good + b"\n\n" + good, "line 4: utterance 'utt1' is also in line 2; ids must differ"),
        (b'{"id": "\xff"}', "line 1: 'utf-8' codec"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{path}, {message}")):
            read_results(path)
    with pytest.raises(FileNotFoundError):
        read_results(tmp_path / "other.jsonl")


def test_results_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    path.write_text(f"{to_line(FULL)}\nnot JSON\n")
    found = iterate_results(path)
    assert next(found) == FULL
    with pytest.raises(ValueError, match="line 2: not JSON"):
        next(found)
