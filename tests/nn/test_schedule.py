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


def _set(clock: Clock, values: dict[int, list[bool]]) -> None:
    for number, of_one in values.items():
        for value in of_one:
            clock.set_flag(number, torch.tensor(value))


def _flags_after(clock: Clock, steps: int = 2) -> list[bool]:
    for _ in range(steps):
        clock.advance(1)
    return [clock.flag(number) for number in range(len(clock.state_dict()["flags_host"]))]


def test_a_flag_is_true_if_any_micro_batch_set_it_so_and_stays_where_none_set_it() -> None:
    clock = Clock()
    for _ in range(5):
        clock.add_flag()
    _set(clock, {0: [True, False], 1: [False, True], 2: [False, False], 3: [False]})
    assert _flags_after(clock) == [True, True, False, False, True]
    _set(clock, {0: [False], 3: [False, True]})  # what an earlier step set counts no more
    assert _flags_after(clock) == [False, True, False, True, True]


def test_flags_merged_over_processes_are_those_of_one_process_that_saw_all() -> None:
    rng = random.Random(0)
    ranks, one = (Clock(), Clock(), Clock()), Clock()
    seen = set()
    counts: list[torch.Tensor] = []

    def collect(tensor: torch.Tensor) -> torch.Tensor:
        counts.append(tensor)
        return tensor

    for clock in (*ranks, one):
        for _ in range(8):
            clock.add_flag()
    for step in range(40):
        for clock in ranks:
            for _ in range(rng.randrange(3)):
                values = {rng.randrange(8): [rng.random() < 0.3]}
                _set(clock, values)
                _set(one, values)
        counts.clear()
        for clock in ranks:
            clock.merge_flags(collect, torch.device("cpu"))
        total = torch.stack(counts).sum(0)
        for tensor in counts:
            tensor.copy_(total)
        for clock in (*ranks, one):
            clock.advance(step)
        flags = [[clock.flag(number) for number in range(8)] for clock in (*ranks, one)]
        assert flags == [flags[-1]] * 4
        seen.add(tuple(flags[-1]))
    assert len(seen) > 10


def test_a_process_that_set_no_flag_takes_part_and_a_model_without_flags_does_not() -> None:
    calls: list[torch.Tensor] = []

    def reduce(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor.clone())
        return tensor.add_(torch.tensor([[0, 2], [0, 0]], dtype=tensor.dtype))  # another process set flag 1 to False twice

    clock = Clock()
    clock.merge_flags(reduce, torch.device("cpu"))
    assert calls == []
    clock.add_flag(), clock.add_flag()
    clock.merge_flags(reduce, torch.device("cpu"))
    assert len(calls) == 1 and calls[0].dtype == torch.int32 and not calls[0].any()
    assert _flags_after(clock) == [True, False]


@pytest.mark.parametrize("carry", ["state_dict", "deepcopy"])
def test_what_was_set_since_the_last_advance_is_carried_along(carry: str) -> None:
    clock = Clock()
    for _ in range(3):
        clock.add_flag()
    _set(clock, {0: [False], 1: [False]})
    if carry == "deepcopy":
        other = copy.deepcopy(clock)
    else:
        other = Clock()
        for _ in range(3):
            other.add_flag()
        state = clock.state_dict()
        as_saved = copy.deepcopy(state)
        other.load_state_dict(state)
        _set(clock, {2: [True]})
        _set(other, {2: [True]})
        assert _same_state(state, as_saved)  # what is saved is a copy, and what is loaded is another
    _set(other, {1: [True]})
    assert _flags_after(other) == [False, True, True]
    assert _flags_after(clock) == [False, False, True]


def _same_state(one: object, two: object) -> bool:
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_same_state(one[key], two[key]) for key in one)
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return torch.equal(one, two)
    return one == two


@pytest.mark.parametrize("drawn_before", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_replay_repeats_the_draws_and_leaves_no_trace(drawn_before: bool, loaded: bool) -> None:
    clock = Clock(3)
    if drawn_before:
        _draws(clock)
    if loaded:  # generators are then made from the loaded state at first use
        clock.load_state_dict(copy.deepcopy(clock.state_dict()))
    snapshot = clock.snapshot()
    first = _draws(clock)
    _draws(clock)
    before = clock.state_dict()
    with pytest.raises(KeyError), clock.replaying(snapshot):
        _draws(clock)
        raise KeyError
    assert _same_state(clock.state_dict(), before)
    with clock.replaying(snapshot):
        pass
    assert _same_state(clock.state_dict(), before)
    for _ in range(2):
        with clock.replaying(snapshot):
            again = _draws(clock)
        assert again[0] == first[0] and torch.equal(again[1], first[1]) and again[2] == first[2]
        assert _same_state(clock.state_dict(), before)


def test_a_replay_reaches_over_the_next_seed_and_the_next_step() -> None:
    clock = Clock(3)
    number = clock.add_flag()
    clock.advance(7)
    snapshot = clock.snapshot()
    first = _draws(clock)
    clock.set_flag(number, torch.tensor(False))
    clock.seed(8)
    clock.advance(8)
    clock.advance(9)
    with clock.replaying(snapshot):
        assert (clock.batch_count, clock.flag(number)) == (7, True)
        again = _draws(clock)
        clock.set_flag(number, torch.tensor(True))
    assert again[0] == first[0] and torch.equal(again[1], first[1])
    assert (clock.batch_count, clock.flag(number)) == (9, False)
    assert _flags_after(clock) == [True]  # a flag set inside stays set
    expected = Clock()
    expected.seed(8)
    assert _draws(clock)[0] == _draws(expected)[0]


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
