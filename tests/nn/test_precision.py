"""The dtype of products: autocast's where it is on."""

from __future__ import annotations

import pytest
import torch

from k2ssl.nn.precision import product_dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_autocast_it_is_that_of_the_factor(dtype: torch.dtype) -> None:
    assert product_dtype(torch.zeros(1, dtype=dtype)) == dtype


def test_with_autocast_it_is_that_of_autocast_whatever_the_factor_is() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(torch.zeros(1)) == torch.bfloat16
        assert product_dtype(torch.zeros(1, dtype=torch.float16)) == (torch.zeros(1, 1) @ torch.zeros(1, 1)).dtype
