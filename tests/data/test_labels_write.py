"""Writing shards: atomic, resumable, and clear about what is wrong."""

from __future__ import annotations

import errno
import os
import pickle
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2ssl.data import label_shards
from k2ssl.data.labels import LabelShardWriter, LabelStore, Lineage, merge_shards

LINEAGE = Lineage("layer 6", {"overlap": 1.5}, "a" * 64, "b" * 64, "3:" + "c" * 64)
FINAL = ("labels-00000-of-00001.bin", "labels-00000-of-00001.ids", "labels-00000-of-00001.json")


def open_writer(folder: Path, shard: int = 0, num_shards: int = 1, **changes: Any) -> LabelShardWriter:
    arguments: dict[str, Any] = {"num_classes": 50, "frame_rate": 50.0, "lineage": LINEAGE, "sampling_rate": 16_000, "commit_cuts": 3}
    return LabelShardWriter(folder, shard, num_shards, **{**arguments, **changes})


def labels_of(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(50, size=5 + i % 4)


def write_range(writer: LabelShardWriter, start: int, stop: int) -> None:
    for i in range(start, stop):
        writer.write(f"cut-{i}", labels_of(i))


def assert_holds(store: LabelStore, num_cuts: int) -> None:
    assert len(store) == num_cuts
    for i in range(num_cuts):
        np.testing.assert_array_equal(store.labels(f"cut-{i}"), labels_of(i))
    store.verify()


def assert_nothing_final(folder: Path) -> None:
    assert not [name for name in FINAL if (folder / name).exists()]
    with pytest.raises(ValueError, match=r"1 of 1 shards are not finished: labels-00000-of-00001 \(begun\)"):
        merge_shards(folder)


def test_an_interrupted_shard_goes_on_after_its_last_commit(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_writer(tmp_path) as writer:
        write_range(writer, 0, 8)
        raise KeyboardInterrupt
    assert_nothing_final(tmp_path)
    with open_writer(tmp_path) as writer:
        done = writer.done_ids()
        assert [f"cut-{i}" in done for i in range(8)] == [True] * 6 + [False] * 2  # two commits of three cuts
        assert len(done) == writer.num_cuts == 6 and 3 not in done
        assert "cut-5" in pickle.loads(pickle.dumps(done))
        write_range(writer, 6, 12)
        assert "cut-11" in writer.done_ids() and "cut-12" not in writer.done_ids()
    assert_holds(merge_shards(tmp_path), 12)


def test_an_interrupted_shard_ends_equal_to_an_uninterrupted_one(tmp_path: Path) -> None:
    with open_writer(tmp_path / "whole") as writer:
        write_range(writer, 0, 10)
    for stop in (4, 8, 10):
        writer = open_writer(tmp_path / "pieces")
        write_range(writer, writer.num_cuts, stop)
        if stop == 10:
            writer.close()
        else:
            writer.commit()
            writer.__exit__(KeyboardInterrupt, None, None)
    for name in FINAL:
        assert (tmp_path / "pieces" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "pieces").iterdir()) == sorted(FINAL)


@pytest.mark.parametrize("torn", [b"7\tcut-9", b"7", b"\x00\x01"])
def test_what_a_crash_left_half_written_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    with pytest.raises(KeyboardInterrupt), open_writer(tmp_path) as writer:
        write_range(writer, 0, 6)
        raise KeyboardInterrupt
    with (tmp_path / f"{FINAL[0]}.partial").open("ab") as file:
        file.write(b"\xff" * 9)
    with (tmp_path / f"{FINAL[1]}.partial").open("ab") as file:
        file.write(torn)
    with open_writer(tmp_path) as writer:
        assert writer.num_cuts == 6
        write_range(writer, 6, 9)
    assert_holds(merge_shards(tmp_path), 9)


@pytest.mark.parametrize("interrupted", [1, 2])
def test_a_commit_that_was_interrupted_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: int) -> None:
    real, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == interrupted:
            raise KeyboardInterrupt
        real(descriptor)

    with pytest.raises(KeyboardInterrupt), open_writer(tmp_path) as writer:
        write_range(writer, 0, 4)  # one commit of three cuts, and one cut more
        monkeypatch.setattr(os, "fsync", fsync)
        try:
            writer.commit()
        except KeyboardInterrupt:
            writer.commit()
            raise
    with open_writer(tmp_path) as writer:
        assert writer.num_cuts == 4
        write_range(writer, 4, 7)
    assert_holds(merge_shards(tmp_path), 7)


