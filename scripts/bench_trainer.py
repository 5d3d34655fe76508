"""What the training loop adds to a step: time outside of forward pass, backward pass and optimizer, and what a checkpoint costs.

    OMP_NUM_THREADS=2 python scripts/bench_trainer.py --size zipformer_base --seconds 16 --steps 5

Prints JSON: medians in seconds, and shares of the whole step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmark import Stopwatch, device_here, synthetic_batch

from k2ssl.batch import PretrainBatch
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.optim.build import OptimConfig, ScheduleConfig, build_optimizer, build_schedule
from k2ssl.structure import to_dict
from k2ssl.train.plan import BatchConfig
from k2ssl.train.trainer import Trainer, TrainerConfig


def build(size: str, device: torch.device, folder: Path, seconds: float) -> Trainer:
    """A trainer without data."""
    torch.manual_seed(0)
    model = HubertModel(getattr(HubertConfig, size)()).to(device)
    optimizer = build_optimizer(OptimConfig(), model)
    config = TrainerConfig(batch=BatchConfig(seconds, seconds), average_period=200, tensorboard=False)
    schedule = build_schedule(ScheduleConfig(), optimizer)
    return Trainer(model, optimizer, schedule, config, device=device, folder=folder, model_config=to_dict(model.config), quiet=True)


def training_batch(trainer: Trainer, seconds: float) -> PretrainBatch:
    """Noise in utterances of at most 15.6 s, as after the crop, with labels for every frame."""
    model: Any = trainer.model
    num = max(1, round(seconds / 15.6))
    samples = int(seconds * 16000 / num)
    return synthetic_batch(num, samples, model.frontend.num_frames(samples), model.config.head.num_classes)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    device = torch.device(options.device)
    trainer = build(options.size, device, folder, options.seconds)
    batch = training_batch(trainer, options.seconds)
    inside = Stopwatch(device)
    trainer.update._forward_backward = inside.wrap(trainer.update._forward_backward)  # type: ignore[method-assign]
    trainer.optimizer.step = inside.wrap(trainer.optimizer.step)  # type: ignore[method-assign]
    wholes, shares = [], []
    for step in range(options.steps + 1):
        inside.seconds, started = 0.0, inside.now()
        trainer.train_step([batch])
        trainer.guard.poll(step, ())
        took = inside.now() - started
        if step:  # the first allocates
            wholes.append(took)
            shares.append(1 - inside.seconds / took)
    started = time.perf_counter()
    if trainer.average is not None:
        trainer.average.update(trainer.model.state_dict(), 200)
    average = time.perf_counter() - started
    assert trainer.checkpoints is not None
    held, written = [], []
    for _ in range(options.checkpoints):
        started = time.perf_counter()
        trainer.save()
        held.append(time.perf_counter() - started)
        trainer.checkpoints.wait()
        written.append(time.perf_counter() - started)
    return {
        "size": options.size,
        "parameters": sum(param.numel() for param in trainer.model.parameters()),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "audio_seconds": options.seconds,
        "step_seconds": statistics.median(wholes),
        "outside_share": statistics.median(shares),
        "average_update_seconds": average,
        "average_update_share": average / trainer.config.average_period / statistics.median(wholes),
        "checkpoint_bytes": max(path.stat().st_size for path in trainer.checkpoints.paths()),
        "checkpoint_held_seconds": statistics.median(held),
        "checkpoint_written_seconds": statistics.median(written),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", default="zipformer_base", choices=("tiny", "zipformer_base", "hubert_base", "zipformer_large", "hubert_large")
    )
    parser.add_argument("--seconds", type=float, default=16.0, help="of audio in the step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default: %(default)s)")
    parser.add_argument("--checkpoints", type=int, default=3, help="timed checkpoints (default: %(default)s)")
    parser.add_argument("--device", type=device_here, default="cpu", help="auto, cpu or cuda (default: %(default)s)")
    options = parser.parse_args()
    if options.steps < 1 or options.checkpoints < 1 or not options.seconds > 0.1:
        parser.error("--steps and --checkpoints are at least 1, --seconds more than 0.1")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, Path(folder)), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
