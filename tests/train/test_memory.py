from __future__ import annotations

from pathlib import Path

import pytest
import torch

from k2ssl.train import memory
from k2ssl.train.memory import DoesNotFitError, PeakMemory, available_bytes, is_out_of_memory

_MIB = 2**20


def test_the_peak_holds_what_was_used_and_freed_inside_and_not_what_came_before() -> None:
    before = torch.ones(100 * _MIB // 4)
    del before
    with PeakMemory("cpu") as peak:
        at_start = peak.bytes
        used = torch.ones(60 * _MIB // 4)
        del used
    assert 58 * _MIB < peak.bytes - at_start < 75 * _MIB
    assert not peak.since_start
    peak.reset()
    assert peak.bytes - at_start < 10 * _MIB


def test_what_the_c_library_kept_is_returned_at_a_reset() -> None:
    peak = PeakMemory("cpu")
    peak.reset()
    at_start = peak.bytes
    blocks = [torch.ones(4096) for _ in range(4000)]  # small ones, which come from the heap
    last = torch.ones(4096)  # keeps the heap from shrinking by itself
    del blocks
    peak.reset()
    assert peak.bytes - at_start < 20 * _MIB
    assert last.sum() == 4096


def test_without_a_record_that_can_be_reset_the_peak_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_RESET", tmp_path / "nowhere" / "clear_refs")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "nowhere" / "status")
    with PeakMemory("cpu") as peak:
        pass
    assert peak.since_start
    assert peak.bytes > 50 * _MIB
    with pytest.raises(ValueError, match="give a limit by hand"):
        available_bytes("cpu")


def test_available_memory_is_what_is_free_and_what_is_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in {"meminfo": "MemTotal: 9 kB\nMemAvailable: 4000 kB\n", "status": "VmHWM: 7 kB\nVmRSS: 500 kB\n"}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    limits = [tmp_path / "none", tmp_path / "limit"]
    monkeypatch.setattr(memory, "_CONTROL_GROUP_LIMITS", limits)
    for limit, expected in (("max\n", 4500 * 1024), ("1048576\n", 1048576), (str(2**62), 4500 * 1024)):
        limits[1].write_text(limit)
        assert available_bytes("cpu") == expected


def test_this_machine_says_how_much_memory_there_is() -> None:
    assert available_bytes("cpu") > PeakMemory("cpu").bytes / 2


@pytest.mark.parametrize("size", [2**60, 2**45])
def test_a_failed_allocation_is_recognised(size: int) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(size)
    assert is_out_of_memory(caught.value)
    assert all(is_out_of_memory(kind("x")) for kind in (torch.OutOfMemoryError, MemoryError, DoesNotFitError))
    assert not any(is_out_of_memory(kind("can't")) for kind in (RuntimeError, ValueError))
    for library in (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory\nCUDA kernel ...",
    ):
        assert is_out_of_memory(RuntimeError(library))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_of_a_cuda_device() -> None:
    with PeakMemory("cuda") as peak:
        at_start = peak.bytes
        used = torch.ones(60 * _MIB // 4, device="cuda")
        del used
    assert peak.bytes - at_start == 60 * _MIB
    assert peak.reserved_bytes >= peak.bytes
    assert available_bytes("cuda") >= torch.cuda.mem_get_info()[0]
