"""The stateless predictor and the joint network against their formulas written out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from k2ssl.models.predictor import Joiner, JoinerConfig, Predictor, PredictorConfig, with_start
from k2ssl.nn.schedule import Clock

GOLDEN = {name: torch.from_numpy(array) for name, array in np.load(Path(__file__).parents[1] / "golden" / "transducer_search.npz").items()}
CONFIG = PredictorConfig(vocab_size=11, dim=8, context_size=3)


def predictor(config: PredictorConfig = CONFIG, seed: int = 0) -> Predictor:
    torch.manual_seed(seed)
    return Predictor(config, Clock())


def written_out(model: Predictor, symbols: list[int]) -> Tensor:
    """(C,) output after one context, channel by channel."""
    weight = model.conv.weight
    rows = [model.embedding.weight[symbol] if symbol >= 0 else torch.zeros(weight.shape[0]) for symbol in symbols]
    channels = []
    for out in range(weight.shape[0]):
        first = out // weight.shape[1] * weight.shape[1]
        value = sum(weight[out, c, k] * rows[k][first + c] for c in range(weight.shape[1]) for k in range(len(rows)))
        channels.append(torch.relu(value))
    return torch.stack(channels)


def test_output_equals_the_formula_written_out() -> None:
    model = predictor().eval()
    symbols = torch.tensor([[0, 5, 3, 7], [0, 2, -1, -1]])
    out = model(symbols)
    assert out.shape == (2, 4, 8)
    torch.testing.assert_close(out[0, 3], written_out(model, [5, 3, 7]))
    torch.testing.assert_close(out[0, 0], written_out(model, [-1, -1, 0]))
    torch.testing.assert_close(out[1, 2], written_out(model, [0, 2, -1]))


def test_steps_of_a_search_equal_the_training_forward() -> None:
    model = predictor().eval()
    symbols = with_start(torch.tensor([[5, 3, 7, 1]]))
    out = model(symbols)
    context = torch.tensor([[-1, -1, 0]])
    for u in range(symbols.shape[1]):
        torch.testing.assert_close(model.step(context), out[:, u])
        context = torch.cat([context[:, 1:], symbols[:, min(u + 1, 4)].unsqueeze(1)], dim=1)


def test_context_of_one_symbol_is_the_embedding() -> None:
    model = predictor(replace(CONFIG, context_size=1)).eval()
    symbols = torch.tensor([[0, 5, -1]])
    expected = torch.stack([model.embedding.weight[0], model.embedding.weight[5], torch.zeros(8)])
    torch.testing.assert_close(model(symbols)[0], expected)
    torch.testing.assert_close(model.step(torch.tensor([[5]]))[0], expected[1])


def test_with_start_puts_blank_in_front() -> None:
    assert with_start(torch.tensor([[5, 3], [2, -1]]), blank=7).tolist() == [[7, 5, 3], [7, 2, -1]]


def test_every_parameter_gets_a_gradient_and_balancers_act_in_training_only() -> None:
    symbols = with_start(torch.randint(1, 11, (4, 9), generator=torch.Generator().manual_seed(1)))

    def gradients(model: Predictor) -> list[Tensor]:
        model.zero_grad()
        model(symbols).square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        return [parameter.grad.clone() for parameter in model.parameters()]

    model = predictor()
    plain = gradients(model.eval())
    model.train()
    for name in ("embedding_balancer", "conv_balancer"):
        for other in ("embedding_balancer", "conv_balancer"):
            balancer = getattr(model, other)
            balancer.probability = (lambda _: 1.0) if other == name else (lambda _: 0.0)
        acted = gradients(model)
        assert any(not torch.equal(a, b) for a, b in zip(acted, plain, strict=True)), name
    limits = model.embedding_balancer.limits()
    assert limits == model.conv_balancer.limits()
    assert (limits.min_rms, limits.max_rms) == pytest.approx((0.5 * np.sqrt(np.pi / 2), np.sqrt(np.pi / 2)))


def test_balancers_act_on_one_in_twenty_calls() -> None:
    model = predictor()
    assert model.embedding_balancer.probability(0.0) == model.conv_balancer.probability(1e6) == 0.05


def test_joiner_equals_its_formula_with_and_without_projection() -> None:
    torch.manual_seed(2)
    joiner = Joiner(JoinerConfig(encoder_dim=6, predictor_dim=8, vocab_size=11, dim=5))
    encoder_out, predictor_out = torch.randn(3, 4, 1, 6), torch.randn(3, 1, 2, 8)
    hidden = encoder_out @ joiner.encoder_proj.weight.T + joiner.encoder_proj.bias
    hidden = hidden + predictor_out @ joiner.decoder_proj.weight.T + joiner.decoder_proj.bias
    expected = torch.tanh(hidden) @ joiner.output_linear.weight.T + joiner.output_linear.bias
    assert expected.shape == (3, 4, 2, 11)
    torch.testing.assert_close(joiner(encoder_out, predictor_out), expected)
    projected = joiner(joiner.project_encoder(encoder_out), joiner.project_predictor(predictor_out), project_input=False)
    torch.testing.assert_close(projected, expected)


def test_parameters_carry_upstream_names_and_shapes() -> None:
    def golden(prefix: str) -> dict[str, torch.Size]:
        return {name.removeprefix(prefix): array.shape for name, array in GOLDEN.items() if name.startswith(prefix)}

    model = predictor(PredictorConfig(vocab_size=17, dim=12))
    joiner = Joiner(JoinerConfig(encoder_dim=20, predictor_dim=12, vocab_size=17, dim=16))
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == golden("state.decoder.")
    assert {name: tensor.shape for name, tensor in joiner.state_dict().items()} == golden("state.joiner.")


@pytest.mark.parametrize(
    ("field", "value"), [("vocab_size", 1), ("dim", 0), ("dim", 10), ("context_size", 0), ("blank", 11), ("blank", -1)]
)
def test_bad_predictor_configuration_names_the_field(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"PredictorConfig: {field} is {value}"):
        replace(CONFIG, **{field: value})


def test_bad_joiner_configuration_and_bad_symbols_are_refused() -> None:
    with pytest.raises(ValueError, match="JoinerConfig: dim is 0"):
        JoinerConfig(encoder_dim=6, predictor_dim=8, vocab_size=11, dim=0)
    with pytest.raises(ValueError, match="int64"):
        predictor()(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\(M, 3\) is needed"):
        predictor().step(torch.zeros(2, 2, dtype=torch.int64))
