"""The program align on words of tones, whose times are known: what it writes, who can read it, what it leaves out and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lhotse import CutSet

from k2ssl.bin import align, label_report
from k2ssl.bin.decode_model import TrainedModel, load_trained
from k2ssl.data.labels import LabelShardWriter, Lineage, cut_list_hash, merge_shards
from k2ssl.data.tokenizer import LetterTokenizer, NormalizationConfig
from k2ssl.decode.alignment import Alignment
from k2ssl.decode.results import Word
from k2ssl.labelling.alignments import read_alignments
from k2ssl.train.ledger import total


@pytest.fixture
def command(reader: Any, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line; `output` is a file below tmp_path."""

    def make(*options: str, output: str = "words.ctm", cuts: str | None = None) -> list[str]:
        files = [str(reader.checkpoint), "--cuts", cuts or reader.words.cuts("valid"), "--output", str(tmp_path / output)]
        return [*files, "--loader.num-workers", "0", "--device", "cpu", "--quiet", "True", *options]

    return make


@pytest.fixture(scope="session")
def trained(reader: Any) -> TrainedModel:
    return load_trained((str(reader.checkpoint),), "raw", None, torch.device("cpu"), torch.float32)


def lines(path: Path) -> dict[str, list[list[str]]]:
    """The columns of every line, by utterance."""
    found: dict[str, list[list[str]]] = {}
    for line in path.read_text().splitlines():
        found.setdefault(line.split(" ")[0], []).append(line.split(" "))
    return found


def changed(reader: Any, folder: Path, change: Callable[[int, Any], Any]) -> str:
    """A manifest of the validation cuts after a change of each, None to leave it out."""
    cuts = [change(number, cut) for number, cut in enumerate(CutSet.from_file(reader.words.cuts("valid")))]
    CutSet.from_cuts(cut for cut in cuts if cut is not None).to_file(folder / "changed.jsonl.gz")
    return str(folder / "changed.jsonl.gz")


def test_words_are_found_where_they_were_said(reader: Any, command: Callable[..., list[str]], tmp_path: Path) -> None:
    assert align.main(command()) == 0
    found = lines(tmp_path / "words.ctm")
    assert sorted(found) == [f"valid{i:02d}" for i in range(10)]
    for number, text in enumerate(reader.texts()):
        rows = found[f"valid{number:02d}"]
        assert [row[4] for row in rows] == text.split() and {row[1] for row in rows} == {"1"} and {len(row) for row in rows} == {6}
        for row, (_, begin, end) in zip(rows, reader.words_in(text), strict=True):
            assert abs(float(row[2]) - begin) < 0.1 and abs(float(row[2]) + float(row[3]) - end) < 0.1
            assert float(row[2]) < end and float(row[2]) + float(row[3]) > begin
            assert 0.1 < float(row[5]) <= 1
    used = total(tmp_path)
    assert used.sessions == {"done": 1} and list(used.by_program) == ["align"]


def test_the_label_quality_report_reads_what_it_writes(reader: Any, command: Callable[..., list[str]], tmp_path: Path) -> None:
    assert align.main(command("--unit", "token", output="letters.ctm")) == 0
    alignments = read_alignments(tmp_path / "letters.ctm")
    assert alignments.phones == ("A", "B", "C", "D", "|")
    hits = trials = 0
    for number, text in enumerate(reader.texts()):
        letters = reader.tones(text)
        said = alignments.phones_at(f"valid{number:02d}", np.array([end - 0.02 for _, _, end in letters]))
        hits += sum(phone >= 0 and alignments.phones[phone] == letter for phone, (letter, _, _) in zip(said, letters, strict=True))
        trials += len(letters)
    assert hits / trials > 0.8
    labels = label_with_truth(reader, tmp_path / "labels")
    report = ["--labels", str(labels), "--output", str(tmp_path / "quality.json"), "--quiet", "True"]
    assert label_report.main([*report, "--compare.alignments", str(tmp_path / "letters.ctm")]) == 0
    phones = json.loads((tmp_path / "quality.json").read_text())["phones"]
    assert phones["cluster_purity"] > 0 and phones["phone_purity"] > 0.5


