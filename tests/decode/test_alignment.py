"""Forced alignment against all paths of tiny cases, and against torchaudio's."""

from __future__ import annotations

import math
from itertools import groupby, product

import pytest
import torch
import torchaudio
from torch import Tensor

from k2ssl.decode.alignment import Alignment, align


def draw_log_probs(seed: int, *shape: int) -> Tensor:
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def best_of_all(log_probs: Tensor, tokens: tuple[int, ...], blank: int) -> tuple[float, tuple[int, ...]] | None:
    """Score and path of the most probable of all paths that spell `tokens`; (T, V)."""
    found = []
    for path in product(range(log_probs.shape[1]), repeat=log_probs.shape[0]):
        if tuple(symbol for symbol, _ in groupby(path) if symbol != blank) == tokens:
            found.append((math.fsum(log_probs[t, symbol].item() for t, symbol in enumerate(path)), path))
    return max(found, default=None)


def path_of(alignment: Alignment, num_frames: int, blank: int) -> tuple[int, ...]:
    path = [blank] * num_frames
    for token, begin, end in zip(alignment.tokens, alignment.begins, alignment.ends, strict=True):
        path[begin:end] = [token] * (end - begin)
    return tuple(path)


@pytest.mark.parametrize("blank", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_the_alignment_is_the_best_of_all_paths(seed: int, blank: int) -> None:
    log_probs = draw_log_probs(seed, 8, 6, 3).double()
    other, another = (i for i in range(3) if i != blank)
    transcripts = [
        (),
        (other,),
        (other, other),
        (other, another),
        (another, another, other),
        (other,) * 4,
        (other, another, other),
        (another,),
    ]
    tokens = torch.full((8, 5), 77)  # padding may hold anything
    for row, transcript in enumerate(transcripts):
        tokens[row, : len(transcript)] = torch.tensor(transcript, dtype=torch.int64)
    lens = torch.tensor([6, 6, 5, 6, 6, 6, 4, 1])
    found = align(log_probs, lens, tokens, torch.tensor([len(transcript) for transcript in transcripts]), blank)
    assert found[5] is None  # four equal tokens take seven frames
    for row, transcript in enumerate(transcripts):
        expected, alignment = best_of_all(log_probs[row, : lens[row]], transcript, blank), found[row]
        if expected is None:
            assert alignment is None
            continue
        assert alignment is not None and alignment.tokens == transcript
        assert alignment.score == pytest.approx(expected[0], abs=1e-12)
        assert path_of(alignment, int(lens[row]), blank) == expected[1]


@pytest.mark.parametrize("seed", range(5))
def test_the_alignment_is_that_of_torchaudio(seed: int) -> None:
    log_probs = draw_log_probs(seed, 4, 60, 6)
    lens, token_lens = torch.tensor([60, 31, 58, 12]), torch.tensor([20, 9, 24, 3])
    tokens = torch.randint(1, 6, (4, 24), generator=torch.Generator().manual_seed(seed))
    for row, alignment in enumerate(align(log_probs, lens, tokens, token_lens)):
        own, transcript = log_probs[row : row + 1, : lens[row]], tokens[row : row + 1, : token_lens[row]]
        path, scores = torchaudio.functional.forced_align(own, transcript, blank=0)
        spans = torchaudio.functional.merge_tokens(path[0], scores[0].exp())
        assert alignment is not None
        assert list(alignment.tokens) == [span.token for span in spans]
        assert list(alignment.begins) == [span.start for span in spans]
        assert list(alignment.ends) == [span.end for span in spans]
        assert alignment.confidences == pytest.approx([span.score for span in spans], abs=1e-6)
        assert alignment.score == pytest.approx(float(scores.sum()), abs=1e-3)


def test_an_utterance_is_aligned_the_same_alone_and_in_a_longer_batch() -> None:
    log_probs, tokens = draw_log_probs(1, 3, 300, 5), torch.randint(1, 5, (3, 60), generator=torch.Generator().manual_seed(2))
    lens, token_lens = torch.tensor([120, 300, 0]), torch.tensor([20, 60, 0])
    together = align(log_probs, lens, tokens, token_lens)
    assert together[2] == Alignment((), (), (), (), 0.0)
    for n, (frames, length) in enumerate(zip(lens.tolist(), token_lens.tolist(), strict=True)):
        assert align(log_probs[n : n + 1, :frames], lens[n : n + 1], tokens[n : n + 1, :length], token_lens[n : n + 1]) == [together[n]]


def test_an_utterance_without_a_possible_path_is_none() -> None:
    log_probs = draw_log_probs(0, 3, 4, 3)
    log_probs[1, :, 2] = -math.inf
    tokens = torch.tensor([[1, 1, 1], [1, 2, 1], [1, 2, 1]])
    found = align(log_probs, torch.tensor([4, 4, 2]), tokens, torch.tensor([3, 3, 3]))
    assert found == [None, None, None]
    assert align(log_probs, torch.tensor([4, 4, 0]), tokens, torch.tensor([2, 1, 1]))[2] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_probs": torch.zeros(2, 3)}, r"log_probs has shape \(2, 3\)"),
        ({"lens": torch.tensor([4, 9])}, r"lens of utterance 1 is 9, allowed are 0..4"),
        ({"lens": torch.tensor([4.0, 4.0])}, r"lens must be int64"),
        ({"token_lens": torch.tensor([-1, 2])}, r"token_lens of utterance 0 is -1, allowed are 0..2"),
        ({"tokens": torch.tensor([[1, 2]])}, r"tokens must be int64 of shape \(2, U\)"),
        ({"tokens": torch.tensor([[1, 2], [2, 0]])}, r"token 1 of utterance 1 is 0, allowed are 0..2 except 0 \(blank\)"),
        ({"tokens": torch.tensor([[3, 2], [2, 1]])}, r"token 0 of utterance 0 is 3"),
        ({"blank": 3}, r"blank is 3, allowed are 0..2"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Tensor], message: str) -> None:
    given = {"log_probs": torch.zeros(2, 4, 3), "lens": torch.tensor([4, 4]), "tokens": torch.tensor([[1, 2], [2, 1]])}
    with pytest.raises(ValueError, match=message):
        align(**{**given, "token_lens": torch.tensor([2, 2]), "blank": 0, **change})


def test_log_probabilities_of_nan_are_refused() -> None:
    log_probs = draw_log_probs(0, 2, 4, 3)
    log_probs[1, 2] = math.nan
    with pytest.raises(ValueError, match="log-probabilities of utterance 1 are nan"):
        align(log_probs, torch.tensor([4, 4]), torch.tensor([[1, 2], [1, 2]]), torch.tensor([2, 2]))
