"""The CTC loss against an enumeration of all paths, a plain forward algorithm and finite differences; what is left out, and refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from k2ssl.losses.ctc import ctc_sums, frames_needed


def random_batch(seed: int, frames: int = 20, symbols: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float64 logits, lens, targets and target_lens of random sizes; blank is 0. Few symbols, so that neighbours are often equal."""
    draw = torch.Generator().manual_seed(seed)
    batch, num_frames, num_targets, vocab_size = (
        int(torch.randint(low, high, (), generator=draw)) for low, high in ((1, 6), (1, frames), (1, 8), (2, symbols + 1))
    )
    logits = torch.randn(batch, num_frames, vocab_size, generator=draw, dtype=torch.float64)
    lens = torch.randint(0, num_frames + 1, (batch,), generator=draw)
    target_lens = torch.randint(0, num_targets + 1, (batch,), generator=draw)
    return logits, lens, torch.randint(1, vocab_size, (batch, num_targets), generator=draw), target_lens


def collapsed(path: tuple[int, ...], blank: int) -> tuple[int, ...]:
    return tuple(token for token, _ in itertools.groupby(path) if token != blank)


def loss_of_all_paths(log_probs: Tensor, targets: list[int], blank: int = 0) -> float:
    """Of one utterance, (T, V): every sequence of symbols that collapses to the targets."""
    table = log_probs.tolist()
    scores = [
        sum(row[token] for row, token in zip(table, path, strict=True))
        for path in itertools.product(range(log_probs.shape[1]), repeat=len(table))
        if collapsed(path, blank) == tuple(targets)
    ]
    return -float(np.logaddexp.reduce(scores)) if scores else math.inf


def plain_forward(log_probs: Tensor, targets: list[int], blank: int = 0) -> float:
    """The forward algorithm on one utterance, state by state."""
    states = [blank, *itertools.chain.from_iterable((target, blank) for target in targets)]
    table = log_probs.tolist()
    alpha = [0.0 if s == 0 else -math.inf for s in range(len(states))]  # before the first frame, in the first blank
    for t, row in enumerate(table):
        before = alpha
        alpha = []
        for s, state in enumerate(states):
            arriving = [before[s]] if t else [0.0 if s <= 1 else -math.inf]
            if s and t:
                arriving.append(before[s - 1])
            if s >= 2 and t and state not in (blank, states[s - 2]):
                arriving.append(before[s - 2])
            alpha.append(float(np.logaddexp.reduce(arriving)) + row[state])
    return -float(np.logaddexp.reduce(alpha[-2:]))


@pytest.mark.parametrize("blank", [0, 2])
def test_the_plain_forward_algorithm_equals_the_sum_over_all_paths(blank: int) -> None:
    log_probs = torch.randn(4, 3, dtype=torch.float64).log_softmax(1)
    symbols = [token for token in range(3) if token != blank]
    for length in range(4):
        for targets in itertools.product(symbols, repeat=length):
            expected = loss_of_all_paths(log_probs, list(targets), blank)
            assert plain_forward(log_probs, list(targets), blank) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_the_loss_is_the_plain_one_summed_over_the_utterances_that_fit(seed: int) -> None:
    logits, lens, targets, target_lens = random_batch(seed)
    log_probs = logits.log_softmax(2)
    expected = [
        plain_forward(log_probs[n, : lens[n]], targets[n, : target_lens[n]].tolist()) if lens[n] else (math.inf if target_lens[n] else 0.0)
        for n in range(len(lens))
    ]
    sums = ctc_sums(log_probs, lens, targets, target_lens)
    assert sums.excluded.tolist() == [math.isinf(loss) for loss in expected]
    assert sums.loss.item() == pytest.approx(sum(loss for loss in expected if not math.isinf(loss)), abs=1e-9)
    assert (sums.num_used + sums.num_excluded).item() == len(lens) and sums.num_excluded.item() == sum(map(math.isinf, expected))
    assert ctc_sums(log_probs.float(), lens, targets, target_lens).loss.item() == pytest.approx(sums.loss.item(), rel=1e-5, abs=1e-5)


