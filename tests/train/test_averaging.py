"""Running averages against the mean over all models that there were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k2ssl.train.averaging import RunningAverage, average_of, average_over_range
from k2ssl.train.checkpoint import CheckpointFolder, KeepConfig, load_checkpoint


class Net(nn.Module):
    """Parameters and buffers of several kinds, one parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 3, bias=False, dtype=torch.bfloat16)
        self.tied = self.first.weight
        self.register_buffer("not_saved", torch.randn(2), persistent=False)


def move(model: nn.Module) -> dict[str, Tensor]:
    """What an optimizer step does to the weights; returns them."""
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(1 + torch.randn(value.shape) if value.is_floating_point() else value + 1)
    return copy_of(model)


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def mean(models: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """In one piece; integers of the last."""
    stacked = {name: torch.stack([model[name] for model in models]) for name in models[0]}
    return {name: value.double().mean(dim=0) if value.is_floating_point() else value[-1] for name, value in stacked.items()}


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], allowed: float) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype
        assert (value.double() - right[name].double()).abs().max() <= allowed, name


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert_close(left, right, 0.0)


def averaged(average: RunningAverage) -> dict[str, Tensor]:
    return average.state_dict()["model"]


def train(model: nn.Module, average: RunningAverage, first: int, last: int) -> list[dict[str, Tensor]]:
    """Steps `first` to `last`; returns the models that were sampled."""
    sampled = []
    for step in range(first, last + 1):
        now = move(model)
        average.update(model, step)
        if step % average.period == 0:
            sampled.append(now)
    return sampled


@pytest.mark.parametrize("period", [1, 4])
def test_the_running_average_is_the_mean_of_all_sampled_models_since_step_0(period: int) -> None:
    model = Net()
    average = RunningAverage(model, period)
    assert average.step == 0
    assert_same_bits(averaged(average), mean([copy_of(model)]))
    sampled = train(model, average, 1, 103)
    assert average.step == 103 - 103 % period
    assert_close(averaged(average), mean(sampled), 1e-14)
    assert averaged(average)["norm.num_batches_tracked"] == sampled[-1]["norm.num_batches_tracked"]
    assert averaged(average)["norm.running_mean"].dtype == torch.float64
    assert "not_saved" not in averaged(average)


def test_nothing_happens_between_the_steps_that_are_sampled_nor_at_step_0() -> None:
    model = Net()
    average = RunningAverage(model, 4)
    train(model, average, 1, 4)
    before = {name: value.clone() for name, value in averaged(average).items()}
    train(model, average, 5, 7)
    move(model)
    average.update(model, 0)
    assert_same_bits(averaged(average), before)
    assert average.step == 4


def test_the_average_stays_float64_where_float32_would_lose_it() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = RunningAverage(model, 1)
    values = [1.0, *[1.0 + 2**-23] * 9]  # neighbours in float32
    for step, value in enumerate(values, start=1):
        nn.init.constant_(model.weight, value)
        average.update(model, step)
    assert averaged(average)["weight"].item() == pytest.approx(1.0 + 0.9 * 2**-23, abs=1e-15)


def test_the_state_comes_back_bit_by_bit_through_a_checkpoint_and_the_average_goes_on_as_if_uninterrupted(tmp_path: Path) -> None:
    model = Net()
    average = RunningAverage(model, 2)
    train(model, average, 1, 7)
    folder = CheckpointFolder(tmp_path, KeepConfig(), background=False)
    path = folder.save(7, {"model": model.state_dict(), "average": average.state_dict()})
    other, resumed_model = RunningAverage(Net(), 2), Net()
    content = load_checkpoint(path)
    resumed_model.load_state_dict(content["model"])
    other.load_state_dict(content["average"])
    assert_same_bits(averaged(other), averaged(average))
    assert other.step == 6
    move(model)
    resumed_model.load_state_dict(model.state_dict())
    average.update(model, 8)
    other.update(resumed_model, 8)
    assert_same_bits(averaged(other), averaged(average))
    assert_close(content["average"]["model"], load_checkpoint(path)["average"]["model"], 0.0)  # was copied, not taken