def label_with_truth(reader: Any, folder: Path) -> Path:
    """Labels that say which letter sounds."""
    cuts = list(CutSet.from_file(reader.words.cuts("valid")))
    with LabelShardWriter(folder, 0, 1, 5, 50.0, Lineage("mfcc", {}, "truth", None, cut_list_hash(cuts)), sampling_rate=16000) as writer:
        for cut, text in zip(cuts, reader.texts(), strict=True):
            times = (np.arange((cut.num_samples - 400) // 320 + 1) + 0.5) / 50
            place = np.floor((times - reader.LEAD) / reader.STEP).astype(int).clip(0, len(text) - 1)
            writer.write(cut.id, np.array([" ABCD".index(text[i]) for i in place]))
    merge_shards(folder)
    return folder


def test_utterances_are_aligned_alike_alone_and_in_a_batch(command: Callable[..., list[str]], tmp_path: Path) -> None:
    assert align.main(command(output="batch.ctm")) == 0
    assert align.main(command("--loader.max-duration", "0.001", output="alone.ctm")) == 0
    batch, alone = lines(tmp_path / "batch.ctm"), lines(tmp_path / "alone.ctm")
    assert batch.keys() == alone.keys()
    for name in batch:
        assert [row[:5] for row in batch[name]] == [row[:5] for row in alone[name]]
        assert [float(row[5]) for row in batch[name]] == pytest.approx([float(row[5]) for row in alone[name]], abs=2e-3)


def test_the_confidence_of_a_word_is_the_mean_over_the_frames_of_its_tokens(trained: TrainedModel) -> None:
    tokens = tuple(trained.tokenizer.encode("AB C"))
    found = Alignment(tokens, (1, 3, 6, 9), (2, 6, 7, 10), (0.5, 0.9, 0.1, 0.3), -1.0)
    first, second = align.timed(found, trained, 16000, "word")
    assert first[0].text == "AB" and first[1] == pytest.approx((0.5 + 3 * 0.9) / 4) and second[1] == 0.3
    rate = trained.seconds_per_frame
    assert (first[0].begin, first[0].end, second[0].begin) == pytest.approx((rate, 6 * rate, 9 * rate))
    letters = align.timed(found, trained, 16000, "token")
    assert [(word.text, confidence) for word, confidence in letters] == list(zip("AB|C", (0.5, 0.9, 0.1, 0.3), strict=True))


def test_what_cannot_be_aligned_is_left_out_and_named_with_the_reason(
    reader: Any, command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {0: "", 1: "AXB", 2: "AABBCCDD" * 20, 3: "AB"}

    def change(number: int, cut: Any) -> Any:
        if number == 3:
            return cut.truncate(duration=0.01, preserve_id=True)
        if number in texts:
            cut.supervisions[0].text = texts[number]
        return cut

    assert align.main(command(cuts=changed(reader, tmp_path, change))) == 0
    reasons = dict(line.split("\t") for line in (tmp_path / "words.ctm.unaligned.tsv").read_text().splitlines())
    assert sorted(reasons) == [f"valid{i:02d}" for i in range(4)]
    assert reasons["valid00"] == "it has no transcript" and "'X'" in reasons["valid01"]
    assert "frames are too few for its 160 tokens" in reasons["valid02"] and "too short" in reasons["valid03"]
    assert sorted(lines(tmp_path / "words.ctm")) == [f"valid{i:02d}" for i in range(4, 10)]
    out = capsys.readouterr().out
    assert "4 utterances could not be aligned" in out and "of 6 utterances" in out
    assert align.main(command("--overwrite", "True")) == 0
    assert not (tmp_path / "words.ctm.unaligned.tsv").exists()


def test_nothing_is_written_if_nothing_can_be_aligned(
    reader: Any, command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert align.main(command(cuts=changed(reader, tmp_path, lambda number, cut: cut.drop_supervisions()))) == 1
    err = capsys.readouterr().err
    assert "none of 10 utterances could be aligned: valid" in err and "it has no transcript" in err and "and 5 more" in err
    assert not list(tmp_path.glob("*words.ctm*"))


def test_a_file_that_exists_is_kept(command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "words.ctm").write_text("mine")
    assert align.main(command()) == 2
    assert "--overwrite True replaces it" in capsys.readouterr().err and (tmp_path / "words.ctm").read_text() == "mine"


def test_a_manifest_that_is_read_is_not_written_over(
    reader: Any, command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Path(changed(reader, tmp_path, lambda number, cut: cut))
    before = manifest.read_bytes()
    assert align.main(command("--overwrite", "True", output=manifest.name, cuts=str(manifest))) == 2
    assert f"which is read (cuts: {manifest})" in capsys.readouterr().err and manifest.read_bytes() == before


def test_what_cannot_be_is_refused_before_anything_is_written(
    reader: Any,
    command: Callable[..., list[str]],
    trained: TrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert align.main(command(cuts=str(tmp_path / "none.jsonl.gz"))) == 2
    assert "there is no such file" in capsys.readouterr().err
    renamed = changed(reader, tmp_path, lambda number, cut: cut.with_id(f"a {number}"))
    assert align.main(command(cuts=renamed)) == 2
    assert "cut id 'a 0': a CTM file cannot hold white space" in capsys.readouterr().err
    twice = [*command()[:3], reader.words.cuts("valid"), *command()[3:]]
    assert align.main(twice) == 2
    assert "the id 'valid00' occurs twice" in capsys.readouterr().err
    monkeypatch.setattr(trained.model, "ctc", None)
    with monkeypatch.context() as patch:
        patch.setattr(align.Align, "load_model", lambda *_: trained)
        assert align.main(command()) == 2
    assert "has no CTC head, which alignment takes" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert align.main(command()) == 2
    assert "2 processes were started" in capsys.readouterr().err
    assert not list(tmp_path.glob("*words.ctm*"))


def test_a_folder_is_no_output(command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert align.main(command("--output", str(tmp_path), "--overwrite", "True")) == 2
    assert f"output is {tmp_path}, which is a folder" in capsys.readouterr().err


def test_no_word_lasts_longer_than_the_audio() -> None:
    tokenizer = LetterTokenizer("ab", NormalizationConfig())
    # 49 frames of 20 ms become 25 of 40 ms, of which the last one ends at 1.0 s
    trained = SimpleNamespace(tokenizer=tokenizer, num_frames=lambda samples: 25, seconds_per_frame=0.04, sample_rate=16000)
    found = Alignment((3, 4), (20, 22), (21, 23), (0.5, 0.75), -1.0)
    for unit, text, begin in (("word", "ab", 0.8), ("token", "b", 0.88)):
        word, confidence = align.timed(found, trained, 15800, unit)[-1]  # type: ignore[arg-type]
        assert word == Word(text, begin, 0.988) and confidence == (0.625 if unit == "word" else 0.75)
