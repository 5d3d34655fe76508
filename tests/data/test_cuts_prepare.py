"""A split from a listing: parts, processes, resuming, and nothing under a final name that is not whole."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from k2ssl.data import prepare_cuts
from k2ssl.data.audio_layouts import Listing, folder_items
from k2ssl.data.audio_scan import AudioItem, ScanSettings
from k2ssl.data.cuts import read_cuts, read_summary, summarize
from k2ssl.data.prepare_cuts import Prepared, prepare_folder, prepare_split

FINAL = ["cuts_x.jsonl.gz", "summary_x.json", "unreadable_x.tsv"]


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    """Twelve files of 0.1 s, 0.2 s, ..., two of them damaged, under in/."""
    for i in range(12):
        path = tmp_path / "in" / f"s{i % 3}" / f"{i:02}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.zeros(1600 * (i + 1)), 16000)
    (tmp_path / "in/s0/00.wav").write_bytes(b"")
    (tmp_path / "in/s2/05.wav").write_bytes(b"nothing")
    return tmp_path / "in"


def prepare(audio: Path, out: Path, **options: object) -> Prepared:
    given: dict[str, object] = {"files_per_part": 3, **options}
    return prepare_split(lambda: folder_items(audio, speaker="folder"), out, "x", source=audio, expected="nothing there", **given)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def count_scans(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None] = lambda number: None) -> list[int]:
    """The number of files of each part that is read from now on; `before` is called with the number of parts read so far."""
    sizes: list[int] = []
    original = prepare_cuts.read_part

    def counted(items: list[AudioItem], settings: ScanSettings, folder: Path, name: str) -> None:
        before(len(sizes))
        sizes.append(len(items))
        original(items, settings, folder, name)  # type: ignore[arg-type]

    monkeypatch.setattr(prepare_cuts, "read_part", counted)
    return sizes


def stop_after(parts: int, monkeypatch: pytest.MonkeyPatch, audio: Path, out: Path, **options: object) -> None:
    def stop(number: int) -> None:
        if number == parts:
            raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        count_scans(patch, stop)
        with pytest.raises(RuntimeError):
            prepare(audio, out, **options)


def test_a_split_is_a_manifest_a_summary_and_a_list_of_what_was_skipped(audio: Path, tmp_path: Path) -> None:
    prepared = prepare(audio, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == FINAL
    cuts = list(read_cuts(prepared.manifest))
    assert [cut.id for cut in cuts] == ["s0/03", "s0/06", "s0/09", "s1/01", "s1/04", "s1/07", "s1/10", "s2/02", "s2/08", "s2/11"]
    assert {key: pytest.approx(value) for key, value in summarize(cuts).to_dict().items()} == prepared.summary.to_dict()
    assert (prepared.summary.cuts, prepared.summary.speakers, prepared.unreadable, prepared.existed) == (10, 3, 2, False)
    rows = [line.split("\t") for line in prepared.unreadable_list.read_text().splitlines()]
    assert rows == [
        ["path", "reason"],
        [str(audio / "s0/00.wav"), "empty file (0 bytes)"],
        [str(audio / "s2/05.wav"), "Format not recognised."],
    ]
    assert "skipped: 2" in str(prepared)
    assert read_summary(prepared.manifest)["unreadable"] == 2


def test_parts_and_processes_do_not_change_a_byte(audio: Path, tmp_path: Path) -> None:
    outcomes = []
    for jobs, size in ((1, 3), (2, 3), (1, 3)):
        out = tmp_path / f"out{len(outcomes)}"
        prepare(audio, out, num_jobs=jobs, files_per_part=size)
        outcomes.append(contents(out))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    prepare(audio, tmp_path / "one", files_per_part=100)
    assert list(read_cuts(tmp_path / "one/cuts_x.jsonl.gz")) == list(read_cuts(tmp_path / "out0/cuts_x.jsonl.gz"))
    assert contents(tmp_path / "one")["unreadable_x.tsv"] == outcomes[0]["unreadable_x.tsv"]


def test_an_interrupted_run_goes_on_where_it_was(audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(audio, tmp_path / "whole")

    def interrupt(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        count_scans(patch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(audio, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cuts_x.parts"]
    sizes = count_scans(monkeypatch)
    prepared = prepare(audio, tmp_path / "out")
    assert sizes == [3, 3]
    assert prepared.resumed == 6
    assert "continued: 6 files were read by an earlier run" in str(prepared)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_part_is_read_again_when_its_files_or_the_settings_change(audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(3, monkeypatch, audio, tmp_path / "out")
    soundfile.write(audio / "s1" / "05.wav", np.zeros(160), 16000)  # in the third part, of four
    sizes = count_scans(monkeypatch)
    prepared = prepare(audio, tmp_path / "out")
    assert sizes == [3, 3, 1], "the first two parts are taken as they are"
    assert prepared.summary.cuts == 11
    prepared = prepare(audio, tmp_path / "out", settings=ScanSettings(min_duration=0.15), overwrite=True)
    assert prepared.summary.cuts == 10


def test_an_interrupted_run_with_other_settings_is_not_mixed_in(audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(3, monkeypatch, audio, tmp_path / "out", settings=ScanSettings(min_duration=0.75))
    prepared = prepare(audio, tmp_path / "out")
    assert (prepared.summary.cuts, prepared.resumed) == (10, 0)
    assert contents(tmp_path / "out").keys() == set(FINAL)


def test_a_finished_split_is_left_alone_and_said_to_be(audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(audio, tmp_path / "out")
    before = contents(tmp_path / "out")
    sizes = count_scans(monkeypatch)
    again = prepare(audio, tmp_path / "out")
    assert not sizes
    assert (again.existed, again.summary, again.unreadable) == (True, first.summary, 2)
    assert "exists already: nothing was done" in str(again)
    with pytest.raises(ValueError, match=r"exists, made with min_duration 0\.0 \(now 0\.5\); overwrite it"):
        prepare(audio, tmp_path / "out", settings=ScanSettings(min_duration=0.5))
    with pytest.raises(ValueError, match=r"exists, made with source .*/other\)"):
        prepare(audio.parent / "other", tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert prepare(audio, tmp_path / "out", settings=ScanSettings(min_duration=0.5), overwrite=True).summary.cuts == 7


def test_a_manifest_whose_summary_is_not_its_own_is_not_taken_for_finished(audio: Path, tmp_path: Path) -> None:
    prepared = prepare(audio, tmp_path / "out")
    prepared.manifest.write_bytes(prepared.manifest.read_bytes() * 2)
    with pytest.raises(ValueError, match="not known to be whole"):
        prepare(audio, tmp_path / "out")


@pytest.mark.parametrize("nth", range(1, 20, 3))
def test_a_full_disk_leaves_nothing_under_a_final_name_and_the_next_run_ends_the_work(
    audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    prepare(audio, tmp_path / "whole")
    calls = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= nth and not os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            prepare(audio, tmp_path / "out")
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in left if path.name.endswith(".part")]
    assert not (tmp_path / "out/cuts_x.jsonl.gz").exists()
    prepare(audio, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_no_readable_audio_is_refused_with_the_first_reason_and_forgotten(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / f"in/{i}.wav").touch()
    with pytest.raises(ValueError, match=r"none of the files gives a cut.*the first is .*0\.wav: empty file") as caught:
        prepare(tmp_path / "in", tmp_path / "out")
    assert "skipped: 4" in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unreadable_x.tsv"]
    for i in range(4):
        soundfile.write(tmp_path / f"in/{i}.wav", np.zeros(160), 16000)
    assert prepare(tmp_path / "in", tmp_path / "out").summary.cuts == 4


def test_ids_that_occur_twice_are_refused(audio: Path, tmp_path: Path) -> None:
    def listing() -> Listing:
        yield from folder_items(audio)
        yield AudioItem("s1/01", str(audio / "s1/04.wav"))

    with pytest.raises(ValueError, match=r"cuts_x.jsonl.gz: ids of cuts must be unique, but there is 's1/01' in lines 4 and 11"):
        prepare_split(listing, tmp_path / "out", "x", source=tmp_path, expected="")
    assert not (tmp_path / "out/cuts_x.jsonl.gz").exists()


def test_an_empty_listing_is_refused_with_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "in/sub").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"in: audio files \(\.wav, .*\) are expected here or in folders below; found sub/"):
        prepare_folder(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match="a folder of audio is needed; there is no such folder"):
        prepare_folder(tmp_path / "nowhere", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_arguments_out_of_range_are_refused(audio: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_jobs is 0"):
        prepare(audio, tmp_path / "out", num_jobs=0)
    for split in ("", "a/b", ".x"):
        with pytest.raises(ValueError, match="split is"):
            prepare_split(lambda: folder_items(audio), tmp_path / "out", split, source=audio, expected="")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/out: cannot write into this folder"):
        prepare(audio, tmp_path / "file/out")


def test_files_that_came_to_a_finished_folder_are_remarked_on_and_not_read(
    audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_folder(audio, tmp_path / "out")
    assert "files now" not in str(prepare_folder(audio, tmp_path / "out"))
    before = contents(tmp_path / "out")
    sizes = count_scans(monkeypatch)
    soundfile.write(audio / "s1" / "new.wav", np.zeros(1600), 16000)
    again = prepare_folder(audio, tmp_path / "out")
    assert "there are 13 files now, it was made of 12: --overwrite makes it again" in str(again)
    assert (again.existed, again.summary, contents(tmp_path / "out")) == (True, first.summary, before) and not sizes
    assert prepare_folder(audio, tmp_path / "out", overwrite=True).summary.cuts == first.summary.cuts + 1
    assert "files now" not in str(prepare_folder(audio, tmp_path / "out"))


def test_a_manifest_that_does_not_tell_of_how_many_files_it_is_made_is_left_alone(audio: Path, tmp_path: Path) -> None:
    manifest = prepare_folder(audio, tmp_path / "out").manifest
    summary = manifest.with_name("summary_all.json")
    content = json.loads(summary.read_text())
    del content["files"]
    summary.write_text(json.dumps(content))
    soundfile.write(audio / "new.wav", np.zeros(1600), 16000)
    assert prepare_folder(audio, tmp_path / "out").notes[0] == "exists already: nothing was done"
    assert "files now" not in str(prepare_folder(audio, tmp_path / "out"))


def test_resampling_channels_and_limits_are_said_once_each(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i, (rate, channels) in enumerate([(8000, 1), (8000, 2), (44100, 2), (16000, 1), (16000, 3)]):
        soundfile.write(tmp_path / f"in/{i}.wav", np.zeros((rate * (i + 1) // 2, channels)), rate)
    prepared = prepare(tmp_path / "in", tmp_path / "out", settings=ScanSettings(min_duration=0.6, max_duration=2.0), files_per_part=1)
    assert list(prepared.notes) == [
        "resampled to 16000 Hz whenever they are loaded: 3 files (2 at 8000 Hz, 1 at 44100 Hz)",
        "more than one channel: 3 files, of which channel 0 (counted from 0) is used",
        "left out, shorter than 0.6 s: 1 cuts, 0.000 h",
        "left out, longer than 2 s: 1 cuts, 0.001 h",
        "files: 5 (headers read); unreadable or unusable, listed in unreadable_x.tsv and skipped: 0",
    ]


def test_tabs_and_line_ends_in_paths_do_not_break_the_list(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a\tb\nc.wav").touch()
    soundfile.write(tmp_path / "in/x.wav", np.zeros(160), 16000)
    prepared = prepare(tmp_path / "in", tmp_path / "out")
    lines = prepared.unreadable_list.read_text().splitlines()
    assert len(lines) == 2
    assert lines[1].endswith("a\\tb\\nc.wav\tempty file (0 bytes)")


def test_a_folder_with_transcripts_carries_them(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "in").mkdir(exist_ok=True)
        soundfile.write(tmp_path / f"in/{name}.flac", np.zeros(160), 16000)
    (tmp_path / "in/a.txt").write_text("BESIDE\n")
    (tmp_path / "in/b.txt").write_text("\n")
    (tmp_path / "t.tsv").write_text("b\tTABLE\tbob\n")
    prepared = prepare_folder(tmp_path / "in", tmp_path / "out", table=tmp_path / "t.tsv")
    supervisions = {cut.id: (cut.supervisions[0].text, cut.supervisions[0].speaker) for cut in read_cuts(prepared.manifest)}
    assert supervisions == {"a": ("BESIDE", None), "b": ("TABLE", "bob"), "c": (None, None)}
    plain = prepare_folder(tmp_path / "in", tmp_path / "out", split="plain")
    assert (plain.summary.with_text, plain.summary.empty_text) == (1, 1)


def test_a_part_that_was_cut_off_is_not_taken(audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(2, monkeypatch, audio, tmp_path / "out")
    parts = sorted((tmp_path / "out/cuts_x.parts").glob("*.json"))
    assert len(parts) == 2
    parts[0].unlink()  # as if the process had died between the two files of the part
    sizes = count_scans(monkeypatch)
    assert prepare(audio, tmp_path / "out").summary.cuts == 10
    assert sizes == [3, 3, 3]


def test_real_speech_is_counted(real_speech: Path, tmp_path: Path) -> None:
    prepared = prepare_folder(real_speech / "unlabelled", tmp_path, speaker="name")
    assert (prepared.summary.cuts, prepared.summary.speakers, prepared.unreadable) == (251, 251, 0)
    assert prepared.summary.hours == pytest.approx(0.87, abs=0.005)
    assert json.loads((tmp_path / "summary_all.json").read_text())["summary"]["cuts"] == 251


def test_a_repaired_file_is_read_when_an_interrupted_run_goes_on(audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(3, monkeypatch, audio, tmp_path / "out")
    soundfile.write(audio / "s0" / "00.wav", np.zeros(1600), 16000)  # in the first part
    sizes = count_scans(monkeypatch)
    prepared = prepare(audio, tmp_path / "out")
    assert len(sizes) == 2 and prepared.resumed == 6 and prepared.unreadable == 1
    assert "s0/00" in [cut.id for cut in read_cuts(prepared.manifest)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"table": "table.tsv"}, r"table None \(now [0-9a-f]{64}\)"),
        ({"speaker": "folder"}, r"speaker none \(now folder\)"),
        ({"text_suffix": ".lab"}, r"text_suffix \.txt \(now \.lab\)"),
    ],
)
def test_a_manifest_with_other_transcripts_or_speakers_is_not_taken(audio: Path, tmp_path: Path, change: dict[str, str], said: str) -> None:
    (tmp_path / "table.tsv").write_text("s1/01\tHELLO\n")
    options = {**change, "table": tmp_path / "table.tsv"} if "table" in change else change
    assert not prepare_folder(audio, tmp_path / "out").existed
    with pytest.raises(ValueError, match=said):
        prepare_folder(audio, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not prepare_folder(audio, tmp_path / "out", **options, overwrite=True).existed  # type: ignore[arg-type]
    assert prepare_folder(audio, tmp_path / "out", **options).existed  # type: ignore[arg-type]
