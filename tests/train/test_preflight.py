from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k2ssl.batch import PretrainBatch
from k2ssl.nn.schedule import Clock
from k2ssl.optim.build import OptimConfig, build_optimizer
from k2ssl.train.averaging import RunningAverage
from k2ssl.train.memory import DoesNotFitError
from k2ssl.train.preflight import PreflightReport, preflight
from k2ssl.train.tuner import tune

_MIB = 2**20


@dataclass
class _Trainer:
    """A whole training step in a few lines; what it takes grows with the audio."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    fault: BaseException | None = None

    def __post_init__(self) -> None:
        self.device = torch.device("cpu")
        self.average = RunningAverage(self.model, period=1)
        self.clock = Clock(3)
        self.steps: list[int] = []

    def train_step(self, batches: list[PretrainBatch]) -> None:
        for batch in batches:
            noise = torch.rand(batch.audio.shape, generator=self.clock.generator(self.device)) + torch.rand(())
            (self.model((batch.audio + noise).unsqueeze(-1)).square().mean()).backward()
        self.optimizer.step()
        self.steps.append(len(batches))
        if self.fault is not None:
            raise self.fault

    def update_average(self, now: bool = False) -> None:
        assert now
        self.average.update(self.model, len(self.steps))

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "average", "clock")}
        return {**parts, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("model", "optimizer", "average", "clock"):
            getattr(self, name).load_state_dict(state[name])
        self.steps = state["steps"]


def _trainer(optimizer: str = "scaled_adam") -> _Trainer:
    model = nn.Sequential(nn.Linear(1, 32), _Counting(), nn.Linear(32, 1))
    return _Trainer(model, build_optimizer(OptimConfig(name=optimizer, lr=0.05), model))  # type: ignore[arg-type]


class _Counting(nn.Module):
    """Has a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.detach().mean()
        return x * 2


def _batch(seconds: Sequence[float], rate: int = 16000) -> PretrainBatch:
    lens = torch.tensor([int(rate * length) for length in seconds])
    return PretrainBatch(torch.ones(len(lens), int(lens.max())), (), lens, tuple("abcdefgh"[: len(lens)]))


def _assert_same(one: Any, two: Any) -> None:
    assert type(one) is type(two)
    if isinstance(one, Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, Mapping):
        assert list(one) == list(two)
        for key in one:
            _assert_same(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            _assert_same(left, right)
    else:
        assert one == two


@pytest.mark.parametrize("optimizer", ["scaled_adam", "adamw"])
@pytest.mark.parametrize("steps_before", [0, 5])
def test_training_goes_on_as_if_nothing_had_happened(optimizer: str, steps_before: int) -> None:
    results = []
    for looks_first in (False, True):
        torch.manual_seed(1)
        trainer = _trainer(optimizer)
        for _ in range(steps_before):
            trainer.train_step([_batch([0.1])])
        trainer.model.zero_grad()
        before = copy.deepcopy(trainer.state_dict())
        if looks_first:
            preflight(trainer, [("long", [_batch([0.5]), _batch([0.1, 0.2])]), ("many", [_batch([0.1] * 8)])])
            _assert_same(trainer.state_dict(), before)
            assert all(param.grad is None for param in trainer.model.parameters())
        for _ in range(6):
            trainer.train_step([_batch([0.1])])
        results.append(copy.deepcopy(trainer.state_dict()))
    _assert_same(*results)


def _report_of_a_long_and_a_short_update() -> PreflightReport:
    return preflight(_trainer(), [("long", [_batch([24.0]), _batch([0.5, 1.0])]), ("short", [_batch([0.1, 0.1, 0.1])])])


def test_the_report_says_what_every_update_held_and_took() -> None:
    # in a process of its own: what earlier tests left behind would be counted, and let go of in between
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        report = pool.apply(_report_of_a_long_and_a_short_update)
    long, short = report.rows
    assert (long.name, long.utterances, long.micro_batches, long.seconds, long.longest) == ("long", 3, 2, 25.5, 24.0)
    assert (short.utterances, short.micro_batches, short.longest) == (3, 1, 0.1)
    assert short.seconds == pytest.approx(0.3)
    assert long.took > 0
    # the first linear layer's output and its double, 32 channels of float32 each, for 24 s
    assert 2 * 24 * 16000 * 32 * 4 < long.peak_bytes - short.peak_bytes < 20 * 24 * 16000 * 32 * 4
    assert report.peak_bytes == long.peak_bytes
    lines = report.text().splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[:5] == ["long", "3", "2", "25.5", "24.0"]


def test_seconds_follow_the_sample_rate() -> None:
    report = preflight(_trainer(), [("x", [_batch([2.0, 1.0], rate=8000)])], sample_rate=8000)
    assert (report.rows[0].seconds, report.rows[0].longest) == (3.0, 2.0)


@pytest.mark.parametrize("fault", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), "allocate"])
def test_running_out_of_memory_names_the_batch_and_puts_everything_back(fault: BaseException | str) -> None:
    trainer = _trainer()
    trainer.train_step([_batch([0.1])])
    trainer.model.zero_grad()
    before = copy.deepcopy(trainer.state_dict())
    if isinstance(fault, str):
        with pytest.raises(RuntimeError) as caught:
            torch.empty(2**60)
        fault = caught.value
    trainer.fault = fault
    message = (
        r"the update 'longest' \(3 utterances, 0.6 s of audio, the longest 0.3 s, in 2 micro-batches\) runs out of memory on cpu; "
        r"lower the seconds of audio per micro-batch"
    )
    with pytest.raises(DoesNotFitError, match=message) as refused:
        preflight(trainer, [("longest", [_batch([0.3]), _batch([0.2, 0.1])])])
    assert isinstance(refused.value, ValueError)
    assert refused.value.__context__ is None  # which would keep alive what the failed step had allocated
    _assert_same(trainer.state_dict(), before)


def test_another_error_stays_what_it_is_and_everything_is_put_back() -> None:
    trainer = _trainer()
    before = copy.deepcopy(trainer.state_dict())
    trainer.fault = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        preflight(trainer, [("longest", [_batch([0.3])])])
    _assert_same(trainer.state_dict(), before)


def test_a_limit_given_by_hand_is_kept() -> None:
    trainer = _trainer()
    batches = [("short", [_batch([0.1])]), ("long", [_batch([24.0])])]  # some 200 MiB, beside which the noise of a process is little
    peaks = [row.peak_bytes for row in preflight(trainer, batches).rows]
    assert peaks[1] - peaks[0] > 60 * _MIB
    limit = (peaks[0] + peaks[1]) // 2
    with pytest.raises(DoesNotFitError, match=r"the update 'long' \(1 utterances, 24.0 s .*\) takes .* GiB, .* GiB are allowed; lower"):
        preflight(trainer, batches, limit_bytes=limit)
    assert len(preflight(trainer, batches[:1], limit_bytes=limit).rows) == 1
    assert trainer.steps == []


def test_no_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        preflight(_trainer(), [])


def test_the_tuner_finds_with_it_how_much_audio_fits() -> None:
    trainer = _trainer()

    def measure(seconds: float) -> int:
        return preflight(trainer, [(f"{seconds:g} s", [_batch([seconds])])]).peak_bytes

    base, more = measure(20.0), measure(60.0)
    per_second = (more - base) / 40
    tuned = tune(measure, int(base + 60 * per_second), start=20.0, most=200.0, margin=0.0)
    assert 65 <= tuned.seconds <= 95  # 80, and the noise of a process
    assert trainer.steps == []
