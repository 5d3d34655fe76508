"""The choice of who computes Swoosh."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from k2ssl.models.k2 import use_swoosh_backend
from k2ssl.nn.activation import Swoosh, SwooshDropoutLinear, swoosh_l, swoosh_r
from k2ssl.nn.schedule import Clock


@pytest.fixture(autouse=True)
def _torch_before_and_after() -> Iterator[None]:
    use_swoosh_backend("auto")
    yield
    use_swoosh_backend("auto")


def outputs(activation: Swoosh, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(1)
    layer = SwooshDropoutLinear(6, 3, activation, Clock(), dropout=0.3).to(dtype)
    x = torch.randn(2, 5, 6, dtype=dtype, requires_grad=True)
    layer.dropout.clock.seed(1, 0, 0, 0)  # type: ignore[attr-defined]
    y = layer(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("activation", [swoosh_l, swoosh_r], ids=["l", "r"])
def test_kernels_of_k2_are_asked_and_give_what_torch_gives(
    activation: Swoosh, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where k2 is not installed, its kernels are played: the wiring is what is tested; tests/k2 hold the kernels against ours."""
    asked: list[str] = []
    formulas = {
        "l": lambda x: (1 + (x - 4).exp()).log() - 0.08 * x - 0.035,
        "r": lambda x: (1 + (x - 1).exp()).log() - 0.08 * x - 0.313261687,
    }

    def forward(name: str, x: Tensor) -> Tensor:
        asked.append(f"value {name}")
        return formulas[name](x)

    def forward_and_derivative(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(f"derivative {name}")
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = formulas[name](x)
            return value.detach(), torch.autograd.grad(value.sum(), x)[0]

    expected = outputs(activation, torch.float32)
    played = types.ModuleType("k2ssl.lattice.swoosh")
    vars(played).update(forward=forward, forward_and_derivative=forward_and_derivative)
    monkeypatch.setitem(sys.modules, "k2ssl.lattice.swoosh", played)
    monkeypatch.setattr("k2ssl.lattice.swoosh", played, raising=False)
    caplog.set_level(logging.INFO, "k2ssl.models.k2")
    use_swoosh_backend("k2")
    torch.testing.assert_close(outputs(activation, torch.float32), expected, rtol=0, atol=1e-5)
    # forward, and both again in the backward pass: two utterances as short as these are one piece
    assert asked == [f"value {activation.name}"] * 2 + [f"derivative {activation.name}"]
    outputs(activation, torch.float64)
    assert len(asked) == 3
    use_swoosh_backend("auto")
    torch.testing.assert_close(outputs(activation, torch.float32), expected, rtol=0, atol=0)
    assert len(asked) == 3
    assert [record.message for record in caplog.records] == ["swoosh: backend k2 (chosen)", "swoosh: backend torch (automatic)"]


def test_a_backend_that_is_unknown_or_does_not_load_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="name is 'triton', allowed are auto, torch, k2"):
        use_swoosh_backend("triton")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "k2", None)
    monkeypatch.delitem(sys.modules, "k2ssl.lattice.package", raising=False)
    with pytest.raises(ValueError, match="name is 'k2', which cannot run here: k2 does not load"):
        use_swoosh_backend("k2")
