"""Set-ups that several model tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from k2ssl.models.zipformer import ZipformerConfig
from k2ssl.nn.balancer import Balancer
from k2ssl.nn.schedule import Clock, Schedule, constant
from k2ssl.nn.whiten import Whiten

_ACTING = Path(__file__).parents[1] / "golden" / "regularisers_acting.json"


@pytest.fixture
def recorded_encoder() -> ZipformerConfig:
    """The sizes with which zipformer.npz and hubert_ce.npz were recorded (their cfg.* entries)."""
    return ZipformerConfig(
        num_layers=(1, 2, 1),
        downsampling=(1, 2, 4),
        dim=(16, 24, 32),
        feedforward_dim=(32, 48, 64),
        unmasked_dim=(16, 16, 24),
        num_heads=(2, 2, 4),
        kernel=(15, 15, 7),
        query_head_dim=8,
        pos_head_dim=4,
        value_head_dim=12,
        pos_dim=16,
    )


@pytest.fixture
def regularise_as_recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module, str], None]:
    """`regularise_as_recorded(model, recording)` lets in evaluation mode the Balancers and Whiteners act that acted in the recording.

    Upstream's Balancer and Whiten ask only whether their input needs a gradient, not whether the model is training: in evaluation mode
    they act at random, with their schedules' default values. The recorded *gradients* contain that. Which ones acted was found by
    trying both answers for each, from the output backwards, against the recorded gradient of the parameters just before it: the right
    answer leaves a difference of 1e-7, the wrong one of 1e-3 to 3e-2.
    """

    def default(schedule: Schedule, value: float) -> Schedule:
        return constant(value) if len(schedule.points) > 1 else schedule

    def prepare(model: nn.Module, recording: str) -> None:
        acting = set(json.loads(_ACTING.read_text())[recording])
        for name, module in model.named_modules():
            if not isinstance(module, (Balancer, Whiten)):
                continue
            module.train()
            module.clock = _Scripted(name in acting)
            acting.discard(name)
            if isinstance(module, Balancer):
                module.min_positive = default(module.min_positive, 0.0)
                module.max_positive = default(module.max_positive, 0.0)
                module.min_abs = default(module.min_abs, 0.0)
                module.max_abs = default(module.max_abs, 1.0)
        assert not acting

    return prepare


class _Scripted(Clock):
    """A clock that gives the same answer to every chance."""

    def __init__(self, answer: bool) -> None:
        super().__init__()
        self.answer = answer
        for _ in range(1000):
            self.add_flag()

    def chance(self, probability: float) -> bool:
        return self.answer
