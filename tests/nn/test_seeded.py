from __future__ import annotations

import pytest
import torch
from torch import Tensor

from k2ssl.nn.seeded import seeded_default_generator

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def state_of(device: str) -> Tensor:
    return torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()


@pytest.mark.parametrize("device", DEVICES)
def test_draws_follow_the_seed_and_the_outer_state_returns(device: str) -> None:
    torch.manual_seed(0)
    torch.randn(3, device=device)  # an odd count leaves half a pair of normals in the CPU state
    before, draws = state_of(device), []
    for seed in (7, 7, 2**63 - 1):
        with seeded_default_generator(seed, torch.device(device)):
            draws.append(torch.randn(5, device=device))
        assert torch.equal(state_of(device), before)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_outer_state_returns_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded_default_generator(1, torch.device("cpu")):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_another_kind_of_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device is meta"), seeded_default_generator(1, torch.device("meta")):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_seeding_does_not_wait_for_the_device() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with seeded_default_generator(3, device):
            torch.randn(4, device=device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
