"""Which rows stand beside each other, what is said of them, and comparisons against plain arithmetic."""

from __future__ import annotations

import csv
import dataclasses
import io
from typing import Any

import pytest

from k2ssl.report.card import Card, Usage, Wer
from k2ssl.report.chain import Cost, Part
from k2ssl.report.document import csv_text
from k2ssl.report.origin import Code, Manifest
from k2ssl.report.tables import (
    Comparison,
    System,
    compare,
    comparison_table,
    cost_numbers,
    cost_table,
    distinct,
    results_table,
    set_names,
    wer_tables,
)


def wer(errors: int = 20, **changes: Any) -> Wer:
    """Of 200 words."""
    counts = {"errors": errors, "substitutions": errors - 3, "insertions": 2, "deletions": 1, "words": 200}
    about = {
        "test_set": "test",
        "cuts": "9:aaaaaaaaaa",
        "search": "greedy",
        "lm": None,
        "lm_scale": None,
        "files": {},
        "weights": "raw weights",
    }
    more = {"rule": "as-is, nfc", "wer": errors / 200, "low": errors / 250, "high": errors / 150, "utterances": 9, "audio_seconds": 60.0}
    return Wer(**{**about, **counts, **more, "real_time_factor": 0.1, "device": "1 x cpu", "decoding": "x", **changes})  # type: ignore[arg-type]


LM: dict[str, Any] = {"lm": "words.arpa", "lm_scale": 0.5, "files": {"search.lm": "l"}}


def system(name: str, *results: Wer, pretraining: float = 0.0, finetuning: float = 1.0, device: str = "4 x Big", **changes: Any) -> System:
    """Hours are of GPUs; `changes` are of the cost."""
    used = Usage(finetuning, 0.0, finetuning, 7.0, 50, 2**31, 2**30, (device,), {"done": 1})
    card = Card(
        "finetune", None, Code(None, None, None, None, None), {}, 94_560_000, (Manifest("a", "sha", 1.0, 2),), (), None, 50, used, results
    )
    parts = {"labels": Part(), "pretraining": Part(pretraining, 0.0, 0.0, (device,)), "finetuning": Part(finetuning, 0.0, 0.0, (device,))}
    numbers = {"pretraining_updates": 400, "finetuning_updates": 50, "pretraining_data": ("d",), "missing": ()}
    return System(name, card, Cost(**{**parts, **numbers, **changes}), results)  # type: ignore[arg-type]


def only(found: list[Comparison]) -> Comparison:
    assert len(found) == 1
    return found[0]


def test_rows_with_and_without_a_language_model_are_in_tables_of_their_own() -> None:
    tables = wer_tables([system("one", wer(20), wer(10, **LM), pretraining=1.0), system("two", wer(30), missing=("its labels",))])
    assert [row[0] for row in tables[False].rows] == ["one", "two"] and [row[0] for row in tables[True].rows] == ["one"]
    assert tables[False].rows[0] == ("one", "greedy", "raw weights", "10.00 [8.00, 13.33] 20/200", "2.00 GPU-h")
    assert tables[False].rows[1][-1] == "≥ 1.00 GPU-h" and tables[True].rows[0][1] == "greedy, words.arpa x 0.5"
    assert list(wer_tables([system("one", wer())])) == [False]


def test_sets_are_columns_and_a_missing_result_is_marked() -> None:
    table = wer_tables([system("one", wer(), wer(40, test_set="other", cuts="9:bb")), system("two", wer(test_set="other", cuts="9:bb"))])[
        False
    ]
    assert [name.partition(":")[0] for name in table.header[3:-1]] == ["test", "other"]
    assert table.rows[1][3] == "-" and table.rows[0][4].startswith("20.00")


def test_sets_of_one_name_with_other_utterances_are_told_apart() -> None:
    systems = [system("one", wer()), system("two", wer(cuts="9:bbbbbbbbbb"))]
    assert set(set_names(systems).values()) == {"test [aaaaaa]", "test [bbbbbb]"}
    table = wer_tables(systems)[False]
    assert table.rows[0][4] == "-" and table.rows[1][3] == "-"
    assert any("test [aaaaaa], test [bbbbbb]" in note and note.startswith("Not comparable") for note in table.notes)
    assert compare(systems, "one") == []


