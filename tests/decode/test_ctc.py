"""Greedy CTC search against a plain one, frame by frame."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from k2ssl.decode.ctc import greedy_search


def plain_search(log_probs: Tensor, blank: int) -> tuple[tuple[int, ...], float, tuple[int, ...]]:
    """Tokens, score and frames of one utterance, (T, V)."""
    tokens, frames, score, before = [], [], 0.0, blank
    for t, row in enumerate(log_probs.tolist()):
        token = max(range(len(row)), key=row.__getitem__)
        score += row[token]
        if token not in (blank, before):
            tokens.append(token)
            frames.append(t)
        before = token
    return tuple(tokens), score, tuple(frames)


@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize("seed", range(10))
def test_a_batch_decodes_as_utterance_after_utterance_does(seed: int, blank: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    log_probs = (2 * torch.randn(6, 30, 3, generator=draw)).log_softmax(2)  # few symbols: many repeats and blanks
    lens = torch.tensor([30, 0, 1, 17, 29, 30])
    found = greedy_search(log_probs, lens, blank)
    for n, hypothesis in enumerate(found):
        tokens, score, frames = plain_search(log_probs[n, : lens[n]], blank)
        assert (hypothesis.tokens, hypothesis.frames) == (tokens, frames)
        assert hypothesis.score == pytest.approx(score, abs=1e-5)
    assert len(found[0].tokens) > 3


def test_repeats_become_one_token_unless_a_blank_is_between_them() -> None:
    path = [1, 1, 0, 1, 2, 2, 2, 0, 0, 2, 1]
    log_probs = torch.full((1, len(path), 3), math.log(0.1))
    log_probs[0, torch.arange(len(path)), torch.tensor(path)] = math.log(0.8)
    (hypothesis,) = greedy_search(log_probs, torch.tensor([len(path)]))
    assert hypothesis.tokens == (1, 1, 2, 2, 1) and hypothesis.frames == (0, 3, 4, 9, 10)
    assert hypothesis.score == pytest.approx(len(path) * math.log(0.8), abs=1e-5)


def test_an_utterance_decodes_the_same_alone_and_in_a_longer_batch() -> None:
    log_probs = torch.randn(3, 500, 7).log_softmax(2)
    lens = torch.tensor([123, 500, 77])
    together = greedy_search(log_probs, lens)
    for n in (0, 2):
        assert greedy_search(log_probs[n : n + 1, : lens[n]], lens[n : n + 1])[0] == together[n]


def test_without_frames_there_are_no_tokens() -> None:
    (hypothesis,) = greedy_search(torch.zeros(1, 0, 3), torch.tensor([0]))
    assert (hypothesis.tokens, hypothesis.score, hypothesis.frames) == ((), 0.0, ())


@pytest.mark.parametrize(
    ("log_probs", "lens", "blank", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([3, 3]), 0, r"log_probs has shape \(2, 3\)"),
        (torch.zeros(2, 3, 4), torch.tensor([3, 4]), 0, r"lens of utterance 1 is 4, allowed are 0..3"),
        (torch.zeros(2, 3, 4), torch.tensor([-1, 3]), 0, "lens of utterance 0 is -1"),
        (torch.zeros(2, 3, 4), torch.tensor([3]), 0, r"lens must be int64 of shape \(2,\)"),
        (torch.zeros(2, 3, 4), torch.tensor([3.0, 3.0]), 0, "lens must be int64"),
        (torch.zeros(2, 3, 4), torch.tensor([3, 3]), 4, r"blank is 4, allowed are 0..3"),
        (torch.zeros(2, 3, 4), torch.tensor([3, 3]), -1, "blank is -1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(log_probs: Tensor, lens: Tensor, blank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        greedy_search(log_probs, lens, blank)
