"""Schedules and the clock."""

from __future__ import annotations

import copy
import io
import random

import pytest
import torch

from k2ssl.nn.schedule import Clock, Schedule, constant


def test_a_schedule_is_linear_between_its_points_and_constant_outside() -> None:
    schedule = Schedule((0, 0.2), (4000, 0.05), (16000, 0.0))
    expected = {-5: 0.2, 0: 0.2, 1000: 0.1625, 4000: 0.05, 10000: 0.025, 16000: 0.0, 10**9: 0.0}
    assert {count: pytest.approx(value) for count, value in expected.items()} == {count: schedule(count) for count in expected}
    assert constant(3.0)(123.0) == 3.0


@pytest.mark.parametrize("points", [(), ((0, 1), (0, 2)), ((5, 1), (1, 2)), ((0, float("nan")),)])
def test_a_schedule_refuses_points_that_make_no_function(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(ValueError, match="Schedule"):
        Schedule(*points)


def _draws(clock: Clock) -> tuple[list[bool], torch.Tensor, int]:
    return [clock.chance(0.5) for _ in range(40)], torch.rand(5, generator=clock.generator(torch.device("cpu"))), clock.draw_seed()


def test_equal_seed_parts_give_equal_draws_and_other_parts_give_others() -> None:
    clock = Clock()
    _draws(clock)  # the device generator exists before it is seeded again
    clock.seed(1, 0, 3, 700)
    first = _draws(clock)
    clock.seed(1, 0, 3, 700)
    again = _draws(clock)
    fresh = Clock()
    fresh.seed(1, 0, 3, 700)
    clock.seed(1, 1, 3, 700)
    other_rank = _draws(clock)
    for draws in (again, _draws(fresh)):
        assert draws[0] == first[0] and torch.equal(draws[1], first[1]) and draws[2] == first[2]
    assert other_rank[0] != first[0] and not torch.equal(other_rank[1], first[1])


def test_the_clock_neither_reads_nor_moves_global_random_states() -> None:
    before = random.getstate(), torch.get_rng_state()
    clock = Clock(7)
    first = _draws(clock)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    random.seed(99)
    torch.manual_seed(99)
    assert _draws(Clock(7))[0] == first[0]


def test_a_flag_takes_effect_at_the_second_advance_after_it_was_set() -> None:
    clock = Clock()
    number, other = clock.add_flag(), clock.add_flag()
    clock.set_flag(number, torch.tensor(False))
    seen = [clock.flag(number)]
    for step in range(3):
        clock.advance(step)
        seen.append(clock.flag(number))
    assert seen == [True, True, False, False]
    assert clock.flag(other)


def test_a_saved_clock_continues_exactly_through_a_file_that_is_loaded_without_unpickling() -> None:
    clock = Clock(3)
    number = clock.add_flag()
    clock.advance(10)
    _draws(clock)
    clock.set_flag(number, torch.tensor(False))
    clock.advance(11)
    file = io.BytesIO()
    torch.save(clock.state_dict(), file)
    file.seek(0)
    restored = Clock(99)
    restored.add_flag()
    restored.load_state_dict(torch.load(file, weights_only=True))
    one, two = _draws(clock), _draws(restored)
    assert one[0] == two[0] and torch.equal(one[1], two[1]) and one[2] == two[2]
    for each in (clock, restored):
        each.advance(12)
    assert (restored.batch_count, restored.flag(number)) == (12, False) == (clock.batch_count, clock.flag(number))
    with pytest.raises(ValueError, match="flags_host has 1 entries, this model has 0"):
        Clock().load_state_dict(clock.state_dict())


def test_a_loaded_clock_touches_no_device_until_it_draws_there() -> None:
    clock = Clock(3)
    number = clock.add_flag()
    _draws(clock)
    clock.set_flag(number, torch.tensor(False))
    state = clock.state_dict()
    elsewhere = {**state, "generators": {"cuda": state["generators"]["cpu"]}}  # as saved by a process on some GPU
    restored = Clock()
    restored.add_flag()
    restored.load_state_dict(elsewhere)
    assert restored.state_dict()["generators"].keys() == {"cuda"}
    for step in range(2):
        restored.advance(step)
    assert not restored.flag(number)


@pytest.mark.parametrize("change", [{}, {"seed": 1}, {"flags_host": [True, True]}])
def test_a_state_that_does_not_fit_changes_nothing(change: dict[str, object]) -> None:
    clock = Clock(4)
    before = clock.state_dict()
    state = {**Clock(9).state_dict(), **change} if "flags_host" in change else change
    with pytest.raises(ValueError, match=r"Clock\.load_state_dict"):
        clock.load_state_dict(state)
    assert clock.state_dict()["host"] == before["host"] and clock.batch_count == 0


def test_seeds_are_whole_numbers() -> None:
    with pytest.raises(TypeError):
        Clock().seed(1.7)  # type: ignore[arg-type]


def test_a_copied_clock_draws_the_same_and_then_goes_its_own_way() -> None:
    clock = Clock(5)
    clock.add_flag()
    clock.chance(0.5)
    twin = copy.deepcopy(clock)
    assert _draws(twin)[0] == _draws(clock)[0]
    twin.advance(5)
    assert clock.batch_count == 0


@pytest.mark.parametrize("count", [-1.0, float("nan"), float("inf")])
def test_advance_refuses_what_is_no_batch_count(count: float) -> None:
    with pytest.raises(ValueError, match="batch_count"):
        Clock().advance(count)
