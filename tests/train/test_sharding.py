"""Two real processes that share one model out, beside two that each hold all of it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from k2ssl import distributed
from k2ssl.batch import LossOutput, PretrainBatch
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.prediction_head import HeadConfig
from k2ssl.models.zipformer_layer import ZipformerLayer
from k2ssl.optim.build import OptimConfig, build_optimizer
from k2ssl.optim.shards import local
from k2ssl.train.memory import PeakMemory
from k2ssl.train.preflight import preflight
from k2ssl.train.sharding import average_replicated_gradients, full_state, gradient_norm, is_sharded, load_full_state, shard
from k2ssl.train.statistics import StatisticsRecorder
from tests.ranks import spawn

_STEPS = {"scaled_adam": 20, "adamw": 7}
_RESUMED = 3  # the last steps, done again from a saved state; within a size-update period
_OPTIMIZERS = {
    "scaled_adam": OptimConfig(lr=0.02, lr_scales={"encoder.stacks.0": 0.5}, clipping_scale=0.9, clipping_update_period=10),
    "adamw": OptimConfig(name="adamw", lr=1e-3, max_grad_norm=1000.0),
}


class _Training:
    """A model in training, sharded or replicated, on two micro-batches per step."""

    def __init__(self, optimizer: str, sharded: bool, seed: int = 0) -> None:
        torch.manual_seed(seed + (distributed.rank() if sharded else 0))  # `shard` must bring ranks together, as DDP does
        self.model = HubertModel(
            dataclasses.replace(HubertConfig.tiny(), head=HeadConfig(num_classes=(17,)))
        )  # which two cannot share evenly
        units = [module for module in self.model.modules() if isinstance(module, ZipformerLayer)]
        # in float32, gradients that are zero but for rounding (of the keys' biases, say) become steps of either sign
        self.model.to(torch.float64)
        self.parallel: nn.Module = shard(self.model, units) if sharded else DistributedDataParallel(self.model)
        self.optimizer = build_optimizer(_OPTIMIZERS[optimizer], self.model)
        self.sharded = sharded

    def train(self, steps: range) -> list[tuple[float, float]]:
        return [self.step(step) for step in steps]

    def step(self, step: int) -> tuple[float, float]:
        """Loss and gradient norm."""
        rank = distributed.rank()
        generator = torch.Generator().manual_seed(100 * step + rank)
        self.model.clock.advance(step)
        self.optimizer.zero_grad()
        total = 0.0
        for part in range(2):
            self.model.clock.seed(1, step, 2 * part + rank)
            audio = torch.randn(2, 4000 + 320 * rank, generator=generator, dtype=torch.float64)
            frames = self.model.frontend.num_frames(audio.shape[1])
            batch = PretrainBatch(audio, (torch.randint(0, 17, (2, frames), generator=generator),))
            if self.sharded:
                self.model.set_requires_gradient_sync(part == 1)
            else:
                self.parallel.require_backward_grad_sync = part == 1
            out = self.parallel(batch)
            out.loss.backward()
            total += out.loss.item()
        average_replicated_gradients(self.model)
        norm = gradient_norm(self.model.parameters()).item()
        if step == 2:
            self.optimizer.found_inf = torch.ones(())
        elif hasattr(self.optimizer, "found_inf"):
            self.optimizer.found_inf = torch.zeros(())
        self.optimizer.step()
        return total, norm

    device = torch.device("cpu")

    def train_step(self, batches: list[PretrainBatch]) -> None:
        """What `preflight` asks for."""
        self.step(99)
        used = torch.ones(20_000_000 * (1 + 4 * distributed.rank()))
        del used
        self.peak = PeakMemory("cpu").bytes

    def update_average(self, now: bool = False) -> None:
        """There is none."""

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "clock": self.model.clock.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.model.clock.load_state_dict(state["clock"])

    def full(self) -> dict[str, Any]:
        return {"model": full_state(self.model.state_dict()), "optimizer": full_state(self.optimizer.state_dict())}


def _through_a_file(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What rank 0 has, on every rank."""
    if distributed.is_main():
        torch.save(state, folder / "state.pt")
    distributed.barrier()
    return torch.load(folder / "state.pt", weights_only=True)


