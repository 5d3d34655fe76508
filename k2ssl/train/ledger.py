"""What a run used, summed over all attempts: time of devices, audio, steps, memory.

Every program appends to `ledger.jsonl` in its output folder. A line holds what its session (one start of one program) has used so far, so
the last line of a session counts, and a killed session costs what it had used when it wrote last.
"""

from __future__ import annotations

import os
import platform
import resource
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

from k2ssl.distributed import is_main
from k2ssl.train.json_lines import JsonLines, read_json_lines

LEDGER = "ledger.jsonl"

Status = Literal["running", "done", "interrupted", "failed"]

_NUMBERS = ("wall_seconds", "gpu_seconds", "cpu_seconds", "audio_seconds", "steps", "peak_gpu_bytes", "peak_host_bytes", "num_devices")
_TEXTS = ("session", "program", "status", "device")


class Ledger:
    """Accounts for one session. Rank 0 writes, the others do nothing.

    A GPU-hour is one hour of wall time of one GPU, busy or not, from the making of this object or from `since`; a run on GPUs counts no
    CPU-hours. A CPU-hour is wall time x threads (`torch.get_num_threads()`) x processes; loader workers are not counted. Memory is that
    of rank 0. The real-time factor is wall time by audio, null where there is none.

    A context manager: the session ends as done, interrupted (KeyboardInterrupt, SystemExit) or failed (any other exception).
    """

    def __init__(
        self,
        folder: str | Path,
        program: str,
        device: torch.device,
        num_devices: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        since: float | None = None,
    ) -> None:
        """
        Args:
            folder: made if need be; `ledger.jsonl` in it is appended to.
            program: name under which totals are listed.
            device: of this process.
            num_devices: GPUs, or processes on the CPU, that work together over all ranks and nodes.
            clock: seconds.
            since: reading of the clock from which time counts, for work that came before anything was written; None: now.

        Raises:
            ValueError: `num_devices` is below 1.
            OSError: the folder cannot be written to.
        """
        if num_devices < 1:
            raise ValueError(f"Ledger: num_devices is {num_devices}, allowed is >= 1")
        self._device, self._num_devices, self._clock = device, num_devices, clock
        self._fixed = {
            "session": secrets.token_hex(8),
            "program": program,
            "started": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "device": _device_name(device),
            "num_devices": num_devices,
        }
        self._started = clock() if since is None else since
        self._audio_seconds, self._steps = 0.0, 0
        self._peak_gpu, self._peak_host = 0, 0
        self._lines: JsonLines | None = None
        if is_main():
            os.makedirs(folder, exist_ok=True)
            self._lines = JsonLines(Path(folder) / LEDGER, sync=True)

    def add(self, *, audio_seconds: float = 0.0, steps: int = 0) -> None:
        """So much more was done by all ranks together. Steps done again after an interruption count again: they were paid for."""
        self._audio_seconds += audio_seconds
        self._steps += steps

    def write(self, status: Status = "running") -> None:
        """Append what was used so far and force it to disk; what is used later is lost to the ledger if the process is killed.

        Raises:
            OSError: the disk is full.
        """
        if self._lines is None:
            return
        seconds = self._clock() - self._started
        on_gpu = self._device.type != "cpu"
        # peaks are remembered here because measuring the memory of one part of a program resets them
        self._peak_host = max(self._peak_host, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)  # Linux counts in KiB
        if self._device.type == "cuda":
            self._peak_gpu = max(self._peak_gpu, torch.cuda.max_memory_allocated(self._device))
        used = {
            "status": status,
            "wall_seconds": seconds,
            "gpu_seconds": seconds * self._num_devices if on_gpu else 0.0,
            "cpu_seconds": 0.0 if on_gpu else seconds * self._num_devices * torch.get_num_threads(),
            "audio_seconds": self._audio_seconds,
            "real_time_factor": seconds / self._audio_seconds if self._audio_seconds else None,
            "steps": self._steps,
            "peak_gpu_bytes": self._peak_gpu,
            "peak_host_bytes": self._peak_host,
        }
        self._lines.append({**self._fixed, **used})

    def close(self, status: Status = "done") -> None:
        """Write for the last time. Calls after the first do nothing."""
        self.write(status)
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is None:
            self.close("done")
        else:
            self.close("failed" if issubclass(kind, Exception) else "interrupted")


