"""An epoch goes on where a state or `start_at` says, with the very same batches, or not at all if they would be others."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lhotse import CutSet, Recording
from lhotse.cut import Cut
from lhotse.utils import fastcopy

from k2ssl.data.audio import AudioError
from k2ssl.data.audio_dataset import Request
from k2ssl.data.labels import LabelStore
from k2ssl.data.loader import audio_loader
from k2ssl.data.sampler import collection_paused

if TYPE_CHECKING:
    from tests.data.conftest import SmallCorpus


@pytest.mark.parametrize("workers_before", [0, 2])
@pytest.mark.parametrize("workers_after", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_interrupted_epoch_goes_on_with_the_very_same_batches(
    corpus: SmallCorpus, workers_before: int, workers_after: int, world_size: int
) -> None:
    for rank in range(world_size):
        share = {"rank": rank, "world_size": world_size, "seed": 5, "epoch": 3}
        straight = list(corpus.loader(**share))
        interrupted = corpus.loader(num_workers=workers_before, **share)
        batches = iter(interrupted)
        before = [next(batches) for _ in range(4)]
        state = interrupted.state_dict()
        del batches
        resumed = corpus.loader(num_workers=workers_after, **share)
        resumed.load_state_dict(state)
        assert len(straight) > 6 and corpus.equal(straight, before + list(resumed))


def test_a_new_process_goes_on_with_the_very_same_batches(corpus: SmallCorpus) -> None:
    """Another process has another hash seed and no generator state of ours."""
    program = """
import hashlib, json, sys
from k2ssl.data.labels import LabelStore
from k2ssl.data.loader import pretrain_loader
from lhotse import CutSet
folder, state = sys.argv[1], json.loads(sys.argv[2])
loader = pretrain_loader(CutSet.from_jsonl_lazy(folder + "/cut.jsonl"), [LabelStore.open(folder + "/labels")], max_duration=20.0,
                         num_buckets=3, max_seconds=5.0, seed=5, epoch=3)
loader.load_state_dict(state)
for batch in loader:
    print(hashlib.sha256(batch.audio.numpy().tobytes() + batch.labels[0].numpy().tobytes()).hexdigest())
