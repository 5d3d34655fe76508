"""Prefix beam search against the sum over all paths, and against a plain search with dictionaries."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import groupby, product

import pytest
import torch
from torch import Tensor

from k2ssl.decode import ctc_beam
from k2ssl.decode.ctc import greedy_search
from k2ssl.decode.ctc_beam import prefix_beam_search

NEG_INF = -math.inf


def draw_log_probs(seed: int, *shape: int, sharpness: float = 1.5) -> Tensor:
    return (sharpness * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).log_softmax(-1)


class Bigram:
    """A language model whose state is the last token, blank before the first one; token 2 never follows token 1."""

    def __init__(self, vocab_size: int, blank: int, seed: int = 0) -> None:
        self.vocab_size, self.blank = vocab_size, blank
        table = draw_log_probs(seed, vocab_size, vocab_size)  # its blank column: the end
        self.end = table[:, blank].clone()
        table[:, blank] = 0.0
        if vocab_size > 3:
            table[1, 2] = NEG_INF
        self.table = table

    def start(self, batch: int, device: torch.device) -> Tensor:
        return torch.full((batch, 1), self.blank, device=device)

    def log_probs(self, state: Tensor) -> Tensor:
        return self.table[state.squeeze(1)]

    def advance(self, state: Tensor, token: Tensor) -> Tensor:
        return token.unsqueeze(1)

    def final(self, state: Tensor) -> Tensor:
        return self.end[state.squeeze(1)]

    def score(self, tokens: tuple[int, ...]) -> float:
        history = (self.blank, *tokens)
        return sum(float(self.table[one, two]) for one, two in zip(history, tokens, strict=False))


def all_sums(log_probs: Tensor, blank: int) -> dict[tuple[int, ...], float]:
    """Log-probability of every token sequence, summed over all paths of (T, V)."""
    sums: dict[tuple[int, ...], list[float]] = defaultdict(list)
    rows = log_probs.tolist()
    for path in product(range(log_probs.shape[1]), repeat=len(rows)):
        tokens = tuple(symbol for symbol, _ in groupby(path) if symbol != blank)
        sums[tokens].append(math.exp(math.fsum(row[symbol] for row, symbol in zip(rows, path, strict=True))))
    return {tokens: math.log(math.fsum(found)) for tokens, found in sums.items()}


def log_add(*values: float) -> float:
    most = max(values)
    return most if most == NEG_INF else most + math.log(sum(math.exp(value - most) for value in values))


def plain_search(
    log_probs: Tensor, blank: int, beam: int, lm: Bigram | None = None, lm_scale: float = 0.0, token_score: float = 0.0
) -> list[tuple[tuple[int, ...], float]]:
    """All hypotheses that are left of one utterance, (T, V), best first."""

    def bonus(tokens: tuple[int, ...]) -> float:
        return token_score * len(tokens) + (lm_scale * lm.score(tokens) if lm else 0.0)

    beams = {(): (0.0, NEG_INF)}
    for row in log_probs.tolist():
        found: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [NEG_INF, NEG_INF])
        for tokens, (in_blank, in_token) in beams.items():
            total = log_add(in_blank, in_token)
            for symbol, log_prob in enumerate(row):
                if symbol == blank:
                    found[tokens][0] = log_add(found[tokens][0], total + log_prob)
                    continue
                longer = (*tokens, symbol)
                if tokens and symbol == tokens[-1]:
                    found[tokens][1] = log_add(found[tokens][1], in_token + log_prob)
                    found[longer][1] = log_add(found[longer][1], in_blank + log_prob)
                else:
                    found[longer][1] = log_add(found[longer][1], total + log_prob)
        best = sorted(found, key=lambda tokens: log_add(*found[tokens]) + bonus(tokens), reverse=True)[:beam]
        beams = {tokens: (found[tokens][0], found[tokens][1]) for tokens in best}
    ends = {tokens: lm_scale * float(lm.end[tokens[-1] if tokens else blank]) if lm else 0.0 for tokens in beams}
    scored = [(tokens, log_add(*values) + bonus(tokens) + ends[tokens]) for tokens, values in beams.items()]
    return sorted((pair for pair in scored if pair[1] > NEG_INF), key=lambda pair: -pair[1])


@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_with_a_beam_for_all_prefixes_it_is_the_exhaustive_sum(seed: int, blank: int) -> None:
    log_probs, lens = draw_log_probs(seed, 3, 6, 3), torch.tensor([6, 5, 1])
    found = prefix_beam_search(log_probs, lens, blank, beam=150, num_hypotheses=150)
    for n, hypotheses in enumerate(found):
        expected = all_sums(log_probs[n, : lens[n]], blank)
        assert {hypothesis.tokens for hypothesis in hypotheses} == set(expected)
        for hypothesis in hypotheses:
            assert hypothesis.score == pytest.approx(expected[hypothesis.tokens], abs=1e-12)
        assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)
        assert math.fsum(math.exp(h.score) for h in hypotheses) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("lm_final", [True, False])
def test_with_a_language_model_the_exhaustive_sum_is_weighted_by_it(lm_final: bool) -> None:
    log_probs, lm = draw_log_probs(5, 1, 4, 4), Bigram(4, 0)
    fusion = {"lm": lm, "lm_scale": 0.7, "token_score": 0.4, "lm_final": lm_final}
    (found,) = prefix_beam_search(log_probs, torch.tensor([4]), beam=130, num_hypotheses=130, **fusion)
    expected = {}
    for tokens, score in all_sums(log_probs[0], 0).items():
        end = float(lm.end[tokens[-1] if tokens else 0]) if lm_final else 0.0
        expected[tokens] = score + 0.7 * (lm.score(tokens) + end) + 0.4 * len(tokens)
    possible = {tokens: score for tokens, score in expected.items() if score > NEG_INF}
    assert len(possible) < len(expected)  # some hold a pair that the model forbids
    assert {h.tokens: h.score for h in found} == pytest.approx(possible, abs=1e-12)


@pytest.mark.parametrize("fusion", ["none", "token_score", "lm", "lm as on a GPU"])
@pytest.mark.parametrize(("beam", "vocab_size"), [(1, 5), (2, 5), (3, 20), (4, 4), (8, 30)])
def test_a_narrow_beam_finds_what_the_plain_search_finds(beam: int, vocab_size: int, fusion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctc_beam, "waiting_is_free", lambda device: fusion != "lm as on a GPU")
    log_probs, lens = draw_log_probs(beam, 5, 30, vocab_size), torch.tensor([30, 0, 1, 17, 29])
    with_lm = {"lm": Bigram(vocab_size, 0), "lm_scale": 0.6, "token_score": 1.1}
    options = {"none": {}, "token_score": {"token_score": 0.8}}.get(fusion, with_lm)
    found = prefix_beam_search(log_probs, lens, beam=beam, num_hypotheses=beam, **options)
    for n, hypotheses in enumerate(found):
        expected = plain_search(log_probs[n, : lens[n]], 0, beam, **options)
        assert [h.tokens for h in hypotheses] == [tokens for tokens, _ in expected]
        assert [h.score for h in hypotheses] == pytest.approx([score for _, score in expected], abs=1e-9)
    assert len(found[0][0].tokens) > 5


def test_an_utterance_decodes_the_same_alone_and_in_a_longer_batch() -> None:
    log_probs, lens = draw_log_probs(1, 5, 120, 12).float(), torch.tensor([33, 120, 77, 0, 119])
    for options in ({}, {"lm": Bigram(12, 0), "lm_scale": 0.5}):
        together = prefix_beam_search(log_probs, lens, beam=7, num_hypotheses=3, **options)
        for n in range(5):
            alone = prefix_beam_search(log_probs[n : n + 1, : lens[n]], lens[n : n + 1], beam=7, num_hypotheses=3, **options)
            assert alone == [together[n]]


def test_equal_scores_are_ranked_the_same_alone_and_in_a_longer_batch() -> None:
    log_probs = torch.zeros(2, 20, 40).log_softmax(2)
    together = prefix_beam_search(log_probs, torch.tensor([2, 20]), beam=30, num_hypotheses=30)
    assert prefix_beam_search(log_probs[:1, :2], torch.tensor([2]), beam=30, num_hypotheses=30) == together[:1]


def test_a_longer_beam_never_loses_a_better_hypothesis_than_greedy_search_finds() -> None:
    log_probs, lens = draw_log_probs(7, 8, 50, 6, sharpness=3.0), torch.full((8,), 50)
    for hypotheses, greedy in zip(prefix_beam_search(log_probs, lens, beam=16), greedy_search(log_probs, lens), strict=True):
        assert hypotheses[0].score > greedy.score  # the sum over alignments against one of them


def test_frames_are_those_of_the_most_probable_alignment() -> None:
    path = [0, 1, 1, 0, 1, 2, 2, 0, 2, 1]
    log_probs = torch.full((1, len(path), 3), math.log(0.05))
    log_probs[0, torch.arange(len(path)), torch.tensor(path)] = math.log(0.9)
    ((best, second),) = prefix_beam_search(log_probs, torch.tensor([len(path)]), num_hypotheses=2)
    assert best.tokens == (1, 1, 2, 2, 1) and best.frames == (1, 4, 5, 8, 9)
    assert len(second.frames) == len(second.tokens) != 5


def test_without_frames_there_are_no_tokens() -> None:
    ((hypothesis,),) = prefix_beam_search(torch.zeros(1, 0, 3), torch.tensor([0]), num_hypotheses=4)
    assert (hypothesis.tokens, hypothesis.score, hypothesis.frames) == ((), 0.0, ())
    assert prefix_beam_search(torch.zeros(0, 4, 3), torch.zeros(0, dtype=torch.int64)) == []


def test_a_model_without_weight_is_not_asked() -> None:
    class Silent(Bigram):
        def start(self, batch: int, device: torch.device) -> Tensor:
            raise AssertionError

    log_probs, lens = draw_log_probs(3, 2, 9, 4), torch.tensor([9, 7])
    assert prefix_beam_search(log_probs, lens, lm=Silent(4, 0)) == prefix_beam_search(log_probs, lens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_probs": torch.zeros(2, 3)}, r"prefix_beam_search: log_probs has shape \(2, 3\)"),
        ({"lens": torch.tensor([4, 5])}, r"prefix_beam_search: lens of utterance 1 is 5, allowed are 0..4"),
        ({"blank": 3}, r"prefix_beam_search: blank is 3"),
        ({"log_probs": torch.zeros(2, 4, 1)}, "1 classes, at least blank and one token"),
        ({"beam": 0}, "beam is 0, at least 1"),
        ({"num_hypotheses": 11}, r"num_hypotheses is 11, allowed are 1..10 \(beam\)"),
        ({"num_hypotheses": 0}, "num_hypotheses is 0"),
        ({"lm": Bigram(3, 0), "lm_scale": -0.1}, "lm_scale is -0.1, a finite number >= 0"),
        ({"lm": Bigram(3, 0), "lm_scale": math.nan}, "lm_scale is nan"),
        ({"token_score": math.inf}, "token_score is inf, a finite number"),
        ({"lm_scale": 0.5}, "lm_scale is 0.5, but there is no language model"),
        ({"lm": Bigram(4, 0), "lm_scale": 0.5}, "the language model has 4 tokens, the log-probabilities have 3"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prefix_beam_search(**{"log_probs": torch.zeros(2, 4, 3), "lens": torch.tensor([4, 4]), **change})  # type: ignore[arg-type]


def test_log_probabilities_of_nan_show_in_the_score_and_in_no_other_utterance() -> None:
    log_probs = draw_log_probs(3, 2, 5, 4)
    alone = prefix_beam_search(log_probs[1:], torch.tensor([5]), beam=3)[0]
    log_probs[0] = math.nan
    broken, whole = prefix_beam_search(log_probs, torch.tensor([5, 5]), beam=3)
    assert math.isnan(broken[0].score) and whole == alone
