"""Strided convolutions over time as matrix products on frames that lie in rows, without a copy that unfolds them.

All utterances of a batch follow each other in one matrix of rows (frames) and columns (channels). `stride` neighbouring rows, read as
one row of a view, form a block; a kernel of k taps reaches over ceil(k / stride) blocks, so that the convolution is the sum of as many
products of views. Rows between an utterance's last frame and the next utterance are computed like any other and mean nothing.

Each step from one convolution's output to the next one's is one function of autograd that keeps that output only: normalisation and
GELU are computed again in the backward pass. Both passes go through the rows in pieces that fit a CPU's cache, or a GPU's memory. The
first convolution, which has one input channel and the largest output, is computed again as well, and its output is kept nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from k2ssl.first_derivative import first_derivative_only
from k2ssl.nn.fusion import fusible
from k2ssl.nn.kernels import triton_kernels

_PIECE_CPU = 2**20  # elements worked on at a time
_PIECE = 2**27  # a GPU wants few kernels: several utterances at once, and temporary tensors of half a gigabyte in float32
_EPS = 1e-5

Part = tuple[slice, slice]  # utterances, and rows of each of them
Norm = tuple[Tensor, Tensor]  # weight and bias (C,) of a layer normalisation over channels


def activate(rows: Tensor, norm: Norm | None) -> Tensor:
    """gelu(rows), or gelu(layer_norm(rows)) computed in float32 at least; (..., C) in the dtype of `rows`."""
    return F.gelu(rows) if norm is None else _normal_gelu(rows, *norm)


def convolve_activated(rows: Tensor, norm: Norm | None, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Convolution of `activate(rows, norm)`.

    Args:
        rows: (R, C_in), R a multiple of `stride`.
        norm: of the activation, None for none.
        weight: (C_out, C_in, kernel) as in `conv1d`; cast to the dtype of `rows`.
        bias: (C_out,) or None.
        stride: rows from one window to the next.

    Returns:
        (R / stride, C_out): row m sees the rows from m * stride on. Windows that reach beyond the last row miss taps.
    """
    norm_weight, norm_bias = norm or (None, None)
    return _Convolve.apply(rows, None, norm_weight, norm_bias, weight, bias, stride, rows.dtype)


