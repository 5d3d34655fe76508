"""ScaledAdam on pieces of parameters in three real processes, beside ScaledAdam on whole ones."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from k2ssl.optim.scaled_adam import ScaledAdam
from k2ssl.optim.shards import SumOverShards, local, piece_for, sharded_like

_RANKS = 3
# pieces of 2, 2, 0 rows; of 1, 1, 0; of 3, 3, 1; of 1, 0, 0; and whole ones
_SHAPES = {
    "w": (4, 3),
    "u": (4, 3),
    "two": (2, 5),
    "bias": (7,),
    "one": (1,),
    "conv": (3, 2, 2),
    "tiny": (5,),
    "s": (),
    "t": (),
    "x": (4, 3),
}
_WHOLE = ("s", "t", "x")
_STEPS = 50


def _start() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in _SHAPES.items()}
    start["tiny"] *= 1e-6  # below param_min_rms
    return start


def _gradient(name: str, step: int) -> Tensor | None:
    if name == "u" and step % 5 == 3:
        return None
    generator = torch.Generator().manual_seed(1000 * step + list(_SHAPES).index(name))
    gradient = torch.randn(_SHAPES[name], generator=generator, dtype=torch.float64) * (100.0 if step % 17 == 13 else 1.0)
    if name == "bias" and step == 22:
        gradient[6] = float("nan")  # in the piece of the last rank alone
    return gradient


def _optimizer(params: dict[str, Tensor]) -> ScaledAdam:
    return ScaledAdam(params.items(), lr=0.05, clipping_scale=1.5, clipping_update_period=15)


def _train(params: dict[str, Tensor], optimizer: ScaledAdam, steps: range) -> None:
    for step in steps:
        for name, param in params.items():
            gradient = _gradient(name, step)
            param.grad = gradient if gradient is None or not isinstance(param, DTensor) else _dealt(gradient, param.device_mesh)
        optimizer.found_inf = torch.tensor(float(step == 31))
        optimizer.step()


def _dealt(whole: Tensor, mesh: Any) -> DTensor:
    return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)  # every rank has the whole: nothing need be sent


def _full(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _full(item) for key, item in state.items()}
    if isinstance(state, list):
        return [_full(item) for item in state]
    if isinstance(state, DTensor):
        return state.full_tensor().clone()
    return state.clone() if isinstance(state, Tensor) else state


def _shard_and_train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=_RANKS, timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (_RANKS,))

    def dealt_out() -> dict[str, Tensor]:
        return {name: value if name in _WHOLE else torch.nn.Parameter(_dealt(value, mesh)) for name, value in _start().items()}

    params, others = dealt_out(), dealt_out()
    optimizer, other = _optimizer(params), _optimizer(others)
    _train(params, optimizer, range(30))
    saved, weights = _full(optimizer.state_dict()), _full(params)
    with torch.no_grad():
        for name, param in others.items():
            local(param).copy_(piece_for(weights[name], param))
    other.load_state_dict(saved)
    _train(params, optimizer, range(30, _STEPS))
    _train(others, other, range(30, _STEPS))
    result = {"params": _full(params), "state": _full(optimizer.state_dict()), "report": optimizer.clipping_report()}
    result |= {"saved": saved, "resumed": _full(others), "resumed_state": _full(other.state_dict())}
    result["pieces"] = {name: tuple(local(param).shape) for name, param in params.items()}
    _check_small_things(mesh)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _check_small_things(mesh: Any) -> None:
    rank = dist.get_rank()
    rows, columns = _dealt(torch.arange(8.0).view(4, 2), mesh), distribute_tensor(torch.arange(8.0).view(2, 4), mesh, [Shard(1)])
    for whole in (rows, columns):
        full = whole.full_tensor()
        piece = piece_for(full, whole)
        assert piece.shape == local(whole).shape and torch.equal(piece, local(whole))
        assert torch.equal(piece_for(whole, whole), local(whole))
        again = sharded_like(piece, whole)
        assert again.shape == whole.shape and torch.equal(again.full_tensor(), full)
    with torch.enable_grad():
        param = torch.nn.Parameter(rows)
        with torch.no_grad():
            local(param).fill_(3.0)
        assert not local(param).requires_grad
        assert param.full_tensor().sum() == 24.0
    # of what is whole on every rank, the first rank's numbers count
    total = SumOverShards([rows, torch.zeros(2)])(torch.tensor([1.0 + rank, 5.0 if rank == 0 else float("nan")]))
    assert total.tolist() == [6.0, 5.0]
    grid = init_device_mesh("cpu", (1, _RANKS))
    for wrong in (distribute_tensor(torch.zeros(4), grid, [Replicate(), Shard(0)]), distribute_tensor(torch.zeros(4), mesh, [Replicate()])):
        with pytest.raises(ValueError, match="only one Shard over one set of ranks is supported"):
            SumOverShards([wrong])
    part = init_device_mesh("cpu", (1, _RANKS), mesh_dim_names=("a", "b"))["a"]
    with pytest.raises(ValueError, match="sharded over different ranks"):
        SumOverShards([rows, distribute_tensor(torch.zeros(4), part, [Shard(0)])])


def _compare(ours: Any, theirs: Any, tolerance: float, path: str = "") -> None:
    assert type(ours) is type(theirs) or isinstance(ours, Tensor), path
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), path
        for key in ours:
            _compare(ours[key], theirs[key], tolerance, f"{path}.{key}")
    elif isinstance(ours, list):
        for i, (one, two) in enumerate(zip(ours, theirs, strict=True)):
            _compare(one, two, tolerance, f"{path}.{i}")
    elif isinstance(ours, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text: f"{path}: {text}")
    elif tolerance == 0 or not isinstance(ours, float):
        assert ours == theirs, path


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_shard_and_train, (str(folder),), _RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(_RANKS)]


def test_steps_on_pieces_are_those_on_whole_parameters(ranks: list[dict[str, Any]]) -> None:
    params = {name: torch.nn.Parameter(value) for name, value in _start().items()}
    optimizer = _optimizer(params)
    _train(params, optimizer, range(_STEPS))
    for result in ranks:
        _compare(result["params"], {name: param.detach() for name, param in params.items()}, 1e-12)
        _compare(result["state"], optimizer.state_dict(), 1e-10)
        assert result["report"]["clipped"] == optimizer.clipping_report()["clipped"] > 0
        assert result["report"]["non_finite"] == 2  # a gradient that was not finite, and a step dropped on request
    assert ranks[0]["pieces"]["two"] == (1, 5) and ranks[2]["pieces"]["two"] == (0, 5)
    assert [result["pieces"]["bias"] for result in ranks] == [(3,), (3,), (1,)]


def test_every_rank_has_the_same_vectors(ranks: list[dict[str, Any]]) -> None:
    for result in ranks[1:]:
        for key in ("params", "state", "report"):
            _compare(result[key], ranks[0][key], 0.0)


def test_whole_tensors_loaded_into_pieces_continue_bit_by_bit(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        _compare(result["resumed"], result["params"], 0.0)
        _compare(result["resumed_state"], result["state"], 0.0)


def test_a_state_of_pieces_loads_into_whole_parameters(ranks: list[dict[str, Any]]) -> None:
    params = {name: torch.nn.Parameter(value) for name, value in _start().items()}
    _train(params, _optimizer(params), range(30))
    optimizer = _optimizer(params)
    optimizer.load_state_dict(ranks[0]["saved"])
    _train(params, optimizer, range(30, _STEPS))
    _compare(ranks[0]["params"], {name: param.detach() for name, param in params.items()}, 1e-12)
