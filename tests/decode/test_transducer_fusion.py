"""Beam search with a language model and a biasing list, against a search in float64 that knows no batches and no states."""

from __future__ import annotations

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from k2ssl.decode import transducer_history
from k2ssl.decode.biasing import ContextGraph
from k2ssl.decode.hypotheses import Hypothesis
from k2ssl.decode.transducer import greedy_search, modified_beam_search
from k2ssl.models.predictor import Joiner, JoinerConfig, Predictor, PredictorConfig
from k2ssl.nn.schedule import Clock

Tokens = tuple[int, ...]
VOCAB = 6
LENS = torch.tensor([5, 11, 0, 8])
ENCODER_OUT = torch.randn(4, 12, 6, generator=torch.Generator().manual_seed(6))
PHRASES = [(3, 1), (1, 5), (3, 1, 4), (5,)]


class TrigramLm:
    """A random table. A state is the last two tokens, each as a row of one-hot numbers, so that states have several axes.

    The column of blank is large, and advancing by blank an error: a search may use neither.
    """

    vocab_size = VOCAB

    def __init__(self, blank: int, seed: int = 3) -> None:
        logits = 2 * torch.randn(VOCAB, VOCAB, VOCAB + 1, generator=torch.Generator().manual_seed(seed))
        logits[..., blank] = -math.inf
        self.blank, self.table = blank, logits.log_softmax(-1)

    def start(self, batch: int, device: torch.device) -> Tensor:
        return torch.eye(VOCAB)[self.blank].repeat(batch, 2, 1)

    def log_probs(self, state: Tensor) -> Tensor:
        scores = self._row(state)[:, :-1].clone()
        scores[:, self.blank] = 77.0
        return scores

    def advance(self, state: Tensor, token: Tensor) -> Tensor:
        torch._assert_async((token != self.blank).all())
        return torch.stack([state[:, 1], torch.eye(VOCAB)[token]], dim=1)

    def final(self, state: Tensor) -> Tensor:
        return self._row(state)[:, -1]

    def _row(self, state: Tensor) -> Tensor:
        first, second = state.argmax(-1).unbind(1)
        return self.table[first, second]

    def plain(self, tokens: Tokens, following: int) -> float:
        """Log-probability of one token, or with -1 of the end."""
        first, second = (self.blank, self.blank, *tokens)[-2:]
        return float(self.table[first, second, following].double())


def biasing_score(tokens: Tokens, at_end: bool = False) -> float:
    """In tokens: those of every phrase in `tokens`, and those of a phrase that may still be completed."""
    stretches = itertools.combinations(range(len(tokens) + 1), 2)
    earned = sum(end - begin for begin, end in stretches if tokens[begin:end] in PHRASES)
    if at_end:
        return earned
    beginnings = {phrase[:end] for phrase in PHRASES for end in range(len(phrase) + 1)}
    inside = next(tokens[begin:] for begin in range(len(tokens) + 1) if tokens[begin:] in beginnings)
    return earned + len(inside) - max(end for end in range(len(inside) + 1) if end == 0 or inside[:end] in PHRASES)


def random_networks(blank: int = 0, context_size: int = 2) -> tuple[Predictor, Joiner]:
    torch.manual_seed(5)
    predictor = Predictor(PredictorConfig(VOCAB, dim=8, blank=blank, context_size=context_size), Clock()).eval()
    joiner = Joiner(JoinerConfig(encoder_dim=6, predictor_dim=8, vocab_size=VOCAB, dim=10)).eval()
    with torch.no_grad():
        joiner.output_linear.weight.mul_(4)
    return predictor, joiner


@torch.no_grad()
def plain_search(
    networks: tuple[Predictor, Joiner], frames: Tensor, beam: int, added: Callable[[Tokens, int], float], at_end: Callable[[Tokens], float]
) -> list[tuple[Tokens, float]]:
    """(tokens, score), best first; `added` is what fusion adds to a token after others, `at_end` to a whole sequence."""
    predictor, joiner = (copy.deepcopy(network).double() for network in networks)
    start = (-1,) * (predictor.context_size - 1) + (predictor.blank,)
    scores: dict[Tokens, float] = {(): 0.0}
    for frame in frames.double():
        candidates = []
        for tokens, score in scores.items():
            context = torch.tensor([(start + tokens)[-predictor.context_size :]])
            for token, log_prob in enumerate(joiner(frame.unsqueeze(0), predictor.step(context))[0].log_softmax(0).tolist()):
                if token == predictor.blank:
                    candidates.append((score + log_prob, tokens))
                else:
                    candidates.append((score + log_prob + added(tokens, token), (*tokens, token)))
        merged: dict[Tokens, list[float]] = defaultdict(list)
        for score, tokens in sorted(candidates, reverse=True)[:beam]:
            merged[tokens].append(score)
        scores = {tokens: float(np.logaddexp.reduce(parts)) for tokens, parts in merged.items()}
    total = {tokens: score + at_end(tokens) for tokens, score in scores.items()}
    return sorted(total.items(), key=lambda item: item[1] / (len(item[0]) + predictor.context_size), reverse=True)


