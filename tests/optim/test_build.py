from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k2ssl.optim.build import OptimConfig, ScheduleConfig, build_optimizer, build_schedule
from k2ssl.optim.scaled_adam import ScaledAdam
from k2ssl.optim.schedules import Eden, Eden2, Polynomial, TriStage


def make_model(reverse: bool = False) -> nn.Module:
    torch.manual_seed(0)
    parts: list[tuple[str, nn.Module]] = [
        ("encoder", nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4))),
        ("encoder_extra", nn.Linear(4, 4)),
        ("head", nn.Linear(4, 2)),
    ]
    model = nn.Module()
    for name, part in reversed(parts) if reverse else parts:
        model.add_module(name, part)
    return model


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for t in steps:
        for name, param in model.named_parameters():
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(1000 * t + len(name)))
        optimizer.step()


def test_options_reach_scaled_adam() -> None:
    config = OptimConfig(lr=0.02, betas=(0.8, 0.9), eps=1e-7, clipping_scale=0.0, size_update_period=2, scalar_max=5.0)
    optimizer = build_optimizer(config, make_model())
    assert isinstance(optimizer, ScaledAdam)
    (group,) = optimizer.param_groups
    expected = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-7, "clipping_scale": None, "size_update_period": 2, "scalar_max": 5.0}
    assert {key: group[key] for key in expected} == expected


def test_rate_scales_multiply_down_the_hierarchy_and_the_schedule_keeps_them() -> None:
    config = OptimConfig(lr=0.1, lr_scales={"encoder": 0.5, "encoder.2": 0.5, "head.bias": 3.0})
    optimizer = build_optimizer(config, make_model())
    by_name = rates(optimizer)
    assert by_name["encoder.0.weight"] == by_name["encoder.1.bias"] == pytest.approx(0.05)
    assert by_name["encoder.2.weight"] == pytest.approx(0.025)
    assert by_name["encoder_extra.weight"] == by_name["head.weight"] == pytest.approx(0.1)
    assert by_name["head.bias"] == pytest.approx(0.3)
    schedule = build_schedule(ScheduleConfig(name="eden", warmup_batches=0), optimizer)
    schedule.advance(10_000, 20)
    factor = schedule.lr_factor(10_000, 20)
    assert 0 < factor < 0.6
    assert rates(optimizer) == {name: pytest.approx(rate * factor) for name, rate in by_name.items()}


def test_a_prefix_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'encode' begins no parameter's name; names begin with \['encoder', 'encoder_extra', 'head'\]"):
        build_optimizer(OptimConfig(lr_scales={"encode": 0.5}), make_model())


@pytest.mark.parametrize("name", ["scaled_adam", "adamw"])
def test_frozen_parameters_are_left_out(name: Any) -> None:
    model = make_model().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        build_optimizer(OptimConfig(name=name), model)
    model.get_submodule("head").requires_grad_(True)
    optimizer = build_optimizer(OptimConfig(name=name, lr_scales={"encoder": 0.1}), model)
    assert set(rates(optimizer)) == {"head.weight", "head.bias"}


def test_adamw_does_not_decay_biases_and_norms() -> None:
    optimizer = build_optimizer(OptimConfig(name="adamw", lr=5e-4, eps=1e-6, weight_decay=0.01), make_model())
    decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert {name for name, value in decay.items() if value == 0.01} == {
        "encoder.0.weight",
        "encoder.2.weight",
        "encoder_extra.weight",
        "head.weight",
    }
    assert set(decay.values()) == {0.01, 0.0}
    assert all(group["betas"] == (0.9, 0.98) and group["eps"] == 1e-6 for group in optimizer.param_groups)


