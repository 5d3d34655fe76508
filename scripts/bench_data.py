"""Time the pre-training loader alone on real audio, and say where the time goes; one JSON line per measurement.

A manifest is made of all FLAC files below --audio-dir, each listed --copies times, with random labels at 50 Hz. Speeds are in seconds of
audio delivered per second (`x_real_time`), and as hours per second. `wall` is by the clock, which other processes on the machine slow down;
`cpu` is by processor time of the process that does the work (for `loader` with workers: of all workers together, so that it is per worker).

    OMP_NUM_THREADS=1 python scripts/bench_data.py --audio-dir FOLDER [--copies 8] [--max-duration 600] [--normalize]
"""

from __future__ import annotations

import argparse
import itertools
import json
import pickle
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import soundfile
import torch
from lhotse import CutSet, Recording
from lhotse.cut import Cut
from torch.utils.data import DataLoader, Dataset

from k2ssl.batch import PretrainBatch
from k2ssl.data.audio import num_samples, read_samples
from k2ssl.data.audio_dataset import Loaded, Request
from k2ssl.data.batch_loader import BatchLoader
from k2ssl.data.labels import LabelShardWriter, LabelStore, Lineage, merge_shards
from k2ssl.data.loader import pretrain_loader

RATE = 16000


def make_corpus(audio_dir: Path, copies: int, folder: Path) -> tuple[CutSet, LabelStore]:
    """A lazy manifest and its label store, in `folder`. Reads every file once, so that later reads come from memory, not from the disk."""
    cuts = [Recording.from_file(path).to_cut() for path in sorted(audio_dir.rglob("*.flac")) if path.read_bytes()]
    if not cuts:
        raise SystemExit(f"--audio-dir: no .flac below {audio_dir}")
    draw = np.random.default_rng(0)
    all_cuts = [cut.with_id(f"{cut.id}-{copy}") for copy in range(copies) for cut in cuts]
    CutSet.from_cuts(all_cuts).to_file(folder / "cuts.jsonl.gz")
    with LabelShardWriter(folder / "labels", 0, 1, 500, 50.0, Lineage.unknown(), sampling_rate=RATE) as writer:
        for cut in all_cuts:
            writer.write(cut.id, draw.integers(0, 500, (num_samples(cut, RATE) - 80) // 320))
    return CutSet.from_jsonl_lazy(folder / "cuts.jsonl.gz"), merge_shards(folder / "labels")


def measure_restore(cuts: CutSet, num_cuts: int, max_duration: float) -> None:
    """What a rank pays for a manifest of many cuts: per cut of all ranks while it trains, and at once when it resumes at its end."""
    known = list(cuts)
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "many.jsonl.gz"
        with CutSet.open_writer(path) as writer:
            for number, choice in enumerate(draw.integers(0, len(known), num_cuts)):
                writer.write(known[choice].with_id(f"{number}"))
        store: Any = NoLabels()
        loader = pretrain_loader(CutSet.from_jsonl_lazy(path), [store], max_duration=max_duration, world_size=8)
        begin, cpu = time.perf_counter(), time.process_time()
        batches = sum(1 for _ in loader.requests())
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    report("restore at the end of an epoch", cuts=num_cuts, batches=8 * batches, wall_s=wall, cpu_s=cpu, us_per_cut=1e6 * cpu / num_cuts)


class NoLabels:
    """As much of a label store as is needed to read the manifest only."""

    contract = SimpleNamespace(frame_rate=50.0)
    identity = "none"

    def __contains__(self, cut_id: object) -> bool:
        return True

    def labels(self, cut_id: str) -> np.ndarray:
        raise AssertionError(f"nobody asks for the labels of {cut_id}")


def timed(action: Callable[[], Any], repeats: int = 3) -> dict[str, float]:
    """Median seconds by the clock and by this process' processor time."""
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        action()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {"wall_s": statistics.median(walls), "cpu_s": statistics.median(cpus)}


def crops_of(loader: BatchLoader[PretrainBatch], requests: list[Request]) -> list[tuple[Cut, int, int]]:
    """(cut, first sample, samples) of everything that `requests` read."""
    dataset: Any = loader.dataset
    crops = []
    for request in requests:
        batch = dataset[request].batch
        for cut in request.cuts:
            usable = dataset.usable_samples(cut, [len(store.labels(cut.id)) for store in dataset.stores])
            length = batch.audio.shape[1]
            crops.append((cut, dataset.crop_start(cut, usable, length, request.epoch), length))
    return crops


def decode_with_soundfile(crops: list[tuple[Cut, int, int]], out: np.ndarray) -> None:
    for cut, start, samples in crops:
        with soundfile.SoundFile(cut.recording.sources[0].source) as file:
            file.seek(start)
            file.read(dtype="float32", out=out[:samples])


def open_and_seek(crops: list[tuple[Cut, int, int]]) -> None:
    for cut, start, _ in crops:
        with soundfile.SoundFile(cut.recording.sources[0].source) as file:
            file.seek(start)


def decode_with_lhotse(crops: list[tuple[Cut, int, int]]) -> None:
    for cut, start, samples in crops:
        cut.truncate(offset=start / RATE, duration=samples / RATE).load_audio()


def read_crops(crops: list[tuple[Cut, int, int]], out: np.ndarray) -> None:
    for cut, start, samples in crops:
        read_samples(cut, start, out[:samples])


def run_all(dataset: Any, requests: list[Request]) -> None:
    """Every batch, none of them kept: memory is used again, as it is in a worker."""
    for request in requests:
        dataset[request]


class Ready(Dataset[Loaded[PretrainBatch]]):
    """Batches of the right shapes without reading anything: what remains is the way between the processes."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        self.batches = {
            shape: PretrainBatch(torch.zeros(shape), (torch.zeros(shape[0], shape[1] // 320, dtype=torch.int64),)) for shape in shapes
        }

    def __getitem__(self, item: tuple[tuple[int, int], Request]) -> Loaded[PretrainBatch]:
        return Loaded(self.batches[item[0]])


def through_a_worker(requests: list[Request], shapes: list[tuple[int, int]]) -> dict[str, float]:
    """Batches that cost nothing to make: seconds by the clock from the first on, and of a worker's processor time."""
    items = list(zip(shapes, requests, strict=True))
    used = children_cpu()
    start = time.perf_counter()
    for number, _ in enumerate(DataLoader(Ready(shapes), batch_size=None, sampler=items, num_workers=1)):  # type: ignore[arg-type]
        if number == 0:
            start = time.perf_counter()
    return {"wall_s": (time.perf_counter() - start) * len(items) / (len(items) - 1), "cpu_s": children_cpu() - used}


def children_cpu() -> float:
    """Seconds of processor time of all worker processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_loader(loader: BatchLoader[PretrainBatch]) -> dict[str, float]:
    """One epoch: seconds until the first batch, and speed from then on."""
    used = children_cpu()
    begin, own = time.perf_counter(), time.process_time()
    audio = 0.0
    after_first = begin
    for number, batch in enumerate(loader):
        if number == 0:
            after_first = time.perf_counter()
            first = batch.audio.numel() / RATE
        audio += batch.audio.numel() / RATE
    wall = time.perf_counter() - after_first
    cpu = children_cpu() - used if loader.num_workers else time.process_time() - own
    return {
        "first_batch_s": after_first - begin,
        "main_process_cpu_s": time.process_time() - own,
        "wall_x_real_time": (audio - first) / wall,
        "wall_x_real_time_per_worker": (audio - first) / wall / max(1, loader.num_workers),
        "cpu_x_real_time_per_worker": audio / cpu,
        "hours_per_second_per_worker": audio / cpu / 3600,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the pre-training loader and its parts.")
    parser.add_argument("--audio-dir", type=Path, required=True, help="folder of 16 kHz mono FLAC, searched below too")
    parser.add_argument("--copies", type=int, default=8, help="how often every file is listed")
    parser.add_argument("--max-duration", type=float, default=600.0, help="seconds of audio in a batch")
    parser.add_argument("--normalize", action="store_true", help="normalise whole utterances, which then are read whole")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--many-cuts", type=int, default=100_000, help="size of the manifest that restoring is timed on; 0 leaves it out")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        cuts, store = make_corpus(args.audio_dir, args.copies, Path(folder))

        def loader(**options: Any) -> BatchLoader[PretrainBatch]:
            return pretrain_loader(cuts, [store], max_duration=args.max_duration, normalize=args.normalize, **options)

        measure_parts(cuts, loader)
        if args.many_cuts:
            measure_restore(cuts, args.many_cuts, args.max_duration)
        for workers in args.workers:
            result = run_loader(loader(num_workers=workers))
            report("loader", workers=workers, normalize=args.normalize, **result)


def measure_parts(cuts: CutSet, loader: Callable[..., BatchLoader[PretrainBatch]]) -> None:
    """What one batch costs, stage by stage."""
    one = loader()
    requests = list(one.requests())
    num_cuts = sum(len(request.cuts) for request in requests)
    dataset: Any = one.dataset
    shapes = [(len(request.cuts), dataset[request].batch.audio.shape[1]) for request in requests]
    crops = crops_of(one, requests)
    audio = sum(samples for _, _, samples in crops) / RATE
    out = np.empty(one.dataset.max_samples, np.float32)  # type: ignore[attr-defined]

    def part(name: str, seconds: dict[str, float], **extra: Any) -> None:
        speeds = {f"{kind[:-2]}_x_real_time": audio / value for kind, value in seconds.items()}
        report(name, us_per_cut=1e6 * seconds.get("cpu_s", seconds["wall_s"]) / num_cuts, **seconds, **speeds, **extra)

    part("soundfile: open and seek", timed(lambda: open_and_seek(crops)))
    part("soundfile: open, seek, decode the crops", timed(lambda: decode_with_soundfile(crops, out)))
    part("read_samples: the same crops", timed(lambda: read_crops(crops, out)))
    part("lhotse: the same crops", timed(lambda: decode_with_lhotse(crops)))
    part("dataset: crops, labels, collation", timed(lambda: run_all(dataset, requests)))
    part("manifest: parsing", timed(lambda: sum(1 for _ in cuts)), where="main process")
    part("sampler: parsing, bucketing", timed(lambda: list(one.requests())), where="main process, once per rank for all ranks' cuts")
    part("requests: pickling there and back", timed(lambda: [pickle.loads(pickle.dumps(request)) for request in requests]))
    part(
        "batches: through a worker's shared memory", through_a_worker(requests, shapes), mebibytes=sum(4 * n * s for n, s in shapes) / 2**20
    )
    state = one.state_dict()
    for _ in itertools.islice(one, 1):
        state = one.state_dict()
    report("setting", cuts=num_cuts, audio_s=audio, batches=len(requests), crop_s=audio / num_cuts, state=sorted(state))


def report(name: str, **values: Any) -> None:
    rounded = {key: round(value, 5 if value < 1 else 1) if isinstance(value, float) else value for key, value in values.items()}
    print(json.dumps({"what": name, **rounded}), flush=True)


if __name__ == "__main__":
    main()
