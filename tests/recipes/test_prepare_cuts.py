"""The recipes' prepare_cuts.py as their users run them, against lhotse's own functions for the same corpora; one runs in its own process."""

from __future__ import annotations

import errno
import gzip
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
from lhotse import CutSet
from lhotse.recipes import prepare_librilight, prepare_librispeech

from k2ssl.data.cuts import read_cuts

ROOT = Path(__file__).parents[2]
RECIPES = ("librispeech", "librilight", "an4", "folder")


def script(recipe: str, name: str = "prepare_cuts") -> ModuleType:
    path = ROOT / "recipes" / recipe / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_{recipe}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(recipe: str, *arguments: object) -> int:
    return script(recipe).main([str(argument) for argument in (*arguments, "--num-jobs", 1, "--quiet")])


def write_audio(path: Path, seconds: float = 1.0, rate: int = 16000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(len(str(path))).uniform(-0.1, 0.1, round(seconds * rate)), rate)


@pytest.fixture
def librispeech(tmp_path: Path) -> Path:
    corpus = tmp_path / "LibriSpeech"
    for part, speaker, chapter in (("train-clean-100", 19, 198), ("train-clean-100", 26, 495), ("dev-clean", 84, 121123)):
        folder = corpus / part / str(speaker) / str(chapter)
        for i in range(3):
            write_audio(folder / f"{speaker}-{chapter}-000{i}.flac", 1 + i / 7)
        lines = [f"{speaker}-{chapter}-000{i} WORDS OF NUMBER {i}" for i in range(3)]
        (folder / f"{speaker}-{chapter}.trans.txt").write_text("\n".join(lines) + "\n")
    (corpus / "SPEAKERS.TXT").touch()
    return corpus


@pytest.fixture
def librilight(tmp_path: Path) -> Path:
    corpus = tmp_path / "light"
    for part, name, activity in (
        ("small", "100/sea_fairies/01", [[0.08, 3.21], [3.4, 4.2], [5.0, 29.97], [29.98, 31.0]]),
        ("small", "200/tales/02_b", [[0.0, 30.0]]),
        ("medium", "300/other/03", [[1.0, 4.0]]),
    ):
        write_audio(corpus / part / f"{name}.flac", 30)
        content = {"speaker": name.split("/")[0], "voice_activity": activity, "book_meta": {"id": 3}}
        (corpus / part / f"{name}.json").write_text(json.dumps(content))
    return corpus


def by_id(cuts: CutSet) -> dict[str, dict]:  # type: ignore[type-arg]
    return {cut.id: {**cut.to_dict(), "supervisions": [s.to_dict() for s in cut.supervisions]} for cut in cuts}


def of_lhotse(manifests: dict[str, dict[str, object]], part: str) -> CutSet:
    cuts = CutSet.from_manifests(recordings=manifests[part]["recordings"], supervisions=manifests[part]["supervisions"])  # type: ignore[arg-type]
    return cuts.trim_to_supervisions(keep_overlapping=False)


def test_librispeech_is_what_lhotse_makes_of_it(librispeech: Path, tmp_path: Path) -> None:
    assert run("librispeech", "--corpus-dir", librispeech, "--out", tmp_path / "out") == 0
    expected = prepare_librispeech(librispeech)
    for part in ("train-clean-100", "dev-clean"):
        ours = read_cuts(tmp_path / f"out/cuts_{part}.jsonl.gz")
        assert by_id(ours) == by_id(of_lhotse(expected, part))
    assert len(ours) == 3


