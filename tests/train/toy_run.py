"""A tiny run on made-up audio, in this process or, started by torchrun, in several: what the trainer's tests train.

The loader draws what a batch holds from its number, so that every rank, every resumed run and every other number of ranks gets the same.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k2ssl import distributed
from k2ssl.batch import LossOutput, PretrainBatch
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.zipformer_layer import ZipformerLayer
from k2ssl.optim.build import OptimConfig, ScheduleConfig, build_optimizer, build_schedule
from k2ssl.structure import to_dict
from k2ssl.train.checkpoint import KeepConfig
from k2ssl.train.guard import GuardConfig
from k2ssl.train.plan import BatchConfig
from k2ssl.train.trainer import Trainer, TrainerConfig
from k2ssl.train.update import parallelise

SECONDS = 1.0  # of audio in a batch: two utterances of half a second
FRAMES = 25


def batch(number: int, epoch: int = 0, num_utterances: int = 2) -> PretrainBatch:
    """Tones of four pitches in noise, whose labels say which; a function of the two numbers."""
    generator = torch.Generator().manual_seed(1000 * epoch + number)
    labels = torch.randint(4, (num_utterances, FRAMES), generator=generator)
    time = torch.arange(320 * FRAMES) / 16000
    pitch = (200.0 * 2.0**labels).repeat_interleave(320, dim=1)
    audio = 0.1 * torch.sin(2 * math.pi * pitch * time) + 0.01 * torch.randn(num_utterances, 320 * FRAMES, generator=generator)
    return PretrainBatch(audio, (labels,), ids=tuple(f"utterance-{epoch}-{number}-{i}" for i in range(num_utterances)))


class ToyLoader:
    """Batches `rank`, `rank + world_size`, ... of so many in an epoch; its state is a count, as that of the real loader."""

    def __init__(self, num_batches: int = 10, rank: int = 0, world_size: int = 1, poisoned: tuple[int, ...] = ()) -> None:
        self.num_batches, self.rank, self.world_size, self.poisoned = num_batches, rank, world_size, set(poisoned)
        self.epoch, self.done, self.resumed = 0, 0, False
        self.handed_out: list[tuple[int, int]] = []

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.done, self.resumed = epoch, 0, False

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "batches": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.start_at(state["epoch"], state["batches"])

    def start_at(self, epoch: int, batches: int) -> None:
        self.epoch, self.done, self.resumed = epoch, batches, True

    def __iter__(self) -> Iterator[PretrainBatch]:
        if not self.resumed:
            self.done = 0
        self.resumed = False
        while self.done * self.world_size + self.rank < self.num_batches:
            number = self.done * self.world_size + self.rank
            self.done += 1
            self.handed_out.append((self.epoch, number))
            made = batch(number, self.epoch)
            if self.epoch * self.num_batches + number in self.poisoned:
                made.audio[1, 100] = math.inf
            yield made


class StoppingLoader:
    """Three batches to validate; before the second of them comes SIGTERM, if this rank is to get it."""

    def __init__(self, rank: int, is_stopped: bool) -> None:
        self.rank, self.is_stopped = rank, is_stopped

    def __iter__(self) -> Iterator[PretrainBatch]:
        for number in range(3):
            if number == 1 and self.is_stopped:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch(100 + 2 * number + self.rank)


class MeanModel(nn.Module):
    """The smallest model of the contract: predicts the mean of each utterance's audio; its gradients can be written down."""

    def __init__(self) -> None:
        from k2ssl.nn.schedule import Clock

        super().__init__()
        self.clock = Clock()
        self.weight = nn.Parameter(torch.tensor([0.5, -0.25]))

    def check_batch(self, batch: PretrainBatch) -> None:
        """Takes anything."""

    def forward(self, batch: PretrainBatch) -> LossOutput:
        error = self.predicted(batch) - batch.labels[0].float().mean(dim=1)
        return LossOutput((error**2).sum(), torch.tensor(len(error)), {})

    def predicted(self, batch: PretrainBatch) -> Tensor:
        """(N,)"""
        return self.weight[0] * batch.audio.abs().mean(dim=1) + self.weight[1]