def test_the_random_batches_hold_both_kinds_of_utterances() -> None:
    excluded = torch.cat([ctc_sums(random_batch(seed)[0].log_softmax(2), *random_batch(seed)[1:]).excluded for seed in range(30)])
    assert 10 < int(excluded.sum()) < len(excluded) - 10


@pytest.mark.parametrize("seed", range(8))
def test_gradients_are_those_of_finite_differences(seed: int) -> None:
    logits, lens, targets, target_lens = random_batch(seed, frames=9)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ctc_sums(x.log_softmax(2), lens, targets, target_lens).loss, (logits,), check_undefined_grad=False
    )


def test_blank_may_be_any_symbol() -> None:
    log_probs = torch.randn(1, 5, 4, dtype=torch.float64).log_softmax(2)
    sums = ctc_sums(log_probs, torch.tensor([5]), torch.tensor([[0, 0, 2]]), torch.tensor([3]), blank=3)
    assert sums.loss.item() == pytest.approx(loss_of_all_paths(log_probs[0], [0, 0, 2], blank=3), abs=1e-10)


def test_equal_neighbours_need_one_frame_more_each_but_not_in_the_padding() -> None:
    targets = torch.tensor([[1, 1, 1, 2], [1, 2, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 2, 2, 9]])
    assert frames_needed(targets, torch.tensor([4, 3, 1, 0, 3])).tolist() == [6, 3, 1, 0, 4]


def test_an_utterance_with_just_enough_frames_is_used_and_one_with_a_frame_less_is_left_out() -> None:
    log_probs = torch.randn(2, 6, 3, dtype=torch.float64).log_softmax(2)
    targets, target_lens = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2]]), torch.tensor([4, 4])
    sums = ctc_sums(log_probs, torch.tensor([6, 5]), targets, target_lens)
    assert sums.excluded.tolist() == [False, True] and (sums.num_used.item(), sums.num_excluded.item()) == (1, 1)
    assert sums.loss.item() == pytest.approx(loss_of_all_paths(log_probs[0], [1, 1, 2, 2]), abs=1e-10)


def test_what_is_left_out_changes_neither_loss_nor_gradient_of_the_others_and_has_none_itself() -> None:
    logits = torch.randn(3, 8, 5, requires_grad=True)
    lens, target_lens = torch.tensor([8, 3, 6]), torch.tensor([4, 4, 2])
    targets = torch.randint(1, 5, (3, 4))
    sums = ctc_sums(logits.log_softmax(2), lens, targets, target_lens)
    (grad,) = torch.autograd.grad(sums.loss, logits)
    kept = [0, 2]
    alone = ctc_sums(logits[kept].log_softmax(2), lens[kept], targets[kept], target_lens[kept])
    (grad_alone,) = torch.autograd.grad(alone.loss, logits)
    assert sums.excluded.tolist() == [False, True, False] and not alone.excluded.any()
    torch.testing.assert_close(sums.loss, alone.loss)
    torch.testing.assert_close(grad, grad_alone)  # also finite, and zero for the one in the middle
    assert not grad[1].any() and grad[0].any() and not grad[2, 6:].any()


def test_a_batch_of_which_nothing_can_be_used_has_loss_and_gradient_zero() -> None:
    logits = torch.randn(2, 2, 3, requires_grad=True)
    sums = ctc_sums(logits.log_softmax(2), torch.tensor([2, 0]), torch.ones(2, 3, dtype=torch.int64), torch.tensor([2, 1]))
    sums.loss.backward()
    assert (sums.loss.item(), sums.num_used.item(), sums.num_excluded.item()) == (0.0, 0, 2)
    assert logits.grad is not None and not logits.grad.any()


def test_another_loss_of_the_same_output_keeps_its_gradient_where_this_one_has_none() -> None:
    log_probs = torch.randn(1, 2, 3).log_softmax(2).requires_grad_()
    sums = ctc_sums(log_probs, torch.tensor([1]), torch.tensor([[1, 2]]), torch.tensor([2]))
    (sums.loss + log_probs.sum()).backward()
    assert log_probs.grad is not None and (log_probs.grad == 1).all()


