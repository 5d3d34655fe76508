"""Two real processes: a fault of one rank, and what both do about it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from k2ssl import distributed
from k2ssl.optim.build import OptimConfig, build_optimizer
from k2ssl.train.guard import Guard, GuardConfig
from tests.ranks import spawn

POISONED = {12: math.nan, 30: math.inf, 41: 1e7, 42: math.inf, 43: math.nan}  # 1e20: a gradient that is finite and far too large


def _train(folder: Path) -> None:
    torch.manual_seed(0)
    rank = distributed.rank()
    model = nn.Linear(3, 1)
    parallel = DistributedDataParallel(model)
    optimizer = build_optimizer(OptimConfig(lr=0.02), model)
    guard = Guard(GuardConfig(max_skipped=4), folder, "cpu")
    accepts, actions, weights = [], [], []
    for step in range(50):
        audio = torch.randn(4, 3, generator=torch.Generator().manual_seed(100 * rank + step))
        if rank == 1 and step in POISONED:
            audio[0, 0] = POISONED[step]
        optimizer.zero_grad()
        loss = parallel(audio).abs().sum()
        loss.backward()
        norm = nn.utils.get_total_norm([param.grad for param in model.parameters()])
        accept = guard.judge(distributed.all_reduce_sum(loss.detach().clone()), norm)
        optimizer.found_inf = (~accept).float()
        optimizer.step()
        verdict = guard.poll(step, [f"{rank}-{step}"])
        for incident in verdict.incidents:
            guard.write_incident(incident, {})
        accepts.append(accept.item())
        actions.append(verdict.action)
        weights.append(model.weight.detach().clone())
    torch.save({"accepts": accepts, "actions": actions, "weights": torch.stack(weights)}, folder / f"{rank}.pt")


def test_both_ranks_drop_the_same_steps_and_roll_back_together(tmp_path: Path) -> None:
    spawn(2, _train, tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["accepts"] == two["accepts"]
    assert [step for step, accept in enumerate(one["accepts"]) if not accept] == sorted(POISONED)
    assert one["actions"] == two["actions"]
    assert [step for step, action in enumerate(one["actions"]) if action == "roll_back"] == [43, 44]
    assert torch.equal(one["weights"], two["weights"]) and one["weights"].isfinite().all()
    files = [json.loads(path.read_text()) for path in (tmp_path / "incidents").iterdir()]
    assert {(file["rank"], file["step"], file["ids"][0]) for file in files} == {
        (rank, step, f"{rank}-{step}") for rank in range(2) for step in POISONED
    }
    assert {file["kind"] for file in files if file["step"] == 41} == {"exploded_gradient"}