def test_a_finished_shard_opens_again_with_newer_libraries(tmp_path: Path) -> None:
    with open_writer(tmp_path, lineage=replace(LINEAGE, versions={"torch": "1"})) as writer:
        write_range(writer, 0, 2)
    assert open_writer(tmp_path, lineage=replace(LINEAGE, versions={"torch": "2"})).finished
    with pytest.raises(ValueError, match=r"lineage\.features 'layer 6' there, 'mfcc' here"):
        open_writer(tmp_path, lineage=replace(LINEAGE, features="mfcc"))


def test_a_crash_between_renaming_and_the_record_leaves_an_unfinished_shard(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        write_range(writer, 0, 4)
    (tmp_path / FINAL[2]).unlink()
    with open_writer(tmp_path) as writer:
        assert writer.num_cuts == 4 and not writer.finished
        write_range(writer, 4, 5)
    assert_holds(merge_shards(tmp_path), 5)


def test_a_finished_shard_opens_again_and_takes_nothing_more(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        write_range(writer, 0, 4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with open_writer(tmp_path) as writer:
        assert writer.finished and "cut-3" in writer.done_ids() and len(writer.done_ids()) == 4
        with pytest.raises(ValueError, match=r"labels-00000-of-00001: the shard is closed, cut 'cut-9' cannot be added"):
            write_range(writer, 9, 10)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_merging_moves_no_label(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        write_range(writer, 0, 4)
    before = (tmp_path / FINAL[0]).stat()
    merge_shards(tmp_path)
    after = (tmp_path / FINAL[0]).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("full", ["bin", "ids"])
def test_a_full_disk_leaves_nothing_final_and_loses_nothing_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    append = label_shards._append
    room = [2]  # commits

    def append_while_there_is_room(file: FileIO, data: bytes) -> None:
        if f".{full}." in str(file.name):
            room[0] -= 1
            if room[0] < 0:
                append(file, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(file, data)

    monkeypatch.setattr(label_shards, "_append", append_while_there_is_room)
    with (
        pytest.raises(OSError, match=r"writing labels failed \(No space left on device\); 6 cuts of this shard are safe") as caught,
        open_writer(tmp_path) as writer,
    ):
        write_range(writer, 0, 20)
    assert caught.value.errno == errno.ENOSPC
    assert_nothing_final(tmp_path)
    sizes = {kind: (tmp_path / f"labels-00000-of-00001.{kind}.partial").stat().st_size for kind in ("bin", "ids")}
    assert sizes == {"bin": 2 * sum(len(labels_of(i)) for i in range(6)), "ids": 6 * len("5\tcut-0\n")}
    with pytest.raises(ValueError, match="abandoned after an error"):
        writer.close()
    monkeypatch.setattr(label_shards, "_append", append)
    with open_writer(tmp_path) as writer:
        write_range(writer, writer.num_cuts, 20)
    assert_holds(merge_shards(tmp_path), 20)


def test_a_disk_that_is_full_when_the_record_is_due_leaves_nothing_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, record: object) -> None:
        raise OSError(errno.ENOSPC, f"{path} cannot be written")

    writer = open_writer(tmp_path)
    write_range(writer, 0, 5)
    with monkeypatch.context() as patched:
        patched.setattr(label_shards, "write_record", fail)
        with pytest.raises(OSError, match="5 cuts of this shard are safe"):
            writer.close()
    assert_nothing_final(tmp_path)
    open_writer(tmp_path).close()
    assert_holds(merge_shards(tmp_path), 5)


def test_a_truncated_partial_shard_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_writer(tmp_path) as writer:
        write_range(writer, 0, 6)
        raise KeyboardInterrupt
    os.truncate(tmp_path / f"{FINAL[0]}.partial", 4)
    with pytest.raises(ValueError, match=r"labels-00000-of-00001\.bin\.partial has 4 bytes, .* lists labels of \d+: it was truncated"):
        open_writer(tmp_path)


def test_a_shard_is_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    with pytest.raises(ValueError, match=r"labels-00000-of-00001\.lock: another process is writing this shard"):
        open_writer(tmp_path)
    with open_writer(tmp_path / "elsewhere"):
        pass
    writer.close()
    assert open_writer(tmp_path).finished


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 51}, "num_classes 50 there, 51 here"),
        ({"frame_rate": 100.0}, r"frame_rate 50\.0 there, 100\.0 here"),
        ({"sampling_rate": 8_000}, "sampling_rate 16000 there, 8000 here"),
        ({"lineage": replace(LINEAGE, kmeans_sha256="d" * 64)}, "lineage.kmeans_sha256 'a+' there, 'd+' here"),
        ({"lineage": replace(LINEAGE, cuts_sha256="4:e")}, "lineage.cuts_sha256"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_a_shard_does_not_go_on_with_another_set_up(tmp_path: Path, finished: bool, changes: dict[str, Any], message: str) -> None:
    writer = open_writer(tmp_path)
    write_range(writer, 0, 3)
    writer.close() if finished else writer.__exit__(KeyboardInterrupt, None, None)
    with pytest.raises(ValueError, match=f"was begun with another set-up: {message}"):
        open_writer(tmp_path, **changes)


def test_shards_of_another_number_are_refused_by_name(tmp_path: Path) -> None:
    open_writer(tmp_path, 0, 2).close()
    with pytest.raises(ValueError, match=r"labels-00000-of-00002\.bin belongs to a store of 2 shards, this one is to have 3"):
        open_writer(tmp_path, 0, 3)
    (tmp_path / "labels-00000-of-00003.bin").touch()
    with pytest.raises(ValueError, match="mixes shards of stores in 2 and 3 shards"):
        merge_shards(tmp_path)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no shard of labels is there"):
        merge_shards(tmp_path / "nothing")
    with open_writer(tmp_path, 1, 4) as writer:
        write_range(writer, 0, 1)
    open_writer(tmp_path, 2, 4).__exit__(KeyboardInterrupt, None, None)
    with pytest.raises(
        ValueError, match=r"3 of 4 shards are not finished: .*00000-of-00004 \(not begun\), .*00002-of-00004 \(begun\), .*00003"
    ):
        merge_shards(tmp_path)


def test_shards_of_different_set_ups_are_refused_by_name(tmp_path: Path) -> None:
    open_writer(tmp_path / "a", 0, 2).close()
    open_writer(tmp_path / "b", 1, 2, num_classes=60).close()
    for path in (tmp_path / "b").iterdir():
        path.rename(tmp_path / "a" / path.name)
    with pytest.raises(
        ValueError, match=r"labels-00000-of-00002 and labels-00001-of-00002 .* different set-ups: num_classes 50 there, 60 here"
    ):
        merge_shards(tmp_path / "a")


def test_a_store_without_any_label_is_refused(tmp_path: Path) -> None:
    for shard in range(2):
        open_writer(tmp_path, shard, 2).close()
    with pytest.raises(ValueError, match="the 2 shards hold no labels at all"):
        merge_shards(tmp_path)
    assert not (tmp_path / "contract.json").exists()


@pytest.mark.parametrize(
    ("cut_id", "labels", "message"),
    [
        ("a", np.array([], dtype=np.int64), "labels of cut 'a' are empty"),
        ("a", np.array([3, 50]), "labels of cut 'a' contain 50, allowed are 0 to 49"),
        ("a", np.array([-1, 3]), "labels of cut 'a' contain -1"),
        ("a", np.array([1.0]), "have shape .1,. and type float64"),
        ("a", np.array([[1]]), "have shape .1, 1. and type int64"),
        ("a", np.array([True]), "type bool"),
        ("", np.array([1]), "cut id '' is empty"),
        ("a\tb", np.array([1]), "has a tab or line break"),
        ("a\nb", np.array([1]), "has a tab or line break"),
        ("cut-0", np.array([1]), "cut 'cut-0' was written already"),
        ("a", np.zeros(2**24, np.uint8), "at most 16777215; split the recording"),
    ],
)
def test_labels_that_cannot_be_are_refused_by_the_name_of_their_cut(tmp_path: Path, cut_id: str, labels: np.ndarray, message: str) -> None:
    with open_writer(tmp_path) as writer:
        write_range(writer, 0, 1)
        with pytest.raises(ValueError, match=message):
            writer.write(cut_id, labels)
        assert writer.num_cuts == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 0}, "num_classes is 0"),
        ({"frame_rate": 0.0}, r"frame_rate is 0\.0"),
        ({"frame_rate": float("nan")}, "frame_rate is nan"),
        ({"sampling_rate": 0}, "sampling_rate is 0"),
        ({"shard": 2, "num_shards": 2}, "shard is 2, allowed are 0 to num_shards - 1 = 1"),
        ({"num_shards": 0}, "num_shards is 0"),
        ({"commit_cuts": 0}, "commit_cuts is 0"),
    ],
)
def test_a_bad_set_up_is_refused_before_anything_is_made(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_writer(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_lineage_holds_plain_values_only() -> None:
    with pytest.raises(ValueError, match=r"settings\['dims'\] is a list"):
        replace(LINEAGE, settings={"dims": [1, 2]})


def test_lineage_names_what_it_lacks() -> None:
    assert LINEAGE.missing() == ()
    assert replace(LINEAGE, checkpoint_sha256=None).missing() == ("checkpoint_sha256",)
    assert replace(LINEAGE, features="mfcc", checkpoint_sha256=None).missing() == ()
    assert Lineage.unknown().missing() == ("features", "settings", "kmeans_sha256", "cuts_sha256")
