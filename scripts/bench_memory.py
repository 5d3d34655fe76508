"""The largest batch that a training step takes, with and without activation checkpointing: JSON lines, and a table of the trade-off.

    PYTHONPATH=. python scripts/bench_memory.py --device cuda --precision bfloat16 --models zipformer_base zipformer_large --seconds 15
    OMP_NUM_THREADS=2 PYTHONPATH=. python scripts/bench_memory.py --limit-gb 4 --models zipformer_base --seconds 5

The measurements are those of bench_step.py, each in a process of its own. The number of utterances is doubled until a step does not fit, then
the largest that fits is looked for between, to within an eighth. What does not fit is what runs out of memory or takes more than --limit-gb,
without which a CPU has no end. A rank of a run that shards nothing has this memory, too, gradients and optimizer state included.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_step import PEERS, SIZES
from benchmark import device_here, in_own_process, table

from k2ssl.train.memory import NO_ROOM

STEP = str(Path(__file__).parent / "bench_step.py")
OUT_OF_MEMORY = (*NO_ROOM, "OutOfMemoryError", "out of memory", "can't allocate memory", "exit status -9")  # the last by the system
COLUMNS = ["model", "recompute_layers", "utterances", "audio_seconds", "memory_gb", "seconds", "times_real_time"]


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` for which `fits`, to within an eighth; 0 if not even 1 does.

    Args:
        fits: is true up to a number and false from there on.
        most: where to stop.
    """
    low, high = 0, 1
    while fits(high):
        low = high
        if high >= most:
            return low
        high = min(2 * high, most)
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def search(options: argparse.Namespace, model: str, recompute: bool) -> dict[str, Any]:
    """The line of the largest batch; every batch tried is printed."""
    tried: dict[int, dict[str, Any]] = {}

    def fits(utterances: int) -> bool:
        sizes = [f"--utterances={utterances}", f"--seconds={options.seconds}", f"--steps={options.steps}", f"--device={options.device}"]
        flags = [*(["--recompute-layers"] if recompute else []), *(["--fuse"] if options.fuse else [])]
        line = in_own_process(STEP, [*sizes, *flags, "--one", model, options.precision, options.frontend])
        line |= {"model": model, "recompute_layers": recompute, "utterances": utterances, "audio_seconds": utterances * options.seconds}
        tried[utterances] = line
        print(json.dumps(line), flush=True)
        if "error" in line and not any(sign in line["error"] for sign in OUT_OF_MEMORY):
            raise SystemExit(f"bench_memory: {model} with {utterances} utterances failed: {line['error']}")
        return "error" not in line and (not options.limit_gb or line["memory_gb"] <= options.limit_gb)

    found = largest(fits, options.most)
    return tried[found] if found else {"model": model, "recompute_layers": recompute, "utterances": 0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = (*SIZES, *PEERS)
    parser.add_argument(
        "--models", nargs="+", default=["zipformer_base", "zipformer_large"], choices=models, metavar="MODEL", help=", ".join(models)
    )
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--frontend", default="waveform", choices=("waveform", "logmel"))
    parser.add_argument("--device", type=device_here, default="cpu", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each utterance (default: %(default)s)")
    parser.add_argument("--limit-gb", type=float, default=0.0, help="1e9 bytes; 0: what the device has (default: %(default)s)")
    parser.add_argument("--most", type=int, default=4096, help="utterances to try at most (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps (default: %(default)s)")
    parser.add_argument("--fuse", action="store_true", help="chains of elementwise operations compiled")
    options = parser.parse_args()
    if options.device == "cpu" and options.limit_gb <= 0:
        parser.error("--limit-gb is needed on a CPU, whose operating system would kill other programs first")
    if options.most < 1:
        parser.error(f"--most is {options.most}, at least 1 is needed")
    ways = {model: (False,) if model in PEERS else (False, True) for model in options.models}
    rows = [search(options, model, recompute) for model in options.models for recompute in ways[model]]
    print(table(rows, COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
