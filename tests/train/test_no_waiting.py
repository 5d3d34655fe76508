"""A whole training step on a device that gives nothing away: PyTorch's "meta" has shapes and no values, so reading one raises.

What a step does there it does on a GPU without waiting for it; and code that asks whether a device is a CPU takes the GPU's way here.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k2ssl.batch import AsrBatch, PretrainBatch, padding_mask_from_lens
from k2ssl.models.asr import AsrConfig, AsrModel
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.logmel import LogMelConfig
from k2ssl.nn import schedule
from k2ssl.optim.build import OptimConfig, build_optimizer
from k2ssl.train.guard import Guard, GuardConfig
from k2ssl.train.metrics import MetricSums
from k2ssl.train.update import Moment, Update

META = torch.device("meta")
LENS = torch.tensor([24000, 16000, 9000])
PRETRAINING = {
    "waveform": HubertConfig.tiny(),
    "log-mel": replace(HubertConfig.tiny(), frontend=LogMelConfig(channels=(2, 4, 8), output_dim=16)),
}


@pytest.fixture(autouse=True)
def _no_autocast_and_no_generators_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has neither for this device; the flags of regularisers are copied to the host with an event on a GPU, which has come by then."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *args, **options: nullcontext() if kind == "meta" else autocast(kind, *args, **options)
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cuda": kind != "meta" and enabled(kind))
    monkeypatch.setattr(schedule.Clock, "generator", lambda clock, device: None)
    monkeypatch.setattr(schedule, "_start_copy", lambda flags: (torch.ones(flags.shape, dtype=flags.dtype), None))


def _train(model: nn.Module, batches: list[Any]) -> None:
    """Four steps, in the last of which ScaledAdam updates the sizes of tensors, and in two of which it renews its clipping threshold."""
    model = model.to(META).train()
    update = Update(model, build_optimizer(OptimConfig(clipping_update_period=2), model), META, torch.float32)
    guard = Guard(GuardConfig(), None, META)
    for step in range(4):
        update(batches, Moment(0, step, 100.0 * step), guard)
    assert all(parameter.grad is not None and parameter.grad.device == META for parameter in update.params)


def _batch(model: HubertModel, lens: Tensor) -> PretrainBatch:
    """Noise and labels for all frames."""
    frames = model.frontend.num_frames(lens)
    labels = torch.zeros(len(lens), int(frames.max()), dtype=torch.int64).masked_fill(
        padding_mask_from_lens(frames, int(frames.max()), lens.device), -1
    )
    audio = torch.randn(len(lens), int(lens.max()))
    return PretrainBatch(audio, (labels,) * len(model.config.head.num_classes), lens if len(set(lens.tolist())) > 1 else None)


@pytest.mark.parametrize(
    ("frontend", "padded", "recompute"),
    [("waveform", True, False), ("waveform", False, False), ("waveform", True, True), ("log-mel", True, False)],
)
def test_a_step_of_pre_training_asks_the_device_for_nothing(frontend: str, padded: bool, recompute: bool) -> None:
    model = HubertModel(PRETRAINING[frontend])
    model.encoder.recompute_layers = recompute
    lens = LENS if padded else torch.full((3,), 24000)
    _train(model, [_batch(model, lens), _batch(model, lens)])


def test_a_step_of_fine_tuning_a_transducer_asks_the_device_for_nothing() -> None:
    model = AsrModel(AsrConfig.tiny(6, "transducer"))  # PyTorch has no CTC loss for this device
    tokens = torch.tensor([[1, 2, 3], [4, 5, 0], [2, 0, 0]])
    batch = AsrBatch(torch.randn(3, 24000), LENS, ("",) * 3, ("a", "b", "c"), tokens, torch.tensor([3, 2, 1]))
    _train(model, [batch])


def test_reading_a_value_there_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def curious(sums: MetricSums, output: Any) -> Tensor:
        return torch.tensor(output.loss.item())

    monkeypatch.setattr(MetricSums, "add", curious)
    model = HubertModel(HubertConfig.tiny())
    batch = _batch(model, torch.tensor([8000]))
    with pytest.raises(RuntimeError, match="meta"):
        _train(model, [batch])
