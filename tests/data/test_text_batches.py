"""Batches of text: each sentence once an epoch, within the size, in an order that depends on seed and epoch alone, resumed anywhere."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from k2ssl.data.text_batches import TextBatch, TextLoader, TokenizedText

DRAW = np.random.default_rng(0)
SENTENCES = [DRAW.integers(1, 50, size=DRAW.integers(1, 30)).tolist() for _ in range(200)]
TEXT = TokenizedText(SENTENCES, 50)


def sentences_of(batch: TextBatch) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(batch.tokens, batch.token_lens, strict=True)]


def seen(loader: TextLoader) -> list[tuple[str, ...]]:
    return [batch.ids for batch in loader]


def test_a_batch_has_the_sentences_it_names_and_zeros_behind_them() -> None:
    for batch in TextLoader(TEXT, 200, 1):
        assert sentences_of(batch) == [SENTENCES[int(name.removeprefix("sentence ")) - 1] for name in batch.ids]
        assert batch.tokens.dtype == batch.token_lens.dtype == torch.int64 and batch.num_samples == 0
        assert batch.tokens.shape == (len(batch.ids), int(batch.token_lens.max()))
        assert all(not row[length:].any() for row, length in zip(batch.tokens, batch.token_lens, strict=True))


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("size", [31, 64, 1000, 10**6])
def test_an_epoch_has_every_sentence_once_in_batches_that_are_full_but_not_too_large(seed: int | None, size: int) -> None:
    loader = TextLoader(TEXT, size, seed)
    batches = list(loader)
    assert len(batches) == loader.num_batches() and loader.left_out == 0
    assert sorted(name for batch in batches for name in batch.ids) == sorted(f"sentence {i + 1}" for i in range(200))
    assert all(len(batch.ids) * (batch.tokens.shape[1] + 1) <= size for batch in batches)
    in_order = list(TextLoader(TEXT, size, None))
    assert len(in_order) == len(batches)
    for batch, longer in pairwise(in_order):
        assert (len(batch.ids) + 1) * (int(longer.token_lens[0]) + 1) > size, "one more sentence would have fitted"


def test_the_order_is_another_one_in_each_epoch_and_for_each_seed_and_can_be_repeated() -> None:
    def epochs(seed: int) -> list[list[tuple[str, ...]]]:
        loader, found = TextLoader(TEXT, 100, seed), []
        for epoch in range(2):
            loader.set_epoch(epoch)
            found.append(seen(loader))
        return found

    (first, second), (other, _) = epochs(1), epochs(2)
    assert epochs(1) == [first, second] and first != second and first != other
    lengths = [len(SENTENCES[int(names[0].removeprefix("sentence ")) - 1]) for names in first]
    assert lengths != sorted(lengths), "batches of short sentences do not come first"


def test_without_a_seed_every_pass_is_the_same_from_the_shortest_on() -> None:
    loader = TextLoader(TEXT, 100, None)
    lengths = [length for batch in loader for length in batch.token_lens.tolist()]
    assert lengths == sorted(lengths) and seen(loader) == seen(loader)


@pytest.mark.parametrize("done", [0, 1, 7])
def test_a_loader_goes_on_after_the_batches_that_were_handed_out(done: int) -> None:
    first = TextLoader(TEXT, 100, 1)
    first.set_epoch(3)
    whole, before = seen(first), iter(first)
    taken = [next(before).ids for _ in range(done)]
    second = TextLoader(TEXT, 100, 1)
    state = first.state_dict() if done else {"epoch": 3, "batches": 0}
    assert state == {"epoch": 3, "batches": done}
    second.load_state_dict(state)
    second.set_epoch(3)  # as the trainer does
    assert taken + seen(second) == whole and second.state_dict() == {"epoch": 3, "batches": len(whole)}
    assert seen(second) == whole, "the next pass is a whole one"


def test_sentences_longer_than_a_batch_are_left_out_and_counted() -> None:
    loader = TextLoader(TEXT, 20, 1)
    long = sum(len(sentence) + 1 > 20 for sentence in SENTENCES)
    assert loader.left_out == long > 0 and sum(map(len, seen(loader))) == 200 - long
    with pytest.raises(ValueError, match="no sentence of at most 1 tokens, at least one is needed"):
        TextLoader(TokenizedText([[1, 2, 3]], 50), 2, 1)
    with pytest.raises(ValueError, match="no sentence"):
        TextLoader(TokenizedText([], 50), 20, 1)


def test_the_hash_tells_texts_apart_and_not_how_they_are_held() -> None:
    one = TokenizedText([[1, 2], [3]], 50)
    assert one.sha256 == TokenizedText(iter([[1, 2], [3]]), 70_000).sha256
    others = ([[1], [2, 3]], [[1, 2], [4]], [[3], [1, 2]], [[1, 2], [3], []])
    assert len({TokenizedText(other, 50).sha256 for other in others} | {one.sha256}) == 5
    assert one.tokens.itemsize == 2 and TokenizedText([[69_999]], 70_000).batch(np.array([0])).tokens.item() == 69_999
