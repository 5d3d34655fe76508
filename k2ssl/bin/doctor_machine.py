"""What `k2ssl.bin.doctor` looks at in the machine: disk, memory, shared memory, files, cores. Control groups' limits count."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from k2ssl.bin.doctor_checks import Finding

_GIB = 2**30
_PUBLISHED_BATCH = 600 * 16000 * 4  # bytes of 600 s at 16 kHz in float32: what a worker hands over at once in the published recipes

_SHM = Path("/dev/shm")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def disk(folder: Path) -> Iterator[Finding]:
    """Room at a folder, or at what of its path exists."""
    place = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free
    text = f"{_size(free)} free at {place}; a checkpoint of a Base model takes 1.9 GB, and four are kept at a time"
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield Finding("error", f"{place} cannot be written to", f"ls -ld {place}")
    elif free < _GIB:
        yield Finding("error", text, f"df -h {place}")
    else:
        yield Finding("warning", text, f"df -h {place}") if free < 10 * _GIB else Finding("ok", text)


def memory() -> Iterator[Finding]:
    """Memory of the machine, or of this process' control group."""
    lines = (line.split(":") for line in _MEMINFO.read_text(encoding="utf-8").splitlines() if ":" in line)
    kib = {name: int(value.split()[0]) for name, value in lines if value.split()[0].isdigit()}
    total, available = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    limit = min((int(text) for text in _limits("memory.max", "memory/memory.limit_in_bytes") if text.isdigit()), default=total)
    text = f"{_size(min(total, limit))}{', a limit of the control group,' if limit < total else ''} with {_size(available)} free on the machine"
    if min(total, limit, available) < 4 * _GIB:
        yield Finding("warning", f"{text}; 4 GiB are the least for the small recipes", "free -h")
    else:
        yield Finding("ok", text)


def shared_memory() -> Iterator[Finding]:
    """/dev/shm, through which workers hand over batches."""
    if not _SHM.is_dir():
        yield Finding(
            "error", f"there is no {_SHM}: workers cannot hand over batches; --data.num-workers 0 does without them", "df -h /dev/shm"
        )
        return
    stat = os.statvfs(_SHM)
    size = stat.f_frsize * stat.f_blocks
    text = f"{_size(size)} at {_SHM}, {_size(stat.f_frsize * stat.f_bavail)} free; a batch of 600 s takes {_size(_PUBLISHED_BATCH)}"
    fix = "docker run --shm-size 8g"
    if size < _PUBLISHED_BATCH:
        yield Finding("error", f"{text}: workers die of a bus error; --data.num-workers 0 does without them", fix)
    elif size < _GIB:
        yield Finding("warning", f"{text}, and every worker keeps several", fix)
    else:
        yield Finding("ok", text)


def open_files() -> Iterator[Finding]:
    """How many files a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 1024:
        yield Finding("warning", f"at most {soft} open files in a process; 1,024 and more are usual", f"ulimit -n {max(hard, 1024)}")
    else:
        yield Finding("ok", f"at most {'any number of' if soft == resource.RLIM_INFINITY else soft} open files in a process")


def cores() -> Iterator[Finding]:
    """Cores that this process may use, and the number of threads that libraries will start."""
    visible = len(os.sched_getaffinity(0))
    quota = min((float(text.split()[0]) / float(text.split()[1]) for text in _quotas()), default=float(visible))
    usable = max(1, int(min(visible, quota)))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    text = f"{visible} visible of {os.cpu_count()}" + (f", and a quota of {quota:g}" if quota < visible else "")
    fix = f"export OMP_NUM_THREADS={usable}"
    if asked and not (asked.isdigit() and int(asked) > 0):
        yield Finding("warning", f"{text}; OMP_NUM_THREADS is {asked!r}, not a number of threads", fix)
    elif int(asked or visible) > usable:
        told = f"OMP_NUM_THREADS is {asked}" if asked else "libraries start a thread for each that is visible"
        yield Finding("warning", f"{text}; {told}, and more threads than cores hinder each other", fix)
    else:
        yield Finding("ok", f"{text}; OMP_NUM_THREADS is {asked or 'not set'}")


def _quotas() -> Iterator[str]:
    """Quota and period of processor time, with a blank between them; none where there is no limit."""
    yield from (text for text in _limits("cpu.max") if not text.startswith("max"))
    quotas, periods = _limits("cpu/cpu.cfs_quota_us"), _limits("cpu/cpu.cfs_period_us")
    yield from (f"{quota} {period}" for quota, period in zip(quotas, periods, strict=False) if not quota.startswith("-"))


def _limits(*names: str) -> Iterator[str]:
    """What files of these names hold in the control groups from this process' own up to the root."""
    try:
        entries = [line.split(":", 2)[2] for line in _OWN_CGROUP.read_text(encoding="utf-8").splitlines() if line.count(":") >= 2]
    except OSError:
        entries = []
    own = next((entry.strip("/") for entry in entries), "")
    groups = [Path(own), *Path(own).parents] if own else [Path()]
    for name in names:
        for group in groups:
            try:
                text = (_CGROUP / group / name).read_text(encoding="utf-8").strip()
            except OSError:
                continue
            if text:
                yield text


def _size(number: float) -> str:
    return f"{number / _GIB:.1f} GiB" if number >= _GIB else f"{number / 2**20:.0f} MiB"
