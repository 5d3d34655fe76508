"""The label store: what is written is what is read, by id, in any process."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet, MonoCut, Recording
from lhotse.testing.dummies import dummy_cut
from lhotse.utils import fastcopy

from k2ssl.data import label_index
from k2ssl.data.labels import LabelShardWriter, LabelStore, Lineage, cut_list_hash, id_list_hash, merge_shards

LINEAGE = Lineage("mfcc", {"num_ceps": 13}, "a" * 64, None, "3:" + "c" * 64, {"torch": "2.11"})


def write_store(
    folder: Path, labels: dict[str, np.ndarray], num_shards: int = 1, num_classes: int = 100, frame_rate: float = 50.0
) -> LabelStore:
    for shard in range(num_shards):
        with LabelShardWriter(folder, shard, num_shards, num_classes, frame_rate, LINEAGE, sampling_rate=16_000) as writer:
            for cut_id in list(labels)[shard::num_shards]:
                writer.write(cut_id, labels[cut_id])
    return merge_shards(folder)


def random_labels(num_cuts: int, num_classes: int = 100, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"speaker-{i % 7}/cut {i} ä": rng.integers(num_classes, size=rng.integers(1, 60)) for i in range(num_cuts)}


def make_cut(cut_id: str, num_samples: int, start: float = 0.0, sampling_rate: int = 16_000) -> MonoCut:
    duration = num_samples / sampling_rate
    recording = Recording(f"rec-{cut_id}", [], sampling_rate, num_samples * 100, duration * 100)
    return MonoCut(cut_id, start=start, duration=duration, channel=0, recording=recording)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("num_cuts", [1, 2, 400])
def test_every_cut_reads_back_what_was_written(tmp_path: Path, num_cuts: int, num_shards: int) -> None:
    labels = random_labels(num_cuts)
    store = write_store(tmp_path / "train", labels, num_shards)
    assert len(store) == num_cuts
    for cut_id, expected in labels.items():
        np.testing.assert_array_equal(store.labels(cut_id), expected)
        assert store.num_labels(cut_id) == len(expected) and cut_id in store
    items = {cut_id: array.tolist() for cut_id, array in store.items()}
    assert items == {cut_id: array.tolist() for cut_id, array in labels.items()}


def test_an_index_of_many_buckets_finds_all_ids_and_no_others(tmp_path: Path) -> None:
    labels = {f"{i}": np.array([i % 100]) for i in range(5000)}
    store = write_store(tmp_path, labels)
    assert len(np.load(tmp_path / "buckets.npy")) == 65  # 5000 // 64 = 78 rounded down to a power of two, and the end
    assert all(store.labels(cut_id).tolist() == [int(cut_id) % 100] for cut_id in labels)
    assert not any(f"{i}" in store for i in range(5000, 10_000))
    assert 3 not in store


def test_the_contract_counts_what_was_written(tmp_path: Path) -> None:
    labels = random_labels(50, num_classes=20)
    contract = write_store(tmp_path / "dev", labels, num_shards=2, num_classes=20).contract
    together = np.concatenate(list(labels.values()))
    assert contract.split == "dev" and contract.lineage == LINEAGE
    assert (contract.num_classes, contract.frame_rate, contract.frame_shift, contract.sampling_rate) == (20, 50.0, 0.02, 16_000)
    assert (contract.num_cuts, contract.num_labels) == (50, len(together))
    assert contract.histogram == tuple(np.bincount(together, minlength=20))
    assert contract.ids_sha256 == id_list_hash(labels)
    assert json.loads((tmp_path / "dev" / "contract.json").read_text())["lineage"]["features"] == "mfcc"


@pytest.mark.parametrize(("num_classes", "dtype", "size"), [(65_535, "uint16", 2), (65_536, "int32", 4)])
def test_two_bytes_per_label_as_long_as_the_classes_fit(tmp_path: Path, num_classes: int, dtype: str, size: int) -> None:
    labels = {"a": np.array([0, num_classes - 1]), "b": np.array([7], dtype=np.uint8)}
    store = write_store(tmp_path, labels, num_classes=num_classes)
    assert store.contract.dtype == dtype
    assert (tmp_path / "labels-00000-of-00001.bin").stat().st_size == 3 * size
    assert store.labels("a").tolist() == [0, num_classes - 1]
    assert (tmp_path / "labels-00000-of-00001.bin").read_bytes()[:size] == bytes(size)
    assert int.from_bytes((tmp_path / "labels-00000-of-00001.bin").read_bytes()[size : 2 * size], "little") == num_classes - 1


def test_labels_of_all_cuts_come_in_order_however_many_fit_into_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = random_labels(30)
    store = write_store(tmp_path, labels)
    monkeypatch.setattr("k2ssl.data.labels._LABELS_PER_READ", 70)
    read, sizes = store._read, []

    def read_and_note(shard: int, start: int, stop: int) -> np.ndarray:
        sizes.append(stop - start)
        return read(shard, start, stop)

    monkeypatch.setattr(store, "_read", read_and_note)
    items = [(cut_id, array.tolist()) for cut_id, array in store.items()]
    assert items == [(cut_id, array.tolist()) for cut_id, array in labels.items()]
    assert len(sizes) > 3 and max(sizes) < 70 + 60


def test_labels_belong_to_the_caller(tmp_path: Path) -> None:
    store = write_store(tmp_path, {"a": np.arange(5)})
    store.labels("a")[:] = 99
    assert store.labels("a").tolist() == [0, 1, 2, 3, 4]


def test_a_shard_without_cuts_is_no_obstacle(tmp_path: Path) -> None:
    store = write_store(tmp_path, {"only": np.array([1, 2])}, num_shards=3)
    assert len(store) == 1 and [cut_id for cut_id, _ in store.items()] == ["only"]
    assert (tmp_path / "labels-00002-of-00003.bin").stat().st_size == 0
    store.verify()


def test_an_unknown_cut_is_named(tmp_path: Path) -> None:
    store = write_store(tmp_path, {"a": np.array([1])})
    for read in (store.labels, store.num_labels, store.lookup):
        with pytest.raises(ValueError, match="none for cut 'b', the store holds 1 other cuts"):
            read("b")


def test_a_store_that_does_not_exist_or_is_not_finished_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: there is no such folder"):
        LabelStore.open(tmp_path / "nowhere")
    with LabelShardWriter(tmp_path, 0, 1, 10, 50.0, LINEAGE, sampling_rate=16_000) as writer:
        writer.write("a", np.array([1]))
    with pytest.raises(ValueError, match=r"no finished label store: it has no contract\.json"):
        LabelStore.open(tmp_path)


def test_a_contract_of_another_format_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path, {"a": np.array([1])})
    path = tmp_path / "contract.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"format_version": 2}, "format_version is 2, this release reads 1"),
        ({"surprise": 1}, "needs exactly the keys"),
        ({"histogram": [1]}, "histogram has 1 classes, num_classes is 100"),
        ({"num_labels": 7}, "num_labels is 7, histogram and shards add up to something else"),
        ({"num_cuts": 2}, r"the index has 1 cuts, contract\.json says 2"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=message):
            LabelStore.open(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"contract\.json is damaged"):
        LabelStore.open(tmp_path)


def test_a_cut_labelled_by_two_ranks_is_refused_by_name(tmp_path: Path) -> None:
    for shard in range(2):
        with LabelShardWriter(tmp_path, shard, 2, 10, 50.0, LINEAGE, sampling_rate=16_000) as writer:
            writer.write("shared", np.array([1]))
            writer.write(f"own {shard}", np.array([1]))
    with pytest.raises(ValueError, match="1 cuts were labelled more than once: shared"):
        merge_shards(tmp_path)
    assert not (tmp_path / "contract.json").exists()


def test_two_ids_with_one_hash_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_index, "id_digest", lambda cut_id: cut_id[:1].encode() * 32)
    with pytest.raises(ValueError, match="the cut ids 'apple' and 'axe' have the same 64-bit hash"):
        write_store(tmp_path, {"apple": np.array([1]), "bee": np.array([2]), "axe": np.array([3])})


def test_the_labelled_cuts_must_be_those_expected(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a", {"x": np.array([1]), "y": np.array([2])}, num_shards=2)
    assert merge_shards(store.folder, id_list_hash(["y", "x"])).contract == store.contract  # again: nothing changes
    with pytest.raises(ValueError, match=r"are not those expected: 2:\w+ .* 3:\w+ expected"):
        merge_shards(store.folder, id_list_hash(["x", "y", "z"]))


def test_list_hashes_ignore_the_order_and_nothing_else() -> None:
    cuts = [make_cut("a", 16_000), make_cut("b", 20_000), make_cut("c", 16_001)]
    reference = cut_list_hash(cuts)
    assert reference.startswith("3:") and len(reference) == 66
    assert cut_list_hash(CutSet.from_cuts(cuts[::-1])) == reference
    assert cut_list_hash(cuts[:2]) != reference
    assert cut_list_hash([*cuts[:2], make_cut("c", 16_002)]) != reference
    assert cut_list_hash([*cuts[:2], make_cut("d", 16_001)]) != reference
    assert cut_list_hash([*cuts, cuts[0]]) != reference
    assert id_list_hash("abc") == id_list_hash("cab") != id_list_hash("abd")
    digests = [int.from_bytes(hashlib.blake2b(cut_id.encode(), digest_size=32).digest(), "little") for cut_id in "abcdefgh"]
    assert sum(digests) > 2**256
    assert id_list_hash("abcdefgh") == f"8:{sum(digests) - sum(digests) // 2**256 * 2**256:064x}"


def test_a_store_travels_to_other_processes_as_its_path(tmp_path: Path) -> None:
    labels = random_labels(20)
    store = write_store(tmp_path, labels, num_shards=2)
    sent = pickle.dumps(store.attach)
    assert len(sent) < 1000
    assert pickle.loads(sent).__self__.contract == store.contract
    cut = make_cut("x", 320)
    labels_of_x = write_store(tmp_path / "x", {"x": np.array([5])}).attach(cut)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(labels_of_x.load_custom, ("labels",)).tolist() == [5]  # nothing there has imported the store yet
        assert pool.apply(store.labels, ("speaker-3/cut 3 ä",)).tolist() == labels["speaker-3/cut 3 ä"].tolist()


def _reads_the_same(store: LabelStore, labels: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(store.labels(cut_id), expected) for cut_id, expected in labels.items())


def test_forked_workers_read_the_same_files_at_once(tmp_path: Path) -> None:
    labels = random_labels(300)
    store = write_store(tmp_path, labels, num_shards=2)
    assert _reads_the_same(store, labels)  # opens the files before the fork
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_check_many_times, args=(store, labels)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0]


def _check_many_times(store: LabelStore, labels: dict[str, np.ndarray]) -> None:
    assert all(_reads_the_same(store, labels) for _ in range(20))


def test_a_cut_list_whose_segments_moved_has_another_hash() -> None:
    cut = dummy_cut(0, start=1.0, duration=2.0)
    moved, longer, other = fastcopy(cut, start=1.5), fastcopy(cut, duration=2.5), fastcopy(cut, channel=1)
    assert len({cut_list_hash([changed]) for changed in (cut, moved, longer, other)}) == 4
    assert cut_list_hash([cut, moved]) == cut_list_hash([moved, cut])