def test_unequal_fine_tuning_and_rules_are_noted() -> None:
    table = wer_tables([system("one", wer()), system("two", wer(rule="lower, nfc"), finetuning_updates=70)])[False]
    assert any("Fine-tuning updates differ: 50: one; 70: two" in note for note in table.notes)
    assert any("as-is, nfc; lower, nfc" in note for note in table.notes)
    lower = wer_tables([system("one", wer(rule="lower, nfc"))])[False]
    assert lower.notes == ("Texts were compared by the rule lower, nfc.",)
    with_lm = wer_tables([system("one", wer(), wer(lm="an4.lm", rule="lower, nfc"))])  # of two tables each has one rule
    assert all(any("as-is, nfc; lower, nfc" in note for note in table.notes) for table in with_lm.values()) and len(with_lm) == 2
    assert "(lower, nfc)" in with_lm[True].rows[0][1] and "(as-is, nfc)" in with_lm[False].rows[0][1]
    assert wer_tables([system("one", wer()), system("two", wer(), device="1 x Small")])[False].notes == (
        "Not comparable: hours of different devices (Big; Small).",
    )
    assert wer_tables([system("one", wer()), system("two", wer()), system("none", device="1 x Small")])[False].notes == ()


def test_the_headline_is_plain_arithmetic() -> None:
    base = system("hubert", wer(44), pretraining=1216.0, finetuning=10.0)
    ours = system("zipformer", wer(28), pretraining=347.0, finetuning=10.0, pretraining_updates=250)
    found = only(compare([base, ours], "hubert"))
    assert found.reduction == pytest.approx((0.22 - 0.14) / 0.22)
    assert found.pretraining_speed_up == pytest.approx(1216 / 347) and found.total_speed_up == pytest.approx(1226 / 357)
    assert found.updates_ratio == pytest.approx(5 / 8) and found.notes == ()
    table = comparison_table([found], set_names([base, ours]), with_lm=False)
    assert table is not None and table.rows[0] == ("zipformer", "test", "greedy", "14.00", "22.00", "36.4 %", "3.50x", "3.43x", "0.62x", "")
    assert comparison_table([found], set_names([base, ours]), with_lm=True) is None


@pytest.mark.parametrize(
    "changes",
    [
        LM,
        {"search": "modified-beam, beam 4"},
        {"cuts": "8:aaaaaaaaaa"},
        {"rule": "lower, nfc"},
        {"files": {"search.lexicon": "x"}},
    ],
)
def test_results_under_other_conditions_are_not_compared(changes: dict[str, Any]) -> None:
    assert compare([system("base", wer(40)), system("other", wer(20, **changes))], "base") == []
    assert only(compare([system("base", wer(40, **changes)), system("other", wer(20, **changes))], "base")).reduction == 0.5


def test_another_language_model_is_not_compared() -> None:
    other = {**LM, "files": {"search.lm": "m"}}
    assert compare([system("base", wer(40, **LM)), system("other", wer(20, **other))], "base") == []


def test_scales_that_each_system_has_of_its_own_are_compared_with_a_remark() -> None:
    tuned = {**LM, "lm_scale": 0.6, "search": "prefix-beam, beam 4, token score -0.5"}
    base = system("base", wer(40, **{**LM, "search": "prefix-beam, beam 4"}))
    found = only(compare([base, system("other", wer(20, **tuned))], "base"))
    assert found.reduction == 0.5
    assert found.notes == ("tuned: language model x 0.6, token score -0.5 against language model x 0.5",)
    assert compare([base, system("other", wer(20, **{**tuned, "search": "prefix-beam, beam 8, token score -0.5"}))], "base") == []
    several = system("base", wer(40, **tuned), wer(30, **{**tuned, "lm_scale": 0.5}))
    assert only(compare([several, system("other", wer(20, **tuned))], "base")).reduction == 0.5
    unsure = only(compare([several, system("other", wer(20, **{**tuned, "lm_scale": 0.1}))], "base"))
    assert unsure.reduction is None and "2 results" in unsure.notes[0]


def test_without_a_language_model_scores_are_part_of_the_search() -> None:
    scored = wer(20, search="greedy, token score 0.5")
    assert compare([system("base", wer(40)), system("other", scored)], "base") == []


def test_rows_of_other_rules_and_of_other_models_of_one_name_stand_apart() -> None:
    one = system("one", wer(20, **LM), wer(30, **{**LM, "files": {"search.lm": "mmmmmmmm"}}))
    assert [row[1] for row in wer_tables([one])[True].rows] == ["greedy, words.arpa x 0.5 [l]", "greedy, words.arpa x 0.5 [mmmmmm]"]
    two = system("two", wer(), wer(10, rule="lower, nfc", test_set="other", cuts="9:bb"))
    rows = wer_tables([two])[False].rows
    assert [row[1] for row in rows] == ["greedy (as-is, nfc)", "greedy (lower, nfc)"] and rows[0][4] == rows[1][3] == "-"


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"device": "4 x Small"}, "different devices"),
        ({"missing": ("labels",)}, "not all were recorded"),
    ],
)
def test_hours_that_are_not_comparable_are_not_compared(changes: dict[str, Any], note: str) -> None:
    found = only(compare([system("base", wer(40), pretraining=9.0), system("other", wer(20), pretraining=3.0, **changes)], "base"))
    assert found.reduction == 0.5 and found.pretraining_speed_up is None and found.total_speed_up is None and note in found.notes[0]


