"""Labels attached to cuts: cropping a cut crops its labels, to the label."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import CutSet, MonoCut, Recording
from lhotse.array import TemporalArray
from torch.utils.data import DataLoader, IterableDataset

from k2ssl.data.labels import LabelShardWriter, LabelStore, Lineage, merge_shards

NUM_CLASSES = 60_000  # so that labels can tell where they stand


def make_cut(cut_id: str, num_samples: int, start_sample: int = 0, sampling_rate: int = 16_000) -> MonoCut:
    total = start_sample + num_samples + 1000
    recording = Recording(f"rec-{cut_id}", [], sampling_rate, total, total / sampling_rate)
    return MonoCut(cut_id, start=start_sample / sampling_rate, duration=num_samples / sampling_rate, channel=0, recording=recording)


def make_store(folder: Path, frame_rate: float, counts: dict[str, int], first: int = 7) -> LabelStore:
    with LabelShardWriter(folder, 0, 1, NUM_CLASSES, frame_rate, Lineage.unknown(), sampling_rate=16_000) as writer:
        for cut_id, count in counts.items():
            writer.write(cut_id, np.arange(count) + first)
    return merge_shards(folder)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[float, LabelStore]:
    """One store of 50 Hz and one of 100 Hz; cut "before" comes first so that offsets are not zero, "cut" has labels 7, 8, 9, ..."""
    seconds = 40
    return {
        rate: make_store(tmp_path_factory.mktemp(f"at{rate:g}"), rate, {"before": 31, "cut": round(seconds * rate) - 1, "after": 5})
        for rate in (50.0, 100.0)
    }


@given(
    rate=st.sampled_from([50.0, 100.0]),
    sampling_rate=st.sampled_from([8_000, 16_000, 44_100]),
    start_sample=st.integers(0, 10_000_000),
    first=st.integers(0, 1998),
    length=st.integers(1, 1999),
)
@settings(max_examples=400, deadline=None)
def test_a_crop_on_the_label_grid_gets_exactly_its_labels(
    stores: dict[float, LabelStore], rate: float, sampling_rate: int, start_sample: int, first: int, length: int
) -> None:
    store = stores[rate]
    total = store.num_labels("cut")
    first = min(first, total - 1)
    length = min(length, total - first)
    hop = sampling_rate / rate
    cut = store.attach(make_cut("cut", 40 * sampling_rate, start_sample, sampling_rate))
    crop = cut.truncate(offset=first * hop / sampling_rate, duration=length * hop / sampling_rate)
    assert crop.load_labels().tolist() == list(range(7 + first, 7 + first + length))


@given(rate=st.sampled_from([50.0, 100.0]), parts=st.lists(st.integers(1, 300), min_size=1, max_size=6), start=st.integers(0, 1_000_000))
@settings(max_examples=200, deadline=None)
def test_crops_of_crops_in_a_row_give_all_labels_once(stores: dict[float, LabelStore], rate: float, parts: list[int], start: int) -> None:
    store = stores[rate]
    rest = store.attach(make_cut("cut", 640_000, start))
    whole, pieces = rest.load_labels().tolist(), []
    for part in parts:
        pieces += rest.truncate(duration=part / rate).load_labels().tolist()
        rest = rest.truncate(offset=part / rate)
    assert pieces + rest.load_labels().tolist() == whole


@given(first=st.integers(0, 639_000), length=st.integers(1, 300_000))
@settings(max_examples=200, deadline=None)
def test_a_crop_off_the_grid_is_rounded_to_the_nearest_label(stores: dict[float, LabelStore], first: int, length: int) -> None:
    cut = stores[50.0].attach(make_cut("cut", 640_000))
    length = min(length, 640_000 - first)
    found = cut.truncate(offset=first / 16_000, duration=length / 16_000).load_labels()
    begin, count = (first + 160) // 320, (length + 160) // 320  # half up
    assert found.tolist() == list(range(7 + begin, 7 + min(begin + count, 1999)))


def test_attached_labels_are_an_array_in_time(stores: dict[float, LabelStore]) -> None:
    cut = make_cut("cut", 640_000, 77)
    attached = stores[50.0].attach(cut, "iteration2")
    assert cut.custom is None
    assert isinstance(attached.iteration2, TemporalArray)
    assert attached.iteration2.shape == [1999] and attached.iteration2.frame_shift == 0.02
    labels = attached.load_iteration2()
    assert labels.dtype == np.int64 and labels.flags.writeable


def test_two_label_sets_hang_on_one_cut(stores: dict[float, LabelStore]) -> None:
    cut = stores[100.0].attach(stores[50.0].attach(make_cut("cut", 640_000)), "fine")
    crop = cut.truncate(offset=2.0, duration=0.1)
    assert crop.load_labels().tolist() == [107, 108, 109, 110, 111]
    assert crop.load_fine().tolist() == list(range(207, 217))


def test_attached_labels_survive_a_manifest_file(stores: dict[float, LabelStore], tmp_path: Path) -> None:
    cuts = CutSet.from_cuts([make_cut("cut", 640_000, 5)]).map(stores[50.0].attach)
    cuts.to_file(tmp_path / "cuts.jsonl.gz")
    (cut,) = CutSet.from_jsonl_lazy(tmp_path / "cuts.jsonl.gz")
    assert cut.truncate(offset=1.0, duration=0.06).load_labels().tolist() == [57, 58, 59]


def test_attaching_is_lazy_and_names_a_cut_without_labels(stores: dict[float, LabelStore], tmp_path: Path) -> None:
    CutSet.from_cuts([make_cut("cut", 640_000), make_cut("stranger", 16_000)]).to_file(tmp_path / "cuts.jsonl")
    cuts = iter(CutSet.from_jsonl_lazy(tmp_path / "cuts.jsonl").map(stores[50.0].attach))
    assert len(next(cuts).load_labels()) == 1999
    with pytest.raises(ValueError, match="none for cut 'stranger'"):
        next(cuts)


@pytest.mark.parametrize("num_samples", [320_000, 650_000])
def test_labels_that_do_not_span_the_cut_are_refused(stores: dict[float, LabelStore], num_samples: int) -> None:
    with pytest.raises(ValueError, match=rf"cut 'cut' has 1999 labels = 39\.980 s, the cut lasts {num_samples / 16_000:.3f} s"):
        stores[50.0].attach(make_cut("cut", num_samples))


def test_labels_go_on_before_padding(stores: dict[float, LabelStore]) -> None:
    padded = make_cut("cut", 640_000).pad(duration=50.0, preserve_id=True)
    with pytest.raises(ValueError, match="'cut' is a MixedCut; labels are attached before cuts are padded or mixed"):
        stores[50.0].attach(padded)


@pytest.mark.parametrize(("count_before", "first"), [(40, 7), (50, 8)])  # the labels lie elsewhere, or they are others
def test_labels_made_anew_are_not_mistaken_for_the_old_ones(tmp_path: Path, count_before: int, first: int) -> None:
    folder = tmp_path / "labels"
    old = make_store(folder, 50.0, {"a": 50, "b": 20}).attach(make_cut("b", 6400))
    assert old.load_labels().tolist() == list(range(7, 27))
    for path in folder.iterdir():
        path.unlink()
    new = make_store(folder, 50.0, {"a": count_before, "b": 20}, first).attach(make_cut("b", 6400))
    assert new.load_labels().tolist() == list(range(first, first + 20))
    with pytest.raises(ValueError, match="were made anew since they were attached to this cut"):
        old.load_labels()


class Crops(IterableDataset):
    """Crops of one cut, drawn from a lazily attached cut list."""

    def __init__(self, cuts: CutSet) -> None:
        self.cuts = cuts

    def __iter__(self) -> Iterator[list[int]]:
        for cut in self.cuts:
            yield [cut.truncate(offset=i * 0.02, duration=0.04).load_labels().tolist() for i in range(50)]


def test_loader_workers_attach_and_read_labels(stores: dict[float, LabelStore]) -> None:
    cuts = CutSet.from_cuts([make_cut("cut", 640_000)]).map(stores[50.0].attach)
    batches = list(DataLoader(Crops(cuts), batch_size=None, num_workers=1))
    assert [[int(label) for label in pair] for pair in batches[0]] == [[7 + i, 8 + i] for i in range(50)]