def test_librispeech_parts_can_be_chosen_and_excerpts_given(librispeech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("librispeech", "--corpus-dir", librispeech, "--parts", "dev-clean", "--out", tmp_path / "a") == 0
    assert [path.name for path in (tmp_path / "a").glob("cuts_*")] == ["cuts_dev-clean.jsonl.gz"]
    assert run("librispeech", "--corpus-dir", librispeech / "train-clean-100", "--out", tmp_path / "b") == 0
    assert len(read_cuts(tmp_path / "b/cuts_train-clean-100.jsonl.gz")) == 6
    assert run("librispeech", "--corpus-dir", librispeech, "--parts", "test-other", "--out", tmp_path / "c") == 1
    assert "there is no part test-other; parts found: dev-clean, train-clean-100" in capsys.readouterr().err


def test_librilight_segments_are_those_of_lhotse(librilight: Path, tmp_path: Path) -> None:
    (librilight / "large").mkdir()
    write_audio(librilight / "large/4/x/y.flac", 3)
    (librilight / "large/4/x/y.json").write_text(json.dumps({"speaker": "4", "voice_activity": [[0, 2.5]]}))
    assert run("librilight", "--corpus-dir", librilight, "--out", tmp_path / "out", "--min-duration", 0) == 0
    expected = prepare_librilight(librilight)
    for part in ("small", "medium", "large"):
        ours = by_id(read_cuts(tmp_path / f"out/cuts_{part}.jsonl.gz"))
        assert ours == by_id(of_lhotse(expected, part))
    first = ours["large/4/x/y_0"]
    assert (first["start"], first["duration"], first["supervisions"][0]["speaker"]) == (0, 2.5, "4")


def test_librilight_keeps_long_segments_and_leaves_short_ones_out(
    librilight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("librilight", "--corpus-dir", librilight, "--parts", "small", "--out", tmp_path / "out") == 0
    cuts = {cut.id: cut for cut in read_cuts(tmp_path / "out/cuts_small.jsonl.gz")}
    assert {name: round(cut.duration, 6) for name, cut in cuts.items()} == {
        "small/100/sea_fairies/01_0": 3.13,
        "small/100/sea_fairies/01_2": 24.97,
        "small/200/tales/02_b_0": 30.0,
    }
    whole, _ = soundfile.read(librilight / "small/100/sea_fairies/01.flac", dtype="float32")
    np.testing.assert_array_equal(cuts["small/100/sea_fairies/01_0"].load_audio()[0], whole[1280:51360])
    assert "left out, shorter than 2 s: 2 cuts" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("librilight", "--corpus-dir", librilight, "--out", tmp_path, "--max-duration", 15)


def test_an_excerpt_of_librilight_is_one_split(librilight: Path, tmp_path: Path) -> None:
    (librilight / "small" / "100" / "sea_fairies" / "01.json").unlink()
    assert run("librilight", "--corpus-dir", librilight / "small", "--out", tmp_path / "out") == 0
    assert [cut.id for cut in read_cuts(tmp_path / "out/cuts_small.jsonl.gz")] == ["200/tales/02_b_0"]
    assert "there is no 01.json beside it" in (tmp_path / "out/unreadable_small.tsv").read_text()


def test_an4_has_its_official_split(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "etc").mkdir(parents=True)
    for part, folder, names in (
        ("train", "an4_clstk/fash", ("an251-fash-b", "an253-fash-b")),
        ("test", "an4test_clstk/fcaw", ("an406-fcaw-b",)),
    ):
        for name in names:
            write_audio(corpus / "flac" / folder / f"{name}.flac")
        marks = ("<s> ", " </s>") if part == "train" else ("", "")
        (corpus / f"etc/an4_{part}.fileids").write_text("".join(f"{folder}/{name}\n" for name in names))
        (corpus / f"etc/an4_{part}.transcription").write_text("".join(f"{marks[0]}YES NO{marks[1]} ({name})\n" for name in names))
    assert run("an4", "--corpus-dir", corpus, "--out", tmp_path / "out") == 0
    train, test = (list(read_cuts(tmp_path / f"out/cuts_{part}.jsonl.gz")) for part in ("train", "test"))
    assert [(cut.id, cut.supervisions[0].text, cut.supervisions[0].speaker) for cut in train + test] == [
        ("an251-fash-b", "YES NO", "fash"),
        ("an253-fash-b", "YES NO", "fash"),
        ("an406-fcaw-b", "YES NO", "fcaw"),
    ]


def test_a_limited_set_is_drawn_from_a_manifest(librispeech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("librispeech", "--corpus-dir", librispeech, "--parts", "train-clean-100", "--out", tmp_path) == 0
    cuts, output = tmp_path / "cuts_train-clean-100.jsonl.gz", tmp_path / "new" / "cuts_limited.jsonl.gz"

    def limited(minutes: float, *more: str) -> int:
        return script("an4", "prepare_limited").main(["--cuts", str(cuts), "--minutes", str(minutes), "--output", str(output), *more])

    assert limited(0.05) == 0  # 3 s of 6 x 1 to 1.3 s
    drawn = list(read_cuts(output))
    assert [cut.supervisions[0].speaker for cut in drawn] == ["19", "26"] and "hours" in capsys.readouterr().out
    before = output.read_bytes()
    assert limited(0.1) == 1 and "--overwrite replaces it" in capsys.readouterr().err
    assert limited(3, "--overwrite") == 1 and "--minutes 3: draw_limited: seconds is 180, allowed" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert limited(0.1, "--overwrite") == 0 and len(list(read_cuts(output))) == 5


def test_a_folder_in_a_process_of_its_own(tmp_path: Path) -> None:
    write_audio(tmp_path / "in/anna/a.wav", 1.0, 8000)
    write_audio(tmp_path / "in/ben/b.ogg", 2.0, 44100)
    (tmp_path / "in/ben/broken.mp3").write_bytes(b"")
    (tmp_path / "in/anna/a.txt").write_text("HI")
    command = [sys.executable, str(ROOT / "recipes/folder/prepare_cuts.py"), "--audio-dir", "in", "--out", "new/out", "--speaker", "folder"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    done = start("--split", "mine")
    assert done.returncode == 0, done.stderr
    assert "resampled to 16000 Hz whenever they are loaded: 2 files (1 at 8000 Hz, 1 at 44100 Hz)" in done.stdout
    assert done.stdout.splitlines()[-1] == "done: 1 split(s), 2 cuts, 0.001 h; 1 unreadable or unusable files skipped and listed"
    assert sorted(path.name for path in (tmp_path / "new/out").iterdir()) == [
        "cuts_mine.jsonl.gz",
        "summary_mine.json",
        "unreadable_mine.tsv",
    ]
    cuts = list(read_cuts(tmp_path / "new/out/cuts_mine.jsonl.gz"))
    assert [(cut.id, cut.supervisions[0].speaker, cut.supervisions[0].text) for cut in cuts] == [
        ("anna/a", "anna", "HI"),
        ("ben/b", "ben", None),
    ]
    assert [cut.load_audio().shape for cut in cuts] == [(1, 16000), (1, 32000)]


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "elsewhere/photos").mkdir(parents=True)
    (tmp_path / "elsewhere/notes.txt").touch()
    yield tmp_path / "elsewhere"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_folder_of_another_layout_is_refused_with_what_was_expected_and_found(
    recipe: str, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option = "--audio-dir" if recipe == "folder" else "--corpus-dir"
    assert run(recipe, option, elsewhere, "--out", tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert f"{elsewhere}: " in message
    assert "expected" in message
    assert "found notes.txt, photos/" in message
    assert run(recipe, option, elsewhere / "nothing", "--out", tmp_path / "out") == 1
    assert "there is no such folder" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_tells_units_and_needs_no_corpus(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script(recipe).main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--min-duration SECONDS" in shown
    assert "--sampling-rate HZ" in shown
    assert "Exit status: 0 done" in shown


def test_settings_out_of_range_and_folders_that_cannot_be_written_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_audio(tmp_path / "in/a.wav")
    assert run("folder", "--audio-dir", tmp_path / "in", "--out", tmp_path / "out", "--min-duration", -1) == 1
    assert "min_duration is -1.0 s" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run("folder", "--audio-dir", tmp_path / "in", "--out", tmp_path / "file/out") == 1
    assert "cannot write into this folder" in capsys.readouterr().err


def test_an_interruption_has_its_own_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = script("folder")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "prepare_folder", interrupt)
    assert module.main(["--audio-dir", str(tmp_path), "--out", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_a_full_disk_is_said_and_leaves_no_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_audio(tmp_path / "in/a.wav")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert run("folder", "--audio-dir", tmp_path / "in", "--out", tmp_path / "out") == 1
    assert "No space left on device; make room and run the same command again" in capsys.readouterr().err
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_a_second_run_does_nothing_and_says_so(librispeech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert run("librispeech", "--corpus-dir", librispeech, "--parts", "dev-clean", "--out", tmp_path / "out") == 0
    assert "exists already: nothing was done" in capsys.readouterr().out


def test_the_manifests_of_real_speech_hold_what_its_readme_says(real_speech: Path, tmp_path: Path) -> None:
    assert run("librispeech", "--corpus-dir", real_speech / "LibriSpeech", "--out", tmp_path) == 0
    assert run("an4", "--corpus-dir", real_speech / "an4", "--out", tmp_path) == 0
    found = {}
    for split in ("train-clean-100", "train", "test"):
        with gzip.open(tmp_path / f"cuts_{split}.jsonl.gz", "rt") as file:
            texts = [json.loads(line)["supervisions"][0]["text"] for line in file]
        hours = json.loads((tmp_path / f"summary_{split}.json").read_text())["summary"]["hours"]
        found[split] = (len(texts), sum(len(text.split()) for text in texts), round(hours, 2))
    assert found == {"train-clean-100": (367, 10420, 1.17), "train": (948, 5442, 0.71), "test": (130, 773, 0.10)}