def test_hours_of_more_devices_of_one_kind_are_compared() -> None:
    found = only(compare([system("base", wer(40), pretraining=9.0), system("other", wer(20), pretraining=3.0, device="8 x Big")], "base"))
    assert found.pretraining_speed_up == 3.0 and found.notes == ()


@pytest.mark.parametrize(
    ("changes", "note"),
    [({"finetuning_updates": 70}, "fine-tuning updates: 70 against 50"), ({"pretraining_data": ("e",)}, "pre-trained on other manifests")],
)
def test_unequal_training_is_remarked(changes: dict[str, Any], note: str) -> None:
    assert only(compare([system("base", wer(40)), system("other", wer(20), **changes)], "base")).notes == (note,)


def test_other_manifests_are_remarked() -> None:
    other = system("other", wer(20))
    assert other.card is not None
    other = dataclasses.replace(other, card=dataclasses.replace(other.card, data=(Manifest("a", "changed", 1.0, 2),)))
    assert only(compare([system("base", wer(40)), other], "base")).notes == ("trained on other manifests",)


def test_of_several_results_of_the_baseline_that_of_the_same_weights_counts() -> None:
    base = system("base", wer(40), wer(20, weights="mean over steps 1 to 9"))
    assert only(compare([base, system("other", wer(10))], "base")).reduction == pytest.approx(0.75)
    assert only(compare([base, system("other", wer(10, weights="mean over steps 1 to 9"))], "base")).reduction == 0.5
    unsure = only(compare([base, system("other", wer(10, weights="mean over steps 2 to 9"))], "base"))
    assert unsure.reduction is None and "2 results" in unsure.notes[0]
    alone = only(compare([system("base", wer(40)), system("other", wer(10, weights="mean"))], "base"))
    assert alone.reduction == pytest.approx(0.75) and alone.notes == ("weights: mean against raw weights",)


def test_an_unknown_baseline_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="'else', allowed are those with results: one, two"):
        compare([system("one", wer()), system("two", wer()), system("without")], "else")


def test_a_baseline_without_errors_gives_no_ratio() -> None:
    assert only(compare([system("base", wer(0)), system("other", wer(5))], "base")).reduction is None


def test_repeated_results_are_shown_once() -> None:
    assert distinct([wer(20), wer(20, decoding="again"), wer(21), wer(20, weights="mean")]) == (wer(20), wer(21), wer(20, weights="mean"))


def test_the_cost_table_tells_parts_and_marks_what_is_not_known() -> None:
    one = system("one", pretraining=2.0, finetuning=1.0, labels=Part(0.0, 0.25, 0.0, ("1 x Chip",)))
    table = cost_table([one, system("two", missing=("its labels",)), System("lost", None, None, (wer(),))])
    row = (
        "one",
        "finetune",
        "94.56 M",
        "4 x Big",
        "50",
        "7.00 h",
        "0.250 CPU-h",
        "2.00 GPU-h",
        "1.00 GPU-h",
        "3.00 GPU-h + 0.250 CPU-h",
        "2.00 GiB GPU, 1.00 GiB",
    )
    assert table.rows[0] == row and len(table.rows) == 2
    assert table.rows[1][9] == "≥ 1.00 GPU-h" and any(note == "≥ in two: its labels." for note in table.notes)
    assert any("different devices (Big; Chip)" in note for note in table.notes)


def test_the_files_for_programs_hold_unrounded_numbers() -> None:
    systems = [system("one", wer(20, low=None), pretraining=1 / 3)]
    (row,) = csv.DictReader(io.StringIO(csv_text(results_table(systems))))
    assert float(row["wer"]) == 0.1 and row["low"] == "" and int(row["errors"]) == 20 and row["set"] == "test"
    (row,) = csv.DictReader(io.StringIO(csv_text(cost_numbers(systems))))
    assert float(row["pretraining_gpu_hours"]) == 1 / 3 and float(row["total_gpu_hours"]) == 1 + 1 / 3 and row["complete"] == "True"
    assert float(row["pretraining_cpu_hours"]) == 0 and row["parameters"] == "94560000" and row["finetuning_updates"] == "50"
