"""Parameters dealt out to several ranks, each of which holds a piece: pieces, and sums over all of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # slow to import, and not needed to show --help
    from torch.distributed.tensor import DTensor


def is_sharded_tensor(value: Any) -> TypeGuard[DTensor]:
    """Whether it is a tensor of which each rank holds a piece."""
    module = sys.modules.get("torch.distributed.tensor")  # before someone has imported it there is no such tensor
    return module is not None and isinstance(value, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a sharded tensor, sharing its memory; any other tensor itself. Pieces may be empty."""
    if not is_sharded_tensor(tensor):
        return tensor
    with torch.no_grad():  # with gradients `to_local` returns a copy of the object that autograd watches
        return tensor.to_local()


def sharded_like(piece: Tensor, whole: Tensor) -> Tensor:
    """The sharded tensor that has `piece` on this rank, with shape and distribution of `whole`; `piece` where `whole` is not sharded."""
    if not is_sharded_tensor(whole):
        return piece
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(piece, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride())


def piece_for(value: Tensor, whole: Tensor) -> Tensor:
    """What this rank holds of `value`, sharded like `whole` already or complete on every rank, when it is dealt out like `whole`."""
    if is_sharded_tensor(value) or not is_sharded_tensor(whole):
        return local(value)
    dim, mesh = _shard_dim(whole), whole.device_mesh
    pieces = value.chunk(mesh.size(), dim)  # may be fewer than ranks; those that are left out have nothing
    rank = mesh.get_local_rank()
    return pieces[rank] if rank < len(pieces) else value.narrow(dim, 0, 0)


class SumOverShards:
    """Sums over ranks of numbers of which every parameter has one; nothing to do where no parameter is sharded.

    Parameters that are not sharded among others that are must be equal on all ranks; the numbers of the first rank count.

    Args:
        params: P parameters.

    Raises:
        ValueError: parameters sharded over different ranks, or over ranks that form a grid of more than one dimension.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        sharded = [param for param in params if is_sharded_tensor(param)]
        self._group: dist.ProcessGroup | None = None
        self._counts: Tensor | None = None
        if not sharded:
            return
        mesh = sharded[0].device_mesh
        if any(param.device_mesh != mesh for param in sharded):
            raise ValueError("ScaledAdam: parameters of one group are sharded over different ranks; make one group for each set of ranks")
        for param in sharded:
            _shard_dim(param)
        self._group = mesh.get_group()
        first = mesh.get_local_rank() == 0
        counts = [first or is_sharded_tensor(param) for param in params]
        self._counts = torch.tensor(counts, device=local(sharded[0]).device)

    def __bool__(self) -> bool:
        """Whether there is anything to add up."""
        return self._group is not None

    def __call__(self, numbers: Tensor) -> Tensor:
        """(P,) of this rank's pieces -> (P,) of the whole parameters, the same bits on all ranks."""
        if self._counts is None:
            return numbers
        total = torch.where(self._counts, numbers, 0.0)
        dist.all_reduce(total, group=self._group)
        return total


def _shard_dim(whole: DTensor) -> int:
    from torch.distributed.tensor import Shard

    if len(whole.placements) != 1 or not isinstance(whole.placements[0], Shard):
        raise ValueError(f"a parameter is distributed as {whole.placements}, only one Shard over one set of ranks is supported")
    return whole.placements[0].dim
