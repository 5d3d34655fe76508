"""Time the searches over all utterances, in batches and one utterance at a time, and the encoder apart; one JSON line per measurement.

Weights are random, at the published sizes of Zipformer Base with both heads. The searches run over random frames of the shape of the
encoder's output, since a search's work does not depend on where frames come from and the encoder would take most of the time; it is timed
on a few utterances of noise. Heads are scaled to logits of a standard deviation of 4 and blank's bias is set so that about
`--tokens-per-second` are emitted; how many were is in each line. A head's own matrix products count as search.

`rtf` is seconds of computing per second of audio, by the clock; `cpu_rtf` by this process' processor time, which is what to look at on a
busy machine. `speedup` compares a search's batches with itself one utterance at a time; `differing` counts utterances of which the two found
other tokens (last digits of matrix products decide ties).

    OMP_NUM_THREADS=2 python scripts/bench_search.py [--size base] [--utterances 100] [--batch-seconds 150] [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmark import device_here
from torch import Tensor, nn

from k2ssl.decode import ctc, transducer
from k2ssl.decode.biasing import ContextGraph
from k2ssl.decode.ctc_beam import prefix_beam_search
from k2ssl.decode.hypotheses import Hypothesis
from k2ssl.models.asr import AsrConfig, AsrModel

RATE = 16000
VOCAB_SIZE = 500
Search = Callable[[Tensor, Tensor], list[Hypothesis]]


def build(size: str, device: str) -> AsrModel:
    torch.manual_seed(0)
    config = AsrConfig.tiny(VOCAB_SIZE, "both") if size == "tiny" else AsrConfig(VOCAB_SIZE, "both")
    return AsrModel(config).eval().to(device)


@torch.no_grad()
def emit_like_speech(layer: nn.Linear, logits: Callable[[], Tensor], share: float) -> None:
    """Scale a head's last layer, and set blank's bias so that about that share of frames emits a token."""
    layer.bias.zero_()
    layer.weight.mul_(4.0 / logits().std())
    margin = logits()[..., 1:].max(-1).values - logits()[..., 0]
    layer.bias[0] = margin.flatten().float().quantile(1.0 - share)


def searches(model: AsrModel, beam: int) -> dict[str, Search]:
    """Every search as a function of frames (N, T, C) and frame counts (N,) to the best hypotheses."""
    assert model.ctc is not None and model.transducer is not None
    head, networks = model.ctc, (model.transducer.predictor, model.transducer.joiner)
    draw = torch.Generator().manual_seed(1)
    graph = ContextGraph(torch.randint(1, VOCAB_SIZE, (100, 4), generator=draw).tolist(), score=2.0)

    def best(found: list[list[Hypothesis]]) -> list[Hypothesis]:
        return [hypotheses[0] for hypotheses in found]

    return {
        "ctc greedy": lambda frames, lens: ctc.greedy_search(head(frames), lens),
        f"ctc prefix beam {beam}": lambda frames, lens: best(prefix_beam_search(head(frames), lens, beam=beam)),
        "transducer greedy": lambda frames, lens: transducer.greedy_search(*networks, frames, lens),
        f"transducer modified beam {beam}": lambda frames, lens: best(transducer.modified_beam_search(*networks, frames, lens, beam)),
        f"transducer modified beam {beam}, 100 phrases": lambda frames, lens: best(
            transducer.modified_beam_search(*networks, frames, lens, beam, biasing=graph)
        ),
    }


class Clock:
    """Seconds since it was made, by the clock and of this process' processors, the device's work included."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.begin = self._now()

    def _now(self) -> tuple[float, float]:
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def seconds(self) -> tuple[float, float]:
        wall, cpu = self._now()
        return wall - self.begin[0], cpu - self.begin[1]


@torch.no_grad()
def run(work: Callable[[Tensor], list[Any]], items: Tensor, batch: int, device: str) -> tuple[list[Any], float, float]:
    """What `work` gives for the rows of `items`, a batch at a time, and the two kinds of seconds."""
    work(items[:batch])  # allocates, and chooses kernels
    clock, found = Clock(device), []
    for begin in range(0, len(items), batch):
        found += work(items[begin : begin + batch])
    return found, *clock.seconds()


