"""The biasing automaton against a plain function that looks at every stretch of a sequence."""

from __future__ import annotations

import itertools

import pytest
import torch

from k2ssl.decode.biasing import ContextGraph

PHRASES = [(1, 2), (1, 2, 3, 4), (2, 3), (3,), (2, 3, 5), (5, 5, 1), (1, 2), (4, 1, 2, 3)]


def earned(phrases: list[tuple[int, ...]], tokens: tuple[int, ...]) -> int:
    """Tokens of every place where a phrase stands."""
    stretches = itertools.combinations(range(len(tokens) + 1), 2)
    return sum(end - begin for begin, end in stretches if tokens[begin:end] in set(phrases))


def lent(phrases: list[tuple[int, ...]], tokens: tuple[int, ...]) -> int:
    """Tokens of the longest end that begins a phrase, from the last phrase complete within it."""
    beginnings = {phrase[:end] for phrase in phrases for end in range(len(phrase) + 1)}
    inside = next(tokens[begin:] for begin in range(len(tokens) + 1) if tokens[begin:] in beginnings)
    return len(inside) - max(end for end in range(len(inside) + 1) if end == 0 or inside[:end] in set(phrases))


def expected(phrases: list[tuple[int, ...]], tokens: tuple[int, ...]) -> int:
    return earned(phrases, tokens) + lent(phrases, tokens)


@pytest.mark.parametrize("vocab_size", [3, 6, 9])
def test_every_token_adds_what_rescanning_says(vocab_size: int) -> None:
    phrases = [phrase for phrase in PHRASES if max(phrase) < vocab_size]
    graph = ContextGraph(phrases, score=0.5)
    sequences = torch.randint(0, vocab_size, (60, 12), generator=torch.Generator().manual_seed(1))
    for row, phrase in enumerate(phrases):  # so that every state is reached
        sequences[row, 4 : 4 + len(phrase)] = torch.tensor(phrase)
    state = graph.start(60)
    seen = set()
    for step in range(12):
        scores = graph.scores(state, vocab_size)
        assert scores.shape == (60, vocab_size) and scores.dtype == torch.float32
        for row, sequence in enumerate(sequences.tolist()):
            before = tuple(sequence[:step])
            for token in range(vocab_size):
                assert scores[row, token] == 0.5 * (expected(phrases, (*before, token)) - expected(phrases, before))
        state = graph.advance(state, sequences[:, step])
        seen |= set(state.tolist())
    for row, sequence in enumerate(sequences.tolist()):
        assert graph.final(state)[row] == -0.5 * lent(phrases, tuple(sequence))
    assert seen == set(range(graph.num_states))


def test_random_lists_add_up_to_the_phrases_of_the_whole_sequence() -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(30):
        lengths = torch.randint(1, 5, (8,), generator=generator).tolist()
        phrases = [tuple(torch.randint(0, 3, (length,), generator=generator).tolist()) for length in lengths]
        graph = ContextGraph(phrases, score=2.0)
        sequence = torch.randint(0, 4, (40,), generator=generator).tolist()
        state, total = graph.start(1), 0.0
        for token in sequence:
            total += float(graph.scores(state, 4)[0, token])
            state = graph.advance(state, torch.tensor([token]))
        assert total + float(graph.final(state)) == 2.0 * earned(phrases, tuple(sequence))


def test_a_phrase_that_breaks_off_gives_its_score_back() -> None:
    graph = ContextGraph([(7, 8, 9)], score=1.5)
    gains, state = [], graph.start(1)
    for token in (7, 8, 4, 7, 8, 9, 7):
        gains.append(float(graph.scores(state, 10)[0, token]))
        state = graph.advance(state, torch.tensor([token]))
    assert gains == [1.5, 1.5, -3.0, 1.5, 1.5, 1.5, 1.5]
    assert float(graph.final(state)) == -1.5


def test_rows_are_independent_and_the_vocabulary_may_be_larger_than_the_phrases_tokens() -> None:
    graph = ContextGraph(PHRASES, score=1.0)
    states = torch.arange(graph.num_states)
    together = graph.scores(states, 20)
    for state in states.tolist():
        assert torch.equal(graph.scores(torch.tensor([state]), 20)[0], together[state])
    assert torch.equal(together[:, 6:], together[:, :1].expand(-1, 14))  # 0 and 6.. are tokens of no phrase
    assert torch.equal(graph.advance(states, torch.full_like(states, 19)), torch.zeros_like(states))


def test_moving_keeps_a_graph_on_its_own_device_and_copies_to_another() -> None:
    graph = ContextGraph(PHRASES, score=1.0)
    assert graph.to(torch.device("cpu")) is graph
    moved = graph.to(torch.device("meta"))
    assert moved.start(3).device.type == "meta" and graph.start(3).device.type == "cpu"
    assert {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert moved.tokens == graph.tokens == {1, 2, 3, 4, 5} and moved.num_states == graph.num_states


def test_bad_lists_and_scores_are_refused() -> None:
    for phrases, score, message in (
        ([(1,)], 0.0, "score is 0.0"),
        ([(1,)], float("nan"), "score is nan"),
        ([], 1.0, "phrases is empty"),
        ([(1,), ()], 1.0, r"phrase 1 is \[\]"),
        ([(1, -2)], 1.0, r"phrase 0 is \[1, -2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ContextGraph(phrases, score)