def make_model(seed: int = 0) -> HubertModel:
    """Zipformer tiny with a head for the four pitches and a short warm-up, so that every regulariser gets to act."""
    torch.manual_seed(seed)
    tiny = HubertConfig.tiny()
    return HubertModel(replace(tiny, encoder=replace(tiny.encoder, warmup=20.0), head=replace(tiny.head, num_classes=(4,))))


def make_trainer(folder: Path | None, config: TrainerConfig, *, model: Any = None, optim: OptimConfig | None = None) -> Trainer:
    """A trainer of this process' rank."""
    model = make_model() if model is None else model
    device = torch.device("cpu")
    parallel = parallelise(model, device, config.sharding, [m for m in model.modules() if isinstance(m, ZipformerLayer)])
    optimizer = build_optimizer(optim or OptimConfig(), model)
    schedule = build_schedule(ScheduleConfig(warmup_batches=10, warmup_start=0.0, lr_batches=100), optimizer)
    model_config = to_dict(model.config) if isinstance(model, HubertModel) else {"kind": "mean"}
    return Trainer(
        model, optimizer, schedule, config, device=device, folder=folder, model_config=model_config, parallel=parallel, seed=7, quiet=True
    )


def make_config(steps: int, *, per_update: float = 2 * SECONDS, per_micro_batch: float = SECONDS, **changes: Any) -> TrainerConfig:
    """So many steps of two micro-batches, everything logged."""
    keep = changes.pop("keep", KeepConfig(save_every=100))
    return TrainerConfig(
        max_steps=steps,
        batch=BatchConfig(per_update, per_micro_batch, reference_seconds=0.1),
        average_period=changes.pop("average_period", 3),
        log_every=1,
        valid_every=changes.pop("valid_every", 0),
        keep=keep,
        guard=changes.pop("guard", GuardConfig()),
        tensorboard=False,
        **changes,
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--num-batches", type=int, default=10)
    parser.add_argument("--short-rank", type=int, default=-1, help="this rank's loader ends one batch early")
    parser.add_argument("--sharding", default="none")
    parser.add_argument("--optimizer", default="scaled_adam")
    parser.add_argument("--poisoned", type=int, nargs="*", default=[])
    parser.add_argument("--valid-every", type=int, default=0)
    parser.add_argument("--stopped-rank", type=int, default=-1, help="this rank gets SIGTERM during a validation")
    parser.add_argument("--max-skipped", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with distributed.set_up("cpu", timeout_minutes=1.0):
        config = make_config(
            options.steps,
            keep=KeepConfig(save_every=options.save_every),
            sharding=options.sharding,
            valid_every=options.valid_every,
            guard=GuardConfig(max_skipped=options.max_skipped),
        )
        optim = OptimConfig() if options.optimizer == "scaled_adam" else OptimConfig(name="adamw", lr=1e-3)
        trainer = make_trainer(options.folder, config, optim=optim)
        rank, world_size = distributed.rank(), distributed.world_size()
        loader = ToyLoader(options.num_batches - world_size * (rank == options.short_rank), rank, world_size, tuple(options.poisoned))
        found = trainer.checkpoints.latest() if trainer.checkpoints is not None else None
        found = distributed.broadcast_object(found)
        if found is not None:
            print(trainer.resume(found, loader))
        done = trainer.fit(loader, StoppingLoader(rank, rank == options.stopped_rank) if options.valid_every else None)
        torch.save(
            [weights.clone() for weights in trainer.model.state_dict().values()] if options.sharding == "none" else [],
            options.folder / f"weights-{rank}.pt",
        )
    return 0 if done else 130


if __name__ == "__main__":
    sys.exit(main())