@pytest.mark.parametrize("skip_unchanged", [True, False])
@pytest.mark.parametrize(
    ("beam", "lm_scale", "lm_final", "bias", "blank", "context_size"),
    [
        (3, 0.5, False, 0.0, 0, 2),
        (4, 0.8, True, 0.0, 2, 1),
        (4, 0.0, False, 0.7, 0, 2),
        (5, 0.3, True, 1.1, 2, 3),
        (1, 0.6, False, 0.4, 0, 2),
    ],
)
def test_fused_search_equals_the_plain_one_in_tokens_and_scores(
    monkeypatch, beam: int, lm_scale: float, lm_final: bool, bias: float, blank: int, context_size: int, skip_unchanged: bool
) -> None:
    monkeypatch.setattr(transducer_history, "waiting_is_free", lambda device: skip_unchanged)
    networks, lm = random_networks(blank, context_size), TrigramLm(blank)
    graph = ContextGraph(PHRASES, bias) if bias else None
    found = modified_beam_search(
        *networks, ENCODER_OUT, LENS, beam, num_hypotheses=beam, lm=lm, lm_scale=lm_scale, biasing=graph, lm_final=lm_final
    )

    def added(tokens: Tokens, token: int) -> float:
        return lm_scale * lm.plain(tokens, token) + bias * (biasing_score((*tokens, token)) - biasing_score(tokens))

    def at_end(tokens: Tokens) -> float:
        return lm_scale * lm_final * lm.plain(tokens, -1) + bias * (biasing_score(tokens, at_end=True) - biasing_score(tokens))

    for n, hypotheses in enumerate(found):
        expected = plain_search(networks, ENCODER_OUT[n, : LENS[n]], beam, added, at_end)
        assert [hypothesis.tokens for hypothesis in hypotheses] == [tokens for tokens, _ in expected]
        assert [hypothesis.score for hypothesis in hypotheses] == pytest.approx([score for _, score in expected], abs=1e-5)
    assert any(hypothesis.tokens for hypothesis in itertools.chain(*found))


@pytest.mark.parametrize("lm_final", [True, False])
def test_the_score_of_every_sequence_is_the_sum_of_its_three_parts(lm_final: bool) -> None:
    networks, lm = random_networks(), TrigramLm(0)
    frames, lens = ENCODER_OUT[:1, :3], torch.tensor([3])
    everything = {"beam": 6**3, "num_hypotheses": 6**3}
    (plain,) = modified_beam_search(*networks, frames, lens, **everything)
    (fused,) = modified_beam_search(
        *networks, frames, lens, **everything, lm=lm, lm_scale=0.4, lm_final=lm_final, biasing=ContextGraph(PHRASES, 0.9)
    )
    acoustic = {hypothesis.tokens: hypothesis.score for hypothesis in plain}
    assert len(plain) == 1 + 5 + 25 + 125 and {hypothesis.tokens for hypothesis in fused} == set(acoustic)
    for hypothesis in fused:
        tokens = hypothesis.tokens
        language = sum(lm.plain(tokens[:u], token) for u, token in enumerate((*tokens, -1) if lm_final else tokens))
        expected = acoustic[tokens] + 0.4 * language + 0.9 * biasing_score(tokens, at_end=True)
        assert hypothesis.score == pytest.approx(expected, abs=1e-5)
    normalised = [hypothesis.score / (len(hypothesis.tokens) + 2) for hypothesis in fused]
    assert normalised == sorted(normalised, reverse=True)


def test_a_language_model_of_scale_zero_changes_no_bit() -> None:
    networks = random_networks()
    without = modified_beam_search(*networks, ENCODER_OUT, LENS, num_hypotheses=4)
    lm: Any = "not even asked"
    assert modified_beam_search(*networks, ENCODER_OUT, LENS, num_hypotheses=4, lm=lm, lm_scale=0.0, lm_final=True) == without
    assert modified_beam_search(*networks, ENCODER_OUT, LENS, num_hypotheses=4, lm=TrigramLm(0), lm_scale=0.5) != without


class Tables(torch.nn.Module):
    """Predictor and joint network in one: logits are what the frame says, whatever came before."""

    context_size, blank = 1, 0

    def step(self, context: Tensor) -> Tensor:
        return torch.zeros(len(context), 1)

    def project_encoder(self, encoder_out: Tensor) -> Tensor:
        return encoder_out

    def project_predictor(self, predictor_out: Tensor) -> Tensor:
        return predictor_out.expand(-1, VOCAB)

    def forward(self, encoder_out: Tensor, predictor_out: Tensor, project_input: bool) -> Tensor:
        return encoder_out + predictor_out


