"""From a worker to the main process: batches go through shared memory, and a batch that finds no room there is told of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import Dataset

from k2ssl.data.audio_dataset import BatchDataset, Loaded, Request

B = TypeVar("B")


class HandedOver(Dataset[Loaded[B]]):
    """What `dataset` makes, moved into shared memory; for workers.

    Without this torch moves it there when it is sent, in a thread of the worker (the feeder of `multiprocessing.Queue`) that prints an
    error, drops the batch and goes on, while the main process waits for it for ever. Here, where it is read, an error reaches the main
    process as those of reading do. What is in shared memory is not copied again.
    """

    def __init__(self, dataset: BatchDataset[B]) -> None:
        self.dataset = dataset

    def __getitem__(self, request: Request) -> Loaded[B]:
        """The batch asked for.

        Raises:
            OSError: there is no room for it in shared memory.
        """
        loaded = self.dataset[request]
        tensors = [tensor for tensor in _tensors_in(loaded) if tensor.untyped_storage().nbytes()]  # an empty one takes no memory
        try:
            for tensor in tensors:
                tensor.share_memory_()
        except (RuntimeError, OSError) as error:  # torch's own are RuntimeErrors
            mebibytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors) / 2**20
            raise OSError(
                f"a worker cannot hand over a batch of {mebibytes:.1f} MiB through shared memory ({str(error).splitlines()[0]}): give it more room "
                "(`df -h /dev/shm`; containers: --shm-size 8g), raise the limits on files (`ulimit -f`, `ulimit -n`), take smaller batches, or "
                "read without workers (num_workers 0: --data.num-workers 0, in labelling and decoding --loader.num-workers 0)"
            ) from error
        return loaded


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in dataclasses and tuples, nested or not."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors_in(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors_in(getattr(value, field.name))
