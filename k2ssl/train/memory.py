"""How much memory a piece of work takes at its peak, on a CPU and on a CUDA device."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path
from types import TracebackType

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MEMINFO = Path("/proc/meminfo")
_CONTROL_GROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class DoesNotFitError(ValueError):
    """A step does not fit; the message says which, and what to lower."""


class PeakMemory:
    """The most memory in use since `reset`, which entering the block calls.

        with PeakMemory(device) as peak:
            ...
        print(peak.bytes)

    On a CUDA device what torch has handed out there counts; on the CPU the resident memory of the whole process (its libraries
    included, loader workers not), as the kernel records it. Nothing waits for the device.

    Attributes:
        since_start: True where the kernel's record cannot be reset: `bytes` then runs from the start of the process.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.since_start = False

    def reset(self) -> None:
        """Start anew: the peak is what is in use now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        _return_freed_memory()
        try:
            _RESET.write_text("5")
        except OSError:  # another system than Linux, or a container that forbids it
            self.since_start = True

    @property
    def bytes(self) -> int:
        """Peak since `reset`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _kibibytes(_STATUS, "VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @property
    def reserved_bytes(self) -> int:
        """Peak of what torch took from the CUDA device, its unused pieces included; on the CPU the same as `bytes`."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else self.bytes

    def __enter__(self) -> PeakMemory:
        self.reset()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


def available_bytes(device: torch.device | str) -> int:
    """What this process could have in all on `device`: what it has now and what nobody uses.

    Raises:
        ValueError: the system does not tell, so that a limit must be given by hand.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free, own = _kibibytes(_MEMINFO, "MemAvailable"), _kibibytes(_STATUS, "VmRSS")
    if free is None or own is None:
        raise ValueError(
            f"available_bytes: device is {device}, and this system does not tell how much memory is free; give a limit by hand"
        )
    return min([free + own, *_control_group_limits()])


# What messages hold where an allocation failed: torch's own on a CPU; CUDA's, cuBLAS' and cuDNN's; NCCL's.
NO_ROOM = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "_STATUS_ALLOC_FAILED",
    "Cuda failure 'out of memory'",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch has no class of its own for that on the CPU, nor where a library of the GPU's allocates."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError, DoesNotFitError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_ROOM)


def gibibytes(number: int) -> str:
    """For people: "3.25 GiB"."""
    return f"{number / 2**30:.2f} GiB"


def _kibibytes(file: Path, key: str) -> int | None:
    """Bytes of the line "KEY: 123 kB"; None without such a file or line."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(found[0]) * 1024 if found else None


def _control_group_limits() -> list[int]:
    limits = []
    for file in _CONTROL_GROUP_LIMITS:
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        limits += [int(text)] if text.isdecimal() else []  # "max": none
    return limits


def _return_freed_memory() -> None:
    """The C library keeps what was freed, which would count as in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
