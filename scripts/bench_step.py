"""Time one training step, ours and torchaudio's HuBERT side by side, split into its stages; one JSON line per measurement.

    OMP_NUM_THREADS=2 PYTHONPATH=. python scripts/bench_step.py --models zipformer_base torchaudio_hubert_base --precisions float32

Every measurement runs in a process of its own, one after the other. `memory_gb` is the most memory held beyond what imports need (on CUDA:
by the allocator), parameters, gradients and optimizer state included. `cpu_seconds` is the processor time of a
step, which with one thread (OMP_NUM_THREADS=1) says more than the clock where other work runs beside. Stages: frontend, encoder (forward), loss (the rest of the forward
pass), backward, optimizer. On CUDA `seconds` are those of a step in a series of four that waits for the device at its end only; each of the
stages waits for it at its own end, so that together they take longer. The peer's step is torchaudio's model, its masked logits' cross-entropy with feature penalty, and AdamW. With
`--inference` the forward pass to encoder frames alone is timed. `tflop` are the matrix products and convolutions of one step, as torch counts
them while it runs (recomputed layers twice); over `seconds` and `--peak-tflops` they give `utilisation`. `operations` is how often torch hands work
to the device in it, with nothing compiled: a GPU waits where the host needs longer for that than the GPU for the work. `traffic_gb` is what
these operations read and write, each tensor once an operation, whether from memory or a cache. What Triton's kernels do is in none of the three.
`--kernels 10` lists what takes longest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchaudio
from benchmark import PeakMemory, Stopwatch, device_here, in_own_process, machine, summary, synthetic_batch, table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from k2ssl.models.frontend import LogMelConfig, WaveformFrontend
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.nn.fusion import use_fusion
from k2ssl.nn.kernels import use_triton
from k2ssl.optim.build import OptimConfig, build_optimizer

SIZES = ("tiny", "zipformer_base", "zipformer_large", "hubert_base", "hubert_large")
PEERS = {
    "torchaudio_hubert_base": partial(torchaudio.models.hubert_pretrain_base, num_classes=504),
    "torchaudio_hubert_large": torchaudio.models.hubert_pretrain_large,
}
_IN_SERIES = 4  # steps, so that one of them updates the sizes of tensors
STAGES = ("frontend", "encoder", "loss", "backward", "optimizer")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Ours:
    """One of our models with the optimizer that its published recipe uses."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        config = getattr(HubertConfig, options.model)()
        if options.frontend == "logmel":
            config = replace(config, frontend=LogMelConfig(gradient_scale=config.frontend.gradient_scale))
        self.model = HubertModel(config).to(device).train()
        self.model.clock.advance(options.batch_count)
        self.model.encoder.recompute_layers = options.recompute_layers
        if isinstance(self.model.frontend, WaveformFrontend):
            self.model.frontend.fast = not options.plain_frontend
        self.frontend, self.encoder = self.model.frontend, self.model.encoder
        self.optimizer = build_optimizer(OptimConfig(name="adamw", lr=1e-4) if "hubert" in options.model else OptimConfig(), self.model)
        samples = round(options.seconds * 16000)
        classes = config.head.num_classes
        self.batch = synthetic_batch(options.utterances, samples, self.model.frontend.num_frames(samples), classes).to(device)

    def infer(self) -> Tensor:
        frames: Tensor = self.model.encode(self.batch.audio).output.frames
        return frames

    def loss(self) -> Tensor:
        self.model.clock.advance(self.model.clock.batch_count)  # as a trainer does: what regularisers found in earlier steps takes effect
        output = self.model(self.batch)
        return output.loss / output.num_targets