def test_whatever_is_in_the_padding_changes_nothing() -> None:
    logits, lens, target_lens = torch.randn(2, 7, 4), torch.tensor([7, 4]), torch.tensor([3, 1])
    targets = torch.tensor([[1, 2, 3], [2, 2, 2]])
    other, other_targets = logits.clone(), torch.tensor([[1, 2, 3], [2, -1, 99]])
    other[1, 4:] = 7.0
    ours, theirs = (ctc_sums(x.log_softmax(2), lens, y, target_lens).loss.item() for x, y in ((logits, targets), (other, other_targets)))
    assert ours == theirs


def test_a_loss_that_is_infinite_although_the_frames_suffice_is_not_hidden() -> None:
    log_probs = torch.randn(1, 3, 3).log_softmax(2)
    log_probs[:, :, 1] = -math.inf
    sums = ctc_sums(log_probs, torch.tensor([3]), torch.tensor([[1]]), torch.tensor([1]))
    assert math.isinf(sums.loss.item()) and not sums.excluded.any()


def test_the_loss_is_computed_in_float32_whatever_the_autocast() -> None:
    log_probs = torch.randn(1, 9, 3).log_softmax(2)
    arguments = (torch.tensor([9]), torch.tensor([[1, 2]]), torch.tensor([2]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = ctc_sums(log_probs.bfloat16(), *arguments).loss
    assert low.dtype == torch.float32 and low.item() == ctc_sums(log_probs.bfloat16().float(), *arguments).loss.item()


def test_the_deterministic_loss_is_the_same_loss() -> None:
    logits, lens, targets, target_lens = random_batch(4)
    results = []
    for deterministic in (False, True):
        variable = logits.clone().requires_grad_()
        sums = ctc_sums(variable.log_softmax(2), lens, targets, target_lens, deterministic=deterministic)
        sums.loss.backward()
        results.append((sums.loss, variable.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


GOOD = {
    "log_probs": torch.zeros(2, 5, 4),
    "lens": torch.tensor([5, 3]),
    "targets": torch.tensor([[1, 2], [3, 0]]),
    "target_lens": torch.tensor([2, 1]),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_probs": torch.zeros(2, 5)}, r"log_probs has shape \(2, 5\), \(N, T, V\)"),
        ({"log_probs": torch.zeros(2, 0, 4)}, r"log_probs has shape \(2, 0, 4\), at least one utterance"),
        ({"targets": torch.ones(3, 2, dtype=torch.int64)}, r"targets must be int64 of shape \(2, U\) on cpu"),
        ({"targets": torch.ones(2, 2, dtype=torch.int32)}, r"targets must be int64 .* got torch.int32"),
        ({"targets": torch.ones(3, dtype=torch.int64)}, "targets must be int64"),
        ({"targets": torch.ones(2, 2, dtype=torch.int64, device="meta")}, "on meta"),
        ({"lens": torch.tensor([5, 6])}, r"lens of utterance 1 is 6, allowed are 0..5"),
        ({"lens": torch.tensor([-1, 3])}, "lens of utterance 0 is -1"),
        ({"lens": torch.tensor([5.0, 3.0])}, "lens must be int64"),
        ({"lens": torch.tensor([5])}, r"lens must be int64 of shape \(2,\)"),
        ({"target_lens": torch.tensor([2, 3])}, r"target_lens of utterance 1 is 3, allowed are 0..2"),
        ({"target_lens": torch.tensor([2, 2])}, "targets of utterance 1 hold 0 at position 1; allowed are 0..3 without blank, which is 0"),
        ({"targets": torch.tensor([[1, 4], [3, 0]])}, "targets of utterance 0 hold 4 at position 1"),
        ({"targets": torch.tensor([[-1, 1], [3, 0]])}, "targets of utterance 0 hold -1 at position 0"),
        ({"blank": 4}, r"blank is 4, allowed are 0..3"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict, message: str) -> None:
    ctc_sums(**GOOD)
    with pytest.raises(ValueError, match=message):
        ctc_sums(**{**GOOD, **change})
