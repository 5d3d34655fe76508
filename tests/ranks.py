"""Several real processes that work together on this machine's CPU."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from k2ssl import distributed


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def set_environment(rank: int, world_size: int, port: int) -> None:
    """What torchrun tells a process, and one thread for it."""
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}})


def spawn(world_size: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Run `function(*arguments)`, of a module, on so many ranks."""
    mp.spawn(_entry, (world_size, free_port(), function, arguments), world_size)


def _entry(rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    set_environment(rank, world_size, port)
    with distributed.set_up("cpu", timeout_minutes=1.0):
        function(*arguments)
