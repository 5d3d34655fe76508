"""A second device for machines that have none: "apart", whose tensors lie in the host's memory but can only be reached as a GPU's can.

An operation on tensors of both devices fails, as do a CPU's generator, NumPy, and reading a value through a pointer; what the host has to
wait for is counted in `waits`. Values are those that the CPU computes. `torch.autocast` follows the rules of CUDA, which differ from those
of a CPU. Code that asks whether a device is a CPU takes the GPU's way; what needs `torch.cuda` itself (events, pinned memory, Triton) does
not run here. Importing this changes torch for the whole process, so it is done in a process of its own (tests/test_other_device.py).

PyTorch calls what it rests on, devices written in Python, experimental: after an upgrade this file may have to follow.
"""

from __future__ import annotations

import os
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

import k2ssl

NAME = "apart"
_PACKAGE = f"{Path(k2ssl.__file__).parent}{os.sep}"
waits: Counter[str] = Counter()  # what the host waited for: operation and where it was asked for
_INDEXING = {"index", "index_put", "index_put_"}
_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "unique_dim", "unique_consecutive"}
_BETWEEN_DEVICES = {"to", "_to_copy", "copy_"}
_LENGTHS_ON_THE_HOST = {"_ctc_loss", "_ctc_loss_backward"}  # they want lengths there, and copy them to the device waiting for it


class _Module(backend_registration._DummyBackendModule):
    """What torch looks for in `torch.apart`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        torch.set_rng_state(state)


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)


class Apart(Tensor):
    """A tensor there. `raw` is the same tensor on the CPU, which only this file may touch."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Apart:
        made = Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return _run(op, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Apart({self.raw!r})"

    def tolist(self) -> Any:
        _wait("tolist")
        return self.raw.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert a tensor on {DEVICE} to numpy")

    __array__ = numpy

    def new_tensor(self, data: Any, **options: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **options})

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_as_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_as_tensors(index), value)


