"""Transducer searches against recorded ones, a search written without batches, and the enumeration of everything."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from k2ssl.decode import transducer_history
from k2ssl.decode.hypotheses import Hypothesis
from k2ssl.decode.prefix_hash import hash_on
from k2ssl.decode.transducer import greedy_search, modified_beam_search
from k2ssl.models.predictor import Joiner, JoinerConfig, Predictor, PredictorConfig
from k2ssl.nn.schedule import Clock

GOLDEN = {name: torch.from_numpy(array) for name, array in np.load(Path(__file__).parents[1] / "golden" / "transducer_search.npz").items()}
ENCODER_OUT, LENS = GOLDEN["encoder_out"], GOLDEN["encoder_out_lens"]


def golden_networks() -> tuple[Predictor, Joiner]:
    predictor = Predictor(PredictorConfig(vocab_size=17, dim=12), Clock()).eval()
    joiner = Joiner(JoinerConfig(encoder_dim=20, predictor_dim=12, vocab_size=17, dim=16)).eval()
    for model, prefix in ((predictor, "state.decoder."), (joiner, "state.joiner.")):
        model.load_state_dict({name.removeprefix(prefix): array for name, array in GOLDEN.items() if name.startswith(prefix)})
    return predictor, joiner


def random_networks(seed: int, vocab_size: int, blank: int = 0, context_size: int = 2) -> tuple[Predictor, Joiner]:
    torch.manual_seed(seed)
    predictor = Predictor(PredictorConfig(vocab_size, dim=8, blank=blank, context_size=context_size), Clock()).eval()
    joiner = Joiner(JoinerConfig(encoder_dim=6, predictor_dim=8, vocab_size=vocab_size, dim=10)).eval()
    with torch.no_grad():
        joiner.output_linear.weight.mul_(4)
    return predictor, joiner


def recorded(name: str) -> list[tuple[int, ...]]:
    return [tuple(token for token in row if token >= 0) for row in GOLDEN[name].tolist()]


@torch.no_grad()
def log_probs_after(
    networks: tuple[Predictor, Joiner], frame: Tensor, tokens: tuple[int, ...], blank_penalty: float = 0.0, temperature: float = 1.0
) -> list[float]:
    """Log-probabilities at one frame after a prefix, in plain terms."""
    predictor, joiner = networks
    start = (-1,) * (predictor.context_size - 1) + (predictor.blank,)
    context = torch.tensor([(start + tokens)[-predictor.context_size :]])
    logits = joiner(frame.unsqueeze(0), predictor.step(context))[0].double()
    logits[predictor.blank] -= blank_penalty
    return (logits / temperature).log_softmax(0).tolist()


def plain_beam_search(
    networks: tuple[Predictor, Joiner], frames: Tensor, beam: int, blank_penalty: float, temperature: float
) -> list[tuple[tuple[int, ...], float]]:
    """The same search for one utterance, prefix by prefix; (tokens, score), best first."""
    blank = networks[0].blank
    scores: dict[tuple[int, ...], float] = {(): 0.0}
    for frame in frames:
        candidates = []
        for tokens, score in scores.items():
            for token, log_prob in enumerate(log_probs_after(networks, frame, tokens, blank_penalty, temperature)):
                candidates.append((score + log_prob, tokens if token == blank else (*tokens, token)))
        merged: dict[tuple[int, ...], list[float]] = defaultdict(list)
        for score, tokens in sorted(candidates, reverse=True)[:beam]:
            merged[tokens].append(score)
        scores = {tokens: float(np.logaddexp.reduce(parts)) for tokens, parts in merged.items()}
    return sorted(scores.items(), key=lambda item: item[1] / (len(item[0]) + networks[0].context_size), reverse=True)


def test_greedy_tokens_equal_the_recorded_ones(agreement) -> None:
    hypotheses = greedy_search(*golden_networks(), ENCODER_OUT, LENS)
    differing = sum(h.tokens != tokens for h, tokens in zip(hypotheses, recorded("greedy"), strict=True))
    agreement.note("transducer_search greedy, utterances that differ", differing, 0)


@pytest.mark.parametrize("beam", [1, 4, 8])
def test_beam_search_tokens_equal_the_recorded_ones(agreement, beam: int) -> None:
    hypotheses = modified_beam_search(*golden_networks(), ENCODER_OUT, LENS, beam=beam)
    differing = sum(best.tokens != tokens for (best,), tokens in zip(hypotheses, recorded(f"beam_{beam}"), strict=True))
    agreement.note(f"transducer_search beam {beam}, utterances that differ", differing, 0)


@pytest.mark.parametrize("max_symbols", [1, 3])
@pytest.mark.parametrize("blank", [0, 4])
def test_greedy_score_frames_and_symbols_per_frame_follow_the_plain_search(max_symbols: int, blank: int) -> None:
    networks = random_networks(0, vocab_size=5, blank=blank)
    encoder_out = 4 * torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(4))
    hypotheses = greedy_search(*networks, encoder_out, torch.tensor([12, 7]), max_symbols, blank_penalty=-0.5)
    for n, (hypothesis, length) in enumerate(zip(hypotheses, (12, 7), strict=True)):
        tokens: tuple[int, ...] = ()
        score, frames = 0.0, []
        for t in range(length):
            for _ in range(max_symbols):
                log_probs = log_probs_after(networks, encoder_out[n, t], tokens, blank_penalty=-0.5)
                token = int(np.argmax(log_probs))
                score += log_probs[token]
                if token == blank:
                    break
                tokens = (*tokens, token)
                frames.append(t)
        assert (hypothesis.tokens, hypothesis.frames) == (tokens, tuple(frames))
        assert hypothesis.score == pytest.approx(score, abs=1e-4)
    # more symbols a frame than one were really emitted, and some frames emitted none
    counts = np.bincount(hypotheses[0].frames, minlength=12)
    assert counts.max() == max_symbols and counts.min() == 0


@pytest.mark.parametrize(
    ("beam", "temperature", "blank_penalty", "blank", "context_size"), [(3, 1.0, 0.0, 0, 2), (4, 2.0, 0.7, 2, 3), (6, 0.5, 2.0, 4, 1)]
)
def test_beam_search_equals_the_plain_search_in_tokens_and_scores(
    beam: int, temperature: float, blank_penalty: float, blank: int, context_size: int
) -> None:
    networks = random_networks(5, 5, blank, context_size)
    lens = torch.tensor([9, 14, 1])
    encoder_out = torch.randn(3, 14, 6, generator=torch.Generator().manual_seed(6))
    found = modified_beam_search(
        *networks, encoder_out, lens, beam=beam, temperature=temperature, blank_penalty=blank_penalty, num_hypotheses=beam
    )
    for n, hypotheses in enumerate(found):
        expected = plain_beam_search(networks, encoder_out[n, : lens[n]], beam, blank_penalty, temperature)
        assert [hypothesis.tokens for hypothesis in hypotheses] == [tokens for tokens, _ in expected]
        assert [hypothesis.score for hypothesis in hypotheses] == pytest.approx([score for _, score in expected], abs=1e-4)


def test_wide_beam_finds_the_exact_probability_of_every_sequence() -> None:
    networks = random_networks(7, vocab_size=3)
    frames = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(8))
    exact: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for alignment in itertools.product(range(3), repeat=4):
        tokens: tuple[int, ...] = ()
        score = 0.0
        for t, token in enumerate(alignment):
            score += log_probs_after(networks, frames[0, t], tokens)[token]
            tokens = tokens if token == 0 else (*tokens, token)
        exact[tokens].append(score)
    (hypotheses,) = modified_beam_search(*networks, frames, torch.tensor([4]), beam=81, num_hypotheses=81)
    assert len(hypotheses) == len(exact) == 31
    assert {hypothesis.tokens for hypothesis in hypotheses} == set(exact)
    for hypothesis in hypotheses:
        assert hypothesis.score == pytest.approx(np.logaddexp.reduce(exact[hypothesis.tokens]), abs=1e-5)
    assert np.logaddexp.reduce([hypothesis.score for hypothesis in hypotheses]) == pytest.approx(0.0, abs=1e-5)
    normalised = [hypothesis.score / (len(hypothesis.tokens) + 2) for hypothesis in hypotheses]
    assert normalised == sorted(normalised, reverse=True)


def test_frames_name_a_place_for_every_token_in_rising_order() -> None:
    for hypotheses in modified_beam_search(*golden_networks(), ENCODER_OUT, LENS, beam=4, num_hypotheses=4):
        for hypothesis in hypotheses:
            assert len(hypothesis.frames) == len(hypothesis.tokens)
            assert all(left < right for left, right in itertools.pairwise(hypothesis.frames))
    beam_of_one = modified_beam_search(*golden_networks(), ENCODER_OUT, LENS, beam=1)
    for greedy, (best,) in zip(greedy_search(*golden_networks(), ENCODER_OUT, LENS), beam_of_one, strict=True):
        assert (best.tokens, best.frames) == (greedy.tokens, greedy.frames)
        assert best.score == pytest.approx(greedy.score, abs=1e-4)


@pytest.mark.parametrize("skip_unchanged", [True, False])
@pytest.mark.parametrize("max_symbols", [1, 2, 5])
def test_greedy_utterances_do_not_influence_each_other(monkeypatch, agreement, max_symbols: int, skip_unchanged: bool) -> None:
    monkeypatch.setattr(transducer_history, "waiting_is_free", lambda device: skip_unchanged)
    networks = golden_networks()

    def search(encoder_out: Tensor, lens: Tensor) -> list[list[Hypothesis]]:
        return [[found] for found in greedy_search(*networks, encoder_out, lens, max_symbols, blank_penalty=1.0)]

    nearness = furthest_from_the_batch(search)
    agreement.note("transducer greedy, score alone, reordered or padded, nats", nearness, 2e-5)


@pytest.mark.parametrize("skip_unchanged", [True, False])
def test_beams_of_utterances_do_not_influence_each_other(monkeypatch, agreement, skip_unchanged: bool) -> None:
    monkeypatch.setattr(transducer_history, "waiting_is_free", lambda device: skip_unchanged)
    networks = golden_networks()
    nearness = furthest_from_the_batch(lambda frames, lens: modified_beam_search(*networks, frames, lens, beam=5, num_hypotheses=5))
    agreement.note("transducer beam 5, score alone, reordered or padded, nats", nearness, 2e-5)


def furthest_from_the_batch(search: Callable[[Tensor, Tensor], list[list[Hypothesis]]]) -> float:
    """Asserts that tokens and frames are the same alone, in another order and with more padding; the largest difference of a score."""
    together = search(ENCODER_OUT, LENS)
    order = torch.tensor([2, 0, 3, 1])
    reordered = search(ENCODER_OUT[order], LENS[order])
    padded = search(torch.cat([ENCODER_OUT, torch.full((4, 9, ENCODER_OUT.shape[2]), 1e4)], dim=1), LENS)
    furthest = 0.0
    for n, length in enumerate(LENS.tolist()):
        (alone,) = search(ENCODER_OUT[n : n + 1, :length], LENS[n : n + 1])
        for other in (alone, reordered[order.tolist().index(n)], padded[n]):
            assert [(h.tokens, h.frames) for h in other] == [(h.tokens, h.frames) for h in together[n]]
            furthest = max(furthest, *(abs(mine.score - its.score) for mine, its in zip(together[n], other, strict=True)))
    return furthest


def test_blank_penalty_and_its_opposite_move_the_number_of_tokens() -> None:
    networks = golden_networks()
    for search in (
        lambda penalty: greedy_search(*networks, ENCODER_OUT, LENS, blank_penalty=penalty),
        lambda penalty: [best for (best,) in modified_beam_search(*networks, ENCODER_OUT, LENS, blank_penalty=penalty)],
    ):
        counts = [sum(len(hypothesis.tokens) for hypothesis in search(penalty)) for penalty in (-100.0, 0.0, 100.0)]
        assert counts[0] == 0 < counts[1] < counts[2] == int(LENS.sum())


def test_utterance_without_frames_is_empty() -> None:
    networks, lens = golden_networks(), torch.tensor([0, 3, 0, 1])
    greedy, beams = greedy_search(*networks, ENCODER_OUT, lens), modified_beam_search(*networks, ENCODER_OUT, lens)
    assert greedy[0] == beams[2][0] == Hypothesis((), 0.0)
    assert greedy[1].tokens and beams[1][0].tokens
    nothing = ENCODER_OUT[:, :0]
    assert greedy_search(*networks, nothing, torch.zeros(4, dtype=torch.int64)) == [Hypothesis((), 0.0)] * 4
    assert modified_beam_search(*networks, nothing, torch.zeros(4, dtype=torch.int64)) == [[Hypothesis((), 0.0)]] * 4


def test_hash_of_short_prefixes_is_unique() -> None:
    prefix, token = torch.zeros(1, dtype=torch.int64), torch.arange(60)
    for _ in range(3):
        prefix = hash_on(prefix.unsqueeze(1), token).flatten()
    assert prefix.unique().numel() == 60**3


def test_bad_arguments_are_refused() -> None:
    networks = golden_networks()
    with pytest.raises(ValueError, match=r"encoder_out_lens of utterance 1 is 31, allowed are 0\.\.30"):
        greedy_search(*networks, ENCODER_OUT, torch.tensor([30, 31, 1, 1]))
    with pytest.raises(ValueError, match=r"int64 of shape \(4,\) on the CPU"):
        modified_beam_search(*networks, ENCODER_OUT, LENS.int())
    with pytest.raises(ValueError, match="is needed"):
        greedy_search(*networks, ENCODER_OUT[0], LENS)
    with pytest.raises(ValueError, match="max_symbols_per_frame is 0"):
        greedy_search(*networks, ENCODER_OUT, LENS, max_symbols_per_frame=0)
    for settings, message in (({"beam": 0}, "beam is 0"), ({"temperature": 0.0}, "temperature is 0"), ({"num_hypotheses": 5}, "1..4")):
        with pytest.raises(ValueError, match=message):
            modified_beam_search(*networks, ENCODER_OUT, LENS, **settings)
    with pytest.raises(ValueError, match="frames has 1 entries for 2 tokens"):
        Hypothesis((1, 2), 0.0, (3,))


def test_frames_of_nan_show_in_the_score_and_in_no_other_utterance() -> None:
    networks = random_networks(3, vocab_size=4)
    encoder_out = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    alone = modified_beam_search(*networks, encoder_out[1:], torch.tensor([5]))[0]
    encoder_out[0] = float("nan")
    broken, whole = modified_beam_search(*networks, encoder_out, torch.tensor([5, 5]))
    assert broken[0].score != broken[0].score and whole[0].tokens == alone[0].tokens
    assert whole[0].score == pytest.approx(alone[0].score, abs=1e-5)
