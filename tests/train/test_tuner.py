from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from k2ssl.train.memory import DoesNotFitError
from k2ssl.train.tuner import tune

_GIB = 2**30


def _linear(seconds: float) -> int:
    return int(_GIB + 30e6 * seconds)


def _steps(seconds: float) -> int:  # utterances of 20 s
    return int(_GIB + 30e6 * 20 * (seconds // 20))


def _convex(seconds: float) -> int:
    return int(_GIB + 20e6 * seconds + 3e4 * seconds**2)


def _concave(seconds: float) -> int:
    return int(_GIB + 10e6 * seconds + 3e8 * math.sqrt(seconds))


def _most_that_fits(memory: Callable[[float], int], budget: float, most: int) -> int:
    return max(seconds for seconds in range(1, most + 1) if memory(seconds) <= budget)


@pytest.mark.parametrize("start", [7.0, 60.0, 900.0])
@pytest.mark.parametrize("runs_out", [False, True], ids=["measured", "runs out"])
@pytest.mark.parametrize("limit", [4 * _GIB, 16 * _GIB, 80 * _GIB])
@pytest.mark.parametrize("memory", [_linear, _steps, _convex, _concave])
def test_the_most_that_fits_is_found_in_ten_measurements(memory: Callable[[float], int], limit: int, runs_out: bool, start: float) -> None:
    calls: list[float] = []

    def measure(seconds: float) -> int:
        calls.append(seconds)
        if runs_out and memory(seconds) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return memory(seconds)

    tuned = tune(measure, limit, start=start, most=2400.0)
    best = _most_that_fits(memory, 0.9 * limit, 2400)
    assert 0.95 * best <= tuned.seconds <= best
    assert tuned.peak_bytes == memory(tuned.seconds) <= tuned.budget_bytes == int(0.9 * limit)
    assert len(calls) == len(set(calls)) == len(tuned.measured) <= 10
    assert all(seconds == int(seconds) for seconds in calls)
    if memory is _linear:
        assert tuned.seconds == best
        assert len(calls) <= (4 if start < best else 8)
    assert tune(measure, limit, start=start, most=2400.0) == tuned


def test_nothing_beyond_the_most_is_tried() -> None:
    calls: list[float] = []

    def measure(seconds: float) -> int:
        calls.append(seconds)
        return _linear(seconds)

    tuned = tune(measure, 80 * _GIB, start=30.0, most=100.9)
    assert tuned.seconds == 100
    assert max(calls) == 100


def test_before_memory_is_known_to_grow_seconds_only_double() -> None:
    calls: list[float] = []

    def measure(seconds: float) -> int:
        calls.append(seconds)
        return _GIB

    assert tune(measure, 2 * _GIB, start=30.0, most=200.0).seconds == 200
    assert calls == [30.0, 60.0, 120.0, 200.0]


def test_the_margin_is_left_free() -> None:
    assert [tune(_linear, 8 * _GIB, start=10.0, most=900.0, margin=margin).seconds for margin in (0.0, 0.5)] == [250, 107]


def test_where_not_even_one_second_fits_the_message_says_what_was_measured() -> None:
    def measure(seconds: float) -> int:
        if seconds > 4:
            raise DoesNotFitError("x")
        return _linear(seconds)

    with pytest.raises(ValueError, match=r"nothing fits \(9 s: out of memory, 4 s: 1.11 GiB, 2 s: 1.06 GiB, 1 s: 1.03 GiB\)"):
        tune(measure, _GIB, start=9.0, most=10.0)


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    def measure(seconds: float) -> int:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        tune(measure, _GIB, start=9.0, most=10.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"limit_bytes": 0}, "limit_bytes is 0"),
        ({"start": 0.5}, "start is 0.5 and most is 10"),
        ({"start": 11.0}, "start is 11.0 and most is 10"),
        ({"most": math.inf}, "most is inf"),
        ({"margin": 1.0}, "margin is 1.0"),
        ({"margin": -0.1}, "margin is -0.1"),
    ],
)
def test_arguments_out_of_range_are_refused(changed: dict[str, float], message: str) -> None:
    arguments = {"limit_bytes": 2 * _GIB, "start": 2.0, "most": 10.0, **changed}
    with pytest.raises(ValueError, match=message):
        tune(_linear, **arguments)  # type: ignore[arg-type]


def test_the_table_shows_every_measurement_and_the_result() -> None:
    def measure(seconds: float) -> int:
        if seconds > 110:
            raise DoesNotFitError("x")
        return _linear(seconds)

    assert tune(measure, 4 * _GIB, start=120.0, most=900.0).text().splitlines() == [
        "     120 s  out of memory",
        "      60 s       2.68 GiB",
        "      90 s       3.51 GiB",
        "      93 s       3.60 GiB",
        "93 s of audio per micro-batch take 3.60 GiB of 3.60 GiB",
    ]
