"""Time one ScaledAdam step over the Base model's parameter shapes; one JSON line per measurement.

Compares with torch's AdamW (foreach) and with a plain loop over tensors, interleaved in the same run, so that whatever else the machine
does weighs on all three alike. `state_per_parameter` is bytes of optimizer state over bytes of parameters; `step_peak_per_parameter` the
largest amount of memory allocated on top of what was held before a step, likewise.

    OMP_NUM_THREADS=2 python scripts/bench_optimizer.py [--shapes FILE] [--steps N] [--device cpu]
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmark import device_here
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from k2ssl.optim.scaled_adam import ScaledAdam


class TensorLoop:
    """ScaledAdam without clipping, one tensor after the other."""

    def __init__(self, params: list[Tensor], lr: float = 0.03) -> None:
        self.params, self.lr, self.t = params, lr, 0
        self.v = [torch.zeros_like(p) for p in params]
        self.delta = [torch.zeros_like(p) for p in params]
        self.rms = [p.detach().square().mean().sqrt() for p in params]
        self.size_v = [torch.zeros(()) for p in params]
        self.size_grads = [torch.zeros(4, device=p.device) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        correction = 1 - 0.98**self.t
        for i, p in enumerate(self.params):
            g = p.grad
            assert g is not None
            self.v[i].mul_(0.98).addcmul_(g, g, value=0.02)
            v = self.v[i] / correction if correction < 0.99 else self.v[i]
            step = -self.lr * g / (v.sqrt() + 1e-8)
            if p.numel() == 1:
                step *= 0.1
            else:
                self.size_grads[i][(self.t - 1) % 4] = (p * g).sum()
                if self.t % 4 == 0:
                    self.rms[i] = p.square().mean().sqrt()
                step *= self.rms[i].clamp(min=1e-5)
                if self.t % 4 == 0:
                    decay = 0.98**4
                    self.size_v[i] = decay * self.size_v[i] + (1 - decay) * self.size_grads[i].square().mean()
                    scale = -0.1 * self.lr * (1 - decay ** (self.t // 4)) ** 0.5 * self.size_grads[i].sum() / (self.size_v[i].sqrt() + 1e-8)
                    step += p * torch.minimum(scale.clamp(-0.1, 0.1), (3.0 - self.rms[i]) / self.rms[i])
            self.delta[i].mul_(0.9).add_(step, alpha=0.1)
            p += self.delta[i]


def make_parameters(shapes: dict[str, list[int]], device: str) -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(0)
    params = {name: torch.nn.Parameter(0.1 * torch.randn(shape, device=device)) for name, shape in shapes.items()}
    for param in params.values():
        param.grad = torch.randn_like(param)
    return params


def timed(step: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def held_bytes(optimizer: object) -> int:
    """Storage of all tensors that the optimizer holds beyond parameters and gradients."""
    storages: dict[int, int] = {}

    def visit(thing: object) -> None:
        if isinstance(thing, Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            for value in thing.values():
                visit(value)
        elif isinstance(thing, list | tuple):
            for value in thing:
                visit(value)

    visit(optimizer.state_dict() if hasattr(optimizer, "state_dict") else [*vars(optimizer).values()][3:])
    return sum(storages.values())


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """Largest sum of memory allocated during a step, on top of what was there."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return int(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    default_shapes = Path(__file__).parents[1] / "tests" / "golden" / "upstream_keys_base.json"
    parser.add_argument("--shapes", type=Path, default=default_shapes, help="JSON file: name -> shape")
    parser.add_argument("--steps", type=int, default=12, help="timed steps; a multiple of 4, the size-update period, is fair")
    parser.add_argument("--device", type=device_here, default="cpu", help="auto, cpu or cuda (default: %(default)s)")
    args = parser.parse_args()
    if args.steps < 5:
        parser.error(f"--steps is {args.steps}, at least 5 are needed for a median")

    params = make_parameters(json.loads(args.shapes.read_text()), args.device)
    size = sum(param.numel() * param.element_size() for param in params.values())
    candidates: dict[str, torch.optim.Optimizer | TensorLoop] = {
        "scaled_adam": ScaledAdam(params.items(), clipping_scale=2.0),
        "adamw_foreach": torch.optim.AdamW(params.values(), lr=1e-4, foreach=True),
        "scaled_adam_loop": TensorLoop(list(params.values())),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(4 + args.steps):
        for name, optimizer in candidates.items():
            seconds = timed(optimizer.step, args.device)
            if number >= 4:
                times[name].append(seconds)
    common = {"parameters": size // 4, "tensors": len(params), "threads": torch.get_num_threads(), "device": args.device}
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, optimizer in candidates.items():
        gc.collect()
        peak = max(peak_bytes(optimizer.step, args.device) for _ in range(4))  # one of four steps updates sizes
        line = {
            "optimizer": name,
            "median_s": round(medians[name], 4),
            "min_s": round(min(times[name]), 4),
            "mean_s": round(statistics.mean(times[name]), 4),
            "scaled_adam_over_this": round(medians["scaled_adam"] / medians[name], 3),
            "state_per_parameter": round(held_bytes(optimizer) / size, 3),
            "step_peak_per_parameter": round(peak / size, 3),
        }
        print(json.dumps({**line, **common}))


if __name__ == "__main__":
    main()