def test_biasing_turns_the_winner_and_a_phrase_broken_off_does_not() -> None:
    networks = (Tables(), Tables())
    frames = torch.full((1, 2, VOCAB), -20.0)
    frames[0, 0, [1, 3]] = torch.tensor([0.0, -0.5])  # says 1 4, but 3 5 is near
    frames[0, 1, [4, 5]] = torch.tensor([0.0, -0.5])

    def best(phrases: list[Tokens] | None) -> Hypothesis:
        graph = ContextGraph(phrases, 0.8) if phrases else None
        return modified_beam_search(*networks, frames, torch.tensor([2]), biasing=graph)[0][0]

    assert best(None).tokens == (1, 4)
    assert best([(3, 5)]).tokens == (3, 5)
    assert best([(3, 5)]).score == pytest.approx(best(None).score - 1.0 + 1.6, abs=1e-5)
    assert best([(3, 2, 2)]) == best(None)  # 3 is lent 0.8 and in the lead for a while
    assert best([(2, 2), (4, 3)]) == best(None)  # what is lent to the 4 at the end is taken back


@pytest.mark.parametrize("skip_unchanged", [True, False])
def test_fused_utterances_do_not_influence_each_other(monkeypatch, agreement, skip_unchanged: bool) -> None:
    monkeypatch.setattr(transducer_history, "waiting_is_free", lambda device: skip_unchanged)
    settings = {"num_hypotheses": 4, "lm": TrigramLm(0), "lm_scale": 0.5, "biasing": ContextGraph(PHRASES, 0.6), "lm_final": True}
    networks = random_networks()
    together = modified_beam_search(*networks, ENCODER_OUT, LENS, **settings)
    order = torch.tensor([2, 1, 3, 0])
    shuffled = modified_beam_search(*networks, ENCODER_OUT[order], LENS[order], **settings)
    for n, length in enumerate(LENS.tolist()):
        (alone,) = modified_beam_search(*networks, ENCODER_OUT[n : n + 1, :length], LENS[n : n + 1], **settings)
        for others in (alone, shuffled[order.tolist().index(n)]):
            assert [(h.tokens, h.frames) for h in together[n]] == [(h.tokens, h.frames) for h in others]
            nearness = max(abs(mine.score - its.score) for mine, its in zip(together[n], others, strict=True))
            agreement.note("fused beam search, score alone and in a batch, nats", nearness, 1e-5)


def test_a_language_model_is_asked_only_after_a_token(monkeypatch) -> None:
    networks, lm, rows = random_networks(), TrigramLm(0), []
    advance = lm.advance
    monkeypatch.setattr(lm, "advance", lambda state, token: rows.append(len(token)) or advance(state, token))
    found = modified_beam_search(*networks, ENCODER_OUT, LENS, beam=1, lm=lm, lm_scale=0.2)
    assert sum(rows) == sum(len(best.tokens) for (best,) in found) < int(LENS.sum())
    rows.clear()
    modified_beam_search(*networks, ENCODER_OUT[:1, :1], torch.tensor([1]), beam=30, lm=lm, lm_scale=0.2)
    assert sum(rows) == VOCAB - 1  # and not for the places of the beam that nothing has filled


def test_a_search_on_a_gpu_would_not_wait_before_its_end(monkeypatch, no_questions) -> None:
    monkeypatch.setattr(transducer_history, "waiting_is_free", lambda device: False)
    networks, graph = random_networks(), ContextGraph(PHRASES, 0.6)
    with no_questions():
        found = modified_beam_search(*networks, ENCODER_OUT, LENS, lm=TrigramLm(0), lm_scale=0.5, biasing=graph, lm_final=True)
        greedy = greedy_search(*networks, ENCODER_OUT, LENS, max_symbols_per_frame=3)
    assert len(found) == len(greedy) == 4


def test_other_vocabularies_and_bad_scales_are_refused() -> None:
    networks, lm = random_networks(blank=2), TrigramLm(2)
    for settings, message in (
        ({"lm": lm, "lm_scale": -0.1}, "lm_scale is -0.1"),
        ({"lm": lm, "lm_scale": math.inf}, "lm_scale is inf"),
        ({"lm_scale": 0.5}, r"lm_scale is 0\.5, but there is no language model"),
        ({"biasing": ContextGraph([(1, VOCAB)], 1.0)}, r"token 6, allowed are 0\.\.5"),
        ({"biasing": ContextGraph([(1, 2)], 1.0)}, "token 2, which is blank"),
    ):
        with pytest.raises(ValueError, match=message):
            modified_beam_search(*networks, ENCODER_OUT, LENS, **settings)
    lm.vocab_size = 7
    with pytest.raises(ValueError, match="vocabulary has 7 tokens, the model's 6"):
        modified_beam_search(*networks, ENCODER_OUT, LENS, lm=lm, lm_scale=0.1)
