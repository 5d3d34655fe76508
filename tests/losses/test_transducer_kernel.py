"""The Triton kernels: run by Triton's interpreter on the CPU beside the PyTorch recursion, and compiled for CUDA devices without one.

The interpreter has to be asked for before Triton is imported, so everything that runs in it does so in one process of its own, which
prints how far the backends are apart. It runs a program at a time: that the compiled kernel exchanges lanes correctly between threads
is seen only on a CUDA device, by the last test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

REPOSITORY = Path(__file__).parents[2]

COMPARE = """
import json, torch
from k2ssl.losses.transducer_backend import lattice_backend, use_lattice_backend
from k2ssl.losses.transducer_lattice import forward_backward, window_forward_backward

generator = torch.Generator().manual_seed(0)

def draw(low, high):
    return int(torch.randint(low, high + 1, (), generator=generator))

def boundaries(batch, symbols, frames):
    rows = [[0, 0, symbols, frames]]
    for _ in range(batch - 1):
        begin, start = draw(0, symbols), draw(0, frames - 1)
        rows.append([begin, start, draw(begin, symbols), draw(start + 1, frames)])
    return torch.tensor(rows)

def both(function, px, py, *rest):
    results = {}
    for name in ("torch", "triton"):
        use_lattice_backend(name)
        assert lattice_backend("cpu") == name
        results[name] = function(px, py, *rest)
    return results["torch"], results["triton"]

def compare(function, px, py, *rest):
    apart, expected = 0.0, None
    expected, actual = both(function, px, py, *rest)
    for x, y in zip(expected, actual):
        assert x.dtype == y.dtype == px.dtype and x.shape == y.shape and torch.equal(x.isinf(), y.isinf())
        if x.numel():
            apart = max(apart, (x - y).nan_to_num(0.0, 0.0, 0.0).abs().max().item())  # inf - inf of impossible utterances
    return {"apart": apart, "possible": int(expected[0].isfinite().sum()), "mass": expected[2].sum().item()}

found = {"float64": [], "float32": []}
for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
    for batch, symbols, frames in ((3, 4, 6), (2, 0, 1), (2, 0, 7), (2, 1, 1), (3, 9, 13), (1, 33, 20), (1, 63, 3), (1, 64, 3)):
        px = torch.randn(batch, symbols, frames + 1, generator=generator).to(dtype) - 1
        py = torch.randn(batch, symbols + 1, frames, generator=generator).to(dtype) - 1
        closed = px.masked_fill(torch.rand(px.shape, generator=generator) < 0.1, float("-inf"))
        found[name].append(compare(forward_backward, closed, py, boundaries(batch, symbols, frames)))
    for batch, symbols, frames, width in ((3, 4, 6, 2), (2, 0, 3, 1), (3, 12, 9, 5), (2, 7, 5, 8), (2, 30, 12, 4)):
        starts = torch.randint(0, width + 1, (batch, frames), generator=generator).cumsum(1)
        starts = (starts - starts[:, :1]).clamp(max=symbols + 1 - width)
        ranges = starts.unsqueeze(2) + torch.arange(width)
        px, py = (torch.randn(ranges.shape, generator=generator).to(dtype) for _ in range(2))
        found[name].append(compare(window_forward_backward, px, py, ranges, boundaries(batch, symbols, frames), symbols))

px, py = torch.zeros(2, 2, 4), torch.zeros(2, 3, 3)
px[0, 1, 1] = float("nan")
expected, actual = both(forward_backward, px, py, torch.tensor([[0, 0, 2, 3]] * 2))
found["nan"] = [[bool(x) for x in log_likelihood.isnan()] for log_likelihood in (expected[0], actual[0])]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, "-c", COMPARE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("dtype", "allowed"), [("float64", 1e-12), ("float32", 1e-6)])
def test_interpreted_kernels_give_what_torch_gives(interpreted: dict, dtype: str, allowed: float) -> None:
    compared = interpreted[dtype]
    assert len(compared) == 13
    assert sum(case["possible"] for case in compared) > 13 and sum(case["mass"] for case in compared) > 50
    assert max(case["apart"] for case in compared) <= allowed


def test_a_nan_makes_the_loss_of_its_utterance_nan_and_no_other(interpreted: dict) -> None:
    assert interpreted["nan"] == [[True, False], [True, False]]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from k2ssl.losses import transducer_kernel as kernels

def compiled(kernel, types, constants, capability, warps):
    source = ASTSource(fn=kernel, signature={name: types.get(name, "constexpr") for name in kernel.arg_names}, constexprs=constants)
    return len(triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm["cubin"])

numbers, places, sizes = "*fp64", "*i64", "i32"
walk = dict(emit=numbers, wait=numbers, scores=numbers, begin=places, end=places, num_diagonals=sizes, num_lanes=sizes)
occupancies = dict(emit=numbers, wait=numbers, scores=numbers, total=numbers, begin=places, end=places, num_diagonals=sizes, num_lanes=sizes)
one_lane = {name: kind for name, kind in walk.items() if name != "num_lanes"}
made = []
for capability in (80, 90):
    made += [compiled(kernels._walk, walk, {"BLOCK": block}, capability, warps) for block, warps in ((8, 1), (128, 4), (1024, 16))]
    made.append(compiled(kernels._walk, one_lane, {"BLOCK": 1, "num_lanes": 1}, capability, 1))  # Triton takes arguments of 1 as constants
    made.append(compiled(kernels._occupancies, occupancies, {"BLOCK": 1024}, capability, 4))
print(min(made), len(made))
"""


def test_kernels_compile_for_cuda_devices(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    smallest, number = map(int, done.stdout.split())
    assert smallest > 1000 and number == 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_give_on_a_cuda_device_what_torch_gives(tmp_path: Path) -> None:
    code = COMPARE.replace("import json, torch", "import json, torch; torch.set_default_device('cuda')", 1)
    code = code.replace("torch.Generator()", "torch.Generator('cuda')").replace('lattice_backend("cpu")', 'lattice_backend("cuda")')
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert max(case["apart"] for case in found["float64"]) <= 1e-12
    assert max(case["apart"] for case in found["float32"]) <= 1e-6
    assert found["nan"] == [[True, False], [True, False]]
