"""Nearest centres by chunked matrix products: quick ones while centres are still moving, exact ones for labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_CHUNK_VALUES = 1 << 24  # numbers in the largest intermediate, 64 MiB of float32
_UNIT = 2.0**-24  # rounding unit of float32


class Centres:
    """Centres on one device, ready for searching.

    Frames and centres are moved by the mean of the centres first: |x|^2 - 2 x c + |c|^2 in float32 is worthless where the offset of the
    data is large against its spread, and distances do not depend on the origin.

    Args:
        centroids: (K, D), finite.
    """

    def __init__(self, centroids: Tensor) -> None:
        self.centroids = centroids.float()
        self.origin = centroids.double().mean(0).float()
        self.moved = (self.centroids.double() - self.origin.double()).float()
        self.half_squares = self.moved.double().square().sum(1).div(2).float()
        self.largest = self.moved.double().norm(dim=1).max().float()

    def nearest(self, x: Tensor, exact: bool = False) -> Tensor:
        """(F, D) float32 to (F,) int64: the nearest centre, of equally near ones that of the lowest index.

        Args:
            exact: as float64 would have it. Frames for which the bound on float32's rounding error leaves more than one centre possible
                are decided in float64 by sums of squared differences. Waits for the device. Without it the rounding of float32 decides.
        """
        rows = max(1, _CHUNK_VALUES // max(self.moved.shape))
        parts = [self._nearest(part, exact) for part in x.split(rows)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=x.device)

    def squared_distances(self, x: Tensor, labels: Tensor) -> Tensor:
        """(F,) float32: |x - c|^2 to the labelled centres, by differences, so without cancellation."""
        rows = max(1, _CHUNK_VALUES // self.moved.shape[1])
        pairs = zip(x.split(rows), labels.split(rows), strict=True)
        return torch.cat([(part - self.centroids[own]).square().sum(1) for part, own in pairs])

    def _nearest(self, x: Tensor, exact: bool) -> Tensor:
        with full_precision(x.device):
            moved = x - self.origin
            scores = torch.addmm(self.half_squares, moved, self.moved.T, alpha=-1)  # (|x - c|^2 - |x|^2) / 2
        best, labels = scores.min(1)
        if exact:
            # A dot product of D terms is off by at most (D + 1) u |x| |c|, and moving and |c|^2 / 2 add a few u more (Higham, 2002, 3.1).
            size = moved.norm(dim=1)
            error = (x.shape[1] + 8) * _UNIT * self.largest * (size + self.largest)
            unsure = ((scores <= (best + 2 * error).unsqueeze(1)).sum(1) > 1).nonzero().squeeze(1)
            if len(unsure):
                labels[unsure] = self._nearest_by_differences(x[unsure])
        return labels

    def _nearest_by_differences(self, x: Tensor) -> Tensor:
        rows = max(1, _CHUNK_VALUES // (2 * self.moved.numel()))
        centroids = self.centroids.double()
        index = torch.arange(len(centroids), device=x.device)
        labels = []
        for part in x.split(rows):
            distances = (part.double().unsqueeze(1) - centroids).square().sum(2)
            equal = distances <= distances.min(1, keepdim=True).values
            labels.append(torch.where(equal, index, len(centroids)).min(1).values)  # min and argmin promise no order among ties
        return torch.cat(labels)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No half precision and no TF32 in matrix products inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def sums_by_label(x: Tensor, labels: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """(K, D) float64 sums and (K,) float64 counts of the frames of each label, the same bits every time."""
    counts = torch.bincount(labels.cpu(), minlength=num_clusters).to(x.device, torch.float64)
    if x.device.type == "cpu":
        return torch.zeros(num_clusters, x.shape[1], dtype=torch.float64).index_add_(0, labels, x.double()), counts
    sums = torch.zeros(num_clusters, x.shape[1], dtype=torch.float64, device=x.device)
    rows = max(1, _CHUNK_VALUES // num_clusters)
    for part, own in zip(x.split(rows), labels.split(rows), strict=True):  # atomic additions would come in another order each time
        members = torch.nn.functional.one_hot(own, num_clusters).to(torch.float64)
        sums += members.T @ part.double()
    return sums, counts
