"""Manifests: lazy, unique ids, whole or absent."""

from __future__ import annotations

import errno
import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.testing.dummies import dummy_recording

from k2ssl.data import cuts as cuts_module
from k2ssl.data.cuts import check_manifest, read_cuts, read_summary, summarize, summary_path, write_cuts


def make_cut(name: str, duration: float = 1.0, text: str | None = None, speaker: str | None = None) -> MonoCut:
    samples = round(duration * 16000)
    recording = Recording(name, [AudioSource("file", [0], f"/nowhere/{name}.wav")], 16000, samples, duration)
    supervision = SupervisionSegment(name, name, 0.0, duration, text=text, speaker=speaker)
    return MonoCut(name, 0.0, duration, 0, supervisions=[supervision], recording=recording)


def make_cuts(count: int) -> Iterator[MonoCut]:
    return (make_cut(f"cut-{i}", 1 + i / 10) for i in range(count))


@pytest.mark.parametrize("name", ["cuts_train.jsonl.gz", "cuts_train.jsonl", "other.jsonl.gz"])
def test_cuts_come_back_as_they_were_written(tmp_path: Path, name: str) -> None:
    given = [make_cut("a", text="ÄÖ ZWEI", speaker="s"), make_cut("b/c d", 2.5, text="")]
    write_cuts(given, tmp_path / name)
    read = read_cuts(tmp_path / name)
    assert read.is_lazy
    assert list(read) == given == list(read), "a second pass reads the file again"
    assert len(read) == 2


def test_the_file_is_the_same_each_time_it_is_written(tmp_path: Path) -> None:
    write_cuts(make_cuts(3), tmp_path / "cuts_a.jsonl.gz")
    write_cuts(make_cuts(3), tmp_path / "cuts_b.jsonl.gz")
    assert (tmp_path / "cuts_a.jsonl.gz").read_bytes() == (tmp_path / "cuts_b.jsonl.gz").read_bytes()


def test_the_summary_beside_the_manifest_is_that_of_its_cuts(tmp_path: Path) -> None:
    written = write_cuts(make_cuts(5), tmp_path / "cuts_dev.jsonl.gz")
    assert written == summarize(make_cuts(5))
    assert summary_path(tmp_path / "cuts_dev.jsonl.gz") == tmp_path / "summary_dev.json"
    assert json.loads((tmp_path / "summary_dev.json").read_text())["summary"] == written.to_dict()


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl"])
def test_writing_two_cuts_with_one_id_is_refused_and_leaves_nothing(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ValueError, match=r"'cut-1' in lines 2 and 4"):
        write_cuts([*make_cuts(3), make_cut("cut-1")], tmp_path / f"cuts_x{suffix}")
    assert not list(tmp_path.iterdir())


def test_reading_two_cuts_with_one_id_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cuts_x.jsonl.gz"
    CutSet.from_cuts(make_cuts(3)).to_file(path)
    assert len(list(read_cuts(path))) == 3, "a manifest that lhotse wrote"
    with gzip.open(path, "at") as file:
        file.write(json.dumps(make_cut("cut-2").to_dict()) + "\n")
    with pytest.raises(ValueError, match=r"cuts_x.jsonl.gz: .*unique.*'cut-2' in lines 3 and 4"):
        read_cuts(path)


def test_many_repeated_ids_are_counted_and_three_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(cuts_module.cut_line(cut) for cut in [*make_cuts(9), *make_cuts(9)]))
    with pytest.raises(ValueError, match=r"'cut-0' in lines 1 and 10.*'cut-2' in lines 3 and 12 and 6 more"):
        read_cuts(path)


def test_ids_with_equal_hashes_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts_module, "_hash", lambda cut_id: 7)
    write_cuts(make_cuts(3), tmp_path / "cuts_x.jsonl.gz")
    assert check_manifest(tmp_path / "cuts_x.jsonl.gz") == 3


def test_a_manifest_with_its_own_summary_is_not_read_through_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cuts_x.jsonl.gz"
    write_cuts(make_cuts(3), path)

    def fail(*_: object, **__: object) -> int:
        raise AssertionError("read through")

    monkeypatch.setattr(cuts_module, "check_manifest", fail)
    read_cuts(path)
    CutSet.from_cuts(make_cuts(4)).to_file(path)  # the summary is now another manifest's
    with pytest.raises(AssertionError, match="read through"):
        read_cuts(path)