def _as_tensors(index: Any) -> Any:
    """Lists in an index as tensors of the CPU, which torch cannot do for this device."""
    if isinstance(index, tuple):
        return tuple(map(_as_tensors, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _wait(what: str) -> None:
    ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(_PACKAGE)]
    waits[f"{what} in {ours[-1].filename.removeprefix(_PACKAGE)}:{ours[-1].lineno}" if ours else what] += 1


def _run(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on the tensors' `raw`, if a GPU could do it."""
    name = op.overloadpacket.__name__
    leaves = tree_leaves((args, kwargs))
    device = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    to_host = device is not None and device.type == "cpu"
    _refuse_what_is_elsewhere(name, args, leaves)
    _count_waits(name, args, kwargs, to_host)
    given: dict[int, Tensor] = {}

    def raw(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            own = leaf.raw if isinstance(leaf, Apart) else leaf
            given[id(own)] = leaf
            return own
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    def there(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        argument = given.get(id(leaf))
        if to_host:
            return leaf if argument is None else leaf.clone()
        if argument is None:
            return Apart(leaf)
        if argument.shape != leaf.shape or argument.stride() != leaf.stride():
            raise NotImplementedError(f"{name} changes the shape of its argument, which {NAME} cannot")
        return argument

    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    return tree_map(there, _IN_PYTHON.get(op, op)(*tree_map(raw, args), **tree_map(raw, kwargs)))


def _refuse_what_is_elsewhere(name: str, args: tuple[Any, ...], leaves: list[Any]) -> None:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if any(isinstance(leaf, Apart) for leaf in tensors) and name not in _BETWEEN_DEVICES | _LENGTHS_ON_THE_HOST:
        indices = tree_leaves(args[1]) if name in _INDEXING else []
        for tensor in tensors:  # numbers and indices may come from the host
            if not isinstance(tensor, Apart) and tensor.dim() > 0 and not any(tensor is index for index in indices):
                raise RuntimeError(f"{name}: a tensor of shape {tuple(tensor.shape)} is on the CPU, others are on {DEVICE}")
    for leaf in leaves:
        if isinstance(leaf, _CpuGenerator) and leaf._cdata not in _generators:
            raise RuntimeError(f"{name}: expected a generator for {DEVICE}, got one for the CPU")


def _count_waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], to_host: bool) -> None:
    if name in _INDEXING:
        for index in tree_leaves(args[1]):
            if isinstance(index, Tensor) and (index.dtype == torch.bool or not isinstance(index, Apart)):
                _wait(f"{name} by {'bool' if isinstance(index, Apart) else 'the host'}")
    elif name in _READS | _LENGTHS_ON_THE_HOST or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        _wait(name)
    elif to_host or (name == "copy_" and not isinstance(args[0], Apart)):
        _wait("copy to the host")


# --- what is not an operation on tensors there, and operations that torch would resize a result for

_CpuGenerator = torch.Generator
_generators: dict[int, torch.Generator] = {}  # those for this device, by their address, which stays theirs


class _ApartGenerator(_CpuGenerator):
    device = DEVICE


class _Generator(_CpuGenerator):
    """`torch.Generator`, also for this device."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:  # type: ignore[misc]
        if torch.device(device).type != NAME:
            return _CpuGenerator(device)
        made = _ApartGenerator("cpu")
        _generators[made._cdata] = made
        return made


def _by_way_of_the_host(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(data: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
        if device is None or torch.device(device).type != NAME:
            return make(data, *args, device=device, **options)
        return make(data, *args, **options).to(device)

    return made


torch.Generator = _Generator  # type: ignore[misc]
torch.tensor, torch.as_tensor = _by_way_of_the_host(torch.tensor), _by_way_of_the_host(torch.as_tensor)


def _lstm_cell(igates: Tensor, hgates: Tensor, cx: Tensor, ib: Tensor | None = None, hb: Tensor | None = None) -> tuple[Tensor, ...]:
    """torch has this for GPUs only: the next output and state, and what the backward pass needs."""
    gates = igates + hgates if ib is None or hb is None else igates + hgates + ib + hb
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat([i, f, g, o], 1)


def _lstm_cell_backward(
    grad_hy: Tensor | None, grad_cy: Tensor | None, cx: Tensor, cy: Tensor, saved: Tensor, has_bias: bool
) -> tuple[Tensor | None, ...]:
    i, f, g, o = saved.chunk(4, 1)
    out = cy.tanh()
    grad_out = torch.zeros_like(cy) if grad_hy is None else grad_hy
    grad = grad_out * o * (1 - out**2) + (0 if grad_cy is None else grad_cy)
    gates = [grad * g * i * (1 - i), grad * cx * f * (1 - f), grad * i * (1 - g**2), grad_out * out * o * (1 - o)]
    grad_gates = torch.cat(gates, 1)
    return grad_gates, grad * f, grad_gates.sum(0) if has_bias else None


def _op(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


_IN_PYTHON = {_op("_thnn_fused_lstm_cell"): _lstm_cell, _op("_thnn_fused_lstm_cell_backward_impl"): _lstm_cell_backward}
_aten = torch.library.Library("aten", "IMPL")
_all = torch.library.Library("_", "IMPL")
_all.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
for _name in ("arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m", "randperm", "randperm.generator"):
    _aten.impl(_name, lambda *args, _name=_name, **kwargs: _run(_op(_name), args, kwargs), "PrivateUse1")

# --- autocast by the rules of CUDA (docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast")

_all.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_LOW = "conv1d conv2d linear matmul addmm mm mv bmm baddbmm addbmm addmv addr scaled_dot_product_attention prelu"
_FLOAT32 = """acos asin cosh cdist cosine_similarity erfinv exp expm1 group_norm huber_loss kl_div l1_loss layer_norm log log10 log1p log2
    logsumexp mse_loss nll_loss norm.Scalar pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor reciprocal rsqrt sinh smooth_l1_loss softplus tan"""
_RESULT_FLOAT32 = "cumprod cumsum log_softmax.int prod prod.dim_int softmax.int sum sum.dim_IntList"
_WIDEST = "addcdiv addcmul atan2 dot index_put scatter_add"


def _autocast(name: str, choose: Callable[[list[torch.dtype]], torch.dtype]) -> None:
    """Have the arguments of an operation cast; `choose` gets the types of those that take part."""
    op, here = _op(name), DispatchKeySet(DispatchKey.AutocastPrivateUse1)

    def takes_part(leaf: Any) -> bool:
        return isinstance(leaf, Apart) and leaf.is_floating_point() and leaf.dtype != torch.float64

    def cast(*args: Any, **kwargs: Any) -> Any:
        to = choose([leaf.dtype for leaf in tree_leaves((args, kwargs)) if takes_part(leaf)])
        with torch._C._ExcludeDispatchKeyGuard(here):
            as_chosen = [tree_map(lambda leaf: leaf.to(to) if takes_part(leaf) else leaf, part) for part in (args, kwargs)]
            return op(*as_chosen[0], **as_chosen[1])

    _aten.impl(name, cast, "AutocastPrivateUse1")


def _autocast_result(name: str) -> None:
    """Have an operation compute in float32 unless it was told a type, without casting its argument first."""
    op, here = _op(name), DispatchKeySet(DispatchKey.AutocastPrivateUse1)
    place = next(place for place, argument in enumerate(op._schema.arguments) if argument.name == "dtype")

    def choose(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        told = kwargs.get("dtype", args[place - 1] if len(args) >= place else None)
        if told is None and x.is_floating_point() and x.dtype != torch.float64:
            args, kwargs = args[: place - 1], {**kwargs, "dtype": torch.float32}
        with torch._C._ExcludeDispatchKeyGuard(here):
            return op(x, *args, **kwargs)

    _aten.impl(name, choose, "AutocastPrivateUse1")


for _name in _LOW.split():
    _autocast(_name, lambda dtypes: torch.get_autocast_dtype(NAME))
for _name in _FLOAT32.split():
    _autocast(_name, lambda dtypes: torch.float32)
for _name in _RESULT_FLOAT32.split():
    _autocast_result(_name)
for _name in _WIDEST.split():
    _autocast(_name, lambda dtypes: torch.float32 if torch.float32 in dtypes else torch.get_autocast_dtype(NAME))
