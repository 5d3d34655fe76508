"""Two real processes over gloo, and one alone."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from k2ssl import distributed
from tests.ranks import free_port, set_environment, spawn


def _exchange(folder: Path) -> None:
    rank = distributed.rank()
    result = {
        "ranks": torch.tensor([rank, distributed.world_size(), distributed.is_main()]),
        "sum": distributed.all_reduce_sum(torch.tensor([1.0, 10.0 * rank])),
        "strided": distributed.all_reduce_sum(torch.full((3, 2), float(rank + 1)).T),
        "broadcast": distributed.broadcast(torch.tensor([rank + 5]), src=1),
        "rows": distributed.all_gather_rows(torch.full((rank * 2, 3), rank)),
        "first": distributed.all_gather_rows(torch.arange(3 - rank * 2)),
    }
    gathered = distributed.gather_objects({"rank": rank, "ids": ("a",) * (rank + 1)})
    assert gathered == ([{"rank": 0, "ids": ("a",)}, {"rank": 1, "ids": ("a", "a")}] if rank == 0 else None)
    assert distributed.broadcast_object(Path("x") if rank == 0 else None) == Path("x")
    assert distributed.agree(3 - rank, rank, 7) == [2, 0, 7]
    in_place = torch.zeros(4, 3)[:, 1]  # not contiguous
    in_place += 1
    assert distributed.all_reduce_sum(in_place) is in_place
    result["in_place"] = in_place
    distributed.barrier()
    torch.save(result, folder / f"{rank}.pt")


def _fail_on_rank_1() -> None:
    expected = (RuntimeError, "rank 1 failed") if distributed.rank() == 0 else (ValueError, "frame 7 is bad")
    with pytest.raises(expected[0], match=expected[1]), distributed.failing_together():
        if distributed.rank() == 1:
            raise ValueError("frame 7 is bad")
    with distributed.failing_together():
        pass


def _both(folder: Path) -> None:
    _exchange(folder)
    _fail_on_rank_1()


def test_two_processes_exchange_sums_rows_and_failures(tmp_path: Path) -> None:
    spawn(2, _both, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [result["ranks"].tolist() for result in results] == [[0, 2, 1], [1, 2, 0]]
    for result in results:
        assert result["sum"].tolist() == [2.0, 10.0]
        assert result["strided"].tolist() == [[3.0] * 3] * 2
        assert result["in_place"].tolist() == [2.0] * 4
        assert result["broadcast"].tolist() == [6]
        assert result["rows"].tolist() == [[1, 1, 1], [1, 1, 1]]
        assert result["first"].tolist() == [0, 1, 2, 0]


def _models_outlive_their_groups(rank: int, world_size: int, ports: list[int]) -> None:
    for port in ports:
        set_environment(rank, world_size, port)
        with distributed.set_up("cpu", timeout_minutes=1.0):
            model = DistributedDataParallel(nn.Linear(4, 4))
            for _ in range(20):
                model(torch.ones(2, 4)).sum().backward()
            distributed.agree(1)
        del model  # holds the group that has ended; without care this waits for ever in one round out of three
    assert _gloo_threads() >= 2
    distributed._let_go()
    assert _gloo_threads() == 0, "one that asks for Python's lock after Python has ended aborts the process"


def _gloo_threads() -> int:
    return sum("gloo" in (task / "comm").read_text(encoding="utf-8") for task in Path("/proc/self/task").iterdir())


def test_a_model_that_outlives_the_group_of_its_processes_ends_nevertheless_and_leaves_no_thread_behind() -> None:
    context = mp.spawn(_models_outlive_their_groups, (2, [free_port() for _ in range(12)]), 2, join=False)
    try:
        deadline = time.monotonic() + 120
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "a process waits for itself"
    finally:
        for process in context.processes:
            process.kill()


def test_alone_nothing_is_exchanged() -> None:
    x = torch.arange(3.0)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert all(function(x) is x for function in (distributed.all_reduce_sum, distributed.broadcast, distributed.all_gather_rows))
    assert distributed.gather_objects(x) == [x] and distributed.broadcast_object(x) is x and distributed.agree(2, 1) == [2, 1]
    distributed.barrier()
    with pytest.raises(KeyError), distributed.failing_together():
        raise KeyError("x")


def test_set_up_joins_nothing_in_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.set_up() as device:
        assert device == torch.device("cpu")
        assert not torch.distributed.is_initialized()
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with distributed.set_up():
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": None}, "WORLD_SIZE is set but RANK is not"),
        ({"RANK": "first"}, "RANK is 'first', a whole number is needed"),
        ({"RANK": "2"}, "RANK is 2, less than WORLD_SIZE 2 is needed"),
    ],
)
def test_a_broken_environment_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None], message: str) -> None:
    whole = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**whole, **change}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), distributed.set_up():
        pass


def test_one_gpu_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device is cuda:0, one GPU for several processes"), distributed.set_up("cuda:0"):
        pass


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_gpus_whose_process_fails_do_not_wait_for_the_others(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[object] = []
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_own_device", lambda device, rank: device)
    monkeypatch.setattr(distributed, "_several", lambda: False)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *arguments, **options: None)
    monkeypatch.setattr(distributed.dist, "group", SimpleNamespace(WORLD="group"))
    monkeypatch.setattr(distributed, "_leave", left.append)
    with pytest.raises(MemoryError), distributed.set_up(kind):
        raise MemoryError
    assert left == ([] if kind == "cuda" else ["group"])
    with distributed.set_up(kind):
        left.clear()
    assert left == ["group"]


def test_a_cuda_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    number = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"device is cuda:{number}, but this machine shows {number}"), distributed.set_up(f"cuda:{number}"):
        pass
