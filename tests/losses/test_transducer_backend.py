"""The choice of who computes the transducer recursions."""

from __future__ import annotations

import importlib.machinery
import logging
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from k2ssl import gpu_kernels
from k2ssl.losses import transducer_backend
from k2ssl.losses.transducer import full_loss, pruned_loss
from k2ssl.losses.transducer_backend import lattice_backend, use_lattice_backend
from k2ssl.losses.transducer_lattice import NEG_INF, forward_backward, make_boundary, window_loss


@pytest.fixture(autouse=True)
def _automatic_before_and_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(transducer_backend, "_announced", set())
    monkeypatch.setattr(gpu_kernels, "nothing_to_compile_with", lambda: None)  # whatever this machine has
    use_lattice_backend("auto")
    yield
    use_lattice_backend("auto")


LOOK_FOR_A_COMPILER = gpu_kernels.nothing_to_compile_with.__wrapped__  # without what it remembers


def installed(monkeypatch: pytest.MonkeyPatch, **packages: bool) -> None:
    """Pretend that packages are installed, or not."""
    find_spec = transducer_backend.importlib.util.find_spec
    monkeypatch.setattr(
        transducer_backend.importlib.util, "find_spec", lambda name: (packages[name] or None) if name in packages else find_spec(name)
    )


def small_loss() -> Tensor:
    return full_loss(torch.zeros(1, 3, 2, 4), torch.tensor([[1]]), make_boundary(torch.tensor([1]), torch.tensor([3])))


def test_automatic_is_torch_on_a_cpu_and_triton_on_cuda_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for triton, on_cuda in ((True, "triton"), (False, "torch")):
        installed(monkeypatch, triton=triton)
        assert lattice_backend("cpu") == "torch"
        assert lattice_backend("cuda:1") == on_cuda
        assert lattice_backend(torch.device("cuda")) == on_cuda


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="name is 'numba', allowed are auto, torch, triton, k2"):
        use_lattice_backend("numba")
    assert lattice_backend("cpu") == "torch"


@pytest.mark.parametrize("name", ["triton", "k2"])
def test_a_backend_that_is_not_installed_is_refused_and_the_choice_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    installed(monkeypatch, **{name: False})
    use_lattice_backend("torch")
    with pytest.raises(ValueError, match=f"name is '{name}'.*the package {name} is not installed"):
        use_lattice_backend(name)
    assert lattice_backend("cuda") == "torch"


def test_triton_is_refused_on_a_cpu_when_a_loss_is_computed_and_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, triton=True)
    use_lattice_backend("triton")
    assert lattice_backend("cuda") == "triton"
    with pytest.raises(ValueError, match="'triton' was chosen and cannot run on cpu: its kernels are for CUDA"):
        lattice_backend("cpu")
    with pytest.raises(ValueError, match="cannot run on cpu"):
        small_loss()


def test_the_backend_is_logged_once_per_backend_and_kind_of_device(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "k2ssl.losses.transducer_backend")
    small_loss()
    small_loss()
    assert [record.message for record in caplog.records] == ["transducer lattice: backend torch on cpu (automatic)"]


def test_the_log_says_why_automatic_is_not_triton_on_cuda(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "k2ssl.losses.transducer_backend")
    installed(monkeypatch, triton=False)
    for _ in range(2):
        assert transducer_backend.announced_backend(torch.device("cuda", 0)) == "torch"
    use_lattice_backend("torch")
    assert transducer_backend.announced_backend(torch.device("cpu")) == "torch"
    assert [record.message for record in caplog.records] == [
        "transducer lattice: backend torch on cuda (automatic; no triton: the package triton is not installed)",
        "transducer lattice: backend torch on cpu (chosen)",
    ]


def test_importing_the_losses_imports_neither_triton_nor_k2() -> None:
    code = "import sys, torch; before = set(sys.modules); import k2ssl.losses.transducer; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "k2ssl.losses.transducer_backend" in done.stdout.split()
    assert not {"triton", "k2", "k2ssl.losses.transducer_kernel", "k2ssl.lattice"} & set(done.stdout.split())