def _compare(optimizer: str, folder: Path) -> None:
    rank = distributed.rank()
    steps, stop = _STEPS[optimizer], _STEPS[optimizer] - _RESUMED
    replicated, sharded = _Training(optimizer, sharded=False), _Training(optimizer, sharded=True)
    result: dict[str, Any] = {"replicated": replicated.train(range(steps)), "replicated_end": replicated.full()}
    result["sharded"] = sharded.train(range(stop))
    saved, clock = _through_a_file(sharded.full(), folder), sharded.model.clock.state_dict()
    result["sharded"] += sharded.train(range(stop, steps))
    result["sharded_end"] = sharded.full()
    resumed = _Training(optimizer, sharded=True, seed=9)
    load_full_state(resumed.model, resumed.optimizer, saved["model"], saved["optimizer"])
    resumed.model.clock.load_state_dict(clock)
    result["resumed"] = resumed.train(range(stop, steps))
    result["resumed_end"] = resumed.full()
    # the same file into a model that is not sharded, as on another number of ranks
    alone = _Training(optimizer, sharded=False, seed=9)
    load_full_state(alone.model, alone.optimizer, saved["model"], saved["optimizer"])
    alone.model.clock.load_state_dict(clock)
    result["alone"] = alone.train(range(stop, steps))
    report = preflight(sharded, [("one step", [PretrainBatch(torch.zeros(1, 800), ())])])
    result["after_preflight"] = sharded.full()
    result["peaks"] = [report.peak_bytes, sharded.peak]
    params = dict(sharded.model.named_parameters())
    result["whole"] = [name for name, param in params.items() if not isinstance(param, DTensor)]
    result["pieces"] = {name: tuple(local(param).shape) for name, param in params.items()}
    result["shapes"] = {name: tuple(param.shape) for name, param in params.items()}
    if optimizer == "scaled_adam":
        reports = [training.optimizer.clipping_report() for training in (replicated, sharded)]
        result["reports"] = [{key: report[key] for key in ("clipped", "non_finite")} for report in reports]
    replicated.parallel.load_state_dict(
        {f"module.{name}": value for name, value in _through_a_file(sharded.full(), folder)["model"].items()}
    )
    replicated.model.clock.load_state_dict(sharded.model.clock.state_dict())
    for name, training in (("replicated", replicated), ("sharded", sharded)):
        with StatisticsRecorder(training.model) as recorder:
            training.step(steps)  # gradients stay
            recorder.end_step()
        result[f"{name}_statistics"] = recorder.to_dict()["parameters"]
    torch.save(result, folder / f"{rank}.pt")


@pytest.fixture(scope="module", params=list(_OPTIMIZERS))
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp(request.param)
    spawn(2, _compare, request.param, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _tensors(state: Any, path: str = "") -> dict[str, Any]:
    if isinstance(state, dict):
        return {key: value for name, item in state.items() for key, value in _tensors(item, f"{path}.{name}").items()}
    if isinstance(state, (list, tuple)):
        return {key: value for i, item in enumerate(state) for key, value in _tensors(item, f"{path}.{i}").items()}
    return {path: state}


def _assert_same(one: Any, two: Any) -> None:
    left, right = _tensors(one), _tensors(two)
    assert list(left) == list(right)
    for key, value in left.items():
        same = torch.equal(value, right[key]) if isinstance(value, Tensor) else value == right[key]
        assert same or (value != value and right[key] != right[key]), key


def test_losses_and_gradient_norms_are_those_of_replicated_training(compared: list[dict[str, Any]], agreement: Any) -> None:
    for result in compared:
        assert len(result["sharded"]) == len(result["replicated"]) >= 7
        for i, what in enumerate(("loss", "gradient norm")):
            ours, theirs = (torch.tensor([numbers[i] for numbers in result[key]], dtype=torch.float64) for key in ("sharded", "replicated"))
            agreement.note(f"fsdp against ddp: {what}", ((ours - theirs) / theirs).abs().max().item(), 1e-5)
            assert len(set(theirs.tolist())) == len(theirs)
    assert compared[0]["sharded"][0][0] != compared[1]["sharded"][0][0]  # each rank has its own audio
    assert [norm for _, norm in compared[0]["sharded"]] == [norm for _, norm in compared[1]["sharded"]]


def test_weights_and_optimizer_state_are_those_of_replicated_training(compared: list[dict[str, Any]], agreement: Any) -> None:
    ours, theirs = (_tensors(compared[0][key]) for key in ("sharded_end", "replicated_end"))
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            assert value.shape == theirs[key].shape, key
            if key.startswith(".model"):
                agreement.note("fsdp against ddp: weights at the end", (value - theirs[key]).abs().max().item(), 1e-5)
            elif torch.isfinite(theirs[key]).all():
                torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")
        elif not isinstance(value, Tensor):
            assert value == theirs[key], key
    assert len(compared[0].get("reports", [])) in (0, 2)
    if "reports" in compared[0]:
        assert compared[0]["reports"][0] == compared[0]["reports"][1] == compared[1]["reports"][1]
        assert compared[0]["reports"][0]["clipped"] > 0
        assert compared[0]["reports"][0]["non_finite"] > 0


def test_a_state_saved_whole_and_loaded_continues_bit_by_bit(compared: list[dict[str, Any]]) -> None:
    for result in compared:
        assert result["resumed"] == result["sharded"][-_RESUMED:]
    _assert_same(compared[0]["resumed_end"], compared[0]["sharded_end"])


def test_a_state_saved_whole_continues_in_a_replicated_model(compared: list[dict[str, Any]]) -> None:
    for result in compared:
        torch.testing.assert_close(torch.tensor(result["alone"]), torch.tensor(result["sharded"][-_RESUMED:]), rtol=1e-6, atol=0)


def test_a_preflight_puts_the_pieces_back_bit_by_bit_and_reports_the_largest_peak_of_all_ranks(compared: list[dict[str, Any]]) -> None:
    _assert_same(compared[0]["after_preflight"], compared[0]["sharded_end"])
    reported, own = zip(*(result["peaks"] for result in compared), strict=True)
    assert reported[0] == reported[1] == pytest.approx(max(own), rel=0.02)
    assert min(own) < 0.95 * max(own)


def test_statistics_are_those_of_whole_parameters_on_every_rank(compared: list[dict[str, Any]]) -> None:
    for result in compared:
        whole, pieces = result["replicated_statistics"], result["sharded_statistics"]
        assert list(whole) == list(pieces)
        for name, values in whole.items():
            assert pieces[name] == pytest.approx(values, rel=1e-6, abs=1e-9, nan_ok=True), name


def test_only_rank_0_gets_the_whole_state(compared: list[dict[str, Any]]) -> None:
    state = _tensors(compared[1]["sharded_end"])
    assert not any(isinstance(value, Tensor) for value in state.values())
    assert list(state) == list(_tensors(compared[0]["sharded_end"]))


def test_every_rank_holds_its_piece_only(compared: list[dict[str, Any]]) -> None:
    one, two = (result["pieces"] for result in compared)
    shapes = compared[0]["shapes"]
    assert all(not shapes[name] for name in compared[0]["whole"])
    assert compared[0]["whole"]
    uneven = 0
    for name in shapes:
        if shapes[name]:
            assert one[name][0] + two[name][0] == shapes[name][0]
            assert abs(one[name][0] - two[name][0]) <= 1
            uneven += one[name][0] != two[name][0]
    assert uneven > 0


def test_a_single_process_has_nothing_to_deal_out() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="there is one process, at least two are needed"):
        shard(model, [])
    assert not is_sharded(model)


