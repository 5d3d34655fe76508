"""Time the pruned transducer loss beside torchaudio's loss on all logits, forward and backward; one JSON line per measurement.

    OMP_NUM_THREADS=1 PYTHONPATH=. python scripts/bench_transducer.py [--batch N] [--frames T] [--symbols S] [--vocab V] [--device cpu]

    pruned      simple loss, prune ranges, pruned loss on (N, T, R, V) logits
    pruned_k2   the same with k2's recursion; only where k2 is installed
    torchaudio  torchaudio.functional.rnnt_loss on (N, T, S+1, V) logits

Each comes twice: `bare`, the losses alone on given logits, and `joiner`, from (N, T, C) and (N, S+1, C) through the joint network
(tanh of the sum, linear layer) as in training. Times are medians of runs that take turns in one process; `torchaudio_over_this` is
torchaudio's median over that of the line. `peak_mib` is measured in a process of its own and is what a run needs on top of its inputs; bare
logits are inputs, of `logits_mib`. `torchaudio_peak_over_this` compares the two together.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchaudio
from benchmark import device_here
from torch import Tensor

from k2ssl.losses.transducer import pruned_loss, simple_loss
from k2ssl.losses.transducer_backend import lattice_backend, use_lattice_backend
from k2ssl.losses.transducer_lattice import make_boundary
from k2ssl.losses.transducer_pruning import prune, prune_ranges
from k2ssl.train.memory import PeakMemory

CANDIDATES = ["pruned", *(["pruned_k2"] if importlib.util.find_spec("k2") else []), "torchaudio"]
LM_SCALE, SIMPLE_SCALE = 0.25, 0.5
MIB = 2**20


class Problem:
    """Inputs of one size and what is computed from them.

    Args:
        args: sizes and device.
        joiner: whether a run includes the joint network.
        full: whether it needs logits at all symbol positions.
    """

    def __init__(self, args: argparse.Namespace, joiner: bool, full: bool) -> None:
        generator = torch.Generator(args.device).manual_seed(0)

        def leaf(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=generator, device=args.device)).requires_grad_()

        n, t, s, v, c = args.batch, args.frames, args.symbols, args.vocab, args.dim
        self.args, self.joiner, self.full = args, joiner, full
        self.symbols = torch.randint(1, v, (n, s), generator=generator, device=args.device)
        self.boundary = make_boundary(torch.full((n,), s), torch.full((n,), t))
        self.lens = [torch.full((n,), length, dtype=torch.int32, device=args.device) for length in (t, s)]
        if joiner:
            self.leaves = {"frames": leaf(n, t, c), "context": leaf(n, s + 1, c)}
            self.leaves |= {name: leaf(v, c, scale=c**-0.5) for name in (["output"] if full else ["output", "am", "lm"])}
        else:
            self.leaves = {"logits": leaf(n, t, s + 1 if full else min(args.range, s + 1), v)}
            self.leaves |= {} if full else {"am": leaf(n, t, v), "lm": leaf(n, s + 1, v)}

    def run(self) -> None:
        """One training step's worth of loss: forward and backward."""
        loss = self._torchaudio() if self.full else self._pruned()
        loss.backward()
        for leaf in self.leaves.values():
            leaf.grad = None

    def _pruned(self) -> Tensor:
        leaves = self.leaves
        am, lm = leaves["am"], leaves["lm"]
        if self.joiner:
            am, lm = F.linear(leaves["frames"], am), F.linear(leaves["context"], lm)
        simple = simple_loss(am, lm, self.symbols, self.boundary, lm_scale=LM_SCALE)
        ranges = prune_ranges(simple.px_grad, simple.py_grad, self.boundary, self.args.range)
        if self.joiner:
            frames, context = prune(leaves["frames"], leaves["context"], ranges)
            logits = F.linear(torch.tanh(frames + context), leaves["output"])
        else:
            logits = leaves["logits"]
        pruned = pruned_loss(logits, self.symbols, ranges, self.boundary)
        return SIMPLE_SCALE * simple.loss.sum() + pruned.sum()

    def _torchaudio(self) -> Tensor:
        leaves = self.leaves
        if self.joiner:
            logits = F.linear(torch.tanh(leaves["frames"].unsqueeze(2) + leaves["context"].unsqueeze(1)), leaves["output"])
        else:
            logits = leaves["logits"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchaudio announces the end of its own loss
            return torchaudio.functional.rnnt_loss(logits, self.symbols.int(), *self.lens, blank=0, reduction="sum")


def problem(args: argparse.Namespace, name: str, joiner: bool) -> tuple[Problem, Callable[[], None]]:
    """Inputs, and one run of candidate `name` on them."""
    made = Problem(args, joiner, full=name == "torchaudio")

    def run() -> None:
        use_lattice_backend("k2" if name == "pruned_k2" else args.backend)
        made.run()

    return made, run


def timed(run: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_of(args: argparse.Namespace, name: str, joiner: bool) -> int:
    """Bytes that a run needs beyond its inputs, in this process; a small run before it loads libraries."""
    small = argparse.Namespace(**{**vars(args), "batch": 2, "frames": 10, "symbols": 6})
    problem(small, name, joiner)[1]()
    _, run = problem(args, name, joiner)
    with PeakMemory(args.device) as peak:
        before = peak.bytes
        run()
        return peak.bytes - before


def peak_in_own_process(name: str, setting: str) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name, setting]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    for name, default, meaning in (
        ("batch", 8, "utterances, N"),
        ("frames", 800, "frames of each, T"),
        ("symbols", 100, "symbols of each, S"),
        ("vocab", 500, "vocabulary, V"),
        ("range", 5, "width of the pruning window, R"),
        ("dim", 512, "channels of the joint network, C"),
        ("repeats", 5, "timed runs of each, at least 5"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default {default})")
    parser.add_argument("--device", type=device_here, default="cpu", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--backend", default="auto", help="who computes our recursions: auto, torch or triton")
    parser.add_argument("--peak-of", nargs=2, metavar=("NAME", "SETTING"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.repeats < 5:
        parser.error(f"--repeats is {args.repeats}, at least 5 are needed for a median")
    return args


def main() -> None:
    args = arguments()
    if args.peak_of:
        print(peak_of(args, args.peak_of[0], args.peak_of[1] == "joiner"))
        return
    sizes = {name: getattr(args, name) for name in ("batch", "frames", "symbols", "vocab", "range", "dim")}
    for setting in ("bare", "joiner"):
        peaks = {name: peak_in_own_process(name, setting) for name in CANDIDATES}
        made = {name: problem(args, name, setting == "joiner") for name in CANDIDATES}
        times: dict[str, list[float]] = {name: [] for name in CANDIDATES}
        for number in range(1 + args.repeats):
            for name, (_, run) in made.items():
                seconds = timed(run, args.device)
                if number > 0:
                    times[name].append(seconds)
        medians = {name: statistics.median(values) for name, values in times.items()}
        inputs = {
            name: sum(x.nbytes for x in [problem.leaves["logits"]]) if setting == "bare" else 0 for name, (problem, _) in made.items()
        }
        for name in CANDIDATES:
            use_lattice_backend("k2" if name == "pruned_k2" else args.backend)
            line = {
                "setting": setting,
                "loss": name,
                "median_s": round(medians[name], 4),
                "min_s": round(min(times[name]), 4),
                "torchaudio_over_this": round(medians["torchaudio"] / medians[name], 2),
                "peak_mib": round(peaks[name] / MIB, 1),
                "logits_mib": round(inputs[name] / MIB, 1),
                "torchaudio_peak_over_this": round((peaks["torchaudio"] + inputs["torchaudio"]) / (peaks[name] + inputs[name]), 2),
                "lattice_backend": "torchaudio" if name == "torchaudio" else lattice_backend(args.device),
            }
            print(json.dumps({**line, **sizes, "device": args.device, "threads": torch.get_num_threads()}), flush=True)


if __name__ == "__main__":
    main()