def windows() -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Arguments of `window_loss`: a possible utterance, an impossible one, and one shorter than both."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.tensor([[0, 0, 1, 2], [0, 0, 0, 2], [0, 1, 1, 1]])
    px, py = (-2 * torch.rand(3, 4, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return (
        px.requires_grad_(),
        py.requires_grad_(),
        starts.unsqueeze(2) + torch.arange(2),
        torch.tensor([[0, 0, 3, 4]] * 2 + [[0, 0, 2, 3]]),
        3,
    )


def check_k2_against_torch() -> None:
    def everything() -> list[Tensor]:
        px, py, *rest = windows()
        loss = window_loss(px, py, *rest)
        generator = torch.Generator().manual_seed(2)
        grid = [-2 * torch.rand(size, generator=generator) for size in ((2, 3, 6), (2, 4, 5))]
        boundary = torch.tensor([[0, 0, 3, 5], [1, 1, 2, 4]])
        grid[0].masked_fill_(torch.arange(6) >= boundary[:, 3].view(-1, 1, 1), NEG_INF)
        logits = torch.randn(2, 5, 3, 6, generator=generator)
        ranges = (torch.tensor([0, 0, 0, 1, 1]).unsqueeze(1) + torch.arange(3)).expand(2, 5, 3)
        pruned = pruned_loss(logits, torch.tensor([[1, 2, 3], [4, 5, 1]]), ranges, torch.tensor([[0, 0, 3, 5], [0, 0, 2, 4]]))
        return [loss, *torch.autograd.grad(loss[loss.isfinite()].sum(), (px, py)), *forward_backward(*grid, boundary), pruned]

    use_lattice_backend("torch")
    expected = everything()
    assert expected[0].isfinite().tolist() == [True, False, True]
    use_lattice_backend("k2")
    assert lattice_backend("cpu") == "k2"
    for actual, wanted in zip(everything(), expected, strict=True):
        assert actual.dtype == wanted.dtype
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)


def test_k2_gives_what_torch_gives() -> None:
    pytest.importorskip("k2")
    check_k2_against_torch()


def test_what_is_asked_of_k2_gives_what_torch_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where k2 is not installed, its function is played by a loop over nodes with k2's signature: the wiring is what is tested."""

    def mutual_information_recursion(px: Tensor, py: Tensor, boundary: Tensor, return_grad: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        assert return_grad and px.is_contiguous() and py.is_contiguous() and px.shape[2] == py.shape[2] + 1
        px, py = px.detach().requires_grad_(), py.detach().requires_grad_()
        scores = []
        for n, (first, begin, last, end) in enumerate(boundary.tolist()):
            p = {(first, begin): px.new_zeros(())}
            for s in range(first, last + 1):
                for t in range(begin, end + 1):
                    arriving = [p[s - 1, t] + px[n, s - 1, t]] if s > first else []
                    arriving += [p[s, t - 1] + py[n, s, t - 1]] if t > begin else []
                    possible = [score for score in arriving if score > NEG_INF]
                    if arriving:
                        p[s, t] = torch.stack(possible).logsumexp(0) if possible else px.new_tensor(NEG_INF)
            scores.append(p[last, end])
        total = torch.stack(scores)
        with torch.enable_grad():
            grads = torch.autograd.grad(total[total.isfinite()].sum(), (px, py), allow_unused=True)
        made = [torch.zeros_like(x) if grad is None else grad for x, grad in zip((px, py), grads, strict=True)]
        made[0][total == NEG_INF] = float("nan")  # k2 promises nothing here
        return total.detach(), (made[0], made[1])

    k2 = types.ModuleType("k2")
    k2.__spec__ = importlib.machinery.ModuleSpec("k2", None)
    k2.mutual_information_recursion = torch.enable_grad()(mutual_information_recursion)  # type: ignore[attr-defined]
    k2.with_cuda = False  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "k2", k2)
    for module in ("transducer", "package"):
        monkeypatch.delitem(sys.modules, f"k2ssl.lattice.{module}", raising=False)
    try:
        check_k2_against_torch()
        with pytest.raises(ValueError, match="'k2' was chosen and cannot run on cuda: this build of k2 has no support for cuda"):
            lattice_backend("cuda")
    finally:
        for module in ("transducer", "package"):
            sys.modules.pop(f"k2ssl.lattice.{module}", None)


def test_a_k2_that_does_not_load_is_refused_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, k2=True)
    monkeypatch.setitem(sys.modules, "k2", None)
    with pytest.raises(
        ValueError, match=r"name is 'k2', which cannot run here: k2 does not load: .*; the wheel that fits is built for torch"
    ):
        use_lattice_backend("k2")


def test_automatic_is_torch_where_triton_finds_nothing_to_compile_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed(monkeypatch, triton=True)
    monkeypatch.setattr(gpu_kernels, "nothing_to_compile_with", LOOK_FOR_A_COMPILER)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(gpu_kernels.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(gpu_kernels.shutil, "which", lambda name: None)
    assert lattice_backend("cuda") == "torch" and "no C compiler" in str(gpu_kernels.why_no_triton())
    monkeypatch.setenv("CC", "cc")
    assert lattice_backend("cuda") == "triton"
    (tmp_path / "Python.h").unlink()
    assert lattice_backend("cuda") == "torch" and "Python.h" in str(gpu_kernels.why_no_triton())
    use_lattice_backend("triton")  # asked for, it is not replaced
    assert lattice_backend("cuda") == "triton"
