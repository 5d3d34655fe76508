from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchaudio.models import wav2vec2_model

from k2ssl.models.encoder_output import EncoderOutput
from k2ssl.models.transformer import TransformerConfig, TransformerEncoder
from k2ssl.nn.dropout import Dropout
from k2ssl.nn.schedule import Clock

TINY = TransformerConfig.tiny()
FEATURES = 24  # width before torchaudio's feature projection


def make_encoder(config: TransformerConfig = TINY, seed: int = 0) -> TransformerEncoder:
    torch.manual_seed(seed)
    encoder = TransformerEncoder(config, Clock(seed))
    for name, param in encoder.named_parameters():  # norms and biases away from one and zero, so that a lost one shows
        if "norm" in name or "bias" in name:
            nn.init.normal_(param, mean=float(name.endswith("norm.weight")), std=0.2)
        elif "layers" in name:
            nn.init.normal_(param, std=param.shape[1] ** -0.5)  # attention and feed-forward of visible size
    return encoder


def mask_for(lens: list[int], max_len: int) -> Tensor:
    return torch.arange(max_len)[None, :] >= torch.tensor(lens)[:, None]


def reference_of(config: TransformerConfig) -> nn.Module:
    """torchaudio's encoder (feature projection and Transformer) of the same sizes."""
    return (
        wav2vec2_model(
            extractor_mode="layer_norm" if config.layer_norm_first else "group_norm",
            extractor_conv_layer_config=[(FEATURES, 10, 5)],
            extractor_conv_bias=False,
            encoder_embed_dim=config.dim,
            encoder_projection_dropout=0.1,
            encoder_pos_conv_kernel=config.conv_pos_kernel,
            encoder_pos_conv_groups=config.conv_pos_groups,
            encoder_num_layers=config.num_layers,
            encoder_num_heads=config.num_heads,
            encoder_attention_dropout=config.attention_dropout,
            encoder_ff_interm_features=config.feedforward_dim,
            encoder_ff_interm_dropout=config.activation_dropout,
            encoder_dropout=config.dropout,
            encoder_layer_norm_first=config.layer_norm_first,
            encoder_layer_drop=config.layer_drop,
            aux_num_out=None,
        )
        .encoder.eval()
        .requires_grad_(False)
    )


def copy_weights(ours: TransformerEncoder, theirs: nn.Module) -> None:
    """Write our weights into torchaudio's Transformer, every one of them."""
    state = ours.state_dict()
    names = {"norm.": "layer_norm.", "position.conv.": "pos_conv_embed.conv."}
    layer_names = {
        "attention.out.": "attention.out_proj.",
        "attention_norm.": "layer_norm.",
        "feedforward.up.": "feed_forward.intermediate_dense.",
        "feedforward.down.": "feed_forward.output_dense.",
        "final_norm.": "final_layer_norm.",
    }
    for index in range(ours.num_layers):
        names.update({f"layers.{index}.{our}": f"layers.{index}.{their}" for our, their in layer_names.items()})
        for kind in ("weight", "bias"):
            parts = state.pop(f"layers.{index}.attention.qkv.{kind}").chunk(3)
            state.update({f"layers.{index}.attention.{p}_proj.{kind}": part for p, part in zip("qkv", parts, strict=True)})
    for our, their in names.items():
        for key in [key for key in state if key.startswith(our)]:
            state[their + key[len(our) :]] = state.pop(key)
    theirs.load_state_dict(state, strict=True)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        replace(TINY, conv_pos_kernel=128),
        replace(TINY, conv_pos_kernel=15),  # odd: nothing to cut off
        replace(TINY, num_layers=3, layer_norm_first=True),
        replace(TransformerConfig.base(), num_layers=2),
    ],
    ids=["post-norm", "odd-kernel", "pre-norm", "base-width"],
)
def test_output_and_hidden_equal_torchaudio_with_weights_copied(config: TransformerConfig, padded: bool) -> None:
    ours, theirs = make_encoder(config).eval(), reference_of(config)
    copy_weights(ours, theirs.transformer)
    lens = [37, 53, 1] if padded else [53, 53, 53]
    features = torch.randn(3, 53, FEATURES)
    expected = theirs(features, torch.tensor(lens) if padded else None)
    expected_hidden = theirs.extract_features(features, torch.tensor(lens) if padded else None)
    x = theirs.feature_projection(features)
    output = ours(x, mask_for(lens, 53) if padded else None, return_hidden=True)
    assert len(output.hidden) == len(expected_hidden) == config.num_layers
    for index, length in enumerate(lens):
        assert (output.frames[index, :length] - expected[index, :length]).abs().max() < 1e-4
        for our_layer, their_layer in zip(output.hidden, expected_hidden, strict=True):
            assert (our_layer[index, :length] - their_layer[index, :length]).abs().max() < 1e-4
    assert ours(x, mask_for(lens, 53) if padded else None).hidden == ()


