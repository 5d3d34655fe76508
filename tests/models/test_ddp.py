"""Two real processes under DistributedDataParallel, which must not be told to look for unused parameters."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from k2ssl.batch import PretrainBatch
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.transformer import TransformerConfig
from k2ssl.optim.scaled_adam import ScaledAdam

_STEPS = 4


def _train(rank: int, config: HubertConfig, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    model = HubertModel(config)
    ddp = DistributedDataParallel(model)
    optimizer = ScaledAdam(model.named_parameters(), lr=0.01, clipping_scale=2.0)
    generator = torch.Generator().manual_seed(rank)  # every rank has its own audio and its own random decisions
    for step in range(_STEPS):
        model.clock.seed(1, rank, 0, step)
        model.clock.advance(step)
        audio = torch.randn(2, 4000 + 320 * rank, generator=generator)
        frames = model.frontend.num_frames(audio.shape[1])
        out = ddp(PretrainBatch(audio, (torch.randint(0, 16, (2, frames), generator=generator),)))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("encoder", [HubertConfig.tiny().encoder, dataclasses.replace(TransformerConfig.tiny(), layer_drop=0.5)])
def test_two_ranks_with_random_decisions_of_their_own_train_one_model(encoder, tmp_path: Path) -> None:
    config = dataclasses.replace(HubertConfig.tiny(), encoder=encoder)
    torch.manual_seed(0)
    before = HubertModel(config).state_dict()
    mp.spawn(_train, (config, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one.keys() == before.keys()
    for name, value in one.items():
        assert torch.isfinite(value).all() and torch.equal(value, two[name]), name
        assert not torch.equal(value, before[name]), name
