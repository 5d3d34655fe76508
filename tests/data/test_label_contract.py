"""The label contract: every way in which labels can be wrong is refused by name before training starts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lhotse import CutSet, MonoCut, Recording

from k2ssl.data.label_contract import ContractReport, check_labels_fit
from k2ssl.data.labels import LabelShardWriter, LabelStore, Lineage, cut_list_hash, merge_shards

KNOWN = Lineage("mfcc", {"num_ceps": 13}, "a" * 64, None, "")


def frames_of(num_samples: int) -> int:
    """As the convolutional frontend has them: windows of 400 samples every 320."""
    return max(0, (num_samples - 400) // 320 + 1)


def make_cuts(prefix: str, count: int, seed: int) -> list[MonoCut]:
    cuts = []
    for i, num_samples in enumerate(np.random.default_rng(seed).integers(8_000, 32_000, size=count).tolist()):
        recording = Recording(f"{prefix}-{i}", [], 16_000, num_samples, num_samples / 16_000)
        cuts.append(MonoCut(f"{prefix}-{i}", start=0.0, duration=recording.duration, channel=0, recording=recording))
    return cuts


def label(
    folder: Path,
    cuts: list[MonoCut],
    num_classes: int = 20,
    frame_rate: float = 50.0,
    sampling_rate: int = 16_000,
    lineage: Lineage = KNOWN,
    used_classes: int | None = None,
    count_of: Callable[[int], int] = frames_of,
) -> LabelStore:
    if lineage.features and not lineage.cuts_sha256:
        lineage = replace(lineage, cuts_sha256=cut_list_hash(cuts))
    rng = np.random.default_rng(0)
    with LabelShardWriter(folder, 0, 1, num_classes, frame_rate, lineage, sampling_rate=sampling_rate) as writer:
        for cut in cuts:
            writer.write(cut.id, rng.integers(used_classes or num_classes, size=count_of(cut.num_samples)))
    return merge_shards(folder)


def check(store: LabelStore, cuts: list[MonoCut], **changes: Any) -> ContractReport:
    arguments: dict[str, Any] = {"num_classes": 20, "frame_rate": 50.0, "sample_rate": 16_000, "num_frames": frames_of}
    return check_labels_fit(store, cuts=cuts, **{**arguments, **changes})


@pytest.fixture
def train(tmp_path: Path) -> tuple[LabelStore, list[MonoCut]]:
    cuts = make_cuts("train", 30, seed=1)
    return label(tmp_path / "train", cuts), cuts


def test_labels_that_fit_are_let_through(train: tuple[LabelStore, list[MonoCut]]) -> None:
    store, cuts = train
    report = check(store, cuts)
    assert (report.num_cuts, report.num_classes, report.head_classes, report.unused_classes) == (30, 20, 20, 0)
    assert report.largest_difference == 0 and report.notes == ()
    assert "20 classes (0 unused) for a head of 20, 30 cuts checked" in report.text()
    assert check(store, CutSet.from_cuts(cuts[::-1]).filter(lambda cut: True)).notes == ()  # lazy, another order


def test_a_sample_of_the_cuts_may_be_checked_and_that_is_noted(train: tuple[LabelStore, list[MonoCut]]) -> None:
    store, cuts = train
    assert check(store, cuts[5:9]).notes == (f"labels in {store.folder} are of 30 cuts, 4 were checked here",)


@pytest.mark.parametrize(("num_classes", "noted"), [(20, False), (24, False), (25, False), (26, True), (500, True)])
def test_a_head_far_larger_than_the_labels_is_noted(train: tuple[LabelStore, list[MonoCut]], num_classes: int, noted: bool) -> None:
    notes = check(*train, num_classes=num_classes).notes
    assert any("have 20 classes, the head" in note for note in notes) is noted


def test_one_class_too_many_is_refused(train: tuple[LabelStore, list[MonoCut]]) -> None:
    with pytest.raises(ValueError, match=rf"labels in {train[0].folder}: 20 classes, the model's head has 19"):
        check(*train, num_classes=19)


def test_labels_of_another_frame_rate_are_refused(tmp_path: Path) -> None:
    cuts = make_cuts("train", 5, seed=1)
    store = label(tmp_path / "fast", cuts, frame_rate=100.0, count_of=lambda samples: samples // 160)
    with pytest.raises(ValueError, match="fast: 100 labels per second, the model takes 50"):
        check(store, cuts)
    assert check(store, cuts, label_rate=100.0).largest_difference <= 2


def test_labels_of_audio_at_another_rate_are_refused(tmp_path: Path) -> None:
    cuts = make_cuts("train", 5, seed=1)
    store = label(tmp_path / "narrow", cuts, sampling_rate=8_000)
    with pytest.raises(ValueError, match="narrow: made from audio at 8000 Hz, the model's frontend takes 16000 Hz"):
        check(store, cuts)


@pytest.mark.parametrize(("used", "refused"), [(10, False), (9, True)])
def test_too_many_unused_classes_are_refused(tmp_path: Path, used: int, refused: bool) -> None:
    cuts = make_cuts("train", 30, seed=1)
    store = label(tmp_path / "labels", cuts, used_classes=used)
    if not refused:
        assert check(store, cuts).unused_classes == 10
        return
    with pytest.raises(ValueError, match=r"11 of 20 classes never occur \(55%\), allowed is a share of 50%"):
        check(store, cuts)
    assert check(store, cuts, max_unused_share=0.6).unused_classes == 11


def test_labels_of_unknown_origin_are_refused_unless_that_is_wanted(tmp_path: Path) -> None:
    cuts = make_cuts("train", 5, seed=1)
    store = label(tmp_path / "found", cuts, lineage=Lineage.unknown())
    with pytest.raises(
        ValueError, match=r"found: the contract does not say where they come from .lineage without features, settings, kmeans"
    ):
        check(store, cuts)
    assert "do not say where they come from" in check(store, cuts, require_lineage=False).notes[0]


def test_labels_of_layer_features_name_their_checkpoint(tmp_path: Path) -> None:
    cuts = make_cuts("train", 5, seed=1)
    store = label(tmp_path / "labels", cuts, lineage=replace(KNOWN, features="layer 6"))
    with pytest.raises(ValueError, match="lineage without checkpoint_sha256"):
        check(store, cuts)


def test_everything_wrong_with_a_store_is_said_at_once(train: tuple[LabelStore, list[MonoCut]]) -> None:
    with pytest.raises(ValueError, match=r"(?s)20 classes.*\n.*50 labels per second.*\n.*16000 Hz"):
        check(*train, num_classes=10, frame_rate=25.0, sample_rate=8_000)


@pytest.mark.parametrize(("off_by", "refused"), [(-2, True), (-1, False), (0, False), (1, False), (2, True)])
def test_labels_may_be_one_frame_off(tmp_path: Path, off_by: int, refused: bool) -> None:
    cuts = make_cuts("train", 8, seed=1)
    store = label(tmp_path / "labels", cuts, count_of=lambda samples: frames_of(samples) + off_by)
    if not refused:
        assert check(store, cuts).largest_difference == abs(off_by)
        return
    frames = frames_of(cuts[0].num_samples)
    with pytest.raises(
        ValueError,
        match=rf"8 of 8 cuts have labels of another length .*'train-0' has {frames + off_by} labels, its {frames} frames take {frames}; .*and 3 more",
    ):
        check(store, cuts)


def test_cuts_without_labels_are_listed(train: tuple[LabelStore, list[MonoCut]]) -> None:
    store, cuts = train
    with pytest.raises(ValueError, match=r"7 of 37 cuts of the cut list have no labels: 'new-0', 'new-1', .* and 2 more"):
        check(store, cuts + make_cuts("new", 7, seed=2))


def list_skipped(store: LabelStore, cuts: list[MonoCut], shard: int = 0) -> None:
    """As the labelling program does."""
    lines = [f"{cut.id}\tcannot be read\n" for cut in cuts]
    (store.folder / f"skipped-{shard:05d}-of-00002.tsv").write_text("".join(lines))


def test_cuts_that_labelling_skipped_are_let_through_and_noted(tmp_path: Path) -> None:
    cuts = make_cuts("train", 30, seed=1)
    labelled = replace(KNOWN, cuts_sha256=cut_list_hash(cuts))
    store = label(tmp_path / "train", cuts[:27], lineage=labelled)
    for shard, some in enumerate((cuts[27:29], cuts[29:])):
        list_skipped(store, some, shard)
    report = check(store, cuts)
    assert (report.num_cuts, report.num_skipped) == (30, 3)
    assert report.notes == (
        f"labels in {store.folder}: 3 of 30 cuts have none, being listed in skipped-*.tsv there; loading leaves them out",
    )
    assert check(store, cuts[:27]).num_skipped == 0 and check(store, cuts[:27]).notes == ()
    for first, num in ((20, 7), (1, 26)):
        sample = check(store, cuts[first:])
        assert sample.num_skipped == 3 and sample.notes[1] == f"labels in {store.folder} are of 27 cuts, {num} were checked here"


def test_cuts_without_labels_that_no_list_explains_are_refused(train: tuple[LabelStore, list[MonoCut]]) -> None:
    store, cuts = train
    new = make_cuts("new", 7, seed=2)
    list_skipped(store, new[:3])
    with pytest.raises(ValueError, match=r"4 of 37 cuts of the cut list have no labels \(and 3 that were skipped\): 'new-3', 'new-4'"):
        check(store, cuts + new)
    with pytest.raises(ValueError, match=r"4 of 7 cuts of the cut list have no labels .*these are labels of another split or cut list"):
        check(store, new)
    with pytest.raises(ValueError, match=r"all 3 cuts of the cut list were skipped by labelling \(skipped-\*\.tsv there\)"):
        check(store, new[:3])


def test_a_skipped_cut_does_not_hide_that_the_rest_is_of_another_list(train: tuple[LabelStore, list[MonoCut]]) -> None:
    store, cuts = train
    new = make_cuts("new", 1, seed=2)
    list_skipped(store, new)
    with pytest.raises(ValueError, match="made for the cuts 30:"):
        check(store, [*cuts[1:], cuts[2], *new])
    moved = [cut.truncate(duration=cut.duration - 1 / 16_000, preserve_id=True) for cut in cuts[:-1]]
    with pytest.raises(ValueError, match="made for the cut list 30:"):
        check(store, [*moved, *new])


@pytest.mark.parametrize("line", [b"train-1 no tab\n", b"\ta reason\n", b"\xff\treason\n"])
def test_a_damaged_list_of_skipped_cuts_is_refused(train: tuple[LabelStore, list[MonoCut]], line: bytes) -> None:
    store, cuts = train
    (store.folder / "skipped-00000-of-00001.tsv").write_bytes(b"some\treason\n" + line)
    with pytest.raises(ValueError, match=r"skipped-00000-of-00001\.tsv: line 2 is b'.*', not a cut id, a tab and a reason"):
        check(store, cuts)


def test_an_empty_cut_list_is_refused(train: tuple[LabelStore, list[MonoCut]]) -> None:
    with pytest.raises(ValueError, match="the cut list is empty"):
        check(train[0], [])


def test_swapped_splits_are_refused(train: tuple[LabelStore, list[MonoCut]], tmp_path: Path) -> None:
    dev = make_cuts("dev", 6, seed=3)
    label(tmp_path / "dev", dev)
    (tmp_path / "train").rename(tmp_path / "other")
    (tmp_path / "dev").rename(tmp_path / "train")
    (tmp_path / "other").rename(tmp_path / "dev")
    message = r"train \(split 'dev', 6 cuts\): 30 of 30 cuts of the cut list have no labels: these are labels of another split or cut list"
    with pytest.raises(ValueError, match=message):
        check(LabelStore.open(tmp_path / "train"), train[1])
    with pytest.raises(ValueError, match=r"dev \(split 'train', 30 cuts\): 6 of 6 cuts"):
        check(LabelStore.open(tmp_path / "dev"), dev)


def test_swapped_splits_that_number_their_cuts_alike_are_refused(tmp_path: Path) -> None:
    cuts, other = make_cuts("utt", 30, seed=1), make_cuts("utt", 30, seed=2)
    with pytest.raises(
        ValueError, match=r"\d+ of 30 cuts have labels of another length .*\n.*made for the cut list 30:\w+ .*this one is 30:"
    ):
        check(label(tmp_path / "labels", other), cuts)


def test_labels_of_another_cut_list_are_refused_even_if_all_lengths_fit(tmp_path: Path) -> None:
    cuts = make_cuts("utt", 3, seed=1)
    store = label(tmp_path / "labels", cuts)
    moved = [cut.truncate(duration=cut.duration - 1 / 16_000, preserve_id=True) for cut in cuts]
    assert max(abs(frames_of(a.num_samples) - frames_of(b.num_samples)) for a, b in zip(cuts, moved, strict=True)) <= 1
    with pytest.raises(ValueError, match=r"made for the cut list 3:\w+ \(count:hash of ids and durations\), this one is 3:"):
        check(store, moved)


def test_a_cut_list_that_repeats_cuts_is_not_the_labelled_one(train: tuple[LabelStore, list[MonoCut]]) -> None:
    store, cuts = train
    with pytest.raises(ValueError, match="made for the cuts 30:"):
        check(store, [*cuts[1:], cuts[2]])


# What follows damages the files of a store: opening it must fail and name the file.


def shard_file(store: LabelStore, kind: str = "bin") -> Path:
    return store.folder / f"labels-00000-of-00001.{kind}"


def test_an_empty_label_file_is_refused(train: tuple[LabelStore, list[MonoCut]]) -> None:
    shard_file(train[0]).write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"labels-00000-of-00001\.bin has 0 bytes, the store's record says \d+: it was truncated or replaced"
    ):
        LabelStore.open(train[0].folder)


@pytest.mark.parametrize("name", ["labels-00000-of-00001.bin", "labels-00000-of-00001.ids", "index.npy", "buckets.npy"])
@pytest.mark.parametrize("damage", ["missing", "one byte less", "one byte changed", "empty"])
def test_a_damaged_file_is_refused(train: tuple[LabelStore, list[MonoCut]], name: str, damage: str) -> None:
    path = train[0].folder / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "one byte less":
        os.truncate(path, len(content) - 1)
    else:
        path.write_bytes(b"" if damage == "empty" else content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with pytest.raises(ValueError, match=f"{name} (is missing|has .* bytes|differs from what was written)"):
        LabelStore.open(train[0].folder)


def test_a_truncated_shard_is_refused_before_merging(train: tuple[LabelStore, list[MonoCut]]) -> None:
    (train[0].folder / "contract.json").unlink()
    os.truncate(shard_file(train[0]), 100)
    with pytest.raises(ValueError, match=r"labels-00000-of-00001\.bin has 100 bytes, the store's record says"):
        merge_shards(train[0].folder)
    assert not (train[0].folder / "contract.json").exists()


def test_a_shard_that_is_truncated_while_it_is_open_is_refused(train: tuple[LabelStore, list[MonoCut]]) -> None:
    store, cuts = train
    attached = store.attach(cuts[-1])
    os.truncate(shard_file(store), 100)
    with pytest.raises(ValueError, match=r"labels-00000-of-00001\.bin in .* ends before label \d+: it was truncated"):
        attached.load_labels()


def test_an_index_of_another_cut_list_is_refused(train: tuple[LabelStore, list[MonoCut]], tmp_path: Path) -> None:
    other = label(tmp_path / "other", make_cuts("other", 30, seed=1))  # as many cuts, of the same lengths
    for name in ("index.npy", "buckets.npy"):
        shutil.copy(other.folder / name, train[0].folder / name)
    with pytest.raises(ValueError, match=r"index\.npy differs from what was written: it was altered or comes from another store"):
        LabelStore.open(train[0].folder)


def test_a_shard_of_another_store_is_refused(train: tuple[LabelStore, list[MonoCut]], tmp_path: Path) -> None:
    other = label(tmp_path / "other", train[1], used_classes=15)  # the same cuts, other labels
    shutil.copy(shard_file(other), shard_file(train[0]))
    with pytest.raises(ValueError, match=r"labels-00000-of-00001\.bin differs from what was written"):
        LabelStore.open(train[0].folder)


@pytest.mark.parametrize(("position", "found_by"), [(0, "open"), (399_999, "open"), (200_000, "verify")])
def test_a_byte_changed_in_a_large_shard_is_found_at_the_ends_or_by_verify(tmp_path: Path, position: int, found_by: str) -> None:
    (cut,) = make_cuts("long", 1, seed=1)
    store = label(tmp_path / "labels", [cut], count_of=lambda samples: 200_000)
    store.verify()
    with shard_file(store).open("r+b") as file:
        file.seek(position)
        old = file.read(1)
        file.seek(position)
        file.write(bytes([old[0] ^ 1]))
    if found_by == "verify":
        store = LabelStore.open(store.folder)
    with pytest.raises(ValueError, match=r"labels-00000-of-00001\.bin differs from what was written"):
        store.verify() if found_by == "verify" else LabelStore.open(store.folder)


def test_a_contract_edited_to_fit_the_head_does_not_open(train: tuple[LabelStore, list[MonoCut]]) -> None:
    path = train[0].folder / "contract.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_classes": 19}))
    with pytest.raises(ValueError, match=r"contract\.json is damaged .*: labels: histogram has 20 classes, num_classes is 19"):
        LabelStore.open(train[0].folder)
