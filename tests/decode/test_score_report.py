"""The report that people read: every number in its place."""

from __future__ import annotations

from k2ssl.decode.compare import compare
from k2ssl.decode.results import Result
from k2ssl.decode.score_report import comparison_text, conditions, overview, score_text, table
from k2ssl.decode.scoring import Score, TextRule, score


def decoding(*texts: tuple[str, str | None, str, str | None]) -> Score:
    return score([Result(name, hyp, 0.0, 360.0, ref, speaker) for name, ref, hyp, speaker in texts])


SCORE = decoding(
    ("a", "the cat sat", "the hat sat", "anna"),
    ("b", "the cat sat on it", "the hat sat it", "ben"),
    ("c", "on it", "oh on it", "ben"),
    ("d", "it", "it", None),
    ("e", None, "what", None),
)
CAUTION = "Of {} utterances intervals are too narrow and p-values too small; 30 or more are needed."
PLAIN = decoding(("a", "a b", "a b", None), ("b", "a", "a", None))


def test_a_report_tells_totals_speakers_words_and_utterances() -> None:
    assert score_text("exp/h.jsonl", SCORE, "word", top=5, worst=5).splitlines() == [
        "exp/h.jsonl",
        "===========",
        "",
        "4 utterances, 0.40 h; 1 without a reference are left out",
        *SCORE.word.text().splitlines(),
        SCORE.char.text().splitlines()[0],
        CAUTION.format(4),
        "",
        "Speakers (3 of 3, highest WER first)",
        "speaker    utterances  words  sub  del  ins     WER     CER",
        "ben                 2      7    1    1    1  42.86%  31.82%",
        "anna                1      3    1    0    0  33.33%   9.09%",
        "(unknown)           1      1    0    0    0   0.00%   0.00%",
        "",
        "Substituted (1 of 1, the most frequent first)",
        "reference → hypothesis  times",
        "cat → hat                   2",
        "",
        "Deleted (1 of 1, the most frequent first)",
        "word  times  of",
        "on        1   2",
        "",
        "Inserted (1 of 1, the most frequent first)",
        "word  times",
        "oh        1",
        "",
        "Utterances with the most errors (3 of 3 that have any)",
        "",
        "b, speaker ben: 2 errors in 5 words",
        "    ref  the  cat  sat  on  it",
        "    hyp  the  hat  sat  **  it",
        "              S         D",
        "",
        "c, speaker ben: 1 errors in 2 words",
        "    ref  **  on  it",
        "    hyp  oh  on  it",
        "         I",
        "",
        "a, speaker anna: 1 errors in 3 words",
        "    ref  the  cat  sat",
        "    hyp  the  hat  sat",
        "              S",
    ]


def test_tables_end_where_they_are_asked_to() -> None:
    text = score_text("x", SCORE, "word", top=1, worst=1)
    assert "Speakers (1 of 3, highest WER first)" in text and "(unknown)" not in text and "anna" not in text
    assert "Utterances with the most errors (1 of 3 that have any)" in text and text.count("    hyp") == 1
    bare = score_text("x", SCORE, "word", top=0, worst=0)
    assert (
        bare
        == f"x\n=\n\n4 utterances, 0.40 h; 1 without a reference are left out\n{SCORE.word.text()}\n{SCORE.char.text().splitlines()[0]}\n{CAUTION.format(4)}"
    )


def test_what_there_is_none_of_has_no_heading() -> None:
    assert score_text("x", PLAIN, "word", top=5, worst=5).splitlines()[3:] == [
        "2 utterances, 0.20 h",
        *PLAIN.word.text().splitlines(),
        PLAIN.char.text().splitlines()[0],
        CAUTION.format(2),
    ]


def test_only_few_utterances_make_the_report_cautious() -> None:
    texts = [(f"u{i:02d}", "a b", "a b" if i else "b", None) for i in range(30)]
    few, many = decoding(*texts[:29]), decoding(*texts)
    assert CAUTION.format(29) in score_text("x", few, "word", 5, 5) and "p-values" not in score_text("x", many, "word", 5, 5)
    assert CAUTION.format(29) in comparison_text(("x", "y"), (few, few), compare(few, few), 0, 5)
    assert "p-values" not in comparison_text(("x", "y"), (many, many), compare(many, many), 0, 5)


def test_characters_have_tables_of_their_own() -> None:
    text = score_text("x", SCORE, "char", top=3, worst=1)
    assert "c → h                       2" in text and "\nchar  times  of\n␣" in text and "highest CER first" in text
    assert "b, speaker ben: 4 errors in 17 chars\n    ref  t h e ␣ c a t" in text


def test_a_speaker_without_words_has_no_rate() -> None:
    text = score_text("x", decoding(("a", "", "oh", "anna"), ("b", "yes", "yes", "ben")), "word", top=5, worst=0)
    assert "anna              1      0    0    0    1      -      -" in text


def test_the_overview_has_a_line_for_each_file() -> None:
    header, first, second = overview([("one.jsonl", SCORE), ("two.jsonl", PLAIN)]).splitlines()
    assert header.split() == ["hypotheses", "utterances", "words", "WER", "95", "%", "interval", "sub", "del", "ins", "SER", "CER"]
    word, char = SCORE.word, SCORE.char
    interval = f"{word.low:.2%} to {word.high:.2%}"
    assert first.split() == f"one.jsonl 4 11 36.36% {interval} 18.18% 9.09% 9.09% 75.00% {char.rate:.2%}".split()
    assert second.split() == ["two.jsonl", "2", "3", "0.00%", "0.00%", "to", "0.00%", "0.00%", "0.00%", "0.00%", "0.00%", "0.00%"]
    assert len(header) == len(first) == len(second)


def test_the_comparison_shows_both_hypotheses() -> None:
    other = decoding(
        ("a", "the cat sat", "the cat sat", None),
        ("b", "the cat sat on it", "", None),
        ("c", "on it", "on it", None),
        ("d", "it", "it", None),
    )
    found = compare(SCORE, other, seed=5)
    text = comparison_text(("one", "two"), (SCORE, other), found, 5, worst=2)
    assert text.splitlines() == [
        "Comparison",
        "==========",
        "",
        "first   one",
        "second  two",
        "",
        *found.text().splitlines(),
        "",
        "Paired bootstrap over 4 utterances (Bisani and Ney 2004), 10,000 draws, seed 5; p is two-sided.",
        CAUTION.format(4),
        "",
        "Utterances that differ most (2 of 3 that differ)",
        "",
        "b: 2 and 5 errors",
        "    ref     the  cat  sat  on  it",
        "    first   the  hat  sat  **  it",
        "                 S         D",
        "    second  ***  ***  ***  **  **",
        "            D    D    D    D   D",
        "",
        "c: 1 and 0 errors",
        "    ref     **  on  it",
        "    first   oh  on  it",
        "            I",
        "    second      on  it",
    ]
    assert (
        comparison_text(("one", "two"), (SCORE, SCORE), compare(SCORE, SCORE), 0, worst=2).splitlines()[-2].startswith("Paired bootstrap")
    )


def test_the_conditions_state_the_rule_and_the_seed() -> None:
    assert "compared as they are, so that case counts, in Unicode form NFC." in conditions(TextRule(), 3)
    assert "compared in lower case, code point by code point." in conditions(TextRule("lower", "as-is"), 3)
    assert "1,000 draws, seed 3." in conditions(TextRule(), 3)


def test_a_table_lines_up_wide_characters() -> None:
    assert table(("word", "n"), [("早上", "10"), ("a", "2")]).splitlines() == ["word   n", "早上  10", "a      2"]