def convolve_windows(
    windows: Tensor, first: Tensor, norm: Norm | None, weight: Tensor, bias: Tensor | None, stride: int, dtype: torch.dtype
) -> Tensor:
    """`convolve_activated` of rows that are windows of audio times a matrix; the rows are never kept.

    Args:
        windows: (N, W, K) float32 or float64, without gradient; W is a multiple of `stride`.
        first: (N, K, C_in) the matrix of each utterance, in the same dtype.
        norm, weight, bias, stride: see `convolve_activated`.
        dtype: what the convolution is computed in.

    Returns:
        (N * W / stride, C_out) in `dtype`.
    """
    norm_weight, norm_bias = norm or (None, None)
    return _Convolve.apply(windows, first, norm_weight, norm_bias, weight, bias, stride, dtype)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        first: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        stride: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(source, first, norm_weight, norm_bias, weight)
        ctx.stride, ctx.dtype, ctx.bias_dtype = stride, dtype, None if bias is None else bias.dtype
        activated = _Activated(source, first, None if norm_weight is None or norm_bias is None else (norm_weight, norm_bias), dtype)
        with torch.autocast(source.device.type, enabled=False):
            taps = _taps(weight, stride, dtype)
            shift = None if bias is None else bias.to(dtype)
            out = torch.empty(activated.num_rows // stride, weight.shape[0], dtype=dtype, device=source.device)
            for start, part in activated.parts(stride, weight.shape[1]):
                blocks = _blocks(activated.values(part), stride)
                end = start + len(blocks)
                if shift is None:
                    torch.mm(blocks[:, : len(taps[0])], taps[0], out=out[start:end])
                else:
                    torch.addmm(shift, blocks[:, : len(taps[0])], taps[0], out=out[start:end])
                for back, tap in enumerate(taps[1:], start=1):  # block m is also seen by the windows of earlier blocks
                    skipped = max(0, back - start)
                    out[start + skipped - back : end - back].addmm_(blocks[skipped:, : len(tap)], tap)
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        source, first, norm_weight, norm_bias, weight = ctx.saved_tensors
        stride, dtype = ctx.stride, ctx.dtype
        activated = _Activated(source, first, None if norm_weight is None else (norm_weight, norm_bias), dtype)
        with torch.autocast(source.device.type, enabled=False):
            grad = grad.to(dtype).contiguous()
            taps = _taps(weight, stride, dtype)
            grad_taps = [torch.zeros(tap.shape, dtype=_wide(dtype), device=tap.device) for tap in taps]
            activated.start_gradients()
            for start, part in activated.parts(stride, weight.shape[1]):
                blocks = _blocks(activated.values_again(part), stride)
                end = start + len(blocks)
                grad_blocks = torch.empty_like(blocks)
                grad_blocks[:, len(taps[0]) :].zero_()
                torch.mm(grad[start:end], taps[0].t(), out=grad_blocks[:, : len(taps[0])])
                for back, tap in enumerate(taps):
                    skipped = max(0, back - start)
                    seen = grad[start + skipped - back : end - back]
                    if back:
                        grad_blocks[skipped:, : len(tap)].addmm_(seen, tap.t())
                    grad_taps[back] += blocks[skipped:, : len(tap)].t() @ seen
                activated.backward(part, grad_blocks.view(-1, weight.shape[1]))
            grad_weight = _untap(grad_taps, weight)
            grad_bias = None if ctx.bias_dtype is None else grad.sum(0, dtype=ctx.bias_dtype)
        return *activated.gradients(), grad_weight, grad_bias, None, None


class _Activated:
    """What a convolution works on, part by part: gelu(rows) or gelu(layer_norm(rows)), where rows are `source` or windows times `first`.

    Triton's kernels, where there are some, make windows times `first` activated values, and rows normalised and activated ones, at once.
    """

    def __init__(self, source: Tensor, first: Tensor | None, norm: Norm | None, dtype: torch.dtype) -> None:
        self.source, self.first, self.norm, self.dtype = source, first, norm, dtype
        self.utterances, self.width = (1, len(source)) if first is None else source.shape[:2]
        self.num_rows = self.utterances * self.width
        kernels = triton_kernels(source.device, source.dtype, dtype)
        self.in_products = kernels if kernels and norm is None and first is not None and source.shape[2] <= kernels.MOST_TAPS else None
        self.in_norm = kernels if kernels and norm is not None and len(norm[0]) <= kernels.MOST_CHANNELS else None

    def parts(self, stride: int, channels: int) -> Iterator[tuple[int, Part]]:
        """Each of whole blocks, with its first block; without `first`, all rows count as one utterance."""
        most = _PIECE_CPU if self.source.device.type == "cpu" else _PIECE
        step = max(1, most // (stride * channels)) * stride
        together = max(1, step // max(1, self.width))
        for utterance in range(0, self.utterances, together):
            for start in range(0, self.width, step):
                yield (utterance * self.width + start) // stride, (slice(utterance, utterance + together), slice(start, start + step))

    def values(self, part: Part) -> Tensor:
        """(rows, C_in) in the dtype of the convolution."""
        if self.in_products is not None and self.first is not None:
            found: Tensor = self.in_products.gelu_of_products(self.source[part], self.first[part[0]], self.dtype)
            return found
        return self._activate(self._rows(part))

    def start_gradients(self) -> None:
        self.grad_source = torch.empty_like(self.source) if self.first is None else None
        self.grad_first = None if self.first is None else torch.zeros_like(self.first)
        self.grad_norm = None if self.norm is None else [torch.zeros_like(self.norm[0], dtype=_wide(self.dtype)) for _ in range(2)]

    def values_again(self, part: Part) -> Tensor:
        """`values`, remembering what `backward` of the same part needs."""
        if self.in_products is not None:
            return self.values(part)
        self.rows = self._rows(part)
        if self.in_norm is not None:
            return self._activate(self.rows)
        self.normal = None if self.norm is None else _normalised(self.rows, self.norm)
        return F.gelu(self.rows if self.normal is None else self.normal[0]).to(self.dtype)

    def backward(self, part: Part, grad: Tensor) -> None:
        """Takes the gradient of `values_again` in, (rows, C_in)."""
        if self.in_products is not None and self.first is not None and self.grad_first is not None:
            self.grad_first[part[0]] += self.in_products.gelu_of_products_backward(grad, self.source[part], self.first[part[0]])
            return
        if self.norm is not None and self.grad_norm is not None:
            if self.in_norm is not None:
                grad, *parts = self.in_norm.normal_gelu_backward(grad, self.rows, *self.norm, _EPS)
            else:
                assert self.normal is not None
                grad, *parts = _through_norm(grad, self.rows, *self.normal, *self.norm)
            for total, part_of_it in zip(self.grad_norm, parts, strict=True):
                total += part_of_it
        elif self.grad_source is not None:
            torch.ops.aten.gelu_backward.grad_input(grad, self.rows, grad_input=self.grad_source[part[1]])
            return
        else:
            grad = torch.ops.aten.gelu_backward(grad.to(self.rows.dtype), self.rows)
        if self.grad_source is not None:
            self.grad_source[part[1]] = grad
        elif self.grad_first is not None:
            windows = self.source[part]
            self.grad_first[part[0]].baddbmm_(windows.transpose(1, 2), grad.view(*windows.shape[:2], -1))

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of `source`, `first`, and the weight and bias of `norm`."""
        if self.norm is None or self.grad_norm is None:
            return self.grad_source, self.grad_first, None, None
        return self.grad_source, self.grad_first, *(total.to(of.dtype) for total, of in zip(self.grad_norm, self.norm, strict=True))

    def _activate(self, rows: Tensor) -> Tensor:
        if self.in_norm is not None and self.norm is not None:
            found: Tensor = self.in_norm.normal_gelu(rows, *self.norm, _EPS, self.dtype)
            return found
        return activate(rows, self.norm).to(self.dtype)

    def _rows(self, part: Part) -> Tensor:
        return self.source[part[1]] if self.first is None else (self.source[part] @ self.first[part[0]]).flatten(0, 1)


def _blocks(rows: Tensor, stride: int) -> Tensor:
    """(R, C) -> (R / stride, stride * C), a view."""
    return rows.view(-1, stride * rows.shape[1])


def _taps(weight: Tensor, stride: int, dtype: torch.dtype) -> list[Tensor]:
    """(C_out, C_in, kernel) -> for each block that a window reaches: (taps in it * C_in, C_out)."""
    by_tap = weight.to(dtype).permute(2, 1, 0).contiguous()
    return [taps.flatten(0, 1) for taps in by_tap.split(stride)]


def _untap(taps: list[Tensor], weight: Tensor) -> Tensor:
    """The inverse of `_taps`, for gradients."""
    return torch.cat(taps).view(weight.shape[2], weight.shape[1], weight.shape[0]).permute(2, 1, 0).to(weight.dtype)


@fusible
def _normal_gelu(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    wide = _wide(rows.dtype)
    return F.gelu(F.layer_norm(rows.to(wide), weight.shape, weight.to(wide), bias.to(wide), _EPS)).to(rows.dtype)


def _normalised(rows: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Layer normalisation in float32 at least, with the means and inverse deviations of the rows."""
    wide = _wide(rows.dtype)
    return torch.native_layer_norm(rows.to(wide), list(norm[0].shape), norm[0].to(wide), norm[1].to(wide), _EPS)


@fusible
def _through_norm(
    grad: Tensor, rows: Tensor, output: Tensor, mean: Tensor, inv_std: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through normalisation and GELU: of `rows` in their dtype, of the weight and of the bias in float32 at least."""
    wide = _wide(rows.dtype)
    grad = torch.ops.aten.gelu_backward(grad.to(wide), output)
    weight, bias = weight.to(wide), bias.to(wide)
    grad_rows, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad, rows.to(wide), list(weight.shape), mean, inv_std, weight, bias, [True, True, True]
    )
    return grad_rows.to(rows.dtype), grad_weight, grad_bias


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
