"""Triton's kernels for Swoosh and the waveform frontend: run by Triton's interpreter beside PyTorch in float64, and compiled for CUDA devices.

The interpreter has to be asked for before Triton is imported, so that what runs in it does so in a process of its own.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from k2ssl.nn import kernels
from k2ssl.nn.kernels import triton_kernels, use_triton

REPOSITORY = Path(__file__).parents[2]
GPU = torch.device("cuda", 0)

COMPARE = """
import copy, json, torch
import torch.nn.functional as F
from k2ssl.models.frontend import WaveformConfig, WaveformFrontend
from k2ssl.nn import activation, row_convolution, triton_kernels as kernels
from k2ssl.nn.activation import SwooshDropoutLinear, swoosh_l, swoosh_r
from k2ssl.nn.kernels import difference
from k2ssl.nn.schedule import Clock

device = torch.device("cpu")
torch.manual_seed(0)
found = {"examples": difference(kernels, device)}

def apart(one, truth):
    return float((one.double() - truth).norm() / truth.norm())

def low(dtype):
    return "low" if dtype != torch.float32 else "float32"

def note(name, dtype, one, truth):
    found.setdefault(f"{name} {low(dtype)}", []).append(apart(one, truth))

for shape in ((2, 5, 7), (3, 40, 70), (1, 1, 1), (1, 33, 65)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for across in (False, True):  # frames beside each other in memory
            x = 4 * torch.randn(shape[0], *(shape[:0:-1] if across else shape[1:]))
            x = (x.transpose(1, 2) if across else x).to(dtype).to(device)
            grad = torch.randn(shape).to(dtype).to(device)
            for mask in (None, (torch.rand(shape[0], 1, shape[2]) > 0.3).float().to(device) + 0.25):
                for swoosh in (swoosh_l, swoosh_r):
                    leaf = x.double().requires_grad_()
                    factors = 1.0 if mask is None else mask.double()
                    truth = swoosh(leaf) * factors
                    value = kernels.swoosh(x, mask, swoosh.shift, 0.08, swoosh.offset, dtype)
                    assert value.is_contiguous() and value.dtype == dtype
                    slope = kernels.swoosh_backward(grad, x, mask, swoosh.shift, 0.08)
                    assert slope.stride() == torch.empty_like(x).stride() and slope.dtype == dtype
                    note("swoosh", dtype, value, truth.detach())
                    note("slope", dtype, slope, torch.autograd.grad(truth, leaf, grad.double())[0])

large = torch.tensor([[[-200.0, -30.0, 0.0, 30.0, 200.0, float("nan")]]], device=device)
value, slope = kernels.swoosh(large, None, 1.0, 0.08, 0.3, torch.float32), kernels.swoosh_backward(torch.ones_like(large), large, None, 1.0, 0.08)
found["large"] = [value.flatten().tolist()[:-1], slope.flatten().tolist()[:-1], bool(value.isnan()[0, 0, 5]), bool(slope.isnan()[0, 0, 5])]

for batch, width, taps, channels in ((2, 40, 11, 70), (1, 1100, 11, 5), (3, 7, 16, 64), (1, 1, 1, 1)):
    windows, leaf = torch.randn(batch, width, taps, device=device), torch.randn(batch, taps, channels, device=device)
    if channels == 64:
        leaf = leaf[:1].expand(batch, -1, -1)  # one matrix for all, as without a normalisation over time
    exact = leaf.double().requires_grad_()
    truth = F.gelu(windows.double() @ exact).flatten(0, 1)
    for dtype in (torch.float32, torch.bfloat16):
        note("gelu", dtype, kernels.gelu_of_products(windows, leaf, dtype), truth.detach())
        grad = torch.randn(batch * width, channels, device=device).to(dtype)
        expected = torch.autograd.grad((truth * grad.double()).sum(), exact, retain_graph=True)[0]
        note("matrix", torch.float32, kernels.gelu_of_products_backward(grad, windows, leaf), expected)

for num_rows, channels in ((5, 7), (600, 70), (1, 1), (300, 512)):
    rows, scale, shift = 3 * torch.randn(num_rows, channels, device=device) + 1, *torch.randn(2, channels, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        rows, grad = rows.to(dtype), torch.randn(num_rows, channels, device=device).to(dtype)
        leaves = [leaf.double().requires_grad_() for leaf in (rows, scale, shift)]
        truth = F.gelu(F.layer_norm(leaves[0], (channels,), leaves[1], leaves[2], 1e-5))
        note("normal", dtype, kernels.normal_gelu(rows, scale, shift, 1e-5, dtype), truth.detach())
        expected = torch.autograd.grad(truth, leaves, grad.double())
        got = kernels.normal_gelu_backward(grad, rows, scale, shift, 1e-5)
        assert got[0].dtype == dtype and got[1].dtype == got[2].dtype == torch.float32
        if channels > 1:  # a single channel is always 0, and so its gradient
            note("below normal", dtype, got[0], expected[0])
            note("norm", torch.float32, got[1], expected[1])
            note("norm", torch.float32, got[2], expected[2])

def results(module, *inputs):
    output = module(*inputs)
    output = output if isinstance(output, torch.Tensor) else output.frames
    return [output.detach(), *torch.autograd.grad(output.double().square().sum(), list(module.parameters()))]

layer = SwooshDropoutLinear(24, 10, swoosh_l, Clock(), dropout=0.2).to(device)
frontend = WaveformFrontend(WaveformConfig(channels=20)).to(device)
normalised = WaveformFrontend(WaveformConfig(channels=20, norm="layer", bias=True)).to(device)
audio = torch.randn(3, 1500, device=device), torch.tensor([1500, 1200, 900])
jobs = [(layer, torch.randn(3, 24, 9, device=device).transpose(1, 2)), (frontend, *audio), (normalised, *audio)]
row_convolution._PIECE_CPU = row_convolution._PIECE = 2 * 20 * 40  # several pieces of an utterance
calls = []
for module, *inputs in jobs:
    states = []
    for chosen in (None, kernels):
        for room in (activation, row_convolution):
            room.triton_kernels = lambda *_: calls.append(chosen) or chosen
        if module is layer:
            layer.dropout.clock.seed(3)
        states.append(results(module, *inputs))
    for one, two in zip(*states):
        found.setdefault("modules", []).append(apart(two, one.double()))
found["calls"] = sum(chosen is not None for chosen in calls)
print(json.dumps(found))
"""


def compared(code: str, folder: Path, **environment: str) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "TRITON_CACHE_DIR": str(folder), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(found: dict) -> None:
    assert found["examples"] < 1e-5
    assert len(found["swoosh float32"]) == 32 and len(found["swoosh low"]) == 64
    for name in ("swoosh", "slope", "gelu", "matrix", "normal", "below normal", "norm"):
        assert max(found[f"{name} float32"]) < 2e-6, name
    for name in ("swoosh", "slope", "gelu", "normal", "below normal"):
        assert max(found[f"{name} low"]) < 8e-3, name  # the interpreter does not round to bfloat16 but cut
    assert len(found["modules"]) == 3 + 10 + 29 and max(found["modules"]) < 1e-5
    assert found["calls"] >= 4
    values, slopes, *nan = found["large"]
    assert values == pytest.approx([15.7, 2.1, 0.01326169, 26.3, 182.7], abs=1e-4) and nan == [True, True]
    assert slopes == pytest.approx([-0.08, -0.08, 0.18894142, 0.92, 0.92], abs=1e-6)


def test_interpreted_kernels_give_what_pytorch_gives(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    check(compared(COMPARE, tmp_path, TRITON_INTERPRET="1"))


COMPILE = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from k2ssl.nn import triton_kernels as kernels

def compiled(kernel, pointers, constants, capability):
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return len(triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"])

tile = {"ROWS": kernels._ROWS, "COLUMNS": kernels._COLUMNS}
made = []
for capability in (80, 90):
    for form in ("*fp32", "*bf16", "*fp16"):
        numbers = {name: "fp32" for name in ("shift", "slope", "offset")}
        pointers = {"x": form, "grad": form, "out": form, "mask": "*fp32", **numbers}
        for derivative in (False, True):
            constants = {"MASKED": derivative, "DERIVATIVE": derivative, **tile}
            made.append(compiled(kernels._swoosh, pointers, {**constants, "x_c": 1, "grad_c": 1, "out_c": 1}, capability))
            made.append(compiled(kernels._swoosh, pointers, {**constants, "x_t": 1}, capability))  # strides of 1 are constants
        pointers = {"windows": "*fp32", "matrices": "*fp32", "out": form, "grad": form, "sums": "*fp32"}
        taps = {"TAPS": kernels.MOST_TAPS, "windows_k": 1, "matrices_c": 1, **tile}
        made.append(compiled(kernels._products, pointers, taps, capability))
        norms = {"rows": form, "grad": form, "out": form, "weight": "*fp32", "bias": "*fp32", "sums": "*fp32"}
        for columns in (64, 512, kernels.MOST_CHANNELS):
            sizes = {"EPS": 1e-5, "ROWS": kernels._NORMAL_ROWS, "COLUMNS": columns}
            made.append(compiled(kernels._normal, norms, sizes, capability))
            made.append(compiled(kernels._normal_backward, norms, {**sizes, "ROWS_PER_PROGRAM": kernels._NORMAL_ROWS_PER_PROGRAM}, capability))
        made.append(compiled(kernels._products_backward, pointers, {**taps, "ROWS_PER_PROGRAM": kernels._ROWS_PER_PROGRAM}, capability))
print(json.dumps([min(made), len(made)]))
"""


def test_kernels_compile_for_cuda_devices(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    smallest, number = compared(COMPILE, tmp_path, TRITON_INTERPRET="0")
    assert smallest > 1000 and number == 72


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_give_on_a_cuda_device_what_pytorch_gives(tmp_path: Path) -> None:
    check(compared(COMPARE.replace('torch.device("cpu")', 'torch.device("cuda", 0)'), tmp_path))


# --- who computes


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kernels._tried.cache_clear()
    monkeypatch.setattr(kernels, "why_no_triton", lambda: None)  # whatever this machine has
    yield
    use_triton(True)
    kernels._tried.cache_clear()


def test_kernels_are_for_gpus_and_the_formats_that_they_know() -> None:
    assert triton_kernels(torch.device("cpu"), torch.float32) is None
    assert triton_kernels(GPU, torch.float64) is None and triton_kernels(GPU, torch.bfloat16, torch.float64) is None


def test_kernels_compute_where_they_give_what_pytorch_gives(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    asked: list[torch.device] = []
    monkeypatch.setattr(kernels, "difference", lambda module, device: asked.append(device) or 1e-6)
    with caplog.at_level(logging.INFO):
        chosen = triton_kernels(GPU, torch.bfloat16)
        assert chosen is not None and chosen.__name__ == "k2ssl.nn.triton_kernels" and triton_kernels(GPU, torch.float32) is chosen
    assert asked == [GPU] and caplog.messages == ["Swoosh and frontend on cuda:0: Triton"]
    use_triton(False)
    assert triton_kernels(GPU, torch.float32) is None


def test_the_examples_are_held_against_pytorch_wherever_the_first_call_comes_from() -> None:
    def gelu_backward(grad: torch.Tensor, windows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        products = windows.double() @ matrices.double()
        return windows.double().mT @ torch.ops.aten.gelu_backward(grad.double().view(products.shape), products)

    def normal_backward(grad: torch.Tensor, rows: torch.Tensor, *norm: object) -> tuple[torch.Tensor, ...]:
        weight, bias, eps = norm
        normal, mean, inverse = torch.native_layer_norm(rows.double(), [70], weight.double(), bias.double(), eps)
        below = torch.ops.aten.gelu_backward(grad.double(), normal)
        return torch.ops.aten.native_layer_norm_backward(
            below, rows.double(), [70], mean, inverse, weight.double(), bias.double(), [True] * 3
        )

    plain = SimpleNamespace(
        swoosh=lambda x, mask, shift, slope, offset, dtype: (
            (F.softplus(x.float() - shift) - slope * x - offset) * (1 if mask is None else mask)
        ),
        swoosh_backward=lambda grad, x, mask, shift, slope: (
            grad * (torch.sigmoid(x.float() - shift) - slope) * (1 if mask is None else mask)
        ),
        gelu_of_products=lambda windows, matrices, dtype: F.gelu(windows.double() @ matrices.double()).flatten(0, 1),
        gelu_of_products_backward=gelu_backward,
        normal_gelu=lambda rows, weight, bias, eps, dtype: F.gelu(
            F.layer_norm(rows.double(), weight.shape, weight.double(), bias.double(), eps)
        ),
        normal_gelu_backward=normal_backward,
    )
    calls: list[str] = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        calls.append("layer")
        assert kernels.difference(plain, torch.device("cpu")) < 1e-5
        return x.sin()

    x = torch.ones(3, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()  # a layer that is computed again saves nothing else than at first
    assert calls == ["layer", "layer"] and torch.equal(x.grad, torch.ones(3).cos())
    with torch.inference_mode():
        layer(torch.ones(3))
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.ones(3))
    plain.swoosh = lambda x, mask, *rest: torch.full_like(x, float("nan"))
    assert math.isnan(kernels.difference(plain, torch.device("cpu")))


@pytest.mark.parametrize(
    ("lacking", "apart", "why"),
    [
        ("Triton finds no C compiler", 0.0, "Triton finds no C compiler"),
        (None, 0.5, "its kernels differ from PyTorch by 0.5"),
        (None, float("nan"), "its kernels differ from PyTorch by nan"),
        (None, RuntimeError("no kernel image\nmore"), "RuntimeError: no kernel image"),
    ],
)
def test_pytorch_computes_where_kernels_cannot_and_the_log_says_why(
    lacking: str | None, apart: float | Exception, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def difference(module: object, device: torch.device) -> float:
        if isinstance(apart, Exception):
            raise apart
        return apart

    monkeypatch.setattr(kernels, "why_no_triton", lambda: lacking)
    monkeypatch.setattr(kernels, "difference", difference)
    monkeypatch.setitem(sys.modules, "k2ssl.nn.triton_kernels", SimpleNamespace())
    assert triton_kernels(GPU, torch.float32) is None and triton_kernels(GPU, torch.float32) is None
    assert caplog.messages == [f"Swoosh and frontend on cuda:0: PyTorch, slower, since Triton cannot: {why}"]