def wrong_states(state: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    model = state["model"]
    return [
        ({**state, "model": {**model, "extra": torch.zeros(1)}}, "extra is in the saved average only"),
        ({**state, "model": {name: model[name] for name in list(model)[1:]}}, "is in this model only"),
        ({**state, "model": {**model, "first.bias": torch.zeros(5).double()}}, r"first\.bias is \(4,\) in this model, \(5,\) in the saved"),
        ({**state, "model": {**model, "first.bias": torch.zeros(4)}}, r"first\.bias is torch\.float32, torch\.float64 is needed"),
    ]


def test_the_state_of_another_model_is_refused_and_changes_nothing() -> None:
    average = RunningAverage(Net(), 2)
    before = {name: value.clone() for name, value in averaged(average).items()}
    other = RunningAverage(Net(), 2)
    for state, message in wrong_states({"step": 4, "model": averaged(other)}):
        with pytest.raises(ValueError, match=message):
            average.load_state_dict(state)
        assert_same_bits(averaged(average), before)
        assert average.step == 0


@pytest.mark.parametrize("period", [0, 2.0, True])
def test_a_period_is_a_whole_number_of_steps(period: Any) -> None:
    with pytest.raises(ValueError, match="RunningAverage: period is"):
        RunningAverage(nn.Linear(1, 1), period)


def test_a_model_has_the_average_inside_and_its_own_bits_afterwards_whatever_happens() -> None:
    model = Net()
    average = RunningAverage(model, 2)
    train(model, average, 1, 7)
    own, parameters = copy_of(model), [id(parameter) for parameter in model.parameters()]
    expected = {name: value.to(own[name].dtype) for name, value in averaged(average).items()}
    kept = {name: value.clone() for name, value in averaged(average).items()}
    with average.swapped_in(model):
        assert_same_bits(copy_of(model), expected)
        assert model.tied is model.first.weight
    assert_same_bits(copy_of(model), own)
    with pytest.raises(KeyError), average.swapped_in(model):
        move(model)  # batch statistics, say
        raise KeyError
    assert_same_bits(copy_of(model), own)
    assert [id(parameter) for parameter in model.parameters()] == parameters  # as an optimizer knows them
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_same_bits(averaged(average), kept)


# --- given models --------------------------------------------------------------------------------------------------------------------------


def history(period: int, *at: int) -> tuple[list[dict[str, Tensor]], dict[int, dict[str, Any]]]:
    """All models by step, and checkpoints at some steps."""
    model = Net()
    average = RunningAverage(model, period)
    models, checkpoints = [], {}
    for step in range(1, max(at) + 1):
        models.append(move(model))
        average.update(model, step)
        if step in at:
            state = average.state_dict()
            checkpoints[step] = {"average": {**state, "model": {name: value.clone() for name, value in state["model"].items()}}}
    return models, checkpoints


def test_the_mean_over_a_range_is_recovered_from_two_checkpoints() -> None:
    models, checkpoints = history(1, 300, 303, 400)
    for start, end in ((300, 400), (300, 303), (303, 400)):
        assert_close(average_over_range(checkpoints[start], checkpoints[end]), mean(models[start:end]), 1e-12)
    assert_close(average_over_range(None, checkpoints[400]), mean(models), 1e-12)


def test_a_range_between_checkpoints_that_fall_between_samples_runs_from_sample_to_sample() -> None:
    models, checkpoints = history(4, 9, 22)
    assert_close(average_over_range(checkpoints[9], checkpoints[22]), mean([models[step - 1] for step in (12, 16, 20)]), 1e-13)


def test_results_are_copies() -> None:
    _, checkpoints = history(1, 2)
    result = average_over_range(None, checkpoints[2])
    result["first.weight"].zero_()
    assert checkpoints[2]["average"]["model"]["first.weight"].abs().min() > 0
    model = copy_of(Net())
    for models in ([model], [model, model]):
        for value in average_of(models).values():
            value.fill_(7)
    assert model["first.weight"].max() < 7 and model["norm.num_batches_tracked"] == 0


def test_ranges_that_cannot_be_recovered_are_refused() -> None:
    _, checkpoints = history(4, 3, 5, 6, 9)
    for start, end, message in (
        (None, {"model": {}}, "the end has no running average"),
        ({"model": {}}, checkpoints[9], "the start has no running average"),
        (checkpoints[3], checkpoints[9], "the running average of the start has never been updated"),
        (checkpoints[9], checkpoints[5], "of the start goes to step 8, that of the end to step 4, which must be later"),
        (checkpoints[5], checkpoints[6], "of the start goes to step 4, that of the end to step 4"),
    ):
        with pytest.raises(ValueError, match=message):
            average_over_range(start, end)
    for state, _ in wrong_states(checkpoints[9]["average"])[:3]:
        with pytest.raises(ValueError, match=r"the models differ: .* in the (start|end)"):
            average_over_range(checkpoints[5], {"average": state})


def test_the_plain_mean_of_models_is_taken_in_float64_one_model_after_the_other() -> None:
    model = Net()
    models = [move(model) for _ in range(5)]
    assert_close(average_of(iter(models)), mean(models), 1e-15)
    assert_same_bits(average_of(models[:1]), mean(models[:1]))


def test_models_that_cannot_be_averaged_are_refused() -> None:
    models = [copy_of(Net()) for _ in range(3)]
    with pytest.raises(ValueError, match="no models are given"):
        average_of([])
    for change, message in (
        ({"first.bias": torch.zeros(1)}, r"first\.bias is \(4,\) in model 1, \(1,\) in model 3"),
        ({"extra": torch.zeros(1)}, "extra is in model 3 only"),
    ):
        with pytest.raises(ValueError, match=message):
            average_of([*models[:2], {**models[2], **change}])


def test_an_average_begun_late_knows_nothing_of_the_weights_before() -> None:
    model = nn.Linear(1, 1)
    average = RunningAverage(model, period=5)
    weights = {500: 1.0, 505: 2.0, 510: 3.0}
    for step, value in weights.items():
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(model, step)
    # the first sample stands for all steps up to it, as the mean of steps 1 to 500 would
    expected = (500 * 1.0 + 5 * 2.0 + 5 * 3.0) / 510
    assert average.state_dict()["model"]["weight"].item() == pytest.approx(expected, rel=1e-12)
