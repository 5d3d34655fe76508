"""Several processes as torchrun starts them, and nothing at all in a single process.

    with set_up("cuda") as device:
        ...
        all_reduce_sum(counts)

Every function works without `set_up`: alone there is one rank, number 0, and nothing to exchange.
"""

from __future__ import annotations

import atexit
import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# Groups that have ended, held until the process does. Whoever lets go of a group last waits for its threads, and these may be waiting for
# Python's lock to let go of the tensors they sent. From here the lock is given up meanwhile (torch's binding of ProcessGroup does that); a
# DistributedDataParallel model that outlived its group would keep it, and both would wait for ever.
_ended: list[dist.ProcessGroup] = []


@atexit.register
def _let_go() -> None:
    """Wait for the threads of groups that have ended: one that asks for Python's lock once that is taken down aborts the process."""
    if _ended:
        gc.collect()  # models in cycles of references, which hold their groups
        _ended.clear()
        time.sleep(0.1)  # a model of the main module, or torch's cache of sharded tensors, may hold one yet: its threads get the lock now


def rank() -> int:
    """Number of this process, 0 <= rank < world_size."""
    return dist.get_rank() if _several() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if _several() else 1


def is_main() -> bool:
    """Whether this is rank 0, which writes files and talks to people."""
    return rank() == 0


@contextmanager
def set_up(device: torch.device | str = "cpu", timeout_minutes: float = 30.0) -> Iterator[torch.device]:
    """Join the processes that torchrun started; the block gets the device of this process.

    Without WORLD_SIZE in the environment, or with WORLD_SIZE=1, nothing is joined. Tensors on the CPU travel by gloo, tensors on CUDA
    devices by NCCL; "cuda" becomes the device numbered LOCAL_RANK and the process' current one.

    Args:
        device: "cpu", "cuda", or a device with an index, which is used as it is.
        timeout_minutes: how long one exchange may wait for another process.

    Raises:
        ValueError: WORLD_SIZE is set but another variable of torchrun is missing or no number, or there is no such CUDA device.
        RuntimeError: a process group is set up already.
    """
    local_rank, several = _environment()
    device = _own_device(torch.device(device), local_rank)
    if not several:
        yield device
        return
    if _several():
        raise RuntimeError("distributed.set_up: a process group is set up already")
    # Imported later, by DistributedDataParallel, its functions would have this group as their arguments' default, and hold it for ever.
    import torch.distributed.nn.functional as _  # noqa: F401

    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    group = dist.group.WORLD
    assert group is not None
    try:
        yield device
    except BaseException:
        if device.type != "cuda":
            _leave(group)
        # NCCL's communicators would wait for the other ranks, which may wait for this one: it is left to the end of the process, upon
        # which torchrun ends theirs, and the message comes out first
        raise
    _leave(group)


def _leave(group: dist.ProcessGroup) -> None:
    _ended.append(group)
    dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Replace `tensor` on every rank by the sum over ranks, and return it; all ranks get the same bits."""
    if world_size() > 1:
        whole = tensor.contiguous()
        dist.all_reduce(whole)
        if whole is not tensor:
            tensor.copy_(whole)
    return tensor


def broadcast(tensor: Tensor, src: int = 0) -> Tensor:
    """Replace `tensor`, of one shape and type everywhere, by that of rank `src`, and return it."""
    if world_size() > 1:
        whole = tensor.contiguous()
        dist.broadcast(whole, src)
        if whole is not tensor:
            tensor.copy_(whole)
    return tensor


def all_gather_rows(tensor: Tensor) -> Tensor:
    """The rows of all ranks, in the order of the ranks: (n_rank, ...) to (sum of n_rank, ...); only the first size may differ."""
    if world_size() == 1:
        return tensor
    counts = torch.zeros(world_size(), dtype=torch.int64, device=tensor.device)
    counts[rank()] = tensor.shape[0]
    sizes: list[int] = all_reduce_sum(counts).tolist()
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_objects(value: Any) -> list[Any] | None:
    """`value` of every rank, in the order of the ranks, on rank 0; None on the others. Small things only: they travel pickled, by gloo."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, gathered)
    return gathered


def broadcast_object(value: Any) -> Any:
    """`value` of rank 0, on every rank. Small things only, as for `gather_objects`."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def agree(*numbers: int) -> list[int]:
    """The smallest of each number over all ranks; exchanged between the processes by gloo, so that nobody waits for a device."""
    if world_size() == 1:
        return list(numbers)
    smallest = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    return smallest.tolist()


class OtherRankError(RuntimeError):
    """This rank is well, another is not."""


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exchange failed because of another process, which has most often ended with a message of its own: as gloo and NCCL tell it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


@contextmanager
def failing_together() -> Iterator[None]:
    """An exception inside the block on one rank ends the block of every rank with one, lest the others wait for it in vain.

    Nothing inside may wait for other ranks. At the end of the block every rank waits for all.

    Raises:
        Exception: this rank's own, as it is; where there is none, an `OtherRankError` that names the ranks that met one.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as met:
        error = met
    failed = torch.zeros(world_size(), dtype=torch.int64)
    failed[rank()] = error is not None
    all_reduce_sum(failed)
    if error is not None:
        raise error
    if failed.any():
        raise OtherRankError(f"rank {', '.join(str(number) for number in failed.nonzero().flatten().tolist())} failed, see its message")


def barrier() -> None:
    """Wait until every rank has come here."""
    if world_size() > 1:
        dist.barrier()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def _environment() -> tuple[int, bool]:
    """LOCAL_RANK, and whether there are other processes to join."""
    if "WORLD_SIZE" not in os.environ:
        return 0, False
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise ValueError(f"distributed.set_up: WORLD_SIZE is set but {', '.join(missing)} is not; start the processes with torchrun")
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if not os.environ[name].isdecimal():
            raise ValueError(f"distributed.set_up: {name} is {os.environ[name]!r}, a whole number is needed")
        numbers[name] = int(os.environ[name])
    if not numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise ValueError(f"distributed.set_up: RANK is {numbers['RANK']}, less than WORLD_SIZE {numbers['WORLD_SIZE']} is needed")
    return numbers["LOCAL_RANK"], numbers["WORLD_SIZE"] > 1


def _own_device(device: torch.device, local_rank: int) -> torch.device:
    if device.type != "cuda":
        return device
    index = local_rank if device.index is None else device.index
    if device.index is not None and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise ValueError(f"distributed.set_up: device is {device}, one GPU for several processes; 'cuda' gives each process one of its own")
    if index >= torch.cuda.device_count():
        raise ValueError(f"distributed.set_up: device is cuda:{index}, but this machine shows {torch.cuda.device_count()} CUDA devices")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device
