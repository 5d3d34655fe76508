from __future__ import annotations

import io
import math

import pytest
import torch

from k2ssl.train.loss_scale import LossScale

TRUE, FALSE = torch.tensor(True), torch.tensor(False)


def without_rescue(step: int) -> int:
    """The number of a step after which no small scale is doubled."""
    return 100 * step + 1


@pytest.mark.parametrize(("init", "interval"), [(1.0, 3), (65536.0, 1), (2.0**127, 2)])
def test_the_scale_follows_that_of_torch(init: float, interval: int) -> None:
    ours = LossScale("cpu", init, interval)
    scale, tracker = torch.tensor([init]), torch.zeros(1, dtype=torch.int32)
    draws = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.2
    changes = set()
    for step, bad in enumerate(draws):
        before = scale.clone()
        torch._amp_update_scale_(scale, tracker, bad.float().view(1), 2.0, 0.5, interval)
        ours.update(~bad, without_rescue(step))
        assert ours.scale.item() == scale.item() and math.isfinite(scale.item()), step
        changes.add((scale / before).item())
    assert changes == {0.5, 1.0, 2.0}


@pytest.mark.parametrize(
    ("scale", "step", "factor"),
    [
        (7.9, 100, 2.0),
        (8.0, 100, 1.0),
        (7.9, 99, 1.0),
        (31.9, 400, 2.0),
        (32.0, 400, 1.0),
        (31.9, 300, 1.0),
        (7.9, 400, 2.0),
        (7.9, 700, 2.0),
    ],
)
def test_small_scales_are_doubled_at_round_steps(scale: float, step: int, factor: float) -> None:
    loss_scale = LossScale("cpu", scale)
    loss_scale.update(TRUE, step)
    assert loss_scale.scale.item() == torch.tensor(scale).item() * factor


def test_a_recovery_leaves_the_count_to_the_next_doubling_alone() -> None:
    loss_scale = LossScale("cpu", 1.0, growth_interval=3)
    scales = []
    for step in (99, 100, 101, 102):
        loss_scale.update(TRUE, step)
        scales.append(loss_scale.scale.item())
    assert scales == [1.0, 2.0, 4.0, 4.0]


def test_a_dropped_step_is_followed_by_a_whole_interval() -> None:
    loss_scale = LossScale("cpu", 16.0, growth_interval=3)
    scales = []
    for accept in (TRUE, TRUE, FALSE, TRUE, TRUE, TRUE, TRUE):
        loss_scale.update(accept, 1)
        scales.append(loss_scale.scale.item())
    assert scales == [16.0, 16.0, 8.0, 8.0, 8.0, 16.0, 16.0]


def test_a_saved_scale_continues_equally() -> None:
    one, two = LossScale("cpu", 4.0, growth_interval=5), LossScale("cpu", growth_interval=5)
    for step in range(1, 4):
        one.update(TRUE, step)
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    two.load_state_dict(torch.load(buffer, weights_only=True))
    for step in range(4, 30):
        accept = torch.tensor(step % 11 != 0)
        one.update(accept, step)
        two.update(accept, step)
        assert torch.equal(one.scale, two.scale), step
    assert one.scale.item() != 4.0
    with pytest.raises(ValueError, match=r"keys are \['scale'\]"):
        two.load_state_dict({"scale": one.scale})


def test_nothing_is_read_from_the_device() -> None:
    loss_scale = LossScale("meta")
    for step in (1, 100, 400):
        loss_scale.update(torch.ones((), dtype=torch.bool, device="meta"), step)  # reading a meta tensor raises


@pytest.mark.parametrize(
    ("options", "message"),
    [({"init": 0.0}, "init is 0.0"), ({"init": math.inf}, "init is inf"), ({"growth_interval": 0}, "growth_interval is 0")],
)
def test_bad_arguments_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossScale("cpu", **options)
    with pytest.raises(ValueError, match="step is 0"):
        LossScale("cpu").update(TRUE, 0)
