"""The program decode on words of tones: what it writes, that it goes on where it was, that batches change nothing, what it refuses."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.cut import MonoCut

from k2ssl.bin import decode, decode_lattice
from k2ssl.bin.decode_arguments import with_names
from k2ssl.bin.decode_folder import PartWriter, read_parts
from k2ssl.bin.decode_methods import Method, SearchConfig, build_recognizer, options_of, read_lexicon
from k2ssl.bin.decode_model import TrainedModel, load_trained
from k2ssl.data.tokenizer import LetterTokenizer, NormalizationConfig
from k2ssl.decode.flashlight import PIP_LINE
from k2ssl.decode.results import Result, read_results
from k2ssl.decode.wer import error_report
from k2ssl.models.asr import AsrConfig, AsrModel
from k2ssl.models.load import config_to_dict
from k2ssl.train.averaging import average_of, average_over_range
from k2ssl.train.checkpoint import load_checkpoint
from k2ssl.train.ledger import total

METHODS = get_args(Method)
ALONE = ("--loader.max-duration", "0.001")  # every utterance is a batch of its own
KILLED = """
import os, signal, sys
from k2ssl.bin import decode
plain, seen = decode.results_of, []
def results_of(*arguments):
    seen.append(1)
    if len(seen) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*arguments)
decode.results_of = results_of
sys.exit(decode.main(sys.argv[1:]))
"""


@pytest.fixture
def command(reader: Any, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line; `output` is a folder below tmp_path."""

    def make(*options: str, output: str = "out", method: str = "ctc-greedy", cuts: str | None = None) -> list[str]:
        files = [str(reader.checkpoint), "--cuts", cuts or reader.words.cuts("valid"), "--output", str(tmp_path / output)]
        return [*files, "--method", method, "--loader.num-workers", "0", "--device", "cpu", *options]

    return make


def results(folder: Path) -> list[Result]:
    return read_results(folder / "hypotheses.jsonl")


def record(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "decode.json").read_text())
    return content


