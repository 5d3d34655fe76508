"""The Zipformer against recorded numbers, and what it must not depend on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2ssl.models.encoder_output import EncoderOutput
from k2ssl.models.import_state import import_state_dict
from k2ssl.models.zipformer import Zipformer, ZipformerConfig


@pytest.fixture
def recorded(golden, recorded_encoder):
    arrays = golden("zipformer")
    model = Zipformer(recorded_encoder).eval()
    import_state_dict(model, {k.removeprefix("state."): v for k, v in arrays.items() if k.startswith("state.")}, "icefall")
    return model, {key: value.transpose(0, 1) if value.ndim == 3 else value for key, value in arrays.items()}


def test_the_recorded_sizes_are_the_ones_tested(golden, recorded_encoder) -> None:
    names = {
        "downsampling_factor": "downsampling",
        "num_encoder_layers": "num_layers",
        "encoder_dim": "dim",
        "encoder_unmasked_dim": "unmasked_dim",
        "num_heads": "num_heads",
        "feedforward_dim": "feedforward_dim",
        "cnn_module_kernel": "kernel",
    }
    for recording in ("zipformer", "hubert_ce"):
        arrays = golden(recording)
        assert {ours: tuple(arrays[f"cfg.{theirs}"].tolist()) for theirs, ours in names.items()} == {
            ours: getattr(recorded_encoder, ours) for ours in names.values()
        }


def test_the_output_agrees_with_the_recorded_one(recorded, agreement) -> None:
    model, arrays = recorded
    agreement.absolute("zipformer output", model(arrays["x"]).frames, arrays["y"], 1e-4)


def test_the_output_under_a_padding_mask_agrees_with_the_recorded_one(recorded, agreement) -> None:
    model, arrays = recorded
    padding_mask = torch.arange(arrays["x"].shape[1]).unsqueeze(0) >= arrays["x_lens"].unsqueeze(1)
    y = model(arrays["x"], padding_mask).frames
    for i, length in enumerate(arrays["x_lens"].tolist()):
        agreement.absolute("zipformer output, padding mask", y[i, :length], arrays["y_masked"][i, :length], 1e-4)


def test_the_input_gradient_agrees_with_the_recorded_one(recorded, agreement, regularise_as_recorded) -> None:
    model, arrays = recorded
    regularise_as_recorded(model, "zipformer")
    x = arrays["x"].clone().requires_grad_()
    model(x).frames.backward(arrays["dy"])
    agreement.absolute("zipformer input gradient (see tests/golden/README.md)", x.grad, arrays["dx"], 1e-4)
    assert (x.grad - arrays["dx"]).norm() < 1e-6 * arrays["dx"].norm()


def test_the_input_gradient_in_evaluation_is_that_of_the_function_itself(recorded) -> None:
    model, arrays = recorded
    model.double()
    x, dy = arrays["x"].double().requires_grad_(), arrays["dy"].double()
    model(x).frames.backward(dy)
    direction = torch.randn_like(x)
    with torch.no_grad():
        plus, minus = ((model(x + sign * 1e-6 * direction).frames * dy).sum() for sign in (1, -1))
    assert (x.grad * direction).sum().item() == pytest.approx(((plus - minus) / 2e-6).item(), rel=1e-6)


@pytest.fixture(scope="module")
def tiny() -> Zipformer:
    torch.manual_seed(1)
    model = Zipformer(ZipformerConfig.tiny()).eval()
    for stack in model.stacks:
        if stack.downsample is not None:
            torch.nn.init.normal_(stack.downsample.bias)  # at its initial value of 0 a wrong order of weights would not show
    return model


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 40), padding=st.integers(0, 20), others=st.integers(0, 2), seed=st.integers(0, 1000))
def test_an_utterance_has_the_same_output_alone_padded_and_in_a_batch(
    tiny: Zipformer, length: int, padding: int, others: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(1 + others, length + padding, tiny.input_dim)
    padding_mask = torch.zeros(1 + others, length + padding, dtype=torch.bool)
    padding_mask[0, length:] = True
    x[0, length:] = 100.0  # what lies in the padding must not matter
    with torch.no_grad():
        alone = tiny(x[:1, :length], return_hidden=True)
        batched = tiny(x, padding_mask, return_hidden=True)
    assert torch.isfinite(batched.frames).all()
    torch.testing.assert_close(batched.frames[:1, :length], alone.frames, atol=1e-4, rtol=0)
    for one, two in zip((*alone.hidden, *alone.stacks), (*batched.hidden, *batched.stacks), strict=True):
        torch.testing.assert_close(two[:1, :length], one, atol=1e-4, rtol=0)


def test_equal_seeds_give_bit_equal_outputs_and_gradients_in_training() -> None:
    model = Zipformer(ZipformerConfig.tiny())
    x = torch.randn(3, 37, model.input_dim)

    def step(seed: int) -> list[torch.Tensor]:
        model.zero_grad()
        model.clock.seed(seed)
        model.clock.advance(100)
        y = model(x).frames
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in model.parameters())]

    torch.rand(100)
    first, again, other = step(5), step(5), step(6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("batch_count", [0, 3000, 60000])
def test_every_parameter_has_a_gradient_in_every_training_step(batch_count: int) -> None:
    model = Zipformer(ZipformerConfig.tiny())
    for seed in range(6):
        model.zero_grad()
        model.clock.seed(seed)
        model.clock.advance(batch_count)
        model(torch.randn(2, 21, model.input_dim)).frames.sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_hidden_outputs_are_one_per_layer_and_one_per_stack_at_the_full_rate(tiny: Zipformer) -> None:
    out = tiny(torch.randn(2, 19, tiny.input_dim), return_hidden=True)
    assert [tuple(h.shape) for h in out.hidden] == [(2, 19, 48), (2, 19, 64), (2, 19, 96), (2, 19, 96)]
    assert [tuple(h.shape) for h in out.stacks] == [(2, 19, 48), (2, 19, 64), (2, 19, 96)]
    assert torch.equal(out.frames, out.stacks[-1]) and tiny(torch.randn(1, 3, 48)).hidden == ()


@pytest.mark.parametrize("training", [False, True])
def test_stopping_after_a_layer_gives_the_same_bits_and_runs_no_later_layer(training: bool) -> None:
    torch.manual_seed(2)
    model = Zipformer(dataclasses.replace(ZipformerConfig.tiny(), num_layers=(2, 1, 2))).train(training)
    x, padding_mask = torch.randn(2, 19, 48), torch.zeros(2, 19, dtype=torch.bool)
    padding_mask[1, 13:] = True
    ran: list[int] = []
    layers = [layer for stack in model.stacks for layer in stack.layers]
    for number, layer in enumerate(layers, 1):
        layer.register_forward_pre_hook(lambda module, args, number=number: ran.append(number))

    def encode(**options: object) -> EncoderOutput:
        ran.clear()
        model.clock.seed(3)
        return model(x, padding_mask, **options)

    full = encode(return_hidden=True)
    assert len(full.hidden) == 5
    for number, stacks in enumerate([0, 1, 2, 2, 3], 1):
        stopped = encode(return_hidden=True, stop_after=number)
        assert ran == list(range(1, number + 1))
        assert torch.equal(stopped.frames, full.hidden[number - 1])
        assert len(stopped.hidden) == number and len(stopped.stacks) == stacks
        for one, two in zip((*stopped.hidden, *stopped.stacks), (*full.hidden[:number], *full.stacks[:stacks]), strict=True):
            assert torch.equal(one, two)
        alone = encode(stop_after=number)
        assert torch.equal(alone.frames, stopped.frames) and alone.hidden == alone.stacks == ()
    for number in (0, -1, 6):
        with pytest.raises(ValueError, match=f"stop_after is {number}, allowed are layers 1 to 5"):
            encode(stop_after=number)


def test_each_output_channel_comes_from_the_last_stack_that_has_it() -> None:
    config = dataclasses.replace(ZipformerConfig.tiny(), dim=(32, 96, 48), unmasked_dim=(32, 48, 48))
    out = Zipformer(config).eval()(torch.randn(1, 9, 32), return_hidden=True)
    assert torch.equal(out.frames, torch.cat([out.stacks[2], out.stacks[1][..., 48:]], dim=-1))


def test_training_masks_whole_feature_ranges_of_a_sequence_in_all_stacks_alike() -> None:
    model = Zipformer(ZipformerConfig.tiny())
    first = second = 0
    for _ in range(20):
        masks = model._draw_feature_masks(torch.zeros(100, 5, 48))
        columns = [
            [mask[:, 0, :u].min(1)[0], mask[:, 0, u : u + (d - u) // 2], mask[:, 0, u + (d - u) // 2 :]]
            for mask, u, d in zip(masks, (32, 48, 64), (48, 64, 96), strict=True)
        ]
        for never, half, rest in columns:
            assert (never == 1).all() and (half.min(1)[0] == half.max(1)[0]).all() and (rest.max(1)[0] <= half.max(1)[0]).all()
            assert torch.equal(half[:, 0], columns[0][1][:, 0]) and torch.equal(rest[:, 0], columns[0][2][:, 0])
        first += int((columns[0][1][:, 0] == 0).sum())
        second += int((columns[0][2][:, 0] == 0).sum())
    assert first / 2000 == pytest.approx(0.125, abs=0.03) and second / 2000 == pytest.approx(1 - 0.875**2, abs=0.04)


def test_the_feature_mask_applies_before_the_first_and_after_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Zipformer(ZipformerConfig.tiny())
    masks = [(torch.rand(2, 1, dim) > 0.5).float() for dim in model.config.dim]
    monkeypatch.setattr(model, "_draw_feature_masks", lambda x: masks)
    inputs: list[torch.Tensor] = []
    for layer in model.stacks[2].layers:
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    out = model(torch.randn(2, 9, 48), return_hidden=True)
    for x in (*inputs, *out.hidden[2:]):
        assert not x[(masks[2] == 0).expand_as(x)].any() and x.any()
    assert len(inputs) == 2


def test_bfloat16_autocast_trains_and_stays_close() -> None:
    model = Zipformer(ZipformerConfig.tiny())
    x = torch.randn(2, 30, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).frames.float().square().sum().backward()
        reduced = model.eval()(x).frames.float()
    full = model(x).frames
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.parameters())
    assert (reduced - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize(("config", "millions"), [(ZipformerConfig.base(), 89.87), (ZipformerConfig.large(), 301.1)])
def test_published_sizes_have_the_published_number_of_parameters(config: ZipformerConfig, millions: float) -> None:
    with torch.device("meta"):
        model = Zipformer(config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": (15, 14, 7)}, r"kernel\[1\] is 14, allowed are odd numbers"),
        ({"unmasked_dim": (32, 65, 64)}, r"unmasked_dim\[1\] is 65, allowed is at most dim\[1\] = 64"),
        ({"num_heads": (2, 2)}, "lengths are .*'num_heads': 2"),
        ({"dim": (48, 0, 96)}, r"dim\[1\] is 0, allowed are whole numbers >= 4"),
        ({"downsampling": (1, 2.0, 4)}, r"downsampling\[1\]: is 2\.0 of type float, int is needed"),
        ({"pos_dim": 15}, "pos_dim is 15, allowed are even numbers"),
        ({"query_head_dim": 0}, "query_head_dim is 0"),
        ({"dropout": (0.3, 1.0)}, "dropout is"),
        ({"warmup": 0.0}, "warmup is 0.0"),
    ],
)
def test_impossible_sizes_are_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ZipformerConfig.tiny(), **changes)


def test_frames_and_masks_of_the_wrong_shape_are_refused(tiny: Zipformer) -> None:
    with pytest.raises(ValueError, match=r"x has shape \(2, 5, 47\) .* allowed are floats of shape \(N, T >= 1, 48\)"):
        tiny(torch.zeros(2, 5, 47))
    with pytest.raises(ValueError, match="padding_mask has shape"):
        tiny(torch.zeros(2, 5, 48), torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"torch\.float32, allowed is \(2, 5\) and torch\.bool"):
        tiny(torch.zeros(2, 5, 48), torch.zeros(2, 5))
