"""Several label stores as one label set."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from k2ssl.data.label_union import LabelUnion
from k2ssl.data.labels import LabelShardWriter, LabelStore, Lineage, merge_shards

KNOWN = Lineage("mfcc", {"num_ceps": 13}, "centres", None, "2:cuts")


def store(folder: Path, num_classes: int = 9, frame_rate: float = 50.0, lineage: Lineage = KNOWN, **labels: list[int]) -> LabelStore:
    with LabelShardWriter(folder, 0, 1, num_classes, frame_rate, lineage, sampling_rate=16000) as writer:
        for cut_id, values in labels.items():
            writer.write(cut_id, np.array(values))
    return merge_shards(folder)


@pytest.fixture
def pair(tmp_path: Path) -> list[LabelStore]:
    return [store(tmp_path / "one", a=[1, 2], both=[3]), store(tmp_path / "two", b=[4, 5, 6], both=[7])]


def test_labels_are_those_of_the_first_store_that_has_the_cut(pair: list[LabelStore]) -> None:
    union = LabelUnion(pair)
    assert {cut_id: union.labels(cut_id).tolist() for cut_id in ("a", "b", "both")} == {"a": [1, 2], "b": [4, 5, 6], "both": [3]}
    assert "a" in union and "b" in union and "none" not in union
    assert union.contract == pair[0].contract
    with pytest.raises(ValueError, match="none"):
        union.labels("none")


def test_it_travels_to_worker_processes(pair: list[LabelStore]) -> None:
    assert pickle.loads(pickle.dumps(LabelUnion(pair))).labels("b").tolist() == [4, 5, 6]


def test_its_identity_is_that_of_all_its_stores_in_their_order(pair: list[LabelStore], tmp_path: Path) -> None:
    same = LabelUnion([LabelStore.open(one.folder) for one in pair])
    assert same.identity == LabelUnion(pair).identity
    other = store(tmp_path / "other", b=[4, 5, 5], both=[7])
    assert len({LabelUnion(stores).identity for stores in (pair, pair[::-1], pair[:1], [pair[0], other])}) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_classes": 10}, "num_classes is 9 and 10"),
        ({"frame_rate": 100.0}, "frame_rate is 50.0 and 100.0"),
        ({"lineage": replace(KNOWN, kmeans_sha256="others")}, "lineage.kmeans_sha256 is centres and others"),
    ],
)
def test_stores_of_other_classes_are_refused(pair: list[LabelStore], tmp_path: Path, change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=f"one and .*other cannot be trained on together: {said}"):
        LabelUnion([*pair, store(tmp_path / "other", c=[1], **change)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stores is empty"):
        LabelUnion([])


def test_one_id_for_cuts_of_different_length_is_refused(pair: list[LabelStore], tmp_path: Path) -> None:
    cuts = [SimpleNamespace(id=name) for name in ("a", "both", "b", "none")]
    same = store(tmp_path / "same", d=[1], both=[3])
    assert list(LabelUnion([pair[0], same]).without_conflicts(cuts)) == cuts
    longer = store(tmp_path / "longer", c=[1], both=[7, 7])
    with pytest.raises(ValueError, match=r"one and .*longer cannot be trained on together: cut 'both' has 1 labels there and 2 here"):
        next(LabelUnion([pair[0], longer]).without_conflicts(cuts[1:]))


def test_one_id_for_different_cuts_of_the_same_length_is_refused_and_a_few_other_labels_of_one_cut_are_not(tmp_path: Path) -> None:
    first = store(tmp_path / "first", cut=[1, 2, 3, 4, 5])
    rounded, other = store(tmp_path / "rounded", cut=[1, 2, 3, 4, 6]), store(tmp_path / "other", cut=[1, 2, 4, 5, 6])
    cut = SimpleNamespace(id="cut")
    assert list(LabelUnion([first, rounded]).without_conflicts([cut])) == [cut]
    with pytest.raises(ValueError, match=r"first and .*other .*: cut 'cut' has mostly other labels there than here; .* rename"):
        next(LabelUnion([first, other]).without_conflicts([cut]))