def test_a_summary_of_a_file_of_the_same_size_does_not_vouch_for_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "cuts_x.jsonl"
    write_cuts([make_cut("a"), make_cut("b")], path)
    path.write_bytes(path.read_bytes().replace(b'"b"', b'"a"'))
    with pytest.raises(ValueError, match="'a' in lines 1 and 2"):
        read_cuts(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no cuts"),
        (b"{not json}\n", "line 1 is not JSON"),
        (b'{"start": 0, "duration": 1}\n', "line 1 has no id"),
        (b'{"id": 3, "start": 0, "duration": 1}\n', "line 1 has no id"),
        (b"[1]\n", "line 1 has no id"),
        (json.dumps(dummy_recording(0).to_dict()).encode(), "line 1 is a recording, not a cut"),
        (json.dumps(make_cut("a").supervisions[0].to_dict()).encode(), "line 1 is a supervision, not a cut"),
        (b"\xff\xfe\n", "line 1 is not JSON"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_what_is_no_manifest_of_cuts_is_refused(tmp_path: Path, content: bytes, message: str, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    with pytest.raises(ValueError, match=message) as caught:
        read_cuts(path)
    assert str(path) in str(caught.value)


def test_a_truncated_manifest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cuts_x.jsonl.gz"
    write_cuts(make_cuts(500), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cuts_x.jsonl.gz: damaged after line \d+"):
        read_cuts(path)


def test_paths_that_cannot_be_manifests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl: there is no such file"):
        read_cuts(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(ValueError, match="there is no such file"):
        read_cuts(tmp_path / "b.jsonl")
    for function in (lambda: read_cuts(tmp_path / "c.yaml"), lambda: write_cuts(make_cuts(1), tmp_path / "c.yaml")):
        with pytest.raises(ValueError, match=r"c.yaml: a manifest of cuts ends in \.jsonl\.gz or \.jsonl"):
            function()


def test_nothing_to_write_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no cuts"):
        write_cuts([], tmp_path / "cuts_x.jsonl.gz")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/sub: cannot write into this folder"):
        write_cuts(make_cuts(1), tmp_path / "file" / "sub" / "cuts_x.jsonl.gz")


def test_audio_in_memory_is_refused(tmp_path: Path) -> None:
    recording = Recording("a", [AudioSource("memory", [0], b"RIFF")], 16000, 16000, 1.0)
    cut = MonoCut("a", 0.0, 1.0, 0, recording=recording)
    with pytest.raises(ValueError, match="cannot be stored as JSON"):
        write_cuts([cut], tmp_path / "cuts_x.jsonl.gz")
    assert not list(tmp_path.iterdir())


def test_an_iterator_that_fails_leaves_the_older_manifest(tmp_path: Path) -> None:
    path = tmp_path / "cuts_x.jsonl.gz"
    write_cuts(make_cuts(2), path)

    def broken() -> Iterator[MonoCut]:
        yield make_cut("new")
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        write_cuts(broken(), path)
    assert [cut.id for cut in read_cuts(path)] == ["cut-0", "cut-1"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cuts_x.jsonl.gz", "summary_x.json"]


@pytest.mark.parametrize("nth", [1, 3])  # 1: the summary, 2: the folder's entry of it, 3: the manifest
def test_a_full_disk_leaves_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    calls = 0

    def full(number: int) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*_x\.json"):
        write_cuts(make_cuts(2), tmp_path / "cuts_x.jsonl.gz")
    monkeypatch.undo()
    assert not (tmp_path / "cuts_x.jsonl.gz").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_a_damaged_summary_is_as_none(tmp_path: Path) -> None:
    path = tmp_path / "cuts_x.jsonl.gz"
    write_cuts(make_cuts(2), path)
    for damaged in ("", "[]", "{", '{"manifest": 3}'):
        (tmp_path / "summary_x.json").write_text(damaged)
        assert len(read_cuts(path)) == 2
    (tmp_path / "summary_x.json").write_text("{")
    assert read_summary(path) == {}
