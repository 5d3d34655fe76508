"""How the cost of a training step grows with batch seconds, utterance length and model size: JSON lines, and one picture each.

    OMP_NUM_THREADS=2 PYTHONPATH=. python scripts/bench_growth.py --pictures docs [--model zipformer_base] [--quick]

The measurements are those of bench_step.py, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from benchmark import device_here, in_own_process

STEP = str(Path(__file__).parent / "bench_step.py")
AXES = {
    "batch_seconds": "audio in the batch, s",
    "utterance_seconds": "length of an utterance, s, in batches of equal length",
    "model": "",
}


def cases(options: argparse.Namespace) -> dict[str, list[tuple[str, int, float]]]:
    """Per picture: model, utterances, seconds of each."""
    model, models = (
        options.model,
        ["tiny"] if options.quick else ["tiny", "zipformer_base", "hubert_base", "zipformer_large", "hubert_large"],
    )
    if options.quick:
        return {
            "batch_seconds": [(model, n, 1.0) for n in (1, 2)],
            "utterance_seconds": [(model, 2, 1.0), (model, 1, 2.0)],
            "model": [(m, 1, 1.0) for m in models],
        }
    return {
        "batch_seconds": [(model, n, 5.0) for n in (1, 2, 4, 8, 16)],
        "utterance_seconds": [(model, n, 30.0 / n) for n in (15, 6, 3, 2, 1)],
        "model": [(m, 2, 10.0) for m in models],
    }


def measure(options: argparse.Namespace, what: str, case: tuple[str, int, float]) -> dict[str, Any]:
    model, utterances, seconds = case
    sizes = ["--utterances", str(utterances), "--seconds", str(seconds), "--steps", str(options.steps), "--device", options.device]
    line = in_own_process(STEP, [*sizes, "--one", model, options.precision, "waveform"])
    line |= {"what": f"growth with {what}", "batch_seconds": utterances * seconds, "utterance_seconds": seconds, "model": model}
    print(json.dumps(line), flush=True)
    return line


def draw(what: str, lines: list[dict[str, Any]], path: Path) -> None:
    """Seconds of a step on the left, memory on the right."""
    lines = [line for line in lines if "error" not in line]
    figure, left = plt.subplots(figsize=(4.2, 2.8))
    right = left.twinx()
    x = [line[what] for line in lines]
    for axis, key, label, colour in ((left, "seconds", "step, s", "C0"), (right, "memory_gb", "memory, GB", "C1")):
        values = [line[key] for line in lines]
        axis.plot(x, values, "o" if what == "model" else "o-", color=colour)  # there is nothing between two models
        axis.set_ylabel(label, color=colour)
        axis.set_ylim(0, 1.1 * max(values))
    left.set_xlabel(AXES[what])
    left.tick_params(axis="x", rotation=20 if what == "model" else 0)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zipformer_base", help="whose batches grow (default: %(default)s)")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", type=device_here, default="cpu", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=list(AXES), choices=tuple(AXES))
    parser.add_argument("--pictures", type=Path, help="folder for growth_*.png; none are drawn without it")
    parser.add_argument("--quick", action="store_true", help="a few seconds of audio: does it run")
    options = parser.parse_args()
    failed = False
    for what, of in cases(options).items():
        if what in options.only:
            lines = [measure(options, what, case) for case in of]
            failed |= any("error" in line for line in lines)
            if options.pictures is not None:
                draw(what, lines, options.pictures / f"growth_{what}.png")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