def test_what_works_on_shards_works_on_whole_parameters() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        gradient_norm(model.parameters())
    model.weight.grad, model.bias.grad = torch.tensor([[1.5e19, 0.0]]), torch.tensor([1.7e19])
    before = model.weight.grad
    average_replicated_gradients(model)
    assert model.weight.grad is before
    norm = gradient_norm(model.parameters())
    assert norm.item() == pytest.approx(math.hypot(1.5e19, 1.7e19)) and norm.dtype == torch.float32
    state = full_state({"a": [model.weight, 3], "b": ({"c": "d"},)})
    assert state["a"][0].data_ptr() != model.weight.data_ptr() and torch.equal(state["a"][0], model.weight)
    assert not state["a"][0].requires_grad
    assert (state["a"][1], state["b"]) == (3, ({"c": "d"},))


def _refuse() -> None:
    layers = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    for units, message in (
        ([nn.Linear(2, 2)], "a Linear that is not a module within Sequential"),
        ([layers], "a Sequential that is not a module within"),
        ([layers[1], layers[1][0]], "units overlap: 1.0 lies within 1"),
        ([layers[0], layers[0]], "units holds a module twice"),
    ):
        with pytest.raises(ValueError, match=message):
            shard(layers, units)
    assert not is_sharded(layers)
    model = shard(layers, [layers[0]])
    assert is_sharded(model)
    whole = {name: torch.zeros(value.shape) for name, value in model.state_dict().items()}
    for change, message in (
        ({"0.bias": torch.zeros(3)}, r"shapes differ: 0.bias is \(2,\), saved \(3,\)"),
        ({"x": torch.zeros(3)}, r"missing from the saved state: \[\]; unknown ones in it: \['x'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_full_state(model, None, {**whole, **change}, {})
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="the saved state is of 2 parameters, this optimizer has 4"):
        load_full_state(model, adamw, whole, {"state": {}, "param_groups": [{"params": [0, 1]}]})
    load_full_state(model, None, whole, {})
    assert all(not local(param).any() for param in model.parameters())


def test_units_and_states_that_do_not_fit_are_refused() -> None:
    spawn(2, _refuse)


class _LinearLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor) -> LossOutput:
        return LossOutput(self.linear(x).sum(), torch.tensor(len(x)))


def _without_units() -> None:
    model = shard(_LinearLoss(), [])
    model(torch.full((1, 2), 1.0 + 2.0 * distributed.rank())).loss.backward()
    (grad,) = [param.grad for param in model.parameters()]
    assert isinstance(grad, DTensor)
    assert grad.full_tensor().tolist() == [[2.0, 2.0]] * 3  # the mean of 1 and 3


def test_a_loss_output_starts_the_backward_pass_of_a_model_without_units() -> None:
    spawn(2, _without_units)
