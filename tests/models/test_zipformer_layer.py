"""The order of a layer's parts in training, and when its random decisions act."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from k2ssl.models import zipformer_layer
from k2ssl.models.zipformer import Zipformer, ZipformerConfig
from k2ssl.models.zipformer_layer import LayerSizes, ZipformerLayer
from k2ssl.nn import bypass as bypass_file
from k2ssl.nn.attention import make_uniform
from k2ssl.nn.balancer import Balancer
from k2ssl.nn.positional import relative_positions
from k2ssl.nn.schedule import Clock, Schedule
from k2ssl.nn.whiten import Whiten

SIZES = LayerSizes(dim=12, feedforward_dim=16, num_heads=2, query_head_dim=4, pos_head_dim=2, value_head_dim=3, pos_dim=6, kernel=5)


class ScriptedClock(Clock):
    """Says yes to chances of the given probabilities, no to all others, and counts what it was asked."""

    def __init__(self, *yes: float) -> None:
        super().__init__()
        self.yes = yes
        self.asked: list[float] = []

    def chance(self, probability: float) -> bool:
        self.asked.append(probability)
        return probability in self.yes


@pytest.mark.parametrize("uniform", [False, True])
def test_training_multiplies_each_part_by_its_own_sequence_mask(uniform: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ScriptedClock(*([0.1375] if uniform else []))
    layer = ZipformerLayer(SIZES, Schedule((0, 0.5), (4000, 0.1)), dropout=0.0, clock=clock)
    clock.advance(2000)
    attention, conv1, ff2, conv2, ff3, kept = (
        torch.tensor(m).view(3, 1, 1) for m in ([1.0, 0, 1], [0, 1.0, 1], [1.0, 1, 0], [1, 0, 0.0], [0, 1, 0.0], [1, 1, 0.0])
    )
    rates: list[float] = []
    masks = iter([attention, conv1, ff2, conv2, ff3])

    def draw(shape, rate, clock, like):  # type: ignore[no-untyped-def]
        rates.append(rate)
        return next(masks)

    monkeypatch.setattr(zipformer_layer, "keep_mask", draw)
    monkeypatch.setattr(bypass_file, "keep_mask", lambda shape, rate, clock, like: (rates.append(rate), kept)[1])
    x = start = torch.randn(3, 7, 12)
    positions = relative_positions(7, 6, x.device)
    y = layer(x, positions)
    assert rates == pytest.approx([0.125, 0.125, 0.055, 0.125, 0.055, 0.3])

    clock.advance(2000)
    a = layer.attention_weights(x, positions)
    first = make_uniform(a[:, :1]) if uniform else a[:, :1]
    x = x + layer.feedforward1(x)
    x = x + attention * layer.nonlinear_attention(x, first)
    x = x + attention * layer.self_attention1(x, a)
    x = x + conv1 * layer.convolution1(x)
    x = x + ff2 * layer.feedforward2(x)
    x = start + layer.bypass_mid.scale * (x - start)
    x = x + attention * layer.self_attention2(x, a)
    x = x + conv2 * layer.convolution2(x)
    x = x + ff3 * layer.feedforward3(x)
    x = start + kept * layer.bypass.scale * (layer.norm(x) - start)
    torch.testing.assert_close(y, x)
    assert torch.equal(y[2], start[2])


def test_under_autocast_masks_have_the_dtype_of_what_they_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: list[tuple[torch.dtype, torch.dtype]] = []
    drop = zipformer_layer.drop_sequences

    def watched(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        dtypes.append((x.dtype, mask.dtype))
        return drop(x, mask)

    monkeypatch.setattr(zipformer_layer, "drop_sequences", watched)
    layer = ZipformerLayer(SIZES, Schedule((0, 0.5)), dropout=0.1, clock=ScriptedClock())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(2, 4, 12), relative_positions(4, 6, torch.device("cpu")))
    assert dtypes == [(torch.bfloat16, torch.bfloat16)] * 7 and y.dtype == torch.float32


def test_every_random_decision_is_asked_with_its_scheduled_probability() -> None:
    clock = ScriptedClock()
    layer = ZipformerLayer(SIZES, Schedule((0, 0.5)), dropout=0.1, clock=clock)
    layer(torch.randn(1, 4, 12, requires_grad=True), relative_positions(4, 6, torch.device("cpu")))
    counts = {p: clock.asked.count(p) for p in set(clock.asked)}
    # Balancers: .025 on keys, .5 on ten scheduled ones, .05 on three outputs; Whiteners: .25 each; .5 also for leaving out positions;
    # .25 also for uniform attention; .6 for the limits of two bypasses and a norm; .1 for the penalty on scores
    assert counts == {0.025: 1, 0.5: 10 + 1, 0.05: 3, 0.25: 11 + 1, 0.6: 3, 0.1: 1}
    clock.asked.clear()
    layer.eval()(torch.randn(1, 4, 12, requires_grad=True), relative_positions(4, 6, torch.device("cpu")))
    assert clock.asked == []


def test_layers_come_into_use_one_after_the_other_during_the_warm_up() -> None:
    config = ZipformerConfig.base()
    with torch.device("meta"):
        model = Zipformer(config)
    for i, stack in enumerate(model.stacks):
        window = (4000 * (i + 1) / 7, 4000 * (i + 2) / 7)
        for j, layer in enumerate(stack.layers):
            step = (window[1] - window[0]) / config.num_layers[i]
            (begin, early), (end, late) = layer.bypass.skip_rate.points
            assert (begin, end) == pytest.approx((window[0] + j * step, window[0] + (j + 1) * step))
            assert (early, late) == pytest.approx((0.5, 0.035 * math.sqrt(config.downsampling[i])))
            assert layer.bypass_mid.skip_rate.points == ((0.0, 0.0),)
        if stack.out_bypass is not None:
            assert stack.out_bypass.skip_rate.points == ((0.0, 0.0),)


def test_dropout_inside_feedforwards_falls_from_three_tenths_to_one_tenth() -> None:
    rate = Zipformer(ZipformerConfig.tiny()).stacks[0].layers[0].feedforward2.out_proj.dropout.rate
    assert [rate(count) for count in (0, 10000, 20000, 10**6)] == pytest.approx([0.3, 0.2, 0.1, 0.1])


_P = ((0, 0.5), (8000, 0.125))
# (min positive, max positive, min abs, max abs, probability); a pair of pairs is a schedule; zipformer design table, section 4
BALANCERS: dict[str, tuple[object, object, object, object, object]] = {
    "attention_weights.key_balancer": (0.4, 0.6, 0, 100, 0.025),
    "nonlinear_attention.balancer": (((0, 0.25), (20000, 0.05)), ((0, 0.75), (20000, 0.95)), 0.5, 5, _P),
    "nonlinear_attention_balancer": (0.3, 0.7, ((0, 0.004), (4000, 0.02)), 100, 0.05),
    **{f"feedforward{i}.balancer": (0.3, 1, 0.75, 5, _P) for i in (1, 2, 3)},
    "feedforward2_balancer": (0.3, 0.7, ((0, 0), (4000, 0.1)), 2, 0.05),
    "feedforward3_balancer": (0.3, 0.7, ((0, 0), (4000, 0.2)), 4, 0.05),
    **{f"convolution{i}.gate_balancer": (((0, 0.05), (8000, 0.025)), 1, 1.5, ((0, 5), (8000, 10)), _P) for i in (1, 2)},
    **{f"convolution{i}.balancer": (((0, 0.1), (8000, 0.05)), 1, ((0, 0.2), (20000, 0.5)), 10, _P) for i in (1, 2)},
    "norm_balancer": (0.45, 0.55, 0.2, 4, _P),
    "output_balancer": (0.45, 0.55, 0.1, 4, _P),
}
# (groups, limit at 0 and at 20,000, size of the added gradient)
WHITENERS = {
    "attention_weights.key_whiten": (2, 3, 6, 0.025),
    **{f"self_attention{i}.whiten": (1, 7.5, 22.5, 0.01) for i in (1, 2)},
    "nonlinear_attention.value_whiten": (1, 5, 10, 0.01),
    "nonlinear_attention.whiten": (1, 5, 15, 0.01),
    **{f"feedforward{i}.whiten": (1, 7.5, 15, 0.01) for i in (1, 2, 3)},
    **{f"convolution{i}.whiten": (1, 7.5, 15, 0.01) for i in (1, 2)},
    "output_whiten": (1, 4, 12, 0.01),
}


def test_every_limit_of_the_regularisers_is_the_published_one() -> None:
    layer = ZipformerLayer(SIZES, Schedule((0, 0.5)), dropout=0.1, clock=Clock())

    def values(schedule: Schedule) -> object:
        return schedule.points if len(schedule.points) > 1 else schedule.points[0][1]

    balancers = {
        name: tuple(values(s) for s in (m.min_positive, m.max_positive, m.min_abs, m.max_abs, m.probability))
        for name, m in layer.named_modules()
        if isinstance(m, Balancer)
    }
    whiteners = {
        name: (m.num_groups, m.limit(0), m.limit(20000), m.grad_scale) for name, m in layer.named_modules() if isinstance(m, Whiten)
    }
    assert balancers == BALANCERS and whiteners == WHITENERS
    assert all(m.grad_scale == 0.04 for m in layer.modules() if isinstance(m, Balancer))
    assert all(m.limit.points[-1][0] == 20000 for m in layer.modules() if isinstance(m, Whiten))


def test_every_initial_scale_is_the_published_one() -> None:
    sizes = dataclasses.replace(SIZES, dim=128, feedforward_dim=256, num_heads=4, query_head_dim=32, value_head_dim=12, pos_dim=48)
    layer = ZipformerLayer(sizes, Schedule((0, 0.5)), dropout=0.1, clock=Clock())
    scaled = {"attention_weights.in_proj": 32**-0.25, "attention_weights.linear_pos": 0.05, "nonlinear_attention.out_proj": 0.05}
    scaled |= {f"{part}{i}.out_proj": 0.05 for part in ("self_attention", "convolution") for i in (1, 2)}
    scaled |= {f"feedforward{i}.out_proj": 0.1 for i in (1, 2, 3)}
    found = set()
    for name, module in layer.named_modules():
        if not isinstance(getattr(module, "weight", None), torch.nn.Parameter):
            continue
        # torch's default is uniform within +-1 / sqrt(fan in), for weights and biases
        bound = math.prod(module.weight.shape[1:]) ** -0.5
        scale = scaled.get(name, 1.0)
        assert module.weight.abs().max().item() == pytest.approx(scale * bound, rel=0.03), name
        if module.bias is not None:
            expected = 0.1 * scale if name in scaled else bound
            assert 0.9 * expected < module.bias.abs().max().item() <= expected, name
        found.add(name)
    assert set(scaled) < found
    assert (layer.bypass.scale == 0.5).all() and (layer.bypass_mid.scale == 0.5).all() and layer.norm.log_scale == 1.0
    assert layer.norm.bias.std().item() == pytest.approx(1e-4, rel=0.3)


def test_the_positional_table_is_dropped_out_in_training() -> None:
    model = Zipformer(ZipformerConfig.tiny())
    seen: list[torch.Tensor] = []
    model.stacks[0].layers[0].attention_weights.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    model(torch.randn(1, 400, 48))
    model.eval()(torch.randn(1, 400, 48))
    dropped = (seen[0] == 0) & (seen[1] != 0)
    assert dropped.float().mean().item() == pytest.approx(0.15, abs=0.02)
    torch.testing.assert_close(seen[0][~dropped], seen[1][~dropped] / 0.85)


def test_three_consumers_of_the_attention_weights_read_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Zipformer(ZipformerConfig.tiny()).train()
    layer = next(module for module in encoder.modules() if isinstance(module, ZipformerLayer))
    seen: dict[str, list[tuple[int, torch.Size]]] = {}

    def watch(name: str) -> None:
        module = getattr(layer, name)
        plain = module.forward

        def forward(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            seen.setdefault(name, []).append((weights.untyped_storage().data_ptr(), weights.shape))
            result: torch.Tensor = plain(x, weights)
            return result

        monkeypatch.setattr(module, "forward", forward)

    made: list[torch.Tensor] = []
    layer.attention_weights.register_forward_hook(lambda module, inputs, output: made.append(output))
    for name in ("self_attention1", "self_attention2", "nonlinear_attention"):
        watch(name)
    encoder.clock.chance = lambda probability: False  # type: ignore[method-assign]  # no uniform attention this time
    encoder(torch.randn(2, 9, encoder.input_dim))
    (weights,) = made
    n, heads, frames, _ = weights.shape
    address = weights.untyped_storage().data_ptr()
    assert seen == {
        "self_attention1": [(address, torch.Size((n, heads, frames, frames)))],
        "self_attention2": [(address, torch.Size((n, heads, frames, frames)))],
        "nonlinear_attention": [(address, torch.Size((n, 1, frames, frames)))],
    }
