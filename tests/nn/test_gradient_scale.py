from __future__ import annotations

import pytest
import torch

from k2ssl.nn.gradient_scale import scale_gradient


@pytest.mark.parametrize("scale", [0.1, 1.0, 2.5])
def test_forward_is_the_identity_and_the_gradient_is_scaled(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(3, 5, dtype=torch.float64, generator=generator)

    y = scale_gradient(x, scale)
    (y * weight).sin().sum().backward()

    assert torch.equal(y, x)
    plain = weight * (x.detach() * weight).cos()
    torch.testing.assert_close(x.grad, scale * plain, rtol=1e-12, atol=0)
