"""A trace of a few optimizer steps, to look at in a browser (chrome://tracing or ui.perfetto.dev)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from k2ssl.distributed import is_main

_log = logging.getLogger(__name__)


@contextmanager
def profile_steps(folder: str | Path, first: int, last: int) -> Iterator[Callable[[int], None]]:
    """Trace steps `first` to `last` on rank 0 into FOLDER/trace-steps-FIRST-LAST.json, with the shapes of operands.

        with profile_steps(folder, 100, 102) as before_step:
            for step in range(1, 1001):
                before_step(step)
                train_step(...)

    The block gets a function to be called before each step. The trace is written before step LAST + 1, or at the end of the block with
    the steps that were seen until then; if none was, a warning says so. Steps outside cost nothing.

    Raises:
        ValueError: `first` is below 1 or `last` below `first`.
        OSError: the folder cannot be written to.
    """
    if not 1 <= first <= last:
        raise ValueError(f"profile_steps: steps {first} to {last}, allowed is 1 <= first <= last")
    if not is_main():
        yield lambda step: None
        return
    trace = _Trace(Path(folder), first, last)
    try:
        yield trace.before_step
    finally:
        trace.finish()


class _Trace:
    def __init__(self, folder: Path, first: int, last: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._first, self._last = folder, first, last
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        self._profile = profile(activities=activities, record_shapes=True, acc_events=True)  # the last avoids a warning
        self._prepared = self._done = False
        self._seen: list[int] = []
        self._mark: record_function | None = None

    def before_step(self, step: int) -> None:
        if self._done or step < self._first - 1:
            return
        if step > self._last:
            self.finish()
            return
        if not self._prepared:  # takes seconds on a GPU, which are not to be seen in the first step if there is one before it
            self._profile.prepare_trace()
            self._prepared = True
        if step >= self._first:
            self._end_mark()
            if not self._seen:
                self._profile.start_trace()
            self._seen.append(step)
            self._mark = record_function(f"optimizer step {step}")
            self._mark.__enter__()

    def finish(self) -> None:
        if self._done:
            return
        self._done = True
        self._end_mark()
        if not self._seen:
            if self._prepared:  # a profiler that is prepared and never started stands in the way of the next one
                self._profile.start_trace()
                self._profile.stop_trace()
            _log.warning("steps %d to %d did not come by: nothing was profiled", self._first, self._last)
            return
        self._profile.stop_trace()
        path = self._folder / f"trace-steps-{self._seen[0]}-{self._seen[-1]}.json"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            self._profile.export_chrome_trace(str(temporary))
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _log.info("trace of steps %d to %d: %s", self._seen[0], self._seen[-1], path)

    def _end_mark(self) -> None:
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None
