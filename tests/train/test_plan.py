"""Seconds of audio per update, dealt to ranks and micro-batches."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from k2ssl.train.plan import BatchConfig, BatchPlan

PUBLISHED = BatchConfig()


@pytest.mark.parametrize(
    ("world_size", "per_micro_batch", "accumulation", "micro_batch"),
    [
        (8, 600.0, 1, 600.0),
        (1, 600.0, 8, 600.0),
        (3, 600.0, 3, 4800 / 9),
        (16, 600.0, 1, 300.0),
        (8, 500.0, 2, 300.0),
        (1, 9000.0, 1, 4800.0),
    ],
)
def test_seconds_per_update_are_kept_whatever_the_ranks(
    world_size: int, per_micro_batch: float, accumulation: int, micro_batch: float
) -> None:
    plan = BatchPlan.of(replace(PUBLISHED, seconds_per_micro_batch=per_micro_batch), world_size)
    assert (plan.accumulation, plan.micro_batch_seconds) == (accumulation, pytest.approx(micro_batch))
    assert plan.world_size * plan.accumulation * plan.micro_batch_seconds == pytest.approx(4800.0) == plan.seconds_per_update
    assert plan.micro_batch_seconds <= per_micro_batch * (1 + 1e-9)


def test_a_rounding_error_costs_no_further_micro_batch() -> None:
    assert BatchPlan.of(BatchConfig(4800.0, 4800.0 / 7 - 1e-10), 1).accumulation == 7
    assert BatchPlan.of(BatchConfig(4800.0, 4800.0 / 7 - 1e-3), 1).accumulation == 8


def test_the_adjusted_batch_count_is_the_published_one() -> None:
    # steps x micro-batches x seconds x ranks / 600 s: eight GPUs of 600 s advance it by eight
    assert BatchPlan.of(PUBLISHED, 8).count_per_step == 8.0
    for world_size in (1, 3, 32):
        plan = BatchPlan.of(PUBLISHED, world_size)
        assert plan.count_per_step == pytest.approx(plan.accumulation * plan.micro_batch_seconds * world_size / 600.0)


def test_a_plan_is_told_in_one_line() -> None:
    assert BatchPlan.of(PUBLISHED, 8).text() == "4800 s of audio per update = 8 ranks x 1 micro-batch x 600 s"
    assert BatchPlan.of(PUBLISHED, 1).text() == "4800 s of audio per update = 1 rank x 8 micro-batches x 600 s"


def test_what_changed_since_a_checkpoint_is_told() -> None:
    saved = asdict(BatchPlan.of(PUBLISHED, 8))
    assert BatchPlan.of(PUBLISHED, 8).changes(saved) == [] and BatchPlan.of(PUBLISHED, 8).same_batches(saved)
    (other_ranks,) = BatchPlan.of(PUBLISHED, 4).changes(saved)
    assert "8 ranks x 1 micro-batches x 600.0 s became 4 x 2 x 600 s" in other_ranks
    larger = BatchPlan.of(replace(PUBLISHED, seconds_per_update=9600.0), 8)
    update, count = larger.changes(saved)
    assert "were 4800.0, they are 9600 now" in update and "advanced by 8.0 a step, it advances by 16 now" in count
    assert larger.same_batches(saved), "the same batches, twice as many of them"
    assert not BatchPlan.of(PUBLISHED, 4).same_batches(saved)
    assert not BatchPlan.of(replace(PUBLISHED, seconds_per_micro_batch=300.0), 8).same_batches(saved)


@pytest.mark.parametrize("name", ["seconds_per_update", "seconds_per_micro_batch", "reference_seconds"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_seconds_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"BatchConfig: {name} is {value}, a finite number of seconds > 0 is needed"):
        replace(PUBLISHED, **{name: value})


def test_micro_batches_without_end_are_refused() -> None:
    with pytest.raises(ValueError, match=r"seconds_per_micro_batch is 1e-300, at least a millionth of seconds_per_update, 4800.0"):
        BatchConfig(4800.0, 1e-300)
