"""Activation checkpointing for modules that take their randomness from a clock."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

from torch.utils.checkpoint import checkpoint

from k2ssl.nn.schedule import Clock, ClockSnapshot


def recompute(function: Callable[..., Any], clock: Clock, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, remembering its inputs only; the backward pass runs it once more for what lies between.

    Both runs draw the same from `clock`, and what others draw during the backward pass is not disturbed, so gradients and all later
    draws are those of a plain call, bit for bit. Forward hooks inside `function` are called in both runs, and the second run ends as
    soon as the backward pass has what it needs.

    Args:
        function: a function or module that draws from `clock` alone, never from torch's default generators, and changes nothing but
            its result.
        clock: that of the model.
        args, kwargs: what it takes; tensors on CUDA among `args` rather than `kwargs`, where their device is looked for.

    Raises:
        torch.utils.checkpoint.CheckpointError: in the backward pass, when the second run makes other tensors than the first.

    Source: arXiv 1604.06174 (sublinear memory cost), in torch's form.
    """
    snapshot = clock.snapshot()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _Replay(clock, snapshot)

    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs)


class _Replay(AbstractContextManager[None]):
    """`clock.replaying(snapshot)`, to be entered once for each backward pass through a graph that is retained."""

    def __init__(self, clock: Clock, snapshot: ClockSnapshot) -> None:
        self._clock = clock
        self._snapshot = snapshot

    def __enter__(self) -> None:
        self._block = self._clock.replaying(self._snapshot)
        self._block.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._block.__exit__(kind, error, trace)
