"""Triton kernels for what reads and writes most on a GPU: Swoosh, the waveform frontend's first convolution with its GELU, and GELU of a layer
normalisation.

As single operations each of them writes the widest tensors of the model to memory several times; here they are read once and written once.
All is computed in float32. Formulas: `k2ssl.nn.activation` and `k2ssl.nn.row_convolution`, which choose between these and PyTorch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_CHANNELS = 2048  # of a layer normalisation: a program has them all
MOST_TAPS = 16  # of the first convolution, with its bias: the least that a product of blocks takes
_ROWS, _COLUMNS = 32, 64
_ROWS_PER_PROGRAM = 1024  # over which a program sums gradients
_NORMAL_ROWS, _NORMAL_ROWS_PER_PROGRAM = 4, 256  # of a layer normalisation


def swoosh(x: Tensor, mask: Tensor | None, shift: float, slope: float, offset: float, dtype: torch.dtype) -> Tensor:
    """(softplus(x - shift) - slope * x - offset) * mask: x (N, T, C), mask (N, 1, C) float32 or None -> (N, T, C) in `dtype`, contiguous."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _over_rows(x, x, mask, out, shift, slope, offset, derivative=False)
    return out


def swoosh_backward(grad: Tensor, x: Tensor, mask: Tensor | None, shift: float, slope: float) -> Tensor:
    """grad * (sigmoid(x - shift) - slope) * mask: grad and x (N, T, C) -> the same, in the dtype and strides of `x`."""
    out = torch.empty_like(x)
    _over_rows(x, grad, mask, out, shift, slope, 0.0, derivative=True)
    return out


