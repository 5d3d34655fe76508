from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from k2ssl.batch import LossOutput
from k2ssl.train.statistics import StatisticsRecorder


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.tap = nn.Identity()
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, audio: Tensor) -> LossOutput:
        return LossOutput(self.tap(self.linear(audio)).square().sum(), torch.tensor(len(audio)))


def test_numbers_are_those_of_all_steps_together() -> None:
    model = Toy().double()
    outputs, grads, params = [], [], []
    with StatisticsRecorder(model) as recorder:
        for n in (2, 5, 3):
            model.zero_grad()
            audio = torch.randn(n, 4, dtype=torch.float64)
            model(audio).loss.backward()
            recorder.end_step()
            outputs.append(model.linear.weight.detach() @ audio.T + model.linear.bias.detach()[:, None])
            grads.append(model.linear.weight.grad.clone())
            params.append(model.linear.weight.detach().clone())
            model.linear.weight.data += 0.1
    found = recorder.to_dict()
    assert found["steps"] == 3
    assert list(found["modules"]) == ["linear", "tap", "the model"]
    values = torch.cat([output.flatten() for output in outputs])
    expected = {
        "rms": values.square().mean().sqrt().item(),
        "mean": values.mean().item(),
        "max": values.abs().max().item(),
        "non_finite": 0.0,
    }
    assert found["modules"]["linear"] == found["modules"]["tap"] == pytest.approx(expected, rel=1e-12)
    rms, gradient_rms = (torch.stack(tensors).square().mean().sqrt().item() for tensors in (params, grads))
    assert found["parameters"]["linear.weight"] == pytest.approx(
        {"rms": rms, "gradient_rms": gradient_rms, "ratio": gradient_rms / rms, "non_finite": 0.0}, rel=1e-12
    )
    unused = found["parameters"]["unused"]
    assert unused["rms"] == 0 and math.isnan(unused["gradient_rms"]) and math.isnan(unused["ratio"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_neither_overflows_nor_loses_count(dtype: torch.dtype) -> None:
    model = nn.Identity()
    with StatisticsRecorder(model) as recorder:
        for _ in range(3):
            model(torch.full((1000, 100), 300.0, dtype=dtype))  # a sum and squares that float16 cannot hold
    assert recorder.to_dict()["modules"]["the model"] == {"rms": 300.0, "mean": 300.0, "max": 300.0, "non_finite": 0.0}


def test_a_model_under_autocast_is_recorded() -> None:
    model = Toy()
    with StatisticsRecorder(model) as recorder:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(5, 4)).loss
        loss.backward()
        recorder.end_step()
    found = recorder.to_dict()
    assert found["modules"]["linear"]["rms"] > 0 and found["parameters"]["linear.bias"]["gradient_rms"] > 0


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    model = Toy()
    with StatisticsRecorder(model) as recorder:
        model.tap(torch.tensor([1.0, math.nan, -math.inf, 3.0]))
        model.tap(torch.full((4,), math.inf))
        model.linear.bias.grad = torch.tensor([math.nan, 2.0, 2.0])
        recorder.end_step()
    found = recorder.to_dict()
    assert found["modules"]["tap"] == pytest.approx({"rms": math.sqrt(5.0), "mean": 2.0, "max": 3.0, "non_finite": 6 / 8})
    bias = found["parameters"]["linear.bias"]
    assert (bias["gradient_rms"], bias["non_finite"]) == pytest.approx((2.0, 1 / 3))


def test_nothing_is_recorded_after_the_block_and_no_number_changes() -> None:
    model, audio = Toy(), torch.randn(3, 4)
    plain = model(audio).loss
    with StatisticsRecorder(model) as recorder:
        recorded = model(audio).loss
    before = recorder.to_dict()
    model(audio)
    assert torch.equal(plain, recorded) and recorder.to_dict() == before
    assert not any(module._forward_hooks for module in model.modules())


def test_the_table_has_a_line_for_each_module_and_parameter() -> None:
    model = Toy()
    with StatisticsRecorder(model) as recorder:
        model(torch.ones(3, 4)).loss.backward()
        recorder.end_step()
    lines = recorder.table().splitlines()
    assert lines[0] == "statistics over 1 steps"
    assert [line.split()[0] for line in lines[1:]] == [
        *("output", "linear", "tap", "the"),
        *("parameter", "unused", "linear.weight", "linear.bias"),
    ]
    weight = recorder.to_dict()["parameters"]["linear.weight"]
    assert lines[7].split()[1:] == [f"{weight[column]:.4g}" for column in ("rms", "gradient_rms", "ratio", "non_finite")]
    assert StatisticsRecorder(model).table().startswith("statistics over 0 steps")