"""
    loader = corpus.loader(seed=5, epoch=3)
    hashes, state = [], ""
    for i, batch in enumerate(loader):
        hashes.append(hashlib.sha256(batch.audio.numpy().tobytes() + batch.labels[0].numpy().tobytes()).hexdigest())
        if i == 2:
            state = json.dumps(loader.state_dict())
    command = [sys.executable, "-c", program, str(corpus.folder), state]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert len(hashes) > 6 and result.stdout.split() == hashes[3:]


def test_a_state_saved_after_the_last_batch_leaves_nothing_and_the_next_epoch_is_whole(corpus: SmallCorpus) -> None:
    loader = corpus.loader()
    first = list(loader)
    resumed = corpus.loader()
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == []
    for each in (loader, resumed):
        each.set_epoch(1)
    second = list(resumed)
    assert corpus.equal(list(loader), second) and not corpus.equal(first, second)
    assert corpus.equal(list(corpus.loader(epoch=1)), second)


def test_iterating_again_without_a_new_state_starts_the_epoch_again(corpus: SmallCorpus) -> None:
    loader = corpus.loader()
    batches = iter(loader)
    first = next(batches)
    assert loader.state_dict()["batches"] == 1
    assert corpus.equal([next(iter(loader))], [first])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("seed was 0 when it was saved and is 1 now", {"seed": 1}),
        ("world_size was 1 when it was saved and is 2 now", {"world_size": 2}),
        ("crop_seconds was 5.0 when it was saved and is 4.0 now", {"max_seconds": 4.0}),
        ("crop_step_samples was None when it was saved and is 8000 now", {"crop_step": 0.5}),
        ("sampling.max_duration was 20.0 when it was saved and is 30.0 now", {"max_duration": 30.0}),
        ("min_samples was 32000 when it was saved and is 48000 now", {"min_seconds": 3.0}),
        ("sample_rate was 16000 when it was saved and is 8000 now", {"sample_rate": 8000}),
        ("normalize was False when it was saved and is True now", {"normalize": True}),
    ],
)
def test_a_state_of_other_settings_is_refused(corpus: SmallCorpus, name: str, options: dict[str, object]) -> None:
    state = corpus.loader().state_dict()
    with pytest.raises(ValueError, match=f"loader state: {name}; both must be equal"):
        corpus.loader(**options).load_state_dict(state)


def test_a_state_from_before_crops_were_rounded_is_that_of_no_rounding(corpus: SmallCorpus) -> None:
    state = corpus.loader().state_dict()
    del state["crop_step_samples"]
    corpus.loader().load_state_dict(state)
    with pytest.raises(ValueError, match="crop_step_samples was None when it was saved"):
        corpus.loader(crop_step=1.0).load_state_dict(state)


def test_a_state_of_other_labels_is_refused(corpus: SmallCorpus, tmp_path: Path) -> None:
    state = corpus.loader().state_dict()
    ours, other = corpus.store(), corpus.label(tmp_path / "other", corpus.cuts(), first=1)
    again = corpus.label(tmp_path / "again", corpus.cuts())
    corpus.loader(stores=[again]).load_state_dict(state)  # the same labels in another folder
    for stores in ([other], [ours, other], [other, ours]):
        now = ", ".join(repr(store.identity) for store in stores)
        with pytest.raises(ValueError, match=rf"loader state: labels was \['{ours.identity}'\] when it was saved and is \[{now}\] now"):
            corpus.loader(stores=stores).load_state_dict(state)


def test_a_state_of_another_cut_set_is_refused(corpus: SmallCorpus, other_cuts: CutSet) -> None:
    loader = corpus.loader()
    list(loader)
    state = loader.state_dict()
    resumed = corpus.loader(cuts=other_cuts)
    resumed.load_state_dict({**state, "batches": 3})
    with pytest.raises(ValueError, match=r"are not those consumed before; it is another cut set; .*--accept-changes True"):
        list(resumed)
    resumed.load_state_dict({**state, "batches": 1000})
    with pytest.raises(ValueError, match="1000 batches were consumed, this cut set gives"):
        list(resumed)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_with_other_settings_goes_on_after_as_many_batches(corpus: SmallCorpus, workers: int, world_size: int) -> None:
    for rank in range(world_size):
        share = {"rank": rank, "world_size": world_size, "seed": 5, "max_duration": 12.0}
        straight = list(corpus.loader(epoch=3, **share))
        loader = corpus.loader(num_workers=workers, **share)
        loader.start_at(3, 2)
        assert loader.state_dict()["batches"] == 2 and loader.state_dict()["epoch"] == 3
        batches = iter(loader)
        rest = [next(batches) for _ in range(2)]
        resumed = corpus.loader(**share)
        resumed.load_state_dict(loader.state_dict())
        assert resumed.state_dict()["batches"] == 4
        del batches
        assert len(straight) > 5 and corpus.equal(straight[2:], rest + list(resumed))


def test_a_state_saved_before_the_first_batch_goes_on_there_too(corpus: SmallCorpus) -> None:
    loader, resumed = corpus.loader(), corpus.loader()
    loader.start_at(1, 3)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert corpus.equal(list(resumed), list(corpus.loader(epoch=1))[3:])


@pytest.mark.parametrize("beyond", [0, 1, 10**12])
def test_beyond_the_end_of_an_epoch_nothing_is_left_and_the_next_one_is_whole(corpus: SmallCorpus, beyond: int) -> None:
    loader = corpus.loader()
    loader.start_at(0, len(list(corpus.loader())) + beyond)
    assert list(loader) == []
    resumed = corpus.loader()
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == []
    resumed.set_epoch(1)
    assert corpus.equal(list(resumed), list(corpus.loader(epoch=1)))


def test_nothing_starts_before_the_beginning(corpus: SmallCorpus) -> None:
    for epoch, batches in ((-1, 0), (0, -1)):
        with pytest.raises(ValueError, match=f"start_at: epoch is {epoch} and batches {batches}, allowed is >= 0"):
            corpus.loader().start_at(epoch, batches)


def test_more_workers_than_any_machine_bears_are_refused_before_anything_starts(corpus: SmallCorpus) -> None:
    most = max(1024, 4 * (os.cpu_count() or 1))
    assert corpus.loader(num_workers=most).num_workers == most
    for num in (most + 1, 999_999, -1):
        with pytest.raises(ValueError, match=f"num_workers is {num}, allowed are 0 to {most} processes"):
            corpus.loader(num_workers=num)


def test_one_request_is_read_as_iterating_would_and_leaves_iteration_alone(corpus: SmallCorpus) -> None:
    loader, straight = corpus.loader(epoch=2), list(corpus.loader(epoch=2))
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    read = [loader.read(request) for request in loader.requests()]
    assert corpus.equal(read, straight) and loader.state_dict() == state
    assert corpus.equal([straight[0], *batches], straight)


def test_a_request_of_which_nothing_can_be_read_is_refused(corpus: SmallCorpus) -> None:
    cuts = list(corpus.cuts())[:2]
    gone = cuts[0].with_id("gone")
    gone.recording = Recording.from_dict({**gone.recording.to_dict(), "sources": [{"type": "file", "channels": [0], "source": "/no.wav"}]})
    told: list[str] = []
    for mixed, num_read in (([gone, cuts[1]], 1), ([gone], 0)):
        watched = audio_loader(mixed, max_duration=99.0, on_error=lambda cut_id, _: told.append(cut_id))
        request = Request(0, tuple(mixed))
        if num_read:
            assert watched.read(request).ids == (cuts[1].id,)
        else:
            with pytest.raises(ValueError, match=r"none of the 1 cuts asked for could be read: cut gone: .*no\.wav"):
                watched.read(request)
        with pytest.raises(AudioError, match="cut gone"):
            audio_loader(mixed, max_duration=99.0).read(request)
    assert told == ["gone", "gone"]


def _with_gone(cuts: list[Cut], gone: set[str]) -> list[Cut]:
    """The cuts, the audio of some of which is not there."""
    nowhere = [{"type": "file", "channels": [0], "source": "/no.wav"}]
    return [
        fastcopy(cut, recording=Recording.from_dict({**cut.recording.to_dict(), "sources": nowhere})) if cut.id in gone else cut
        for cut in cuts
    ]


@pytest.mark.parametrize("which", [[0], [3], [2, 3], [0, 1, 5], [-1]])
def test_a_neighbour_stands_in_for_a_batch_of_which_nothing_can_be_read(
    corpus: SmallCorpus, which: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []
    straight = list(corpus.loader(epoch=1))
    which = [number % len(straight) for number in which]
    gone = {name for number in which for name in straight[number].ids}
    loader = corpus.loader(cuts=CutSet(_with_gone(list(corpus.cuts()), gone)), epoch=1, on_error=lambda name, _: told.append(name))
    batches = list(loader)
    last = len(straight) - 1
    stands_in = {number: next((later for later in range(number, last + 1) if later not in which), last - 1) for number in range(last + 1)}
    expected = [straight[stands_in[number]] for number in range(last + 1)]
    assert corpus.equal(batches, expected) and set(told) == gone
    assert caplog.text.count("none of its cuts could be read: cut ") == len(which) and "stands in for it" in caplog.text
    assert loader.state_dict()["batches"] == len(straight)
    for done in range(1, last):
        batches, again = iter(loader), corpus.loader(cuts=loader.corpora.sets[0], epoch=1, on_error=lambda *_: None)
        for _ in range(done):
            next(batches)
        again.load_state_dict(loader.state_dict())
        assert corpus.equal(list(again), expected[done:]), done


def test_an_epoch_of_which_no_three_batches_in_a_row_can_be_read_ends(corpus: SmallCorpus) -> None:
    straight = list(corpus.loader(epoch=1))
    gone = {name for batch in straight[3:6] for name in batch.ids}
    loader = corpus.loader(cuts=CutSet(_with_gone(list(corpus.cuts()), gone)), epoch=1, on_error=lambda *_: None)
    with pytest.raises(ValueError, match=r"batch 5 of epoch 1: none of its cuts .*; nor could those of the 2 batches before it"):
        list(loader)
    few = [cut for cut in corpus.cuts() if cut.id in straight[0].ids]
    loader = corpus.loader(cuts=CutSet(_with_gone(few, {cut.id for cut in few})), on_error=lambda *_: None)
    with pytest.raises(ValueError, match=r"epoch 0: nothing could be read of any of its \d batches"):
        list(loader)


def test_collecting_garbage_is_paused_and_taken_up_again(corpus: SmallCorpus) -> None:
    with pytest.raises(KeyError), collection_paused():
        assert not gc.isenabled()
        with collection_paused():
            pass
        assert not gc.isenabled(), "it was off before the inner one"
        raise KeyError
    assert gc.isenabled()
    loader = corpus.loader()
    loader.start_at(0, 2)
    next(iter(loader))
    assert gc.isenabled()


def test_cuts_without_labels_are_left_out_and_counted_by_the_index_alone(
    corpus: SmallCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable = [cut for cut in corpus.cuts() if cut.duration >= 2.0]
    short = 83 - len(usable)
    stores = [corpus.label(tmp_path / "a", usable[:-5]), corpus.label(tmp_path / "b", usable[2:])]
    loader = corpus.loader(stores=stores)
    with monkeypatch.context() as patch:
        patch.setattr(LabelStore, "labels", None)
        asked = {cut.id for request in loader.requests() for cut in request.cuts}
    seen = {cut_id for batch in loader for cut_id in batch.ids}
    assert seen == asked == {cut.id for cut in usable[2:-5]}
    assert loader.excluded == {"shorter than 2 s": short, "without labels": 7}
    resumed, straight = corpus.loader(stores=stores), list(loader)
    resumed.start_at(0, 1)
    assert corpus.equal(list(resumed), straight[1:])


def test_labels_of_another_corpus_leave_no_cut_and_that_is_said(corpus: SmallCorpus, tmp_path: Path) -> None:
    store = corpus.label(tmp_path / "other", [cut.with_id(f"other-{cut.id}") for cut in corpus.cuts()])
    with pytest.raises(ValueError, match=r"epoch 0 has no batch for every rank; cuts left out: \d+ without labels"):
        next(iter(corpus.loader(stores=[store])))


def test_a_state_of_batches_that_were_drawn_otherwise_is_refused_with_the_way_to_go_on(corpus: SmallCorpus) -> None:
    state = corpus.loader().state_dict()
    del state["order"]  # as it was before there was one
    with pytest.raises(ValueError, match=r"order was None when it was saved and is 2 now; .*--accept-changes True\) goes on"):
        corpus.loader().load_state_dict(state)
