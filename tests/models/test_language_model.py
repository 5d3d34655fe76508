"""The LSTM language model: its states against whole sentences, in both searches that use it; its loss; and what it refuses to load."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from k2ssl.decode import transducer_history
from k2ssl.decode.ctc_beam import prefix_beam_search
from k2ssl.decode.transducer import modified_beam_search
from k2ssl.models.language_model import LanguageModel, LanguageModelConfig, language_model_to_dict, load_language_model
from k2ssl.models.predictor import Joiner, JoinerConfig, Predictor, PredictorConfig
from k2ssl.nn.schedule import Clock

CPU = torch.device("cpu")
VOCAB = 5


def make_lm(seed: int = 0, dropout: float = 0.1) -> LanguageModel:
    """Weights so large that every token of the past matters."""
    torch.manual_seed(seed)
    model = LanguageModel(LanguageModelConfig(VOCAB, dim=8, num_layers=2, dropout=dropout))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model.eval()


def from_the_start(lm: LanguageModel, tokens: list[int]) -> Tensor:
    """(V,) log-probabilities after these tokens, the sentence computed as a whole; 0 is the end."""
    with torch.no_grad():
        return lm.logits(torch.tensor([[0, *tokens]]))[0, -1].log_softmax(-1)


class Forgetful:
    """The same model without states: it is told the tokens so far and computes each hypothesis from the start."""

    vocab_size = VOCAB

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm

    def start(self, batch: int, device: torch.device) -> Tensor:
        return torch.zeros(batch, 30, dtype=torch.int64)  # 0 where there is no token yet

    def log_probs(self, state: Tensor) -> Tensor:
        rows = torch.stack([from_the_start(self.lm, row[row > 0].tolist()) for row in state])
        rows[:, 0] = 0.0
        return rows

    def advance(self, state: Tensor, token: Tensor) -> Tensor:
        state = state.clone()
        state[torch.arange(len(state)), (state > 0).sum(1)] = token
        return state

    def final(self, state: Tensor) -> Tensor:
        return torch.stack([from_the_start(self.lm, row[row > 0].tolist())[0] for row in state])


def batch_of(*sentences: list[int], padding: int = 0) -> Any:
    longest = max(map(len, sentences))
    tokens = torch.tensor([[*sentence, *[padding] * (longest - len(sentence))] for sentence in sentences])
    return SimpleNamespace(tokens=tokens, token_lens=torch.tensor(list(map(len, sentences))))


def test_states_picked_and_repeated_by_index_are_those_of_their_tokens() -> None:
    lm, draw = make_lm(), torch.Generator().manual_seed(1)
    state, histories = lm.start(3, CPU), [[] for _ in range(3)]
    for _ in range(6):
        rows = torch.randint(len(histories), (4,), generator=draw)
        token = torch.randint(1, VOCAB, (4,), generator=draw)
        state = lm.advance(state[rows], token)
        histories = [[*histories[row], int(symbol)] for row, symbol in zip(rows, token, strict=True)]
        expected = torch.stack([from_the_start(lm, history) for history in histories])
        torch.testing.assert_close(lm.log_probs(state)[:, 1:], expected[:, 1:], rtol=0, atol=1e-5)
        torch.testing.assert_close(lm.final(state), expected[:, 0], rtol=0, atol=1e-5)
    assert state.shape == (4, 2, 2, 8)


def test_tokens_and_the_end_share_all_probability_and_blank_has_none() -> None:
    lm = make_lm()
    state = lm.advance(lm.start(2, CPU), torch.tensor([1, 4]))
    log_probs = lm.log_probs(state)
    assert torch.equal(log_probs[:, 0], torch.zeros(2))
    torch.testing.assert_close(log_probs[:, 1:].exp().sum(1) + lm.final(state).exp(), torch.ones(2))
    assert not log_probs.requires_grad and not state.requires_grad


def test_asking_a_state_does_not_change_it_nor_does_training_mode() -> None:
    lm = make_lm(dropout=0.5)
    state = lm.start(2, CPU)
    before = state.clone()
    first = lm.log_probs(state)
    lm.advance(state, torch.tensor([1, 2]))
    lm.train()
    assert torch.equal(state, before) and torch.equal(lm.log_probs(state), first)
    assert torch.equal(lm.start(2, CPU), before)


def test_the_loss_is_that_of_all_tokens_and_ends_whatever_stands_at_padding() -> None:
    lm, sentences = make_lm(), ([1, 2, 3, 4], [4], [2, 2])
    output = lm(batch_of(*sentences))
    expected = 0.0
    for sentence in sentences:
        for place, token in enumerate([*sentence, 0]):
            expected -= from_the_start(lm, sentence[:place])[token].item()
    assert output.loss.item() == pytest.approx(expected, rel=1e-5) and int(output.num_targets) == 7 + 3
    assert torch.equal(lm(batch_of(*sentences, padding=3)).loss, output.loss)


def test_dropout_draws_from_the_models_clock_alone() -> None:
    lm, batch = make_lm(dropout=0.5).train(), batch_of([1, 2, 3], [4])

    def loss(*seed: int) -> float:
        lm.clock.seed(*seed)
        return lm(batch).loss.item()

    state = torch.get_rng_state()
    assert loss(1) == loss(1) != loss(2)
    assert torch.equal(torch.get_rng_state(), state)
    lm.eval()
    assert loss(1) == loss(2)


@pytest.mark.parametrize("skip_unchanged", [True, False])
def test_the_transducer_beam_keeps_the_state_of_every_hypothesis(monkeypatch: pytest.MonkeyPatch, skip_unchanged: bool) -> None:
    monkeypatch.setattr(transducer_history, "waiting_is_free", lambda device: skip_unchanged)
    torch.manual_seed(3)
    predictor = Predictor(PredictorConfig(VOCAB, dim=8), Clock()).eval()
    joiner = Joiner(JoinerConfig(8, 8, VOCAB, dim=8)).eval()
    with torch.no_grad():
        joiner.output_linear.weight.mul_(4.0)
    frames, lens, lm = torch.randn(3, 9, 8), torch.tensor([9, 4, 7]), make_lm()

    def search(model: Any) -> Any:
        return modified_beam_search(predictor, joiner, frames, lens, beam=4, num_hypotheses=4, lm=model, lm_scale=0.7 * (model is not None))

    assert_same(search(lm), search(Forgetful(lm)))
    assert [row[0].tokens for row in search(lm)] != [row[0].tokens for row in search(None)]


def test_the_ctc_beam_keeps_the_state_of_every_hypothesis() -> None:
    torch.manual_seed(4)
    log_probs, lens, lm = (1.5 * torch.randn(3, 9, VOCAB)).log_softmax(-1), torch.tensor([9, 4, 7]), make_lm()

    def search(model: Any) -> Any:
        return prefix_beam_search(log_probs, lens, beam=5, num_hypotheses=5, lm=model, lm_scale=0.7 * (model is not None))

    assert_same(search(lm), search(Forgetful(lm)))
    assert [row[0].tokens for row in search(lm)] != [row[0].tokens for row in search(None)]


def assert_same(found: Any, expected: Any) -> None:
    assert sum(len(hypothesis.tokens) for row in expected for hypothesis in row) > 20, "too little for states to go wrong"
    assert [[one.tokens for one in row] for row in found] == [[one.tokens for one in row] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert [one.score for one in row] == pytest.approx([one.score for one in wanted], abs=1e-4)


def test_a_ctc_beam_for_all_prefixes_finds_the_weighted_sum() -> None:
    torch.manual_seed(5)
    log_probs, lm = torch.randn(1, 3, VOCAB).log_softmax(-1), make_lm()
    found = prefix_beam_search(log_probs, torch.tensor([3]), beam=200, num_hypotheses=100, lm=lm, lm_scale=0.5, token_score=0.3)[0]
    sums: dict[tuple[int, ...], float] = {}
    for path in product(range(VOCAB), repeat=3):
        tokens = tuple(s for i, s in enumerate(path) if s and (i == 0 or path[i - 1] != s))
        probability = sum(log_probs[0, t, symbol].item() for t, symbol in enumerate(path))
        sums[tokens] = torch.logaddexp(torch.tensor(sums.get(tokens, -torch.inf)), torch.tensor(probability)).item()
    expected = {
        tokens: total
        + 0.5 * sum(from_the_start(lm, list(tokens[:place]))[token].item() for place, token in enumerate((*tokens, 0)))
        + 0.3 * len(tokens)
        for tokens, total in sums.items()
    }
    assert {one.tokens: one.score for one in found} == pytest.approx(expected, abs=1e-4)


# --- what is refused -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 1}, "vocab_size is 1, at least 2"),
        ({"dim": 0}, "dim is 0, at least 1"),
        ({"num_layers": 0}, "num_layers is 0, at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0, allowed is 0 <= dropout < 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
    ],
)
def test_sizes_out_of_range_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"LanguageModelConfig: {message}"):
        LanguageModelConfig(**{"vocab_size": VOCAB, **change})


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_tokens_that_the_model_does_not_have_are_refused(token: int) -> None:
    make_lm().check_batch(batch_of([1, VOCAB - 1]))
    with pytest.raises(ValueError, match=f"tokens from .*{token}.*, allowed are 0..4"):
        make_lm().check_batch(batch_of([1, token]))


def test_anything_may_stand_at_padding() -> None:
    batch = batch_of([1, 2, 3], [4])
    batch.tokens[1, 1:] = torch.tensor([-1, 77])
    make_lm().check_batch(batch)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_type_has_states_of_that_type(dtype: torch.dtype) -> None:
    exact, lm = make_lm(), make_lm().to(dtype)
    states = [model.advance(model.start(2, CPU), torch.tensor([1, 3])) for model in (exact, lm)]
    assert states[1].dtype == dtype
    torch.testing.assert_close(lm.log_probs(states[1]), exact.log_probs(states[0]), rtol=0, atol=1e-5 if dtype == torch.float64 else 0.1)


def saved(path: Path, lm: LanguageModel, **changes: Any) -> Path:
    content = {"config": language_model_to_dict(lm.config), "model": lm.state_dict(), "tokenizer_sha256": "abc" * 20}
    torch.save({**content, **changes}, path)
    return path


def test_a_loaded_model_is_the_saved_one_without_dropout_and_draws_nothing(tmp_path: Path) -> None:
    lm = make_lm(7)
    path, state = saved(tmp_path / "lm", lm), torch.get_rng_state()
    found = load_language_model(path, "abc" * 20)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.config == lm.config and not found.training and not any(p.requires_grad for p in found.parameters())
    assert all(torch.equal(value, lm.state_dict()[name]) for name, value in found.state_dict().items())


def test_other_files_and_models_of_another_tokenizer_are_refused_by_name(tmp_path: Path) -> None:
    lm = make_lm()
    other = copy.deepcopy(lm.state_dict())
    other["output.bias"] = torch.zeros(3)
    cases: dict[str, dict[str, Any]] = {
        r"lm: the language model is of another tokenizer than the recognition model: sha256 abcabc.*, xyz": {},
        r"lm: the language model is of another tokenizer .* sha256 None": {"tokenizer_sha256": None},
        r"lm: holds no language model; an ARPA file or a checkpoint of k2ssl.bin.train_lm is needed": {"config": {"kind": "asr"}},
        r"lm: the weights under 'model' do not fit.*output\.bias": {"model": other, "tokenizer_sha256": "xyz"},
    }
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=f"(?s){message}"):
            load_language_model(saved(tmp_path / "lm", lm, **changes), "xyz")