def test_adamw_clips_to_the_given_norm() -> None:
    model = make_model()
    optimizer = build_optimizer(OptimConfig(name="adamw", max_grad_norm=0.5), model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    total = torch.linalg.vector_norm(torch.stack([param.grad.norm() for param in model.parameters()]))
    assert total.item() == pytest.approx(0.5, rel=1e-4)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all parameters and of all tensors of the optimizer's state."""

    def flat(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield path, value.detach().clone()
        elif isinstance(value, (dict, list)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                yield from flat(item, f"{path}.{key}")

    return dict(flat([dict(model.state_dict()), optimizer.state_dict()], ""))


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
@pytest.mark.parametrize("poison", [1.0, math.nan, math.inf])
def test_adamw_drops_a_step_on_request(max_grad_norm: float, poison: float) -> None:
    config = OptimConfig(name="adamw", lr=0.01, max_grad_norm=max_grad_norm)
    model, other = make_model(), make_model()
    optimizer, expected = build_optimizer(config, model), build_optimizer(config, other)
    for first in (0, 5):
        train(other, expected, range(first, first + 5))
        optimizer.found_inf = torch.zeros(())
        train(model, optimizer, range(first, first + 5))
        before = everything(model, optimizer)
        for param in model.parameters():
            param.grad = torch.full_like(param, poison)
        optimizer.found_inf = torch.ones(())
        optimizer.step()
        after = everything(model, optimizer)
        assert before.keys() == after.keys() and len(before) > 3 * len(list(model.parameters()))
        assert [key for key in before if not torch.equal(before[key], after[key])] == []
    for key, value in everything(other, expected).items():
        assert torch.equal(value, after[key]), key  # as if the dropped steps had not been


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_gradients_without_a_finite_norm_are_not_clipped(poison: float) -> None:
    model = make_model()
    optimizer = build_optimizer(OptimConfig(name="adamw", max_grad_norm=0.5), model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    first, *others = model.parameters()
    first.grad[0, 0] = poison
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all((param.grad == 1.0).all() for param in others)
    assert (first.grad.flatten()[1:] == 1.0).all()
    torch.testing.assert_close(first.grad[0, 0], torch.tensor(poison), equal_nan=True)


def test_adamw_follows_torchs_plain_one_also_for_gradients_that_lie_otherwise_in_memory() -> None:
    model, other = make_model().double(), make_model().double()
    optimizer = build_optimizer(OptimConfig(name="adamw", lr=0.01, weight_decay=0.0), model)
    plain = torch.optim.AdamW(other.parameters(), lr=0.01, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0, fused=False)
    for t in range(5):
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            two.grad = torch.randn(two.shape, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
            one.grad = two.grad.t().contiguous().t() if two.dim() == 2 else two.grad.clone()
        optimizer.step()
        plain.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


def test_adamw_refuses_the_state_of_one_that_cannot_drop_steps() -> None:
    model = make_model()
    optimizer = build_optimizer(OptimConfig(name="adamw"), model)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["fused"] = None
    with pytest.raises(ValueError, match="an AdamW that is not fused"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("name", ["scaled_adam", "adamw"])
def test_state_does_not_depend_on_the_order_of_modules(name: Any) -> None:
    config = OptimConfig(name=name, lr=0.01, lr_scales={"head": 0.1})
    model = make_model()
    optimizer = build_optimizer(config, model)
    train(model, optimizer, range(10))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = make_model(reverse=True)
    other.load_state_dict(model.state_dict())
    resumed = build_optimizer(config, other)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    train(model, optimizer, range(10, 20))
    train(other, resumed, range(10, 20))
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_adamw_refuses_the_state_of_another_model() -> None:
    state = build_optimizer(OptimConfig(name="adamw"), make_model()).state_dict()
    model = make_model()
    model.add_module("tail", nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"missing from the saved state: \['tail.bias', 'tail.weight'\]"):
        build_optimizer(OptimConfig(name="adamw"), model).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adam"}, "name is 'adam'"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"betas": (0.9, 1.5)}, "betas is"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"clipping_scale": -2.0}, "clipping_scale is -2.0"),
        ({"clipping_update_period": 0}, "clipping_update_period is 0"),
        ({"weight_decay": 0.1}, "'scaled_adam' has no such option"),
        ({"name": "adamw", "clipping_scale": 3.0}, "'adamw' has no such option"),
        ({"name": "adamw", "betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\)"),
        ({"name": "adamw", "betas": (-0.1, 0.9)}, r"betas is \(-0.1, 0.9\)"),
        ({"name": "adamw", "eps": -1.0}, "eps is -1.0"),
        ({"name": "adamw", "eps": float("nan")}, "eps is nan"),
        ({"name": "adamw", "weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"name": "adamw", "max_grad_norm": float("nan")}, "max_grad_norm is nan"),
        ({"lr_scales": {"encoder": 0.0}}, r"lr_scales\['encoder'\] is 0.0"),
    ],
)
def test_bad_optimizer_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**options)


def test_every_schedule_can_be_built() -> None:
    optimizer = build_optimizer(OptimConfig(), make_model())
    eden = build_schedule(ScheduleConfig(lr_batches=10, lr_epochs=3, warmup_batches=7, warmup_start=0.1), optimizer)
    assert isinstance(eden, Eden) and (eden.lr_batches, eden.lr_epochs, eden.warmup_batches, eden.warmup_start) == (10, 3, 7, 0.1)
    assert isinstance(build_schedule(ScheduleConfig(name="eden2"), optimizer), Eden2)
    shared = build_schedule(ScheduleConfig(name="tri_stage", max_batches=100, phase_ratio=(0.2, 0.3, 0.5)), optimizer)
    stated = build_schedule(ScheduleConfig(name="tri_stage", warmup_batches=20, hold_batches=30, decay_batches=50), optimizer)
    assert isinstance(shared, TriStage) and isinstance(stated, TriStage)
    assert [shared.lr_factor(batch, 0) for batch in range(0, 120, 7)] == [stated.lr_factor(batch, 0) for batch in range(0, 120, 7)]
    polynomial = build_schedule(ScheduleConfig(name="polynomial", warmup_batches=32, max_batches=250), optimizer)
    assert isinstance(polynomial, Polynomial) and polynomial.lr_factor(141, 0) == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cosine"}, "name is 'cosine'"),
        ({"lr_batches": 0.0}, "lr_batches is 0.0"),
        ({"name": "tri_stage", "max_batches": -1.0}, "max_batches is -1.0"),
        ({"name": "tri_stage", "max_batches": 10.0, "phase_ratio": (0.5, 0.6, 0.1)}, "phase_ratio is"),
        ({"name": "polynomial"}, "max_batches is 0.0"),
        ({"name": "tri_stage"}, "max_batches and decay_batches are both 0"),
        ({"name": "eden2", "lr_epochs": 3.0}, "lr_epochs is 3.0, but 'eden2' has no such option"),
    ],
)
def test_bad_schedule_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**options)


def test_adamw_goes_on_with_other_groups_by_name() -> None:
    model = make_model()
    plain = build_optimizer(OptimConfig(name="adamw", lr=0.01), model)
    train(model, plain, range(10))
    other = make_model()
    other.load_state_dict(model.state_dict())
    scaled = build_optimizer(OptimConfig(name="adamw", lr=0.01, lr_scales={"head": 0.1}), other)
    scaled.load_state_dict(plain.state_dict())
    assert len(scaled.param_groups) > len(plain.param_groups)
    names = {optimizer: [name for group in optimizer.param_groups for name in group["param_names"]] for optimizer in (plain, scaled)}
    moments = [
        {
            name: optimizer.state[param]["exp_avg"]
            for name, param in zip(names[optimizer], (param for group in optimizer.param_groups for param in group["params"]), strict=True)
        }
        for optimizer in (plain, scaled)
    ]
    assert moments[0].keys() == moments[1].keys() and all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])
    assert sorted({group["lr"] for group in scaled.param_groups}) == pytest.approx([0.001, 0.01])
    train(other, scaled, range(10, 12))
