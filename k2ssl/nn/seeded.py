"""Give a kernel that can only draw from torch's default generator a seed of our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded_default_generator(seed: int, device: torch.device) -> Iterator[None]:
    """Inside the block the default generator of `device` starts at `seed`; afterwards it is as it was before.

    Fused attention has no `generator` argument, so its dropout would otherwise depend on, and disturb, global random state. The state
    of a CUDA generator (seed and offset) lives on the host: neither end of the block waits for the device.

    Args:
        seed: non-negative integer below 2**63, such as `Clock.draw_seed()` returns.
        device: a CPU or CUDA device; a CUDA device without index is the current one.

    Raises:
        ValueError: a device of another type.
    """
    generator = _default_generator(device)
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        torch.cuda.init()  # the list below is empty before
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    raise ValueError(f"seeded_default_generator: device is {device}, cpu or cuda is needed")
