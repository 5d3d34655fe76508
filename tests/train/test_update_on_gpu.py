"""Updates on a GPU, where there is one, wait for nothing; tests/other_device says the same of what can be known without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from k2ssl.optim.build import OptimConfig, build_optimizer
from k2ssl.train.guard import Guard, GuardConfig
from k2ssl.train.update import Moment, Update
from tests.update_cases import model_and_batch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@contextmanager
def waiting_is_an_error(device: str) -> Iterator[None]:
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["waveform", "waveform, unpadded", "waveform, recomputing", "log-mel", "transducer"])
@pytest.mark.parametrize("device", DEVICES)
def test_updates_wait_for_nothing(device: str, case: str, dtype: torch.dtype) -> None:
    model, batch = model_and_batch(case)
    model, batch = model.to(device).train(), batch.pin_memory() if device == "cuda" else batch
    update = Update(model, build_optimizer(OptimConfig(clipping_update_period=2), model), torch.device(device), dtype)
    guard = Guard(GuardConfig(), None, device)
    update([batch, batch], Moment(0, 0, 0.0), guard)  # kernels are compiled and compared, handles of libraries made
    with waiting_is_an_error(device):
        for step in range(1, 5):  # some of them update the sizes of tensors, some draw regularisers
            update([batch, batch], Moment(0, step, 100.0 * step), guard)
            verdict = guard.poll(step, ["a"])
            assert verdict.action == "continue" and not verdict.incidents
    assert update.metrics.reduce()["loss"] > 0
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in update.params)
