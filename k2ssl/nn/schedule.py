"""Values that follow the batch count, and the clock that training-time randomness hangs on.

Every training-only mechanism of the encoder (balancers, skips, dropouts) needs two things that change from step to step: how far
training has come, and random numbers. Both live in one `Clock`, handed to each mechanism when it is built. Nothing is pushed onto
sub-modules and no global random state is read, so a step whose clock is put back can be replayed bit by bit.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Schedule:
    """Piecewise-linear function of the adjusted batch count, constant outside its first and last point.

    Args:
        points: (batch count, value) pairs with strictly increasing batch counts.

    Raises:
        ValueError: no points, a value that is not finite, or batch counts out of order.

    Source: arXiv 2310.11230 (Zipformer), where it is called ScheduledFloat.
    """

    def __init__(self, *points: tuple[float, float]) -> None:
        if not points:
            raise ValueError("Schedule: points is empty, at least one (batch count, value) pair is needed")
        if not all(math.isfinite(number) for point in points for number in point):
            raise ValueError(f"Schedule: points {points} must be finite numbers")
        counts = [count for count, _ in points]
        if any(right <= left for left, right in itertools.pairwise(counts)):
            raise ValueError(f"Schedule: batch counts {counts} must increase strictly")
        self.points = tuple((float(count), float(value)) for count, value in points)

    def __call__(self, batch_count: float) -> float:
        """Value at `batch_count`."""
        count, value = self.points[0]
        if batch_count <= count:
            return value
        for next_count, next_value in self.points[1:]:
            if batch_count <= next_count:
                return value + (next_value - value) * (batch_count - count) / (next_count - count)
            count, value = next_count, next_value
        return value

    def __repr__(self) -> str:
        return f"Schedule{self.points}"


def constant(value: float) -> Schedule:
    """A schedule that never changes."""
    return Schedule((0.0, value))


@dataclass(frozen=True)
class ClockSnapshot:
    """What a forward pass reads of a clock, as of one moment; see `Clock.snapshot`."""

    batch_count: float
    seed: int
    host: tuple[Any, ...]
    generators: Mapping[torch.device, Tensor]
    loaded_generators: Mapping[str, Tensor]
    flags: tuple[bool, ...]


class Clock:
    """What changes from one training step to the next: the batch count, random generators, and slow flags.

    One clock serves one model. A training loop calls `seed` before every forward pass, `advance` once per step and, where several
    processes train together, `merge_flags` after the last backward pass of the step.

    - `batch_count` drives every `Schedule`. It is the adjusted count: seconds of audio seen over a reference batch duration.
    - `chance` answers host-side questions ("does this regulariser act this time?").
    - `generator(device)` draws masks and dropouts on the device.
    - *Flags* are booleans that a backward pass computes on the device and that later host-side decisions use (`Whiten` asks whether
      its limit was exceeded). A flag that is set several times in a step, by micro-batches or by the processes that `merge_flags`
      brings together, is True if it was set to True once: how a step is divided up makes no difference. `advance` starts copying
      flags to the host and makes use of the copy begun one call earlier: the host waits at most for a step before the last one, and
      the outcome does not depend on timing.

    A step is replayed bit by bit by restoring the `state_dict` taken before it (seeding alone would not bring back the flags); it is
    what an exact resume must restore. Of ranks that merge their flags only the generators differ. Recomputing a part of a forward pass draws
    again: `replaying` makes it draw the same, as `k2ssl.nn.recompute` does (`torch.utils.checkpoint` alone does not know of clocks).
    """

    def __init__(self, seed: int = 0) -> None:
        self.batch_count = 0.0
        self._host = random.Random()
        self._generators: dict[torch.device, torch.Generator] = {}
        self._loaded_generators: dict[str, Tensor] = {}  # by type of device, until a generator is asked for there
        self._flags_host: list[bool] = []
        self._flags_device: Tensor | None = None  # (flags,) bool, as of the last `advance`
        self._pending: Tensor | None = None  # (2, flags) int32, how often set and how often to True since then; where `_flags_device` is
        self._copy: tuple[Tensor, torch.cuda.Event | None] | None = None
        self._seed = 0
        self.seed(seed)

    def seed(self, *parts: int) -> None:
        """Restart all generators from integers such as (seed, rank, epoch, step); equal parts give equal draws."""
        digest = hashlib.blake2b(repr(tuple(operator.index(part) for part in parts)).encode(), digest_size=8).digest()
        self._seed = int.from_bytes(digest, "little") >> 1  # torch takes signed 64-bit seeds
        self._host.seed(self._seed)
        self._loaded_generators = {}
        for generator in self._generators.values():
            generator.manual_seed(self._seed)

    def advance(self, batch_count: float) -> None:
        """Move every schedule to `batch_count` and let flags of earlier steps take effect; call once per step.

        Raises:
            ValueError: `batch_count` is negative or not finite.
        """
        if not (math.isfinite(batch_count) and batch_count >= 0):
            raise ValueError(f"Clock.advance: batch_count is {batch_count}, a finite number >= 0 is needed")
        self.batch_count = float(batch_count)
        if self._flags_device is not None and self._pending is not None:
            was_set, was_true = self._pending > 0
            self._flags_device = torch.where(was_set, was_true, self._flags_device)
            self._pending = None
        if self._copy is not None:
            self._wait_for_copy()
            self._flags_host = self._copy[0].tolist()
        self._copy = None if self._flags_device is None else _start_copy(self._flags_device)

    def chance(self, probability: float) -> bool:
        """True with the given probability, drawn on the host."""
        return self._host.random() < probability

    def draw_seed(self) -> int:
        """A fresh 63-bit seed, for kernels that can only draw from torch's default generator."""
        return self._host.getrandbits(63)

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator for tensors on `device`, made and seeded at first use."""
        if device not in self._generators:
            generator = torch.Generator(device).manual_seed(self._seed)
            loaded = self._loaded_generators.pop(device.type, None)
            if loaded is not None:
                generator.set_state(loaded)
            self._generators[device] = generator
        return self._generators[device]

    def add_flag(self) -> int:
        """Reserve a flag, initially True, and return its number. Called while a model is built."""
        self._flags_host.append(True)
        return len(self._flags_host) - 1

    def flag(self, number: int) -> bool:
        """The flag as known to the host."""
        return self._flags_host[number]

    def set_flag(self, number: int, value: Tensor) -> None:
        """Store a boolean scalar tensor into a flag, on that tensor's device; the host sees it after two `advance` calls. Of several
        values stored between two `advance` calls one True is enough."""
        pending = self._pending_on(value.device)
        pending[0, number].add_(1)
        pending[1, number].add_(value)

    def merge_flags(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Make the flags set since the last `advance` those of all processes; every process calls it, once per step, before `advance`.

        Does not wait for the device, and does nothing for a model without flags.

        Args:
            reduce: replaces an int32 tensor by its sum over processes, in place, such as `distributed.all_reduce_sum`.
            device: the model's. It is asked for because a process that has set no flag yet does not know where to take part.
        """
        if self._flags_host:
            reduce(self._pending_on(device))

    def snapshot(self) -> ClockSnapshot:
        """What the next draws and host-side decisions depend on, to be put back by `replaying`. Does not wait for the device: what is
        read of a CUDA generator (seed and offset) lies on the host."""
        generators = {device: generator.get_state() for device, generator in self._generators.items()}
        return ClockSnapshot(
            self.batch_count, self._seed, self._host.getstate(), generators, dict(self._loaded_generators), tuple(self._flags_host)
        )

    @contextmanager
    def replaying(self, snapshot: ClockSnapshot) -> Iterator[None]:
        """Inside the block draws and decisions repeat what followed `snapshot`; afterwards the clock goes on as if nothing had been
        drawn. Flags may be set inside the block, and stay set; `seed`, `advance` and loading have no place in it."""
        present = self.snapshot()
        self._put_back(snapshot)
        try:
            yield
        finally:
            self._put_back(present)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue exactly, on any machine with the same type of device: plain numbers, lists and CPU tensors.
        Waits for the device."""
        self._wait_for_copy()
        generators = {device.type: generator.get_state() for device, generator in self._generators.items()}
        return {
            "batch_count": self.batch_count,
            "seed": self._seed,
            "host": _to_lists(self._host.getstate()),
            "generators": {**self._loaded_generators, **generators},
            "flags_host": list(self._flags_host),
            "flags_device": None if self._flags_device is None else self._flags_device.cpu().clone(),
            "flags_pending": None if self._pending is None else self._pending.cpu().clone(),
            "flags_copied": None if self._copy is None else self._copy[0].clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Touches no device: generators and flags go there when they are first used.

        Raises:
            ValueError: keys are missing or unknown, or the state was saved by a model with another number of flags; nothing has been
                changed then.
        """
        expected = {"batch_count", "seed", "host", "generators", "flags_host", "flags_device", "flags_pending", "flags_copied"}
        if set(state) != expected:
            raise ValueError(f"Clock.load_state_dict: keys are {sorted(state)}, allowed are exactly {sorted(expected)}")
        if len(state["flags_host"]) != len(self._flags_host):
            raise ValueError(
                f"Clock.load_state_dict: flags_host has {len(state['flags_host'])} entries, this model has {len(self._flags_host)}"
            )
        self.batch_count = state["batch_count"]
        self._seed = state["seed"]
        self._host.setstate(_to_tuples(state["host"]))
        self._generators = {}
        self._loaded_generators = {kind: generator.clone() for kind, generator in state["generators"].items()}
        self._flags_host = list(state["flags_host"])
        self._flags_device = None if state["flags_device"] is None else state["flags_device"].clone()
        self._pending = None if state["flags_pending"] is None else state["flags_pending"].clone()
        self._copy = None if state["flags_copied"] is None else (state["flags_copied"].clone(), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Clock:
        # torch.Generator and CUDA events cannot be copied, their state can: a copied model (an average, say) gets a clock of its own
        copy = Clock()
        memo[id(self)] = copy
        copy.__setstate__(self.state_dict())
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return self.state_dict()

    def __setstate__(self, state: dict[str, Any]) -> None:
        Clock.__init__(self)
        self._flags_host = list(state["flags_host"])
        self.load_state_dict(state)

    def _pending_on(self, device: torch.device) -> Tensor:
        """The counts of flags set in this step, on `device`; the flags go there too."""
        num_flags = len(self._flags_host)
        if self._flags_device is None or self._flags_device.numel() != num_flags:
            self._flags_device = torch.tensor(self._flags_host)
        if self._flags_device.device != device:
            self._flags_device = self._flags_device.to(device, non_blocking=True)
        if self._pending is None or self._pending.shape[1] != num_flags:
            self._pending = torch.zeros(2, num_flags, dtype=torch.int32, device=device)
        elif self._pending.device != device:
            self._pending = self._pending.to(device, non_blocking=True)
        return self._pending

    def _put_back(self, snapshot: ClockSnapshot) -> None:
        self.batch_count = snapshot.batch_count
        self._seed = snapshot.seed
        self._host.setstate(snapshot.host)
        self._flags_host = list(snapshot.flags)
        self._loaded_generators = dict(snapshot.loaded_generators)
        for device in self._generators.keys() - snapshot.generators.keys():
            del self._generators[device]  # it was made later; `generator` makes it again as it did then
        for device, state in snapshot.generators.items():
            if device not in self._generators:
                self._generators[device] = torch.Generator(device)
            self._generators[device].set_state(state)

    def _wait_for_copy(self) -> None:
        if self._copy is not None and self._copy[1] is not None:
            self._copy[1].synchronize()


def _start_copy(flags: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Copy device flags to the host; on CUDA without waiting, with the event that tells when the copy is complete."""
    if not flags.is_cuda:
        return flags.clone().cpu(), None
    host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
    host.copy_(flags, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(flags.device))
    return host, event


def _to_lists(state: Any) -> Any:
    return [_to_lists(item) for item in state] if isinstance(state, tuple) else state


def _to_tuples(state: Any) -> Any:
    return tuple(_to_tuples(item) for item in state) if isinstance(state, list) else state
