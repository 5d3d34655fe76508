"""Time k-means beside scikit-learn's MiniBatchKMeans on the same frames, and the MFCC; one JSON line per measurement.

    OMP_NUM_THREADS=1 python scripts/bench_kmeans.py [--audio FOLDER] [--seconds S] [--clusters K] [--dim D] [--device cpu]

With `--audio` the frames are MFCC of the .flac and .wav files below the folder, else a random mixture. Lines:

    mfcc      audio seconds per second of MFCC extraction (`x_real_time`), reading of files not counted
    fit       ours: frames per second of mini-batch updates alone, of everything (sampling, restarts, updates), inertia per frame
    sklearn   MiniBatchKMeans.fit on the frames in memory with the settings of the published recipe, likewise
    inertia   ours over scikit-learn's, minus 1, on all frames; at most 0.02 is asked for
    assign    frames per second of exact assignment, and how many labels differ from float64 brute force on the first 20,000 frames
    memory    peak resident memory in MiB of a process that fits a generated stream of so many frames, at two sizes (Linux); `before_mib`
              is what importing alone takes
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import soundfile
import torch
from benchmark import device_here
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from k2ssl.labelling.features import MfccFeatures
from k2ssl.labelling.kmeans import KMeans, KMeansConfig, Progress, fit_kmeans


def main() -> None:
    args = _arguments()
    if args.memory_of:
        _fit_generated(args.memory_of, args.clusters, args.dim)
        return
    device = torch.device(args.device)
    frames = _mfcc(args.audio, args.seconds, device) if args.audio else _mixture(round(args.seconds * 100), args.dim)
    ours = _bench_fit(frames, args, device)
    theirs = _bench_sklearn(frames, args)
    _say("inertia", share_above_sklearn=ours.inertia(frames) / theirs.inertia(frames) - 1, asked=0.02)
    _bench_assign(ours, frames, device)
    for number in (200_000, 2_000_000):
        command = [sys.executable, __file__, "--memory-of", str(number), "--clusters", str(args.clusters), "--dim", str(args.dim)]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmark k-means.")
    parser.add_argument("--audio", type=Path, help="folder of .flac or .wav files, 16 kHz")
    parser.add_argument("--seconds", type=float, default=3000.0, help="of audio, or hundredths of so many random frames")
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--dim", type=int, default=39, help="of random frames")
    parser.add_argument("--batch-frames", type=int, default=10_000)
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--device", type=device_here, default="cpu", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--memory-of", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def _say(what: str, **numbers: float | str) -> None:
    rounded = {name: float(f"{number:.4g}") if isinstance(number, float) else number for name, number in numbers.items()}
    print(json.dumps({"bench": what, **rounded}), flush=True)


def _mixture(num_frames: int, dim: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(300, dim, generator=draw)
    return means[torch.randint(300, (num_frames,), generator=draw)] + 1.5 * torch.randn(num_frames, dim, generator=draw)


def _mfcc(folder: Path, seconds: float, device: torch.device) -> Tensor:
    audio: list[Tensor] = []
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".flac", ".wav"))
    for path in paths:
        if sum(map(len, audio)) < seconds * 16000:
            audio.append(torch.from_numpy(soundfile.read(path, dtype="float32")[0]))
    if not audio:
        raise SystemExit(f"{folder}: no .flac or .wav file")
    audio.sort(key=len)
    function, parts, started = MfccFeatures().to(device), [], time.perf_counter()
    for index in range(0, len(audio), 8):
        group = audio[index : index + 8]
        lens = torch.tensor([len(one) for one in group])
        frames, counts = function(torch.nn.utils.rnn.pad_sequence(group, batch_first=True).to(device), lens)
        parts += [frame[:count].cpu() for frame, count in zip(frames, counts.tolist(), strict=True)]
    length = sum(map(len, audio)) / 16000
    _say("mfcc", audio_seconds=length, x_real_time=length / (time.perf_counter() - started), device=str(device))
    return torch.cat(parts)


def _streamed(frames: Tensor, epoch: int) -> Iterator[Tensor]:
    order = torch.randperm(len(frames) // 1000 + 1, generator=torch.Generator().manual_seed(epoch))
    for index in order.tolist():
        yield frames[index * 1000 : (index + 1) * 1000]


def _bench_fit(frames: Tensor, args: argparse.Namespace, device: torch.device) -> KMeans:
    began, updates_began, last = time.perf_counter(), 0.0, Progress("", 0, 0)

    def tell(progress: Progress) -> None:
        nonlocal updates_began, last
        last = progress
        if progress.stage == "updates" and not progress.batches:
            updates_began = time.perf_counter()

    config = KMeansConfig(num_clusters=args.clusters, batch_frames=args.batch_frames, num_restarts=args.restarts)
    model = fit_kmeans(lambda epoch: _streamed(frames, epoch), config, device, progress=tell)
    now = time.perf_counter()
    _say(
        "fit",
        frames=len(frames),
        dim=frames.shape[1],
        clusters=args.clusters,
        batches=last.batches,
        seconds=now - began,
        frames_per_second_of_updates=last.frames / (now - updates_began),
        frames_per_second=last.frames / (now - began),
        inertia=model.inertia(frames),
        device=str(device),
        threads=torch.get_num_threads(),
    )
    return model


def _bench_sklearn(frames: Tensor, args: argparse.Namespace) -> KMeans:
    settings = {"max_no_improvement": 100, "n_init": args.restarts, "tol": 0.0, "reassignment_ratio": 0.0, "random_state": 0}
    began = time.perf_counter()
    other = MiniBatchKMeans(args.clusters, batch_size=args.batch_frames, compute_labels=False, **settings).fit(frames.numpy())
    seconds = time.perf_counter() - began
    model = KMeans(torch.from_numpy(other.cluster_centers_))
    seen = other.n_steps_ * args.batch_frames
    _say("sklearn", batches=other.n_steps_, seconds=seconds, frames_per_second=seen / seconds, inertia=model.inertia(frames))
    return model


def _bench_assign(model: KMeans, frames: Tensor, device: torch.device) -> None:
    frames = frames.to(device)
    model.assign(frames[:1000])
    began = time.perf_counter()
    labels = model.assign(frames).cpu()
    seconds = time.perf_counter() - began
    first = frames[:20_000].cpu().double()
    exact = torch.cdist(first, model.centroids.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    _say("assign", frames_per_second=len(frames) / seconds, differing=int((exact != labels[:20_000]).sum()), device=str(device))


def _fit_generated(num_frames: int, clusters: int, dim: int) -> None:
    def batches(epoch: int) -> Iterator[Tensor]:
        for number in range(num_frames // 5000):
            yield torch.randn(5000, dim, generator=torch.Generator().manual_seed(number))

    config = KMeansConfig(
        num_clusters=clusters, reservoir_frames=20_000, held_out_frames=5000, num_restarts=1, max_batches=num_frames // 10_000
    )
    before = _peak_mib()
    fit_kmeans(batches, config)
    _say("memory", frames=num_frames, frames_mib=num_frames * dim * 4 / (1 << 20), before_mib=before, peak_mib=_peak_mib())


def _peak_mib() -> float:
    """Of this program; not ru_maxrss, which on Linux starts from the peak of the process that started this one."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024


if __name__ == "__main__":
    main()