@pytest.mark.parametrize("layer_norm_first", [False, True])
@settings(max_examples=12, deadline=None)
@given(length=st.integers(1, 40), longer=st.integers(1, 60), seed=st.integers(0, 99))
def test_an_utterance_is_the_same_alone_padded_and_batched(layer_norm_first: bool, length: int, longer: int, seed: int) -> None:
    encoder = make_encoder(replace(TINY, layer_norm_first=layer_norm_first)).eval()
    generator = torch.Generator().manual_seed(seed)
    total = length + longer
    batch = torch.randn(2, total, TINY.dim, generator=generator) * 3  # what lies in the padding must not matter
    with torch.no_grad():
        alone = encoder(batch[:1, :length], return_hidden=True)
        padded = encoder(batch[:1], mask_for([length], total), return_hidden=True)
        batched = encoder(batch, mask_for([length, total], total), return_hidden=True)
        unpadded = encoder(batch[1:])
    for other in (padded, batched):
        for left, right in zip((alone.frames, *alone.hidden), (other.frames, *other.hidden), strict=True):
            assert (left[0] - right[0, :length]).abs().max() < 1e-4
            assert right.isfinite().all()
    assert (batched.frames[1] - unpadded.frames[0]).abs().max() < 1e-4


def regularised() -> TransformerConfig:
    return replace(TINY, num_layers=6, dropout=0.2, attention_dropout=0.3, activation_dropout=0.1, layer_drop=0.4)


def train_step(encoder: TransformerEncoder, x: Tensor, mask: Tensor | None, *seed: int) -> list[Tensor]:
    """Output and all gradients of one training pass."""
    encoder.zero_grad()
    encoder.clock.seed(*seed)
    frames = encoder.train()(x, mask).frames
    (frames * torch.linspace(-1, 1, frames.numel()).view_as(frames)).sum().backward()
    return [frames.detach(), *(param.grad.clone() for param in encoder.parameters())]


@pytest.mark.parametrize("padded", [False, True])
def test_the_same_clock_seed_repeats_a_training_step_bit_by_bit(padded: bool) -> None:
    encoder = make_encoder(regularised())
    x, mask = torch.randn(2, 19, TINY.dim), mask_for([19, 11], 19) if padded else None
    first = train_step(encoder, x, mask, 5, 1)
    torch.manual_seed(1234)  # global state plays no part
    again = train_step(copy.deepcopy(encoder), x, mask, 5, 1)
    other = train_step(encoder, x, mask, 5, 2)
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "activation_dropout", "layer_drop"])
def test_each_rate_acts_in_training_alone(rate: str) -> None:
    still = replace(TINY, num_layers=6, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, layer_drop=0.0)
    encoder = make_encoder(replace(still, **{rate: 0.5}))
    x = torch.randn(1, 9, TINY.dim)
    quiet = encoder.eval()(x).frames
    assert torch.equal(quiet, make_encoder(still).eval()(x).frames)
    assert any(not torch.equal(train_step(encoder, x, None, seed)[0], quiet) for seed in range(4))


@pytest.mark.parametrize("layer_norm_first", [False, True])
def test_dropout_stands_after_positions_attention_and_feedforward(layer_norm_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dropout, "forward", lambda self, x: torch.zeros_like(x))  # drop everything: only norms are left
    encoder = make_encoder(replace(TINY, layer_norm_first=layer_norm_first))
    expected = torch.zeros(1, 4, TINY.dim)
    if layer_norm_first:
        expected = encoder.norm(expected)
    else:
        for layer in encoder.layers:
            expected = layer.final_norm(layer.attention_norm(expected))
    assert torch.equal(encoder(torch.randn(1, 4, TINY.dim)).frames, expected)


