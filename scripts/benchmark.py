"""What the benchmarks share: the description of the machine, medians, memory of this process, measurements in processes of their own."""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from k2ssl.batch import PretrainBatch
from k2ssl.bin.cluster_features import choose_device
from k2ssl.config import ConfigError


def device_here(name: str) -> str:
    """The type of an option `--device`: what the programs take, "auto" resolved.

    Raises:
        ArgumentTypeError: this machine has no such device.
    """
    try:
        chosen = choose_device(name)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if chosen.startswith("cuda:"):
        torch.cuda.set_device(chosen)  # what asks for no device means this one
    return chosen


class Stopwatch:
    """Adds up the time spent in what it wraps; on CUDA it waits for the device, so stages do not overlap while it is in use."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            started = self.now()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += self.now() - started

        return timed


def machine(device: torch.device) -> dict[str, Any]:
    """Device, threads and versions, for a measurement's line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def summary(values: Iterable[float], digits: int = 4) -> dict[str, Any]:
    """Median and spread."""
    values = sorted(values)
    return {
        "median": round(statistics.median(values), digits),
        "min": round(values[0], digits),
        "max": round(values[-1], digits),
        "runs": len(values),
    }


def synthetic_batch(num: int, samples: int, num_frames: int, num_classes: Iterable[int]) -> PretrainBatch:
    """`num` utterances of noise of `samples` samples each, with a label for every frame in each label set."""
    generator = torch.Generator().manual_seed(0)
    audio = 0.1 * torch.randn(num, samples, generator=generator)
    return PretrainBatch(audio, tuple(torch.randint(k, (num, num_frames), generator=generator) for k in num_classes))


class PeakMemory:
    """Largest memory held since this object was made: of the process on a CPU, of the allocator on CUDA.

    A process' high-water mark never falls, so on a CPU make it before the first large allocation, in a process of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = 0
        if device.type == "cuda":
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self.before = _high_water()

    def gigabytes(self) -> float:
        """1e9 bytes."""
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _high_water()
        return (peak - self.before) / 1e9


def in_own_process(script: str, arguments: list[str]) -> dict[str, Any]:
    """Run `script` with `arguments` and return the JSON of its last line; memory and compiled kernels of one measurement then do not
    weigh on the next. A failure becomes `{"error": ...}`, so that the measurements after it still run."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        # long enough for CUDA's message about memory, a single line of 600 characters that says so at its beginning
        return {"error": f"exit status {done.returncode}: {done.stderr.strip()[-2000:]}"}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Markdown."""
    cells = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


def _high_water() -> int:
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss of a child starts at its parent's
        kibibytes = int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")))
    return kibibytes * 1024