class Peer:
    """torchaudio's HuBERT for pre-training."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.model: nn.Module = PEERS[options.model]().to(device).train()
        self.frontend, self.encoder = self.model.wav2vec2.feature_extractor, self.model.wav2vec2.encoder.transformer
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        samples = round(options.seconds * 16000)
        classes = (self.model.logit_generator.label_embeddings.shape[0],)
        self.batch = synthetic_batch(options.utterances, samples, (samples - 400) // 320 + 1, classes).to(device)

    def infer(self) -> Tensor:
        frames: Tensor = self.model.wav2vec2(self.batch.audio)[0]
        return frames

    def loss(self) -> Tensor:
        logits, _, penalty = self.model(self.batch.audio, self.batch.labels[0])
        logits = logits.float()
        return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long)) + 10.0 * penalty  # class 0 is the label


def timed_stages(job: Ours | Peer, device: torch.device, autocast: Callable[[], Any]) -> dict[str, float]:
    """Seconds of every stage of one step."""
    frontend, encoder = Stopwatch(device), Stopwatch(device)
    own = job.frontend.forward, job.encoder.forward
    job.frontend.forward, job.encoder.forward = frontend.wrap(own[0]), encoder.wrap(own[1])  # type: ignore[method-assign]
    try:
        job.optimizer.zero_grad(set_to_none=True)
        moments = [frontend.now()]
        with autocast():
            loss = job.loss()
        moments.append(frontend.now())
        loss.backward()  # type: ignore[no-untyped-call]
        moments.append(frontend.now())
        job.optimizer.step()
        moments.append(frontend.now())
    finally:
        job.frontend.forward, job.encoder.forward = own  # type: ignore[method-assign]
    forward, backward, optimizer = (after - before for before, after in itertools.pairwise(moments))
    rest = forward - frontend.seconds - encoder.seconds
    return dict(zip(STAGES, (frontend.seconds, encoder.seconds, rest, backward, optimizer), strict=True))


def timed_inference(job: Ours | Peer, device: torch.device, autocast: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one forward pass."""
    job.model.eval()
    watch = Stopwatch(device)
    with torch.no_grad(), autocast():  # in inference mode torch's counter of products takes weight norm apart, and fails
        watch.wrap(job.infer)()
    return {"forward": watch.seconds}


def timed_series(job: Ours | Peer, device: torch.device, autocast: Callable[[], Any], inference: bool) -> float:
    """Seconds of a step in a series that waits for the device at its end only, as a trainer's: the host may run ahead of it."""
    watch = Stopwatch(device)

    def series() -> None:
        for _ in range(_IN_SERIES):
            if inference:
                with torch.no_grad(), autocast():
                    job.infer()
                continue
            job.optimizer.zero_grad(set_to_none=True)
            with autocast():
                loss = job.loss()
            loss.backward()  # type: ignore[no-untyped-call]
            job.optimizer.step()

    watch.wrap(series)()
    return watch.seconds / _IN_SERIES


class OperationCounter(TorchDispatchMode):
    """Counts what is handed to the device: operations of torch that write memory, not those that give a view or make room; and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.traffic = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not (function.is_view or "empty" in name or name in _NO_WORK):
            self.operations += 1
            self.traffic += _traffic(function, args, kwargs or {}, result)
        return result


_NO_WORK = ("_unsafe_view", "detach", "promote_types")
_WRITE_ONLY = ("copy_", "fill_", "zero_")


def _traffic(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Bytes of what an operation reads and of what it writes."""
    arguments = function._schema.arguments
    written = {argument.name for argument in arguments if argument.alias_info is not None and argument.alias_info.is_write}
    given = {**{argument.name: value for argument, value in zip(arguments, args, strict=False)}, **kwargs}
    blind = function.overloadpacket.__name__ in _WRITE_ONLY or bool(written - {"self"})  # what is written is not read before
    read = [value for name, value in given.items() if not (blind and name in written)]
    made = [value for name, value in given.items() if name in written] if result is None else result  # lists in place return nothing
    return sum(_bytes(leaf) for leaf in tree_leaves((read, made)) if isinstance(leaf, Tensor))


def _bytes(tensor: Tensor) -> int:
    """In memory: what is expanded lies there once."""
    return tensor.element_size() * math.prod(length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)


def counted(run: Callable[[], Any]) -> dict[str, float]:
    """TFLOP of the matrix products and convolutions in `run`, its operations, and the GB that they read and write."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flop}) as flop, OperationCounter() as operations:
        run()
    return {
        "tflop": float(f"{flop.get_total_flops() / 1e12:.4g}"),
        "operations": operations.operations,
        "traffic_gb": float(f"{operations.traffic / 1e9:.4g}"),
    }


def _addmm_flop(total: Any, left: Any, right: Any, **_: Any) -> int:
    """Of the product in place, which torch's counter does not know; from shapes."""
    return int(2 * left[0] * left[1] * right[1])