def test_attention_dropout_differs_between_layers_and_utterances() -> None:
    config = replace(TINY, dropout=0.0, layer_drop=0.0, attention_dropout=0.5)
    attention = make_encoder(config).layers[0].attention.train()
    x = torch.randn(1, 8, TINY.dim).expand(2, -1, -1)
    first, second = attention(x), attention(x)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)


def test_forward_leaves_the_global_generator_as_it_was() -> None:
    encoder = make_encoder(regularised()).train()
    before = torch.get_rng_state()
    encoder(torch.randn(2, 7, TINY.dim, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("layer_norm_first", [False, True])
@pytest.mark.parametrize("layer_drop", [0.0, 0.5, 1.0])
def test_every_parameter_has_a_gradient_whatever_layers_drop(layer_drop: float, layer_norm_first: bool) -> None:
    encoder = make_encoder(replace(TINY, layer_drop=layer_drop, layer_norm_first=layer_norm_first)).train()
    encoder(torch.randn(2, 9, TINY.dim)).frames.square().sum().backward()
    assert [name for name, param in encoder.named_parameters() if param.grad is None] == []
    dropped = [all(not param.grad.any() for param in layer.parameters()) for layer in encoder.layers]
    assert layer_drop == 0.5 or dropped == [layer_drop == 1.0] * TINY.num_layers


def test_a_dropped_layer_passes_its_input_on() -> None:
    encoder = make_encoder(replace(TINY, dropout=0.0, layer_drop=1.0)).train()
    x = torch.randn(2, 9, TINY.dim)
    output = encoder(x, return_hidden=True)
    assert torch.equal(output.frames, encoder.norm(x + encoder.position(x)))
    assert all(torch.equal(hidden, output.frames) for hidden in output.hidden)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layer_norm_first", [False, True])
def test_stopping_after_a_layer_gives_the_same_bits_and_runs_no_later_layer(layer_norm_first: bool, training: bool) -> None:
    encoder = make_encoder(replace(TINY, num_layers=4, layer_drop=0.3, layer_norm_first=layer_norm_first)).train(training)
    x, padding_mask = torch.randn(2, 9, TINY.dim), mask_for([9, 6], 9)
    ran: list[int] = []
    for number, layer in enumerate(encoder.layers, 1):
        layer.register_forward_pre_hook(lambda module, args, number=number: ran.append(number))

    def encode(**options: object) -> EncoderOutput:
        ran.clear()
        encoder.clock.seed(3)
        return encoder(x, padding_mask, **options)

    full = encode(return_hidden=True)
    ran_fully = list(ran)
    assert training or ran_fully == [1, 2, 3, 4]
    for number in range(1, 5):
        stopped = encode(return_hidden=True, stop_after=number)
        assert ran == [layer for layer in ran_fully if layer <= number]
        assert torch.equal(stopped.frames, full.hidden[number - 1])
        assert all(torch.equal(one, two) for one, two in zip(stopped.hidden, full.hidden[:number], strict=True))
        alone = encode(stop_after=number)
        assert torch.equal(alone.frames, stopped.frames) and alone.hidden == ()
    for number in (0, -1, 5):
        with pytest.raises(ValueError, match=f"stop_after is {number}, allowed are layers 1 to 4"):
            encode(stop_after=number)


def test_layers_drop_at_the_configured_rate() -> None:
    encoder = make_encoder(replace(TINY, num_layers=20, dropout=0.0, attention_dropout=0.0, layer_drop=0.3)).train()
    x, dropped = torch.randn(1, 2, TINY.dim), 0
    with torch.no_grad():
        for _ in range(50):
            hidden = encoder(x, return_hidden=True).hidden
            dropped += sum(torch.equal(left, right) for left, right in pairwise(hidden))
    assert 0.24 < dropped / (50 * 19) < 0.36  # four standard deviations


@pytest.mark.parametrize("layer_norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_half_precision_training_is_finite_and_close(layer_norm_first: bool, padded: bool) -> None:
    encoder = make_encoder(replace(TINY, layer_norm_first=layer_norm_first))
    x, mask = torch.randn(2, 33, TINY.dim), mask_for([33, 20], 33) if padded else None
    with torch.autocast("cpu", torch.bfloat16):
        half = train_step(encoder, x, mask, 3)
    full = train_step(encoder, x, mask, 3)
    assert all(tensor.isfinite().all() for tensor in half)
    valid = ~mask if mask is not None else torch.ones(2, 33, dtype=torch.bool)
    assert (half[0].float() - full[0])[valid].abs().max() < 0.1 * full[0].abs().max()


def expected_parameters(config: TransformerConfig) -> int:
    dim, hidden = config.dim, config.feedforward_dim
    attention = 4 * (dim * dim + dim)
    feedforward = dim * hidden + hidden + hidden * dim + dim
    position = dim * (dim // config.conv_pos_groups) * config.conv_pos_kernel + config.conv_pos_kernel + dim
    return config.num_layers * (attention + feedforward + 2 * 2 * dim) + position + 2 * dim


@pytest.mark.parametrize(
    ("config", "frontend", "final_dim", "total"),
    [(TransformerConfig.base(), 4_200_448, 256, 94.7e6), (TransformerConfig.large(), 4_206_592, 768, 316.6e6)],
    ids=["base", "large"],
)
def test_base_and_large_have_the_published_size(config: TransformerConfig, frontend: int, final_dim: int, total: float) -> None:
    with torch.device("meta"):
        encoder = TransformerEncoder(config)
    count = sum(param.numel() for param in encoder.parameters())
    assert count == expected_parameters(config)
    dim, classes = config.dim, 504
    around = frontend + 2 * 512 + 512 * dim + dim + dim + dim * final_dim + final_dim + classes * final_dim
    assert count + around == pytest.approx(total, abs=0.1e6)  # convolutions, norm, projection, mask embedding, head, label embeddings


def test_initial_weights_are_those_of_bert_and_wav2vec2() -> None:
    torch.manual_seed(0)
    config = replace(TransformerConfig.base(), num_layers=1)
    encoder = TransformerEncoder(config)
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.02), name
            assert not module.bias.any(), name
    conv = encoder.position.conv
    assert conv.weight.std().item() == pytest.approx((4 / (128 * 768)) ** 0.5, rel=0.02)
    assert conv.parametrizations.weight.original0.shape == (1, 1, 128)  # one gain per tap
    assert not conv.bias.any()


def test_encoder_tells_its_sizes_and_shares_the_clock() -> None:
    clock = Clock(1)
    encoder = TransformerEncoder(TINY, clock)
    assert (encoder.input_dim, encoder.output_dim, encoder.num_layers) == (32, 32, 2)
    assert encoder.clock is clock
    assert {id(module.clock) for module in encoder.modules() if hasattr(module, "clock")} == {id(clock)}
    assert TransformerEncoder(TINY).clock is not TransformerEncoder(TINY).clock


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 0),
        ("dim", 30),
        ("feedforward_dim", 0),
        ("num_heads", 5),
        ("conv_pos_groups", 3),
        ("conv_pos_kernel", 0),
        ("dropout", 1.0),
        ("attention_dropout", -0.1),
        ("activation_dropout", float("nan")),
        ("layer_drop", 1.1),
    ],
)
def test_a_bad_field_is_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{value}.*needed|dim {value}"):
        replace(TINY, **{field: value})


@pytest.mark.parametrize(
    ("x", "mask", "named"),
    [
        (torch.zeros(2, 5), None, "x has shape"),
        (torch.zeros(2, 5, 31), None, "x has shape"),
        (torch.zeros(2, 0, 32), None, "x has shape"),
        (torch.zeros(2, 5, 32), torch.zeros(2, 5), "padding_mask has"),
        (torch.zeros(2, 5, 32), torch.zeros(2, 4, dtype=torch.bool), "padding_mask has"),
    ],
)
def test_a_bad_input_is_named(x: Tensor, mask: Tensor | None, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TransformerEncoder(TINY)(x, mask)
