"""What is found below a folder, and which decoding is of which run."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from k2ssl.bin.report import interval
from k2ssl.bin.score import main as score
from k2ssl.report import experiments
from k2ssl.report.experiments import Experiments, find


def names(found: Experiments) -> dict[str, list[str]]:
    """Decodings by run."""
    return {run.name: [Path(wer.decoding).name for wer in run.card.results] for run in found.runs.values()}


def look(world: Any, *roots: str) -> Experiments:
    return find(roots or ("out",), interval)


def test_runs_are_found_with_their_decodings(world: Any) -> None:
    found = look(world)
    assert names(found) == {"pretrain": [], "ssl": ["ssl-greedy"], "scratch": ["scratch-greedy"]}
    assert found.orphans == () and found.remarks == () and list(found.label_pictures) == ["train"]
    assert {run.name: run.card.program for run in found.runs.values()} == {"pretrain": "pretrain", "ssl": "finetune", "scratch": "finetune"}


def test_what_lies_below_two_roots_is_found_once(world: Any) -> None:
    assert names(look(world, "out", "out/ssl", "./out/decode")) == names(look(world))


def test_runs_of_one_name_are_told_apart_by_the_folder_above(world: Any) -> None:
    world.run("second/ssl", "finetune", seconds=(1.0,), steps=10)
    assert set(names(look(world))) == {"pretrain", "out/ssl", "second/ssl", "scratch"}


def test_errors_and_interval_are_those_of_the_hypotheses(world: Any) -> None:
    found = look(world)
    (wer,) = found.runs[world.out / "scratch"].card.results
    assert (wer.wer, wer.errors, wer.substitutions, wer.insertions, wer.deletions, wer.words) == (3 / 9, 3, 2, 1, 0, 9)
    assert (wer.low, wer.high) == interval(world.out / "decode/scratch-greedy/hypotheses.jsonl")
    assert wer.low is not None and wer.low < wer.wer
    assert (wer.test_set, wer.search, wer.lm, wer.real_time_factor, wer.device) == ("test", "greedy", None, 0.5, "1 x cpu")


def test_a_score_is_taken_before_what_the_decoding_counted(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world.decoding("caps", "ssl", ["A b", "c"], ["a b", "c"])
    (plain,) = (wer for wer in look(world).runs[world.out / "ssl"].card.results if wer.decoding.endswith("caps"))
    assert plain.errors == 1 and plain.rule == "as-is, nfc"
    monkeypatch.chdir(world.out)  # paths in wer.json are then meant as seen from a folder above it
    assert score(["decode/caps/hypotheses.jsonl", "--casing", "lower", "--output", "score"]) == 0
    monkeypatch.chdir(world.base)
    (scored,) = (wer for wer in look(world).runs[world.out / "ssl"].card.results if wer.decoding.endswith("caps"))
    (file,) = json.loads((world.out / "score/wer.json").read_text())["files"]
    assert scored.rule == "lower, nfc" and (scored.wer, scored.low, scored.high) == (0.0, file["word"]["low"], file["word"]["high"])


def test_of_several_scores_that_of_plain_comparison_counts(world: Any) -> None:
    world.decoding("caps", "ssl", ["A b", "c"], ["a b", "c"])
    for folder, casing in (("one", "upper"), ("two", "as-is"), ("three", "lower")):
        assert score(["out/decode/caps/hypotheses.jsonl", "--casing", casing, "--output", f"out/score/{folder}"]) == 0
    (wer,) = (wer for wer in look(world).runs[world.out / "ssl"].card.results if wer.decoding.endswith("caps"))
    assert wer.rule == "as-is, nfc" and wer.errors == 1


def test_a_score_of_an_earlier_decoding_is_named_and_passed_over(world: Any) -> None:
    assert score(["out/decode/ssl-greedy/hypotheses.jsonl", "--output", "out/score"]) == 0
    world.decoding("ssl-greedy", "ssl", ["a b c d"], ["x y c d"])
    found = look(world)
    assert [wer.errors for wer in found.runs[world.out / "ssl"].card.results] == [2]
    assert len(found.remarks) == 1 and "wer.json" in found.remarks[0] and "1 errors" in found.remarks[0]


def test_a_score_by_another_rule_of_an_earlier_decoding_is_passed_over_too(world: Any) -> None:
    assert score(["out/decode/ssl-greedy/hypotheses.jsonl", "--casing", "lower", "--output", "out/score"]) == 0
    world.decoding("ssl-greedy", "ssl", ["a b c d"], ["x y c d"])
    found = look(world)
    assert [wer.rule for wer in found.runs[world.out / "ssl"].card.results] == ["as-is, nfc"]
    assert "counts 9 words" in found.remarks[0]


def test_a_score_without_counts_is_named_and_the_decoding_stays(world: Any) -> None:
    world.write("out/score/wer.json", {"format": "k2ssl-wer", "version": 1, "files": [{"path": "out/decode/ssl-greedy/hypotheses.jsonl"}]})
    found = look(world)
    assert names(found)["ssl"] == ["ssl-greedy"] and "wer.json: damaged" in found.remarks[0]


def test_a_score_is_of_the_decoding_beside_it_and_not_of_one_of_that_name_here(world: Any) -> None:
    assert score(["out/decode/ssl-greedy/hypotheses.jsonl", "--casing", "lower", "--output", "out/score"]) == 0
    shutil.copytree(world.out, world.base / "copy/out")
    (wer,) = look(world, "copy/out").runs[world.base / "copy/out/ssl"].card.results
    assert wer.rule == "lower, nfc"


def test_what_is_published_does_not_say_where_the_folder_lies(world: Any) -> None:
    (world.out / "decode/scratch-greedy/decode.json").write_text("{")
    found = look(world, str(world.out))
    (wer,) = found.runs[world.out / "ssl"].card.results
    assert wer.decoding == "out/decode/ssl-greedy" and found.remarks[0].startswith("out/decode/scratch-greedy/decode.json")


def test_damaged_lines_of_a_ledger_are_named(world: Any) -> None:
    (world.out / "ssl/ledger.jsonl").write_text("junk\n")
    with (world.out / "scratch/ledger.jsonl").open("a") as file:
        file.write("junk\n")
    found = look(world)
    assert [remark.partition(" passed over")[0] for remark in found.remarks] == [
        "out/scratch/ledger.jsonl: 1 damaged line(s)",
        "out/ssl/ledger.jsonl: 1 damaged line(s)",
    ]
    assert world.out / "scratch" in found.runs and world.out / "ssl" not in found.runs and len(found.orphans) == 1


def test_a_switch_is_told_by_its_name_where_it_is_on(world: Any) -> None:
    for name, on in (("on", True), ("off", False)):
        world.decoding(name, "ssl", ["a"], ["b"], what={"search": {"beam": 4, "lm_final": on}})
    found = {Path(wer.decoding).name: wer.search for wer in look(world).runs[world.out / "ssl"].card.results}
    assert found["on"] == "greedy, beam 4, lm final" and found["off"] == "greedy, beam 4"


def test_an_average_is_of_the_run_that_it_names(world: Any) -> None:
    world.model("out/ssl_average.pt", "out/ssl")
    world.decoding("averaged", "ssl", ["a"], ["b"], checkpoint="out/ssl_average.pt")
    found = look(world)
    assert names(found)["ssl"] == ["averaged", "ssl-greedy"]
    assert [wer.weights for wer in found.runs[world.out / "ssl"].card.results] == ["as in ssl_average.pt", "raw weights at step 50"]


def test_checkpoints_are_told_by_their_steps(world: Any) -> None:
    paths = [f"out/ssl/checkpoints/step-0000000{step}.pt" for step in (50, 40, 30)]
    for path in paths[1:]:
        world.model(path, "out/ssl")
    world.decoding("earlier", "ssl", ["a"], ["b"], checkpoint=paths[1])
    folder = world.decoding("mean", "ssl", ["a"], ["b"], settings={"checkpoints": paths})
    record = json.loads((folder / "decode.json").read_text())
    record["what"] |= {
        "weights": "mean of the raw weights of 3 checkpoints",
        "checkpoints": [hashlib.sha256((world.base / path).read_bytes()).hexdigest() for path in paths],
    }
    (folder / "decode.json").write_text(json.dumps(record))
    weights = {Path(wer.decoding).name: wer.weights for wer in look(world).runs[world.out / "ssl"].card.results}
    assert weights["earlier"] == "raw weights at step 40"
    assert weights["mean"] == "mean of the raw weights of 3 checkpoints, steps 30 to 50"


def test_a_checkpoint_elsewhere_is_recognised_by_its_hash(world: Any, tmp_path: Path) -> None:
    kept = world.out / "scratch/checkpoints/step-000000050.pt"
    kept.write_bytes(b"weights that do not say whose they are")
    world.decoding("scratch-greedy", "scratch", ["a"], ["b"])
    moved = world.base / "moved/step-000000050.pt"
    moved.parent.mkdir()
    moved.write_bytes(kept.read_bytes())
    world.decoding("moved", "scratch", ["a"], ["b"], checkpoint="moved/step-000000050.pt")
    assert names(look(world))["scratch"] == ["moved", "scratch-greedy"]
    other = world.model("other/step-000000050.pt", "nowhere")
    world.decoding("other", "scratch", ["a"], ["b"], checkpoint=str(other))
    assert [Path(wer.decoding).name for wer in look(world).orphans] == ["other"]


def test_a_decoding_of_weights_that_were_replaced_belongs_to_nobody(world: Any) -> None:
    (world.out / "ssl/checkpoints/step-000000050.pt").write_bytes(b"trained again")
    found = look(world)
    assert names(found)["ssl"] == [] and len(found.orphans) == 1
    assert "has changed" in found.remarks[0] and "step-000000050.pt" in found.remarks[0]


def test_a_checkpoint_that_was_removed_is_still_of_its_run(world: Any) -> None:
    (world.out / "ssl/checkpoints/step-000000050.pt").unlink()
    assert names(look(world))["ssl"] == ["ssl-greedy"]


def test_a_moved_folder_is_found_again(world: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (world.base / "kept").mkdir()
    world.out.rename(world.base / "kept/out")
    monkeypatch.chdir("/")
    found = find([str(world.base / "kept/out")], interval)
    assert names(found) == {"pretrain": [], "ssl": ["ssl-greedy"], "scratch": ["scratch-greedy"]}


def test_the_language_model_and_its_weight_are_told_apart_from_the_search(world: Any) -> None:
    changes: dict[str, Any] = {
        "what": {
            "search": {"beam": 4, "nbest": 1, "lm": "x/words.arpa", "lm_scale": 0.5, "temperature": 1.3},
            "files": {"search.lm": "l" * 64},
        },
        "settings": {"search": {"lm": "x/words.arpa"}},
    }
    world.decoding("lm", "ssl", ["a"], ["b"], **changes)
    (wer,) = (wer for wer in look(world).runs[world.out / "ssl"].card.results if wer.lm)
    assert (wer.lm, wer.lm_scale, wer.search, wer.files) == ("words.arpa", 0.5, "greedy, beam 4, temperature 1.3", {"search.lm": "l" * 64})


def test_damaged_and_unfinished_files_are_named_and_passed_over(world: Any) -> None:
    (world.out / "decode/ssl-greedy/decode.json").write_text("{")
    world.decoding("running", "ssl", ["a"], ["b"], result=None)
    world.decoding("partly", "ssl", ["a"], ["b"], result={"wer": 0.5, "words": {}})
    world.decoding("silent", "ssl", ["a"], ["b"], result={"utterances": 3})
    (world.out / "scratch/settings.json").write_text("no JSON")
    world.write("out/score/wer.json", {"format": "else"})
    world.write("out/score/two/wer.json", {"format": "k2ssl-wer", "version": 1, "files": [3]})
    world.decoding("typed", "ssl", ["a"], ["b"], result={"wer": "much", "words": {}})
    folder = world.decoding("endless", "ssl", ["a"], ["b"])
    (folder / "decode.json").write_text((folder / "decode.json").read_text().replace('"audio_seconds": 6.0', '"audio_seconds": NaN'))
    folder = world.decoding("nobody", "ssl", ["a"], ["b"], what={"checkpoints": None})
    found = look(world)
    remarks = "\n".join(found.remarks)
    assert names(found) == {"pretrain": [], "ssl": []} and "nobody" in [Path(wer.decoding).name for wer in found.orphans]
    for text in (
        "ssl-greedy/decode.json: damaged",
        "running: this decoding is not finished",
        "partly/decode.json: damaged",
        "no error rate",
        "score/two/wer.json: damaged",
        "typed/decode.json: damaged",
        "endless/decode.json: damaged",
    ):
        assert text in remarks
    assert "scratch/settings.json: damaged" in remarks and "wer.json: damaged" in remarks


def test_damaged_hypotheses_leave_a_result_without_an_interval(world: Any) -> None:
    (world.out / "decode/ssl-greedy/hypotheses.jsonl").write_text("{")
    found = look(world)
    (wer,) = found.runs[world.out / "ssl"].card.results
    assert wer.low is None and wer.high is None and wer.errors == 1 and "no interval" in found.remarks[0]


def test_folders_without_anything_are_refused(world: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: there is no such folder"):
        look(world, "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no runs"):
        look(world, "empty")
    with pytest.raises(ValueError, match="labels: no runs"):
        look(world, "out/mfcc/labels")


def test_folders_are_told_apart_by_their_whole_path_if_need_be_and_alternatives_are_no_other_search() -> None:
    assert experiments._short_names([Path("/run"), Path("/x/run")]) == {Path("/run"): "/run", Path("/x/run"): "x/run"}
    options = {"beam": 4, "nbest": 2}
    assert (
        experiments._search_text("modified-beam", options)
        == experiments._search_text("modified-beam", {"beam": 4})
        == "modified-beam, beam 4"
    )
