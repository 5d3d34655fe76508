"""Two real processes under DistributedDataParallel, which must not be told to look for unused parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from k2ssl.batch import PretrainBatch
from k2ssl.distributed import all_reduce_sum
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.transformer import TransformerConfig
from k2ssl.nn.schedule import constant
from k2ssl.nn.whiten import Whiten
from k2ssl.optim.scaled_adam import ScaledAdam

_STEPS = 4


_ENCODERS = [HubertConfig.tiny().encoder, dataclasses.replace(TransformerConfig.tiny(), layer_drop=0.5)]


@contextmanager
def _joined(rank: int, folder: str) -> Iterator[None]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()


def _batch(model: HubertModel, rank: int, generator: torch.Generator) -> PretrainBatch:
    audio = torch.randn(2, 4000 + 320 * rank, generator=generator)
    frames = model.frontend.num_frames(audio.shape[1])
    return PretrainBatch(audio, (torch.randint(0, 16, (2, frames), generator=generator),))


def _train(rank: int, config: HubertConfig, recompute_layers: bool, half: bool) -> dict[str, torch.Tensor]:
    """Weights after some steps, and what the clock draws then."""
    torch.manual_seed(0)
    model = HubertModel(config)
    model.encoder.recompute_layers = recompute_layers
    ddp = DistributedDataParallel(model)
    optimizer = ScaledAdam(model.named_parameters(), lr=0.01, clipping_scale=2.0)
    generator = torch.Generator().manual_seed(rank)  # every rank has its own audio and its own random decisions
    for step in range(_STEPS):
        model.clock.seed(1, rank, 0, step)
        model.clock.advance(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = ddp(_batch(model, rank, generator))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    return {**model.state_dict(), "draw": torch.tensor(model.clock.draw_seed())}


def _train_plainly(rank: int, config: HubertConfig, folder: str) -> None:
    with _joined(rank, folder):
        torch.save(_train(rank, config, recompute_layers=False, half=False), f"{folder}/{rank}.pt")


def _train_both_ways(rank: int, config: HubertConfig, folder: str) -> None:
    with _joined(rank, folder):
        torch.save([_train(rank, config, recompute_layers, half=True) for recompute_layers in (False, True)], f"{folder}/{rank}.pt")


@pytest.mark.parametrize("encoder", _ENCODERS)
def test_two_ranks_with_random_decisions_of_their_own_train_one_model(encoder, tmp_path: Path) -> None:
    config = dataclasses.replace(HubertConfig.tiny(), encoder=encoder)
    torch.manual_seed(0)
    before = HubertModel(config).state_dict()
    mp.spawn(_train_plainly, (config, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one.pop("draw") != two.pop("draw")
    assert one.keys() == before.keys()
    for name, value in one.items():
        assert torch.isfinite(value).all() and torch.equal(value, two[name]), name
        assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("encoder", _ENCODERS)
def test_two_ranks_that_recompute_layers_in_bfloat16_train_the_same_model_as_without(encoder, tmp_path: Path) -> None:
    config = dataclasses.replace(HubertConfig.tiny(), encoder=encoder)
    mp.spawn(_train_both_ways, (config, str(tmp_path)), nprocs=2)
    for rank in range(2):
        plain, recomputed = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert plain.keys() == recomputed.keys()
        for name, value in plain.items():
            assert torch.isfinite(value).all() and torch.equal(value, recomputed[name]), name


_FLAG_STEPS = 12


def _flags(micro_batches: list[int], merge: bool) -> list[list[bool]]:
    """The flags after each of some steps of one process that works on `micro_batches` of every step; weights stay as they are."""
    torch.manual_seed(0)
    model = HubertModel(HubertConfig.tiny())
    whitens = [module for module in model.modules() if isinstance(module, Whiten)]
    for whiten in whitens:
        whiten.limit = constant(30.0)  # exceeded by some of the batches below and not by others
    seen = []
    for step in range(_FLAG_STEPS):
        model.clock.advance(0.0)
        seen.append([model.clock.flag(whiten.above_limit) for whiten in whitens])
        for micro in micro_batches:
            model.clock.seed(1, step, micro)
            model(_batch(model, micro, torch.Generator().manual_seed(10 * step + micro))).loss.backward()
        if merge:
            model.clock.merge_flags(all_reduce_sum, torch.device("cpu"))
    return seen


def _flags_of_rank(rank: int, folder: str) -> None:
    with _joined(rank, folder):
        torch.save(_flags([rank], merge=True), f"{folder}/{rank}.pt")


def test_two_ranks_come_to_the_flags_of_one_process_that_accumulates(tmp_path: Path) -> None:
    mp.spawn(_flags_of_rank, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one == two == _flags([0, 1], merge=False)
    for alone in (_flags([0], merge=False), _flags([1], merge=False)):
        assert alone != one
    assert 0.1 < sum(map(sum, one)) / sum(map(len, one)) < 0.9