def report(what: str, **values: object) -> None:
    rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in values.items()}
    print(json.dumps({"what": what, **rounded}), flush=True)


def bench_encoder(model: AsrModel, args: argparse.Namespace, common: dict[str, Any]) -> None:
    samples = int(args.seconds * RATE)
    audio = 0.1 * torch.randn(args.encoder_utterances, samples, generator=torch.Generator().manual_seed(2)).to(args.device)
    batch = min(common["batch"], args.encoder_utterances)
    _, wall, cpu = run(lambda rows: [model.recognition_frames(rows).frames], audio, batch, args.device)
    total = args.encoder_utterances * args.seconds
    report("encoder", utterances=args.encoder_utterances, **{**common, "batch": batch}, rtf=wall / total, cpu_rtf=cpu / total)


def bench_search(name: str, search: Search, frames: Tensor, args: argparse.Namespace, common: dict[str, Any]) -> None:
    def work(rows: Tensor) -> list[Hypothesis]:
        return search(rows, torch.full((len(rows),), rows.shape[1]))

    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    few = frames[: args.alone]
    found, wall, cpu = run(work, frames, common["batch"], args.device)
    peak = {} if args.device == "cpu" else {"peak_bytes": torch.cuda.max_memory_allocated()}
    alone, alone_wall, alone_cpu = run(work, few, 1, args.device)
    total, few_total = len(frames) * args.seconds, len(few) * args.seconds
    report(
        name,
        utterances=len(frames),
        **common,
        rtf=wall / total,
        cpu_rtf=cpu / total,
        utterances_alone=len(few),
        rtf_alone=alone_wall / few_total,
        cpu_rtf_alone=alone_cpu / few_total,
        speedup=alone_wall / few_total / (wall / total),
        differing=sum(one.tokens != other.tokens for one, other in zip(alone, found, strict=False)),
        tokens_per_second=sum(len(hypothesis.tokens) for hypothesis in found) / total,
        **peak,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--size", default="base", choices=("base", "tiny"))
    parser.add_argument("--utterances", type=int, default=100, help="that are searched (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of each (default: %(default)s)")
    parser.add_argument("--batch-seconds", type=float, default=150.0, help="audio in a batch (default: %(default)s)")
    parser.add_argument("--alone", type=int, default=20, help="utterances searched one at a time as well (default: %(default)s)")
    parser.add_argument("--encoder-utterances", type=int, default=4, help="that are encoded; 0: none (default: %(default)s)")
    parser.add_argument("--beam", type=int, default=4, help="of both beam searches (default: %(default)s)")
    parser.add_argument("--tokens-per-second", type=float, default=4.0, help="that the random heads emit, about (default: %(default)s)")
    parser.add_argument("--device", type=device_here, default="cpu", help="auto, cpu or cuda (default: %(default)s)")
    args = parser.parse_args()
    if min(args.utterances, args.alone, args.beam) < 1 or not 0.1 <= args.seconds <= args.batch_seconds:
        parser.error("--utterances, --alone and --beam are at least 1, --seconds at least 0.1 and at most --batch-seconds")

    model = build(args.size, args.device)
    assert model.ctc is not None and model.transducer is not None
    num_frames = int(model.frontend.num_frames(int(args.seconds * RATE)))
    draw = torch.Generator().manual_seed(3)
    frames = torch.randn(args.utterances, num_frames, model.encoder.output_dim, generator=draw).to(args.device)
    joiner, sample = model.transducer.joiner, frames[: min(4, args.utterances)]
    start = model.transducer.predictor.step(torch.tensor([[-1, 0]], device=args.device))
    share = args.tokens_per_second * args.seconds / num_frames
    emit_like_speech(joiner.output_linear, lambda: joiner(sample, start), share)
    projection = model.ctc.projection
    emit_like_speech(projection, lambda: projection(sample), share)

    common = {"size": args.size, "seconds": args.seconds, "batch": max(1, int(args.batch_seconds / args.seconds)), "device": args.device}
    common["threads"] = torch.get_num_threads()
    if args.encoder_utterances:
        bench_encoder(model, args, common)
    for name, search in searches(model, args.beam).items():
        bench_search(name, search, frames, args, common)


if __name__ == "__main__":
    main()
