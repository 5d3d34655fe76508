#!/usr/bin/env python
"""How many lengths the crops of an epoch have with `data.crop_step`, and how much audio that leaves unused; no audio is read.

    PYTHONPATH=. python scripts/bench_crops.py --steps 0 0.25 0.5

Lengths of utterances are drawn: most around 14.5 s, the others evenly from 2 to 13 s, much as in read English. Prints one JSON object for
each size of batch and step.
"""

from __future__ import annotations

import argparse
import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
from lhotse import AudioSource, Recording
from lhotse.cut import Cut, MonoCut

from k2ssl.data.loader import pretrain_loader
from k2ssl.data.worst_batches import row_seconds

RATE = 16000


class AnyLabels:
    """Has labels of every cut, of which nobody asks for any."""

    identity = "any"
    contract = SimpleNamespace(frame_rate=50.0)

    def __contains__(self, cut_id: object) -> bool:
        return True

    def labels(self, cut_id: str) -> np.ndarray:
        raise NotImplementedError("no audio is read here, so there are no labels either")


def draw_cuts(number: int, seed: int = 0) -> list[Cut]:
    """Utterances of 2 to 25 s, whose audio does not exist."""
    draw = np.random.default_rng(seed)
    most = draw.random(number) < 0.65
    seconds = np.where(most, draw.normal(14.5, 1.2, number), draw.uniform(2, 13, number)).clip(2.0, 25.0)
    recording = Recording("none", [AudioSource("file", [0], "none.flac")], RATE, 25 * RATE, 25.0)
    return [MonoCut(f"cut{i}", 0.0, round(length * RATE) / RATE, 0, recording=recording) for i, length in enumerate(seconds)]


def shapes(cuts: list[Cut], max_duration: float, step: float) -> list[tuple[int, float]]:
    """(utterances, seconds of each) of the batches of an epoch."""
    loader = pretrain_loader(cuts, [AnyLabels()], max_duration=max_duration, crop_step=step)
    return [(len(request.cuts), row_seconds(loader, request)) for request in loader.requests()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=40_000)
    parser.add_argument("--max-duration", type=float, nargs="+", default=[600.0, 100.0], help="seconds of audio in a batch")
    parser.add_argument("--steps", type=float, nargs="+", default=[0.0, 0.1, 0.25, 0.5, 1.0], help="s; 0 does not round")
    options = parser.parse_args(argv)
    cuts = draw_cuts(options.utterances)
    for max_duration in options.max_duration:
        whole = sum(number * seconds for number, seconds in shapes(cuts, max_duration, 0.0))
        for step in options.steps:
            found = shapes(cuts, max_duration, step)
            line: dict[str, Any] = {"max_duration": max_duration, "crop_step": step, "batches": len(found)}
            line |= {"lengths": len({seconds for _, seconds in found}), "shapes": len(set(found))}
            print(json.dumps(line | {"not_used": round(1 - sum(number * seconds for number, seconds in found) / whole, 6)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
