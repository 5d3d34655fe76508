"""The attention weights of a layer: computed once, handed to three consumers, copied for none."""

from __future__ import annotations

from typing import Any

import torch

from k2ssl.models.zipformer import Zipformer, ZipformerConfig
from k2ssl.models.zipformer_layer import ZipformerLayer


def test_three_consumers_of_the_attention_weights_read_the_same_memory(monkeypatch: Any) -> None:
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