@dataclass(frozen=True)
class LedgerTotal:
    """What sessions used together.

    Attributes:
        sessions: how many starts, by how they ended; "running" is one that runs or was killed.
        wall_hours: summed over sessions, also where these ran side by side.
        gpu_hours, cpu_hours: see `Ledger`.
        audio_hours: worked through, with repetitions.
        steps: optimizer steps, with repetitions.
        peak_gpu_bytes, peak_host_bytes: largest of any session's rank 0.
        devices: how many of which kind worked together, as in "8 x NAME".
        by_program: the same for each program alone; empty in those.
        damaged_lines: lines of the files that could not be read and count nowhere.
    """

    sessions: Mapping[str, int]
    wall_hours: float
    gpu_hours: float
    cpu_hours: float
    audio_hours: float
    steps: int
    peak_gpu_bytes: int
    peak_host_bytes: int
    devices: tuple[str, ...]
    by_program: Mapping[str, LedgerTotal] = field(default_factory=dict)
    damaged_lines: int = 0

    def text(self) -> str:
        """A line for all, and one for each program where there are several."""
        lines = [self._line("in all") if self.sessions else "nothing was recorded"]
        if len(self.by_program) > 1:
            lines += [f"  {total._line(program)}" for program, total in sorted(self.by_program.items())]
        if self.damaged_lines:
            lines.append(f"{self.damaged_lines} damaged lines are not counted")
        return "\n".join(lines)

    def _line(self, what: str) -> str:
        hours = [f"{self.gpu_hours:,.2f} GPU-hours"] if self.gpu_hours else []
        hours += [f"{self.cpu_hours:,.2f} CPU-hours"] if self.cpu_hours or not hours else []
        memory = [f"{self.peak_host_bytes / 2**30:.2f} GiB"]
        memory += [f"{self.peak_gpu_bytes / 2**30:.2f} GiB on the GPU"] if self.peak_gpu_bytes else []
        ends = ", ".join(f"{count} {'running or killed' if end == 'running' else end}" for end, count in sorted(self.sessions.items()))
        parts = [
            *hours,
            f"{self.audio_hours:,.2f} h of audio",
            *([f"{self.steps:,} steps"] if self.steps else []),
            f"peak memory {', '.join(memory)}",
            f"on {', '.join(self.devices)}",
            f"sessions: {ends}",
        ]
        return f"{what}: {'; '.join(parts)}"


def total(*places: str | Path) -> LedgerTotal:
    """Everything used, from the ledgers of one or several runs.

    Args:
        places: output folders, or ledger files; a session that several hold is counted once.

    Raises:
        OSError: a ledger does not exist or cannot be read.
    """
    last: dict[str, dict[str, Any]] = {}
    damaged = 0
    for place in places:
        path = Path(place)
        records, torn = read_json_lines(path / LEDGER if path.is_dir() else path)
        whole = [record for record in records if _is_entry(record)]
        damaged += torn + len(records) - len(whole)
        for record in whole:
            before = last.get(record["session"])
            if before is None or record["wall_seconds"] >= before["wall_seconds"]:
                last[record["session"]] = record
    programs = {record["program"] for record in last.values()}
    by_program = {program: _sum(record for record in last.values() if record["program"] == program) for program in programs}
    return _sum(last.values(), by_program, damaged)


def _sum(entries: Iterable[Mapping[str, Any]], by_program: Mapping[str, LedgerTotal] | None = None, damaged: int = 0) -> LedgerTotal:
    entries = list(entries)
    ends = [entry["status"] for entry in entries]
    hours = {name: sum(entry[f"{name}_seconds"] for entry in entries) / 3600 for name in ("wall", "gpu", "cpu", "audio")}
    return LedgerTotal(
        sessions={end: ends.count(end) for end in sorted(set(ends))},
        wall_hours=hours["wall"],
        gpu_hours=hours["gpu"],
        cpu_hours=hours["cpu"],
        audio_hours=hours["audio"],
        steps=sum(entry["steps"] for entry in entries),
        peak_gpu_bytes=max((entry["peak_gpu_bytes"] for entry in entries), default=0),
        peak_host_bytes=max((entry["peak_host_bytes"] for entry in entries), default=0),
        devices=tuple(sorted({f"{entry['num_devices']} x {entry['device']}" for entry in entries})),
        by_program=by_program or {},
        damaged_lines=damaged,
    )


def _is_entry(record: Mapping[str, Any]) -> bool:
    return all(isinstance(record.get(name), int | float) for name in _NUMBERS) and all(isinstance(record.get(n), str) for n in _TEXTS)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
