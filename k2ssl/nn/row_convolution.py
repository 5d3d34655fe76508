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
from torch.autograd.function import once_differentiable

from k2ssl.nn.fusion import fusible

_PIECE_CPU = 2**20  # elements worked on at a time
_PIECE = 2**27  # a GPU wants few kernels: several utterances at once, and temporary tensors of half a gigabyte in float32
_EPS = 1e-5

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
        norm = None if norm_weight is None or norm_bias is None else (norm_weight, norm_bias)
        with torch.autocast(source.device.type, enabled=False):
            taps = _taps(weight, stride, dtype)
            shift = None if bias is None else bias.to(dtype)
            num_rows = source.shape[0] if first is None else source.shape[0] * source.shape[1]
            out = torch.empty(num_rows // stride, weight.shape[0], dtype=dtype, device=source.device)
            for start, _, rows in _pieces(source, first, stride, weight.shape[1]):
                blocks = _blocks(activate(rows, norm).to(dtype), stride)
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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        source, first, norm_weight, norm_bias, weight = ctx.saved_tensors
        stride, dtype = ctx.stride, ctx.dtype
        norm = None if norm_weight is None else (norm_weight, norm_bias)
        with torch.autocast(source.device.type, enabled=False):
            grad = grad.to(dtype).contiguous()
            taps = _taps(weight, stride, dtype)
            grad_taps = [torch.zeros(tap.shape, dtype=_wide(dtype), device=tap.device) for tap in taps]
            grad_source = torch.empty_like(source) if first is None else None
            grad_first = None if first is None else torch.zeros_like(first)
            grad_norm = None if norm is None else [torch.zeros_like(norm_weight, dtype=_wide(dtype)) for _ in range(2)]
            for start, (utterances, part), rows in _pieces(source, first, stride, weight.shape[1]):
                normal = None if norm is None else _normalised(rows, norm)
                blocks = _blocks(F.gelu(rows if normal is None else normal[0]).to(dtype), stride)
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
                grad_rows = grad_blocks.view(-1, weight.shape[1])
                if normal is None or norm is None or grad_norm is None:
                    if grad_source is not None:
                        torch.ops.aten.gelu_backward.grad_input(grad_rows, rows, grad_input=grad_source[part])
                        continue
                    grad_rows = torch.ops.aten.gelu_backward(grad_rows.to(rows.dtype), rows)
                else:
                    grad_rows, *parts = _through_norm(grad_rows, rows, *normal, *norm)
                    for total, part_of_it in zip(grad_norm, parts, strict=True):
                        total += part_of_it
                if grad_source is not None:
                    grad_source[part] = grad_rows
                elif grad_first is not None:
                    seen_windows = source[utterances, part]
                    grad_first[utterances].baddbmm_(seen_windows.transpose(1, 2), grad_rows.view(*seen_windows.shape[:2], -1))
            grad_weight = _untap(grad_taps, weight)
            grad_bias = None if ctx.bias_dtype is None else grad.sum(0, dtype=ctx.bias_dtype)
        grads_norm = (None, None) if grad_norm is None else (grad_norm[0].to(norm_weight.dtype), grad_norm[1].to(norm_bias.dtype))
        return grad_source, grad_first, *grads_norm, grad_weight, grad_bias, None, None


def _pieces(source: Tensor, first: Tensor | None, stride: int, channels: int) -> Iterator[tuple[int, tuple[slice, slice], Tensor]]:
    """The first block, the utterances and their rows, and the activation's input (rows, C_in), piece by piece, each of whole blocks."""
    most = _PIECE_CPU if source.device.type == "cpu" else _PIECE
    step = max(1, most // (stride * channels)) * stride
    utterances = source.unsqueeze(0) if first is None else source
    width = utterances.shape[1]
    together = max(1, step // max(1, width))
    for utterance in range(0, len(utterances), together):
        some = slice(utterance, utterance + together)
        for start in range(0, width, step):
            part = slice(start, start + step)
            rows = utterances[some, part] if first is None else utterances[some, part] @ first[some]
            yield (utterance * width + start) // stride, (some, part), rows.flatten(0, 1)


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
