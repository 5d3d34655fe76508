"""The worst batches of an epoch are those that reading all of them would find."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from k2ssl.data.batch_loader import BatchLoader
from k2ssl.data.loader import audio_loader
from k2ssl.data.worst_batches import row_seconds, worst_requests

if TYPE_CHECKING:
    from tests.data.conftest import SmallCorpus

RATE = 16000
# what is asked for: how large a batch of (rows, samples) is
SIZES: dict[str, Callable[[tuple[int, int]], int]] = {
    "longest audio": lambda shape: shape[0] * shape[1],
    "most utterances": lambda shape: shape[0],
    "longest utterance": lambda shape: shape[1],
}
LOADERS: dict[str, Callable[..., BatchLoader[Any]]] = {
    "crops": lambda corpus, **options: corpus.loader(epoch=1, **options),
    "no crop": lambda corpus, **options: corpus.loader(max_seconds=15.0, quadratic_duration=5.0, **options),
    "few lengths": lambda corpus, **options: corpus.loader(crop_step=0.3, **options),
    "padded": lambda corpus, **options: audio_loader(corpus.cuts(), max_duration=20.0, shuffle=True, **options),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_they_are_as_large_as_the_largest_batches_that_are_read(corpus: SmallCorpus, kind: str, world_size: int) -> None:
    for rank in range(world_size):
        loader = LOADERS[kind](corpus, rank=rank, world_size=world_size)
        shapes = [tuple(batch.audio.shape) for batch in loader]
        worst = worst_requests(loader)
        assert list(worst) == list(SIZES) and len(set(shapes)) > (2 if kind == "few lengths" else 3)
        for name, size in SIZES.items():
            largest, ours = max(map(size, shapes)), size(tuple(loader.read(worst[name]).audio.shape))
            # labels end up to 3 frames before the audio does, which the manifest does not tell; rounding may make a step of it
            lost = round(0.3 * RATE) if kind == "few lengths" else 3 * 320
            assert ours >= largest - lost * (1 if name == "longest utterance" else 20)


@pytest.mark.parametrize("kind", LOADERS)
def test_the_manifest_tells_how_long_the_rows_of_a_batch_will_be(corpus: SmallCorpus, kind: str) -> None:
    loader = LOADERS[kind](corpus)
    # where labels end before the audio does, which the manifest does not tell; rounding may make a step of it
    most = {"padded": 0, "few lengths": round(0.3 * RATE)}.get(kind, 3 * 320)
    for request in loader.requests():
        lost = round(row_seconds(loader, request) * RATE) - loader.read(request).audio.shape[1]
        assert 0 <= lost <= most and (kind != "few lengths" or lost in (0, most))


def test_of_equally_long_utterances_the_fuller_batch_is_taken(corpus: SmallCorpus) -> None:
    loader = corpus.loader(max_seconds=2.0, max_duration=21.0, num_buckets=1)  # 10 of 2 s each, but for the last batch
    assert {len(request.cuts) for request in worst_requests(loader).values()} == {10}
    assert len({len(request.cuts) for request in loader.requests()}) == 2


def test_no_audio_is_read_and_iteration_is_left_alone(corpus: SmallCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, straight = corpus.loader(), list(corpus.loader())
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr("k2ssl.data.pretrain_dataset.read_samples", None)
        worst = worst_requests(loader)
    assert loader.state_dict() == state and corpus.equal([straight[0], *batches], straight)
    assert worst_requests(loader) == worst


def test_only_the_first_batches_are_looked_at(corpus: SmallCorpus) -> None:
    loader = corpus.loader(max_seconds=12.0, seed=1)
    requests = list(loader.requests())
    for looked_at in (1, 2, len(requests)):
        most = max(len(request.cuts) for request in requests[:looked_at])
        worst = worst_requests(loader, looked_at)
        assert len(worst["most utterances"].cuts) == most and all(request in requests[:looked_at] for request in worst.values())
    assert len(worst_requests(loader, 1)["most utterances"].cuts) < most, "the test can tell"


@pytest.mark.parametrize(
    ("message", "options", "most_batches"),
    [
        ("most_batches is 0, allowed is >= 1", {}, 0),
        ("epoch 0 has no batch for every rank; cuts left out: 83 shorter than 100 s$", {"min_seconds": 100.0}, 5),
        (
            "every rank; cuts left out: 21 shorter than 2 s, 62 in the last batches, fewer than the 2 ranks$",
            {"max_duration": 1e6, "num_buckets": 1},
            5,
        ),
    ],
)
def test_nothing_to_look_at_is_refused(corpus: SmallCorpus, message: str, options: dict[str, Any], most_batches: int) -> None:
    with pytest.raises(ValueError, match=message):
        worst_requests(corpus.loader(rank=1, world_size=2, **options), most_batches)


def test_a_rank_that_may_have_no_batch_is_named_where_the_others_need_none(corpus: SmallCorpus) -> None:
    options: dict[str, Any] = {"max_duration": 1e6, "num_buckets": 1, "drop_incomplete": False, "world_size": 2}
    assert worst_requests(corpus.loader(rank=0, **options))
    loader = corpus.loader(rank=1, **options)
    with pytest.raises(ValueError, match="epoch 0 has no batch for rank 1 of 2"):
        worst_requests(loader)


def test_a_loader_that_is_refused_is_left_as_it_was(corpus: SmallCorpus) -> None:
    loader = corpus.loader(min_seconds=100.0)
    loader.start_at(0, 3)
    state = loader.state_dict()
    with pytest.raises(ValueError, match="cuts left out: 83 shorter than 100 s"):
        worst_requests(loader)
    assert loader.state_dict() == state and not loader.excluded
