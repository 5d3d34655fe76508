"""Encoders that recompute their layers in the backward pass train exactly as those that remember everything."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from k2ssl.batch import PretrainBatch
from k2ssl.models.hubert import EncoderConfig, HubertConfig, HubertModel
from k2ssl.models.transformer import TransformerConfig
from k2ssl.optim.scaled_adam import ScaledAdam

_TRANSFORMER = dataclasses.replace(TransformerConfig.tiny(), num_layers=6, layer_drop=0.3, activation_dropout=0.1)
_ENCODERS = {
    "zipformer": HubertConfig.tiny().encoder,
    "transformer": _TRANSFORMER,
    "transformer, pre-norm": dataclasses.replace(_TRANSFORMER, layer_norm_first=True),
}


def _model(encoder: EncoderConfig, recompute_layers: bool) -> HubertModel:
    torch.manual_seed(0)
    model = HubertModel(dataclasses.replace(HubertConfig.tiny(), encoder=encoder, input_dropout=0.1))
    model.encoder.recompute_layers = recompute_layers
    return model


def _batch(model: HubertModel, generator: torch.Generator, samples: int = 6000) -> PretrainBatch:
    labels = torch.randint(0, 16, (2, model.frontend.num_frames(samples)), generator=generator)
    labels[1, model.frontend.num_frames(samples - 1700) :] = -1
    audio = torch.randn(2, samples, generator=generator)
    return PretrainBatch(audio, (labels,), torch.tensor([samples, samples - 1700]))


def _train(encoder: EncoderConfig, recompute_layers: bool, half: bool, steps: int = 8) -> tuple[list[Tensor], list[object]]:
    """Losses and gradients of some steps, of two micro-batches each, and the clock's state after each pass."""
    model = _model(encoder, recompute_layers)
    optimizer = ScaledAdam(model.named_parameters(), lr=0.02, clipping_scale=2.0)
    generator = torch.Generator().manual_seed(4)
    values: list[Tensor] = []
    clocks: list[object] = []
    for step in range(steps):
        model.clock.advance(step * 50.0)
        for micro in range(2):
            model.clock.seed(7, step, micro)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = model(_batch(model, generator)).loss
            clocks.append(model.clock.state_dict())
            loss.backward()
            clocks.append(model.clock.state_dict())
            values.append(loss.detach())
        values += [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return values, clocks


def _plain(state: object) -> object:
    """Tensors as lists, so that states compare."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, Tensor) else state


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", _ENCODERS)
def test_losses_gradients_and_clock_are_bit_equal_with_and_without(name: str, half: bool) -> None:
    plain, recomputed = (_train(_ENCODERS[name], recompute_layers, half) for recompute_layers in (False, True))
    assert all(torch.isfinite(value).all() for value in plain[0])
    assert [i for i, (one, two) in enumerate(zip(plain[0], recomputed[0], strict=True)) if not torch.equal(one, two)] == []
    assert _plain(plain[1][-1]) == _plain(recomputed[1][-1])
    assert all(_plain(one) == _plain(two) for one, two in zip(plain[1], recomputed[1], strict=True))
    if name == "zipformer":  # some Whiten acted, so that its flags were compared
        assert sum(int(state["flags_pending"][0].sum()) for state in plain[1][1::2] if state["flags_pending"] is not None) > 20


def _saved_bytes(encoder: EncoderConfig, recompute_layers: bool, training: bool = True) -> int:
    """Bytes that the encoder keeps for its backward pass, each storage counted once, parameters not at all."""
    model = _model(encoder, recompute_layers).encoder.train(training)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    parameters = set(storages)
    x = torch.randn(2, 200, model.input_dim, requires_grad=True)

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # kept, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in parameters)


@pytest.mark.parametrize(("name", "least"), [("zipformer", 10), ("transformer", 4), ("transformer, pre-norm", 4)])
def test_much_less_is_kept_for_the_backward_pass(name: str, least: float) -> None:
    encoder = _ENCODERS[name]
    if isinstance(encoder, TransformerConfig):
        encoder = dataclasses.replace(encoder, layer_drop=0.0)
    ratio = _saved_bytes(encoder, False) / _saved_bytes(encoder, True)
    assert ratio > least


@pytest.mark.parametrize("name", ["zipformer", "transformer"])
def test_layers_run_twice_in_training_only(name: str) -> None:
    encoder = dataclasses.replace(_TRANSFORMER, layer_drop=0.0) if name == "transformer" else _ENCODERS[name]
    model = _model(encoder, True).encoder
    layers = [module for parent, module in model.named_modules() if parent.rpartition(".")[0].endswith("layers")]
    assert len(layers) == model.num_layers
    calls: list[object] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: calls.append(module))
    x = torch.randn(1, 20, model.input_dim, requires_grad=True)

    def calls_per_layer(recompute_layers: bool, training: bool, grad: bool) -> float:
        calls.clear()
        model.recompute_layers = recompute_layers
        model.train(training)
        with torch.set_grad_enabled(grad):
            output = model(x, return_hidden=True)
        if grad:
            sum(hidden.sum() for hidden in output.hidden).backward()
        return len(calls) / len(layers)

    assert [calls_per_layer(*case) for case in ((True, True, True), (True, False, True), (True, True, False), (False, True, True))] == [
        2,
        1,
        1,
        1,
    ]