def needed_by(method: str, reader: Any, folder: Path) -> list[str]:
    """Options without which the method does not run; skips if its package is not there."""
    lexicon, lm = folder / "lexicon.txt", folder / "words.arpa"
    words = sorted({word for text in reader.texts() for word in text.split()})
    if method in decode_lattice.OPTIONS:
        pytest.importorskip("k2", reason="the package of this search: k2")
    elif method in ("ctc-lexicon-free", "ctc-lexicon"):
        pytest.importorskip("flashlight.lib.text.decoder", reason=f"the package of this search: {PIP_LINE}")
    lexicon.write_text("\n".join(words))
    ngrams = "\n".join(f"-1\t{word}" for word in [*words, "</s>"])
    lm.write_text(f"\\data\\\nngram 1={len(words) + 1}\n\n\\1-grams:\n{ngrams}\n\n\\end\\\n")
    if method == "ctc-lexicon":
        return ["--search.lexicon", str(lexicon)]
    return ["--search.lexicon", str(lexicon), "--search.lm", str(lm)] if method == "ctc-hlg" else []


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reads_what_was_said_alike_alone_and_in_a_batch(
    reader: Any, command: Callable[..., list[str]], tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--timestamps", "True", *needed_by(method, reader, tmp_path)]
    assert decode.main(command(*options, output="batch", method=method)) == 0
    assert decode.main(command(*options, *ALONE, output="alone", method=method)) == 0
    batch, alone = results(tmp_path / "batch"), results(tmp_path / "alone")
    assert [(one.id, one.hyp, one.words) for one in batch] == [(one.id, one.hyp, one.words) for one in alone]
    assert [one.score for one in batch] == pytest.approx([one.score for one in alone], abs=1e-4)
    assert [(one.id, one.ref) for one in batch] == [(f"valid{i:02d}", text) for i, text in enumerate(reader.texts())]
    report = error_report([(one.ref or "", one.hyp) for one in batch])
    found = record(tmp_path / "batch")["result"]
    assert report.rate <= 0.1 and found["wer"] == report.rate and found["words"]["errors"] == report.counts.errors
    assert report.text() in capsys.readouterr().out
    for one in batch:
        assert " ".join(word.text for word in one.words) == one.hyp
        assert all(word.end <= one.duration for word in one.words)
        if one.hyp == one.ref:
            for word, (_, begin, end) in zip(one.words, reader.words_in(one.hyp), strict=True):
                assert abs(word.begin - begin) < reader.STEP and abs(word.end - end) < reader.STEP


def test_the_record_says_what_was_decoded_how_fast_and_with_how_much_memory(
    reader: Any, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert decode.main(command("--search.beam", "3", method="modified-beam")) == 0
    folder = tmp_path / "out"
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "decode.json", "hypotheses.jsonl", "ledger.jsonl"]
    content, audio = record(folder), sum(one.duration for one in results(folder))
    assert content["what"]["search"] == {"beam": 3, "nbest": 1, "blank_penalty": 0.0, "temperature": 1.0, "lm": None, "context": None}
    assert content["settings"]["checkpoints"] == [str(reader.checkpoint)]
    result = content["result"]
    assert result["utterances"] == 10 and result["audio_seconds"] == pytest.approx(audio) == result["decoded_seconds"]
    assert result["real_time_factor"] == result["wall_seconds"] / result["decoded_seconds"]
    assert 0 < result["peak_host_bytes"] < 2**36
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert lines[-1]["real_time_factor"] == pytest.approx(lines[-1]["wall_seconds"] / audio) and lines[-1]["real_time_factor"] > 0
    used = total(folder)
    assert used.sessions == {"done": 1} and list(used.by_program) == ["decode"] and used.audio_hours * 3600 == pytest.approx(audio)


def odd_cuts(reader: Any, folder: Path) -> str:
    """Something too short for a frame, something without a transcript, something at another rate with a speaker, something long."""
    (audio, _), (other, _) = (soundfile.read(reader.audio(i)) for i in (0, 1))
    low = np.interp(np.arange(0, len(audio), 2), np.arange(len(audio)), audio)
    sounds = {
        "short": (audio[:100], 16000),
        "brief": (audio[:1200], 16000),
        "silent": (other, 16000),
        "low": (low, 8000),
        "long": (np.concatenate([audio] * 12), 16000),
    }
    cuts = []
    for name, (samples, rate) in sounds.items():
        soundfile.write(folder / f"{name}.wav", samples, rate)
        recording = Recording.from_file(folder / f"{name}.wav")
        cut = MonoCut(name, 0.0, recording.duration, 0, recording=recording)
        if name != "silent":
            text = "" if name in ("short", "brief") else reader.texts()[0]
            cut.supervisions = [SupervisionSegment(name, name, 0.0, recording.duration, text=f"  {text} ", speaker="anna")]
        cuts.append(cut)
    CutSet.from_cuts(cuts).to_file(folder / "odd.jsonl.gz")
    return str(folder / "odd.jsonl.gz")


def test_every_utterance_is_decoded_whatever_its_length_rate_and_transcript(
    reader: Any, command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert decode.main(command("--loader.max-duration", "4", cuts=odd_cuts(reader, tmp_path))) == 0
    short, brief, silent, low, long = results(tmp_path / "out")
    first, second = reader.texts()[:2]
    assert (short.ref, short.hyp, short.score) == ("", "", 0.0)
    assert brief.hyp == "" and brief.score < 0, "two frames, in which nothing is heard"
    assert (silent.ref, silent.hyp, silent.speaker) == (None, second, None)
    assert (low.ref, low.hyp, low.speaker) == (first, first, "anna")
    assert long.ref == first and len(long.hyp.split()) >= 12
    result = record(tmp_path / "out")["result"]
    assert result["empty"] == 2 and result["without_transcript"] == 1
    out = capsys.readouterr().out
    assert "5 utterances" in out and "2 give no words" in out and "1 have no transcript" in out
    assert len([message for message in caplog.messages if "resampled to 16000 Hz" in message]) == 1


def test_utterances_without_any_transcript_have_no_error_rate(
    reader: Any, command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cuts = [cut.drop_supervisions() for cut in CutSet.from_file(reader.words.cuts("valid"))]
    CutSet.from_cuts(cuts).to_file(tmp_path / "bare.jsonl.gz")
    assert decode.main(command(cuts=str(tmp_path / "bare.jsonl.gz"))) == 0
    assert "wer" not in record(tmp_path / "out")["result"] and "no error rate" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_and_ends_as_one_that_was_not(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decode.main(command(*ALONE, output="whole")) == 0
    plain, seen = decode.results_of, []

    def interrupted(batch: Any, *arguments: Any) -> Any:
        seen.extend(about.id for about in batch.about)
        if len(seen) == 7:
            raise KeyboardInterrupt
        return plain(batch, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(decode, "results_of", interrupted)
        assert decode.main(command(*ALONE)) == 130
    assert not (tmp_path / "out/hypotheses.jsonl").exists()
    (part,) = (tmp_path / "out").glob("part-*.jsonl")
    part.write_bytes(part.read_bytes()[:-30])  # as a kill may leave it
    assert len(read_parts(tmp_path / "out")) == 5
    again: list[str] = []
    monkeypatch.setattr(decode, "results_of", lambda batch, *rest: again.extend(about.id for about in batch.about) or plain(batch, *rest))
    assert decode.main(command(*ALONE)) == 0
    assert "5 of 10 utterances are decoded already" in capsys.readouterr().out
    assert again == seen[5:6] + [name for name in again if name not in seen[:6]] and len(again) == 5
    assert (tmp_path / "out/hypotheses.jsonl").read_bytes() == (tmp_path / "whole/hypotheses.jsonl").read_bytes()
    assert not list((tmp_path / "out").glob("part-*"))


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decode.main(command(*ALONE, output="whole", method="modified-beam")) == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    child = [sys.executable, "-c", KILLED, *command(*ALONE, method="modified-beam")]
    killed = subprocess.run(child, env=environment, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "decode.json", "ledger.jsonl", "part-00000.jsonl"]
    capsys.readouterr()
    assert decode.main(command(*ALONE, method="modified-beam")) == 0
    assert "4 of 10 utterances are decoded already" in capsys.readouterr().out
    for one, two in zip(results(tmp_path / "out"), results(tmp_path / "whole"), strict=True):
        assert (one.id, one.hyp, one.ref) == (two.id, two.hyp, two.ref) and one.score == pytest.approx(two.score, abs=1e-4)
    assert total(tmp_path / "out").sessions == {"done": 1}, "the killed one had not written yet"


def test_what_a_rank_has_found_outlives_its_being_killed_and_is_found_by_all(tmp_path: Path) -> None:
    found = {name: Result(name, "a", -1.0, 1.0) for name in ("one", "two", "three")}
    with PartWriter(tmp_path, 0) as first, PartWriter(tmp_path, 11) as second:
        first.write([found["one"]])
        second.write([found["two"], found["three"]])
        assert read_parts(tmp_path) == found, "before the files are closed"


def test_a_finished_run_is_not_decoded_again_and_another_one_in_its_folder_is_refused(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decode.main(command()) == 0
    said = capsys.readouterr().out.splitlines()[:4]
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(decode, "decode_rest", None)
        assert decode.main(command("--loader.max-duration", "3")) == 0  # how audio is read is no other decoding
    out = capsys.readouterr().out.splitlines()
    assert "complete already" in out[0] and out[1:5] == said
    assert decode.main(command(method="greedy")) == 2
    error = capsys.readouterr().err
    assert "method is 'ctc-greedy' there, 'greedy' here" in error and "--overwrite True" in error
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert decode.main(command("--overwrite", "True", method="greedy")) == 0
    assert record(tmp_path / "out")["what"]["method"] == "greedy"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/settings.json").write_text("{}")
    assert decode.main(command("--overwrite", "True", output="run")) == 2
    assert "holds other files and no decode.json" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["settings.json"]


def test_audio_that_cannot_be_read_fails_the_run_by_name_and_the_rest_need_not_be_done_again(
    reader: Any, command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cuts = odd_cuts(reader, tmp_path)
    whole = (tmp_path / "low.wav").read_bytes()
    (tmp_path / "low.wav").write_bytes(b"nothing")
    assert decode.main(command(cuts=cuts)) == 1
    error = capsys.readouterr().err
    assert "1 utterances cannot be read: low: " in error and not (tmp_path / "out/hypotheses.jsonl").exists()
    assert sorted(read_parts(tmp_path / "out")) == ["brief", "long", "short", "silent"]
    (tmp_path / "low.wav").write_bytes(whole)
    assert decode.main(command(cuts=cuts)) == 0
    assert "4 of 5 utterances are decoded already" in capsys.readouterr().out and len(results(tmp_path / "out")) == 5


def test_two_ranks_write_what_one_writes(command: Callable[..., list[str]], tmp_path: Path) -> None:
    assert decode.main(command(*ALONE, output="one")) == 0
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "k2ssl.bin.decode"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*program, *command(*ALONE, output="two")], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for one, two in zip(results(tmp_path / "one"), results(tmp_path / "two"), strict=True):
        assert (one.id, one.hyp, one.ref) == (two.id, two.hyp, two.ref) and one.score == pytest.approx(two.score, abs=1e-4)
    first, second = (record(tmp_path / name)["result"] for name in ("one", "two"))
    assert second["ranks"] == 2 and second["wer"] == first["wer"] and second["decoded_seconds"] == pytest.approx(first["decoded_seconds"])
    assert done.stdout.count("WER ") == 1, "one rank talks"


def test_alternatives_are_written_best_first_and_a_list_of_words_can_change_the_winner(
    command: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert decode.main(command("--search.nbest", "3", method="modified-beam")) == 0
    found = results(tmp_path / "out")
    assert all(one.nbest[0].hyp == one.hyp and one.nbest[0].score == one.score for one in found)
    assert all(len({other.hyp for other in one.nbest}) == len(one.nbest) == 3 for one in found)
    (tmp_path / "words.txt").write_text("\nAAAA\n\nDDDD\n")
    options = ["--search.context", str(tmp_path / "words.txt"), "--search.context-score", "30"]
    assert decode.main(command(*options, output="biased", method="modified-beam")) == 0
    biased = results(tmp_path / "biased")
    assert sum("AAAA" in one.hyp or "DDDD" in one.hyp for one in biased) > sum("AAAA" in one.hyp or "DDDD" in one.hyp for one in found)
    assert list(record(tmp_path / "biased")["what"]["files"]) == ["search.context"]


@pytest.mark.parametrize("method", ["ctc-prefix-beam", "ctc-lexicon-free", "modified-beam"])
def test_no_text_is_twice_among_the_alternatives_and_it_has_the_score_of_the_best(
    reader: Any, command: Callable[..., list[str]], tmp_path: Path, method: str
) -> None:
    options = ["--search.beam", "30", "--search.nbest", "30", *needed_by(method, reader, tmp_path)]
    plain, twice = decode.alternatives, []

    def seen(recognizer: Any, found: Any) -> Any:
        texts = [recognizer.text(hypothesis) for hypothesis in found]
        twice.append(len(texts) - len(set(texts)))
        result = plain(recognizer, found)
        assert [(one.hyp, one.score) for one in result] == [(text, found[texts.index(text)].score) for text in dict.fromkeys(texts)]
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "alternatives", seen)
        assert decode.main(command(*options, method=method)) == 0
    assert sum(twice) > 0, "different tokens must read the same for this to say anything"
    for one in results(tmp_path / "out"):
        assert len({other.hyp for other in one.nbest}) == len(one.nbest) and one.nbest[0].hyp == one.hyp


# --- which weights -------------------------------------------------------------------------------------------------------------------------


def loaded(*checkpoints: Path, weights: Any = "raw", after: Path | None = None) -> TrainedModel:
    start = None if after is None else str(after)
    return load_trained(tuple(map(str, checkpoints)), weights, start, torch.device("cpu"), torch.float32)


def test_weights_are_raw_averaged_over_steps_or_the_mean_of_checkpoints(reader: Any) -> None:
    one, two = (load_checkpoint(path) for path in reader.checkpoints)
    mean = average_of([one["model"], two["model"]])
    cases = {
        "raw weights": (loaded(reader.checkpoint), two["model"]),
        "mean over steps 1 to 160": (loaded(reader.checkpoint, weights="average"), two["average"]["model"]),
        "mean over steps 81 to 160": (
            loaded(reader.checkpoint, weights="average", after=reader.checkpoints[0]),
            average_over_range(one, two),
        ),
        "mean of the raw weights of 2 checkpoints": (loaded(*reader.checkpoints), mean),
    }
    for what, (trained, expected) in cases.items():
        assert trained.weights == what and not trained.model.training
        assert all(torch.allclose(value, expected[name].to(value.dtype)) for name, value in trained.model.state_dict().items()), what
    distinct = {tuple(trained.model.ctc.projection.bias.tolist()) for trained, _ in cases.values()}
    assert len(distinct) == 4


def changed(reader: Any, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = dict(torch.load(reader.checkpoint, weights_only=True))
    change(content)
    torch.save(content, path)
    return path


def test_models_that_do_not_belong_together_are_not_averaged(reader: Any, tmp_path: Path) -> None:
    swapped = LetterTokenizer("BACD", NormalizationConfig()).to_dict()
    other = changed(reader, tmp_path / "other.pt", lambda content: content.update(tokenizer=swapped))
    with pytest.raises(ValueError, match="cannot be averaged: their tokenizers differ"):
        loaded(reader.checkpoint, other)
    bare = tmp_path / "bare.pt"
    model = AsrModel(AsrConfig.tiny(7, "ctc"))
    torch.save({"config": config_to_dict(model.config), "model": model.state_dict(), "tokenizer": swapped}, bare)
    with pytest.raises(ValueError, match=r"cannot be averaged: config\."):
        loaded(reader.checkpoint, bare)
    larger = LetterTokenizer("ABCDE", NormalizationConfig()).to_dict()
    with pytest.raises(ValueError, match="model has 7 tokens, its tokenizer 8"):
        loaded(changed(reader, tmp_path / "larger.pt", lambda content: content.update(tokenizer=larger)))


def test_audio_is_normalised_as_it_was_in_training(reader: Any, tmp_path: Path) -> None:
    assert not loaded(reader.checkpoint).normalize
    normalizing = changed(reader, tmp_path / "normalizing.pt", lambda content: content["job"]["data"].update(normalize=True))
    assert loaded(normalizing).normalize


# --- refusals ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("greedy", ["--search.beam", "4"], "search.beam is 4, which has no effect with method 'greedy'; it has with "),
        ("ctc-greedy", ["--search.blank-penalty", "1"], "search.blank_penalty is 1.0, which has no effect with method 'ctc-greedy'"),
        ("modified-beam", ["--search.max-symbols-per-frame", "2"], "it has with greedy"),
        ("modified-beam", ["--search.context-score", "1"], "search.context_score is 1.0, which has no effect without search.context"),
        ("modified-beam", ["--search.nbest", "5"], "search.nbest is 5, at most search.beam, which is 4"),
        ("modified-beam", ["--search.temperature", "0"], "SearchConfig: temperature is 0.0, allowed is a number > 0"),
        ("modified-beam", ["--search.context", "nowhere.txt"], "search.context: nowhere.txt: there is no such file"),
        ("modified-beam", ["--search.lm-scale", "1"], "search.lm_scale is 1.0, which has no effect without search.lm"),
        ("ctc-lexicon", [], "search.lexicon is missing"),
        ("ctc-lexicon-free", ["--search.word-score", "1"], "it has with ctc-lexicon"),
        ("ctc-prefix-beam", ["--search.lm", "nowhere.arpa"], "search.lm: nowhere.arpa: there is no such file"),
        ("greedy", ["--search.max-symbols-per-frame", "0"], "max_symbols_per_frame is 0"),
        ("greedy", ["--after", "FIRST"], "goes with --weights average and one checkpoint"),
        ("greedy", ["--checkpoints", "FIRST", "FIRST"], "one is given twice"),
        ("greedy", ["--checkpoints", "nowhere.pt"], "checkpoints: nowhere.pt: there is no such file"),
        ("greedy", ["--cuts", "nowhere.jsonl.gz"], "cuts: nowhere.jsonl.gz: there is no such file"),
        ("greedy", ["--device", "tpu"], "device is 'tpu'"),
        ("greedy", ["--precision", "float16"], "float16"),
    ],
)
def test_settings_that_cannot_be_or_have_no_effect_are_refused_before_anything_is_touched(
    reader: Any,
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    options: list[str],
    said: str,
) -> None:
    options = [str(reader.checkpoints[0]) if option == "FIRST" else option for option in options]
    given = command(*options, method=method)
    assert decode.main(given[1:] if "--checkpoints" in options else given) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("decode: ") and said in error
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_cannot_recognise_are_refused_by_name(
    reader: Any, command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AsrModel(AsrConfig.tiny(7, "ctc"))
    tokenizer = LetterTokenizer("ABCD", NormalizationConfig()).to_dict()
    torch.save({"config": config_to_dict(model.config), "model": model.state_dict(), "tokenizer": tokenizer}, tmp_path / "ctc.pt")
    changed(reader, tmp_path / "mute.pt", lambda content: content.pop("tokenizer"))
    changed(reader, tmp_path / "nan.pt", lambda content: content["model"]["mask_embedding"].fill_(math.nan))
    (tmp_path / "torn.pt").write_bytes(reader.checkpoint.read_bytes()[:-1000])
    for name, said in (
        ("nan.pt", "mask_embedding holds numbers that are not finite"),
        (
            "ctc.pt",
            "method is 'greedy', but the checkpoint has no transducer head; allowed are ctc-greedy, ctc-prefix-beam, ctc-lexicon-free",
        ),
        ("mute.pt", "holds no tokenizer"),
        ("torn.pt", "torn.pt: damaged"),
    ):
        assert decode.main([str(tmp_path / name), *command(method="greedy")[1:]]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_manifests_without_cuts_or_with_an_id_in_common_are_refused(
    reader: Any, command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert decode.main(command(cuts=str(tmp_path / "empty.jsonl"))) == 2
    assert "holds no cuts" in capsys.readouterr().err
    shutil.copy(reader.words.cuts("valid"), tmp_path / "copy.jsonl.gz")
    assert decode.main(command("--cuts", reader.words.cuts("valid"), str(tmp_path / "copy.jsonl.gz"))) == 2
    assert "the id 'valid00' occurs twice" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_phrases_that_the_tokenizer_cannot_spell_are_refused_by_their_line(reader: Any, tmp_path: Path) -> None:
    (tmp_path / "phrases.txt").write_text("AB\nA CX\n")
    with pytest.raises(ValueError, match=r"phrases.txt, line 2: .*'X'"):
        build_recognizer("modified-beam", SearchConfig(context=str(tmp_path / "phrases.txt")), loaded(reader.checkpoint))
    (tmp_path / "phrases.txt").write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        build_recognizer("modified-beam", SearchConfig(context=str(tmp_path / "phrases.txt")), loaded(reader.checkpoint))


def test_the_first_arguments_are_names_and_files_of_settings_stay_in_front() -> None:
    assert with_names(["a.pt", "b.pt", "--x", "1"], "many", "many") == ["--many", "a.pt", "b.pt", "--x", "1"]
    assert with_names(["s.toml", "a.pt", "-", "b.wav", "-h"], "one", "rest") == ["s.toml", "--one", "a.pt", "--rest", "-", "b.wav", "-h"]
    assert with_names(["--x", "a.pt"], "one", "rest") == ["--x", "a.pt"]


def test_options_have_the_defaults_of_their_method() -> None:
    assert options_of("ctc-greedy", SearchConfig()) == {}
    assert options_of("modified-beam", SearchConfig(context="a.txt"))["context_score"] == 2.0
    assert options_of("ctc-prefix-beam", SearchConfig())["beam"] == 10 and options_of("modified-beam", SearchConfig())["beam"] == 4


# --- language models and lexicons ----------------------------------------------------------------------------------------------------------


def arpa(path: Path, probabilities: dict[str, float]) -> str:
    """A model of single tokens or words, of which none depends on another."""
    lines = [f"{np.log10(value):.6f}\t{word}" for word, value in probabilities.items()]
    path.write_text("\n".join(["\\data\\", f"ngram 1={len(lines)}", "", "\\1-grams:", *lines, "", "\\end\\", ""]))
    return str(path)


def tokens_without_d(path: Path) -> str:
    return arpa(path, {"<s>": 1e-9, "</s>": 0.1, "<unk>": 1e-9, "|": 0.3, "A": 0.2, "B": 0.2, "C": 0.2, "D": 1e-9})


@pytest.mark.parametrize("method", ["ctc-prefix-beam", "modified-beam"])
def test_a_language_model_over_tokens_takes_part(
    command: Callable[..., list[str]], tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tokens_without_d(tmp_path / "tokens.arpa")
    hypotheses = {}
    for name, options in (("none", ()), ("zero", ("--search.lm", model, "--search.lm-scale", "0")), ("one", ("--search.lm", model))):
        scale = ("--search.lm-scale", "2") if name == "one" else ()
        assert decode.main(command(*options, *scale, output=name, method=method)) == 0
        hypotheses[name] = [one.hyp for one in results(tmp_path / name)]
    assert hypotheses["zero"] == hypotheses["none"] != hypotheses["one"]
    d = {name: "".join(texts).count("D") for name, texts in hypotheses.items()}
    assert d["one"] < 0.7 * d["none"], d
    assert list(record(tmp_path / "one")["what"]["files"]) == ["search.lm"]
    words = arpa(tmp_path / "words.arpa", {"<s>": 1e-9, "</s>": 0.5, "CAT": 0.5})
    assert decode.main(command("--search.lm", words, output="words", method=method)) == 2
    assert "words.arpa: the language model is of another vocabulary" in capsys.readouterr().err and not (tmp_path / "words").exists()


@pytest.mark.parametrize(("method", "default"), [("ctc-prefix-beam", True), ("modified-beam", False)])
def test_the_end_of_the_sentence_counts_as_asked(command: Callable[..., list[str]], tmp_path: Path, method: str, default: bool) -> None:
    options = ["--search.lm", tokens_without_d(tmp_path / "tokens.arpa"), "--search.lm-scale", "0.5", "--search.nbest", "3"]
    scores: dict[str, dict[tuple[str, str], float]] = {}
    for name, more in (("default", []), ("True", ["--search.lm-final", "True"]), ("False", ["--search.lm-final", "False"])):
        assert decode.main(command(*options, *more, output=name, method=method)) == 0
        scores[name] = {(one.id, other.hyp): other.score for one in results(tmp_path / name) for other in one.nbest}
        assert record(tmp_path / name)["what"]["search"]["lm_final"] is (default if name == "default" else name == "True")
    assert scores["default"] == scores[str(default)]
    both = scores["True"].keys() & scores["False"].keys()
    assert len(both) >= 10
    for found in both:  # </s> has probability 0.1 after every token
        assert scores["True"][found] - scores["False"][found] == pytest.approx(0.5 * math.log(0.1), abs=1e-4)


def test_without_the_extra_the_searches_that_need_it_say_how_to_get_it(
    command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "flashlight.lib.text", None)
    assert decode.main(command(method="ctc-lexicon-free")) == 2
    assert "not installed: pip install" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_word_of_the_lexicon_is_written_however_it_is_spelled(reader: Any, command: Callable[..., list[str]], tmp_path: Path) -> None:
    pytest.importorskip("flashlight.lib.text.decoder")
    words = sorted({word for text in reader.texts() for word in text.split()})
    lines = [f"{word.lower()}x {' '.join(word)}" for word in words]
    (tmp_path / "lexicon.txt").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    assert decode.main(command("--search.lexicon", str(tmp_path / "lexicon.txt"), method="ctc-lexicon")) == 0
    heard = [word for one in results(tmp_path / "out") for word in one.hyp.split()]
    assert len(heard) > 10 and set(heard) <= {f"{word.lower()}x" for word in words}


def test_a_search_with_a_lexicon_finds_its_words_only(reader: Any, command: Callable[..., list[str]], tmp_path: Path) -> None:
    pytest.importorskip("flashlight.lib.text.decoder")
    assert decode.main(command(output="free", method="ctc-lexicon-free")) == 0
    assert decode.main(command(output="greedy", method="ctc-greedy")) == 0
    assert [one.hyp for one in results(tmp_path / "free")] == [one.hyp for one in results(tmp_path / "greedy")]
    words = sorted({word for text in reader.texts() for word in text.split() if "D" not in word})
    (tmp_path / "words.txt").write_text("\n".join(words))
    options = ("--search.lexicon", str(tmp_path / "words.txt"), "--timestamps", "True", "--search.nbest", "2")
    assert decode.main(command(*options, output="words", method="ctc-lexicon")) == 0
    found = results(tmp_path / "words")
    assert {word for one in found for word in one.hyp.split()} <= set(words)
    assert all(one.hyp == one.ref for one in found if set((one.ref or "").split()) <= set(words))
    assert all([word.text for word in one.words] == one.hyp.split() for one in found) and any(len(one.nbest) == 2 for one in found)


def test_a_lexicon_is_a_list_of_words_with_or_without_their_spelling(tmp_path: Path) -> None:
    letters = LetterTokenizer("ABCD", NormalizationConfig(case="upper"))
    (tmp_path / "lexicon.txt").write_text("ab\n\nCC C C |\nCC C D\n")
    assert read_lexicon(str(tmp_path / "lexicon.txt"), letters, "|") == {"ab": [["A", "B", "|"]], "CC": [["C", "C", "|"], ["C", "D", "|"]]}
    assert read_lexicon(str(tmp_path / "lexicon.txt"), letters, "")["ab"] == [["A", "B"]]
    for line, said in (("A X", "the spelling of 'A' holds 'X', which is no token"), ("XA", "holds 'X'")):
        (tmp_path / "lexicon.txt").write_text(f"AB\n{line}\n")
        with pytest.raises(ValueError, match=rf"lexicon.txt, line 2: .*{said}"):
            read_lexicon(str(tmp_path / "lexicon.txt"), letters, "|")