def largest_kernels(run: Callable[[], Any], device: torch.device, most: int) -> list[tuple[str, float, int]]:
    """What `run` spends most time in: name of the kernel (on a CPU of the operation), milliseconds by itself, calls."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        run()
    found = [(e.key[:120], (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1000, e.count) for e in profiler.key_averages()]
    return [(name, round(ms, 3), calls) for name, ms, calls in sorted(found, key=lambda kernel: -kernel[1])[:most]]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The measurement of one model, in this process."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    memory = PeakMemory(device)
    dtype = PRECISIONS[options.precision]
    started = time.perf_counter()
    job = (Peer if options.model in PEERS else Ours)(options, device)
    if options.fuse:
        use_fusion("inductor")
    use_triton(not options.no_triton)
    run = timed_inference if options.inference else timed_stages

    def autocast() -> Any:
        return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

    runs, cpu = [], []
    for step in range(options.warmup + options.steps):
        cpu_started = time.process_time()
        seconds = run(job, device, autocast)
        if step == 0:
            first = time.perf_counter() - started
        if step >= options.warmup:
            runs.append(seconds)
            cpu.append(time.process_time() - cpu_started)
    held = round(memory.gigabytes(), 3)
    work = counted(lambda: run(job, device, autocast))
    kernels = {"kernels": largest_kernels(lambda: run(job, device, autocast), device, options.kernels)} if options.kernels else {}
    stages = {stage: summary(one[stage] for one in runs)["median"] for stage in runs[0]}
    whole = summary(sum(one.values()) for one in runs)
    if device.type == "cuda":  # there the stages, each of which waits for the device, take longer in all than a step
        whole = summary(timed_series(job, device, autocast, options.inference) for _ in range(options.steps))
    audio = options.utterances * options.seconds
    return {
        "what": "inference" if options.inference else "training step",
        "model": options.model,
        "parameters": sum(parameter.numel() for parameter in job.model.parameters()),
        "frontend_kind": "waveform" if options.model in PEERS else options.frontend,
        "precision": options.precision,
        "batch": f"{options.utterances} x {options.seconds:g} s",
        "seconds": whole["median"],
        **{key: whole[key] for key in ("min", "max", "runs")},
        "cpu_seconds": summary(cpu)["median"],
        "times_real_time": round(audio / whole["median"], 2),
        "memory_gb": held,
        **work,
        "tflop_per_second": float(f"{work['tflop'] / whole['median']:.4g}"),
        **({"utilisation": round(work["tflop"] / whole["median"] / options.peak_tflops, 4)} if options.peak_tflops else {}),
        **stages,
        "optimizer_share": round(stages.get("optimizer", 0.0) / whole["median"], 4),
        "build_and_first_step": round(first, 2),
        **{name: True for name in ("recompute_layers", "plain_frontend", "fuse", "no_triton") if getattr(options, name)},
        **kernels,
        **machine(device),
        "torchaudio": torchaudio.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["zipformer_base"], choices=(*SIZES, *PEERS), metavar="MODEL", help=f"{', '.join((*SIZES, *PEERS))}"
    )
    parser.add_argument("--precisions", nargs="+", default=["float32"], choices=tuple(PRECISIONS))
    parser.add_argument("--frontends", nargs="+", default=["waveform"], choices=("waveform", "logmel"), help="of our models")
    parser.add_argument("--utterances", type=int, default=4, help="in the batch (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each utterance (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them (default: %(default)s)")
    parser.add_argument("--batch-count", type=float, default=10000.0, help="where our schedules stand (default: %(default)s)")
    parser.add_argument("--device", type=device_here, default="cpu", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--inference", action="store_true", help="forward pass only")
    parser.add_argument("--recompute-layers", action="store_true", help="activation checkpointing of our encoders")
    parser.add_argument("--plain-frontend", action="store_true", help="our waveform frontend without its fast path")
    parser.add_argument("--fuse", action="store_true", help="chains of elementwise operations compiled (ours)")
    parser.add_argument("--no-triton", action="store_true", help="on a GPU without our Triton kernels")
    parser.add_argument(
        "--peak-tflops", type=float, default=0.0, help="of the device in this precision, for the utilisation (default: none)"
    )
    parser.add_argument("--kernels", type=int, default=0, help="list so many that take longest, of one step after all others")
    parser.add_argument("--table", action="store_true", help="print a table at the end")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "PRECISION", "FRONTEND"), help="measure in this process")
    options = parser.parse_args()
    if options.peak_tflops < 0 or options.kernels < 0:
        parser.error("--peak-tflops and --kernels are at least 0")
    if options.steps < 1 or options.warmup < 1 or options.utterances < 1 or not options.seconds >= 0.1:
        parser.error("--steps, --warmup and --utterances are at least 1, --seconds at least 0.1")
    if options.one:
        options.model, options.precision, options.frontend = options.one
        print(json.dumps(measure(options)))
        return 0
    lines = []
    for precision, model, frontend in itertools.product(options.precisions, options.models, options.frontends):
        if model in PEERS and frontend != options.frontends[0]:
            continue
        line = in_own_process(__file__, [*sys.argv[1:], "--one", model, precision, frontend])
        lines.append({"model": model, "precision": precision, **line})
        print(json.dumps(lines[-1]), flush=True)
    if options.table:
        columns = [
            "model",
            "precision",
            "frontend_kind",
            "seconds",
            "min",
            "max",
            "memory_gb",
            *(("forward",) if options.inference else STAGES),
            "error",
        ]
        print(table(lines, columns))
    return 1 if any("error" in line for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