def gelu_of_products(windows: Tensor, matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """gelu(windows @ matrices): (N, W, K) and (N, K, C) float32, K <= 16 -> (N * W, C) in `dtype`."""
    batch, width, taps = windows.shape
    channels = matrices.shape[2]
    out = torch.empty(batch * width, channels, dtype=dtype, device=windows.device)
    grid = (triton.cdiv(width, _ROWS), triton.cdiv(channels, _COLUMNS), batch)
    with _on(windows):
        _products[grid](
            windows, matrices, out, width, taps, channels, *windows.stride(), *matrices.stride(), TAPS=MOST_TAPS, ROWS=_ROWS, COLUMNS=_COLUMNS
        )  # fmt: skip
    return out


def gelu_of_products_backward(grad: Tensor, windows: Tensor, matrices: Tensor) -> Tensor:
    """The gradient of `matrices`, (N, K, C) float32, from that of the result, (N * W, C) with rows that lie behind each other."""
    batch, width, taps = windows.shape
    channels = matrices.shape[2]
    parts = triton.cdiv(width, _ROWS_PER_PROGRAM)
    sums = torch.empty(batch, parts, MOST_TAPS, channels, device=windows.device)  # added up below, so that their order never changes
    with _on(windows):
        _products_backward[(parts, triton.cdiv(channels, _COLUMNS), batch)](
            grad, windows, matrices, sums, width, taps, channels, *windows.stride(), *matrices.stride(),
            TAPS=MOST_TAPS, ROWS=_ROWS, COLUMNS=_COLUMNS, ROWS_PER_PROGRAM=_ROWS_PER_PROGRAM,
        )  # fmt: skip
    return sums.sum(dim=1)[:, :taps]


def normal_gelu(rows: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """gelu(layer_norm(rows)): rows (R, C), weight and bias (C,) -> (R, C) in `dtype`."""
    rows = rows.contiguous()
    num_rows, channels = rows.shape
    out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    grid = (triton.cdiv(num_rows, _NORMAL_ROWS),)
    with _on(rows):
        _normal[grid](rows, weight, bias, out, num_rows, channels, EPS=eps, ROWS=_NORMAL_ROWS, COLUMNS=triton.next_power_of_2(channels))
    return out


def normal_gelu_backward(grad: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `rows`, in their dtype, and of weight and bias, in float32, from that of the result, (R, C)."""
    rows, grad = rows.contiguous(), grad.contiguous()
    num_rows, channels = rows.shape
    parts = triton.cdiv(num_rows, _NORMAL_ROWS_PER_PROGRAM)
    out, sums = torch.empty_like(rows), torch.empty(2, parts, channels, device=rows.device)
    with _on(rows):
        _normal_backward[(parts,)](
            grad, rows, weight, bias, out, sums, num_rows, channels,
            EPS=eps, ROWS=_NORMAL_ROWS, COLUMNS=triton.next_power_of_2(channels), ROWS_PER_PROGRAM=_NORMAL_ROWS_PER_PROGRAM,
        )  # fmt: skip
    grad_weight, grad_bias = sums.sum(dim=1)
    return out, grad_weight, grad_bias


def _over_rows(
    x: Tensor, grad: Tensor, mask: Tensor | None, out: Tensor, shift: float, slope: float, offset: float, derivative: bool
) -> None:
    batch, frames, channels = x.shape
    grid = (triton.cdiv(batch * frames, _ROWS), triton.cdiv(channels, _COLUMNS))
    mask = None if mask is None else mask.contiguous()
    with _on(x):
        _swoosh[grid](
            x, grad, x if mask is None else mask, out, batch * frames, frames, channels, *x.stride(), *grad.stride(), *out.stride(),
            shift, slope, offset, MASKED=mask is not None, DERIVATIVE=derivative, ROWS=_ROWS, COLUMNS=_COLUMNS,
        )  # fmt: skip


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


@triton.jit(do_not_specialize=["num_rows", "frames"])  # lengths: no kernel of its own for each kind of them
def _swoosh(  # type: ignore[no-untyped-def]
    x, grad, mask, out, num_rows, frames, channels, x_n, x_t, x_c, grad_n, grad_t, grad_c, out_n, out_t, out_c, shift, slope, offset,
    MASKED: tl.constexpr, DERIVATIVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (i, j) has block i of the rows and block j of the columns. Both activations are one kernel, their numbers its arguments."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    exists = (row < num_rows) & (column < channels)
    utterance, frame = row // frames, row % frames
    value = tl.load(x + utterance * x_n + frame * x_t + column * x_c, mask=exists, other=0.0).to(tl.float32)
    z = value - shift
    if DERIVATIVE:
        small = tl.exp(-tl.abs(z))
        result = tl.where(z < 0.0, small, 1.0) / (1.0 + small) - slope
        result *= tl.load(grad + utterance * grad_n + frame * grad_t + column * grad_c, mask=exists, other=0.0).to(tl.float32)
    else:
        result = tl.where(z > 0.0, z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z))) - slope * value - offset
    if MASKED:
        result *= tl.load(mask + utterance * channels + column, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + utterance * out_n + frame * out_t + column * out_c, result, mask=exists)


@triton.jit
def _tile(source, row, column, num_rows, num_columns, stride_row, stride_column):  # type: ignore[no-untyped-def]
    """Rows (R, 1) and columns (1, C) of a matrix, zero where it has none."""
    there = (row < num_rows) & (column < num_columns)
    return tl.load(source + row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column, mask=there, other=0.0)


@triton.jit(do_not_specialize=["width"])
def _products(  # type: ignore[no-untyped-def]
    windows, matrices, out, width, taps, channels, windows_n, windows_w, windows_k, matrices_n, matrices_k, matrices_c,
    TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (i, j, n) has block i of utterance n's windows and block j of the channels."""
    utterance = tl.program_id(2).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    window = _tile(windows + utterance * windows_n, row, tl.arange(0, TAPS)[None, :], width, taps, windows_w, windows_k)
    matrix = _tile(matrices + utterance * matrices_n, tl.arange(0, TAPS)[:, None], column, taps, channels, matrices_k, matrices_c)
    value = tl.dot(window, matrix, input_precision="ieee")
    result = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    tl.store(out + (utterance * width + row) * channels + column, result, mask=(row < width) & (column < channels))


@triton.jit(do_not_specialize=["width"])
def _products_backward(  # type: ignore[no-untyped-def]
    grad, windows, matrices, sums, width, taps, channels, windows_n, windows_w, windows_k, matrices_n, matrices_k, matrices_c,
    TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROWS_PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    """Program (i, j, n) sums over part i of utterance n's windows, for block j of the channels."""
    utterance = tl.program_id(2).to(tl.int64)
    tap, column = tl.arange(0, TAPS), (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    matrix = _tile(matrices + utterance * matrices_n, tap[:, None], column, taps, channels, matrices_k, matrices_c)
    total = tl.zeros((TAPS, COLUMNS), dtype=tl.float32)
    for start in range(0, ROWS_PER_PROGRAM, ROWS):
        row = (tl.program_id(0) * ROWS_PER_PROGRAM + start + tl.arange(0, ROWS))[:, None]
        window = _tile(windows + utterance * windows_n, row, tap[None, :], width, taps, windows_w, windows_k)
        value = tl.dot(window, matrix, input_precision="ieee")
        slope = 0.5 * (1.0 + tl.erf(value * 0.7071067811865476)) + value * tl.exp(-0.5 * value * value) * 0.3989422804014327
        above = _tile(grad + utterance * width * channels, row, column, width, channels, channels, 1).to(tl.float32)
        total += tl.dot(tl.trans(window), above * slope, input_precision="ieee")
    place = sums + ((utterance * tl.num_programs(0) + tl.program_id(0)) * TAPS + tap[:, None]) * channels + column
    tl.store(place, total, mask=column < channels)


@triton.jit
def _normalised(rows, row, column, num_rows, channels, EPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows with mean 0 and variance 1, zero beyond the last channel, and the inverse deviations (R, 1)."""
    exists = (row < num_rows) & (column < channels)
    value = tl.load(rows + row * channels + column, mask=exists, other=0.0).to(tl.float32)
    value = tl.where(exists, value - (tl.sum(value, axis=1) / channels)[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / channels + EPS)
    return value * inverse[:, None], inverse[:, None]


@triton.jit(do_not_specialize=["num_rows"])
def _normal(rows, weight, bias, out, num_rows, channels, EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program i has block i of the rows."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    normal, _ = _normalised(rows, row, column, num_rows, channels, EPS)
    scale = tl.load(weight + column, mask=column < channels, other=0.0).to(tl.float32)
    value = normal * scale + tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)
    result = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    tl.store(out + row * channels + column, result, mask=(row < num_rows) & (column < channels))


@triton.jit(do_not_specialize=["num_rows"])
def _normal_backward(  # type: ignore[no-untyped-def]
    grad, rows, weight, bias, out, sums, num_rows, channels,
    EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROWS_PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    """Program i has part i of the rows, over which it sums the gradients of weight and bias."""
    column = tl.arange(0, COLUMNS)[None, :]
    scale = tl.load(weight + column, mask=column < channels, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)
    weights, biases = tl.zeros((COLUMNS,), dtype=tl.float32), tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(0, ROWS_PER_PROGRAM, ROWS):
        row = (tl.program_id(0).to(tl.int64) * ROWS_PER_PROGRAM + start + tl.arange(0, ROWS))[:, None]
        exists = (row < num_rows) & (column < channels)
        normal, inverse = _normalised(rows, row, column, num_rows, channels, EPS)
        value = normal * scale + shift
        slope = 0.5 * (1.0 + tl.erf(value * 0.7071067811865476)) + value * tl.exp(-0.5 * value * value) * 0.3989422804014327
        above = slope * tl.load(grad + row * channels + column, mask=exists, other=0.0).to(tl.float32)
        weights += tl.sum(above * normal, axis=0)
        biases += tl.sum(above, axis=0)
        above *= scale
        mean, along = tl.sum(above, axis=1) / channels, tl.sum(above * normal, axis=1) / channels
        tl.store(out + row * channels + column, inverse * (above - mean[:, None] - normal * along[:, None]), mask=exists)
    channel = tl.arange(0, COLUMNS)
    place = sums + tl.program_id(0).to(tl.int64) * channels + channel
    tl.store(place, weights, mask=channel < channels)
    tl.store(place + tl.num_programs(0).to(tl.int64) * channels, biases, mask=channel < channels)
