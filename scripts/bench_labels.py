"""Measure a label store of the size of a large corpus on its index; one JSON line per measurement.

    python scripts/bench_labels.py [--cuts 22000000] [--labels 10800000000] [--shards 64] [--folder DIR] [--keep]

The index is real: an id and a count for every cut, the shards' records, the sorted table, the contract. The packed labels are files with a
hole of the right size, which read as zeros, so that the disk is not filled; look-ups and reads of labels work as they would on real ones,
except that a hole is read without touching the disk. `cold` numbers come right after the system was asked to forget the files.
Memory is that of a fresh process: resident set (VmHWM), of which `anonymous` is not shared with the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from lhotse import MonoCut, Recording

from k2ssl.data.label_format import (
    LabelSetup,
    ShardInfo,
    ShardRecord,
    describe_file,
    fingerprint,
    packed_dtype,
    shard_stem,
    write_record,
)
from k2ssl.data.label_index import MOST_LABELS_OF_A_CUT, LabelIndex
from k2ssl.data.labels import LabelShardWriter, LabelStore, Lineage, merge_shards

NUM_CLASSES = 500


def report(**values: object) -> None:
    """One line of JSON."""
    print(json.dumps(values), flush=True)


def cut_id(i: int) -> str:
    """An id of the length that segments of long recordings have."""
    return f"large/{i // 2000:05d}/reading_{i // 50:07d}_64kb-{i:08d}"


def make_shards(folder: Path, num_cuts: int, num_labels: int, num_shards: int) -> None:
    """Shards as their writers leave them, with holes for labels."""
    lineage = Lineage("layer 9", {"sample_rate": 16_000}, "0" * 64, "0" * 64, f"{num_cuts}:{0:064x}", {})
    setup = LabelSetup(NUM_CLASSES, 50.0, 16_000, num_shards, lineage)
    bounds = np.linspace(0, num_cuts, num_shards + 1).astype(int)
    mean = num_labels // num_cuts
    for shard in range(num_shards):
        start, stop = int(bounds[shard]), int(bounds[shard + 1])
        counts = mean // 2 + np.random.default_rng(shard).integers(mean, size=stop - start)
        stem, total = shard_stem(shard, num_shards), int(counts.sum())
        partial = folder / f"{stem}.ids.partial"
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(f"{count}\t{cut_id(i)}\n" for i, count in zip(range(start, stop), counts.tolist(), strict=True))
        partial.replace(folder / f"{stem}.ids")
        hole = folder / f"{stem}.bin"
        with hole.open("wb") as file:
            file.truncate(total * packed_dtype(setup.dtype).itemsize)
        histogram = (total, *(0,) * (NUM_CLASSES - 1))
        labels = describe_file(hole, sha256=fingerprint(hole))  # hashing gigabytes of zeros would measure nothing
        info = ShardInfo(shard, stop - start, total, histogram, labels, describe_file(folder / f"{stem}.ids"))
        write_record(folder / f"{stem}.json", ShardRecord(setup, info))


def in_fresh_process(task: str, folder: Path, num_cuts: int) -> None:
    """Run one of TASKS in a process of its own, which prints its measurement."""
    subprocess.run([sys.executable, __file__, "--task", task, "--folder", str(folder), "--cuts", str(num_cuts)], check=True)


def memory() -> dict[str, int]:
    """Megabytes of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(fields[key].split()[0]) // 1024 for name, key in (("peak", "VmHWM"), ("now", "VmRSS"), ("anonymous", "RssAnon"))}


def forget(folder: Path) -> None:
    """Ask the system to drop the files of a folder from its page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def milliseconds(calls: Iterator[Callable[[], object]]) -> dict[str, float]:
    """Time single calls."""
    times = []
    for call in calls:
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    times.sort()
    quantiles = {
        "mean": statistics.fmean(times),
        "median": statistics.median(times),
        "p99": times[int(0.99 * len(times))],
        "max": times[-1],
    }
    share = sum(value > 1.0 for value in times) / len(times)
    return {name: round(value, 4) for name, value in quantiles.items()} | {"share_over_1_ms": round(share, 5), "calls": len(times)}


def merge(folder: Path, num_cuts: int) -> None:
    """Sort the index of all shards; the one step of labelling that a single process does."""
    begin = time.perf_counter()
    merge_shards(folder)
    report(what="merge_shards", cuts=num_cuts, seconds=round(time.perf_counter() - begin, 1), megabytes=memory())


def cold(folder: Path, num_cuts: int) -> None:
    """Open and read with nothing in the page cache."""
    forget(folder)
    before = memory()
    begin = time.perf_counter()
    store = LabelStore.open(folder)
    seconds = time.perf_counter() - begin
    report(what="open cold", cuts=len(store), seconds=round(seconds, 3), asked=5, megabytes_before=before, megabytes_after=memory())
    ids = [cut_id(int(i)) for i in np.random.default_rng(0).integers(num_cuts, size=2000)]
    report(what="random read of one cut, cold", milliseconds=milliseconds(_reads(store, ids)), asked=1, megabytes=memory())


def warm(folder: Path, num_cuts: int) -> None:
    """Read half a million cuts at random, as a loader does; what stays in memory afterwards."""
    begin = time.perf_counter()
    store = LabelStore.open(folder)
    report(what="open warm", seconds=round(time.perf_counter() - begin, 3), asked=5)
    ids = [cut_id(int(i)) for i in np.random.default_rng(1).integers(num_cuts, size=500_000)]
    report(
        what="random read of one cut, warm",
        milliseconds=milliseconds(_reads(store, ids)),
        asked=1,
        megabytes=memory(),
        asked_megabytes=1000,
    )
    report(what="look-up alone, warm", milliseconds=milliseconds((lambda i=i: store.lookup(i)) for i in ids[:100_000]))


def mapped(folder: Path, num_cuts: int) -> None:
    """The same reads through memory maps of the labels, for comparison: pages touched through a map count as memory of the process."""
    store = LabelStore.open(folder)
    maps = [np.memmap(folder / shard.labels.name, packed_dtype(store.contract.dtype), mode="r") for shard in store.contract.shards]

    def read(wanted: str) -> int:
        shard, offset, count = store.lookup(wanted)
        return int(maps[shard][offset : offset + count].sum())

    ids = (cut_id(int(i)) for i in np.random.default_rng(1).integers(num_cuts, size=500_000))
    report(
        what="random read through maps, for comparison", milliseconds=milliseconds((lambda i=i: read(i)) for i in ids), megabytes=memory()
    )


def cropped(folder: Path, num_cuts: int) -> None:
    """What lhotse adds: attach labels to cuts, crop them, load the crops."""
    store = LabelStore.open(folder)
    cuts = []
    for i in np.random.default_rng(2).integers(num_cuts, size=20_000):
        seconds = store.num_labels(cut_id(int(i))) * 0.02
        recording = Recording(cut_id(int(i)), [], 16_000, round(seconds * 16_000), seconds)
        cuts.append(MonoCut(recording.id, start=0.0, duration=seconds, channel=0, recording=recording))
    report(what="attach labels to a cut", milliseconds=milliseconds((lambda c=cut: store.attach(c)) for cut in cuts))
    crops = [store.attach(cut).truncate(offset=0.5, duration=cut.duration / 2) for cut in cuts]
    report(what="load the labels of a crop", milliseconds=milliseconds((lambda c=crop: c.load_labels()) for crop in crops))


def written(folder: Path, num_cuts: int) -> None:
    """How fast one process writes; 100,000 cuts of 500 labels, beside the store."""
    labels = np.random.default_rng(3).integers(NUM_CLASSES, size=500)
    begin = time.perf_counter()
    with LabelShardWriter(folder / "written", 0, 1, NUM_CLASSES, 50.0, Lineage.unknown(), sampling_rate=16_000) as writer:
        for i in range(100_000):
            writer.write(cut_id(i), labels)
    seconds = time.perf_counter() - begin
    shutil.rmtree(folder / "written")
    report(what="write", cuts_per_second=round(1e5 / seconds), times_real_time=round(1e6 / seconds))


def whole_index(folder: Path, num_cuts: int) -> None:
    """The worst case for memory: every page of the index has been touched."""
    store = LabelStore.open(folder)
    places = LabelIndex(folder, store.contract.index).rows["place"]
    pieces = (places[start : start + 100_000] & np.uint64(MOST_LABELS_OF_A_CUT) for start in range(0, num_cuts, 100_000))
    assert sum(int(piece.sum()) for piece in pieces) == store.contract.num_labels
    report(what="every page of the index touched", megabytes=memory(), asked_megabytes=1000)


def _reads(store: LabelStore, ids: list[str]) -> Iterator[Callable[[], object]]:
    return ((lambda i=i: store.labels(i)) for i in ids)


TASKS: dict[str, Callable[[Path, int], None]] = {
    "merge": merge,
    "cold": cold,
    "warm": warm,
    "mapped": mapped,
    "cropped": cropped,
    "written": written,
    "whole_index": whole_index,
}


def sizes(folder: Path) -> None:
    """Bytes as a full store would have them, and those really written here."""
    suffixes = {"labels": ".bin", "ids": ".ids", "index": ".npy", "records": ".json"}
    apparent = {name: sum(path.stat().st_size for path in folder.glob(f"*{suffix}")) for name, suffix in suffixes.items()}
    written = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    gigabytes = {name: round(size / 1e9, 3) for name, size in apparent.items()}
    total = round(sum(apparent.values()) / 1e9, 2)
    report(what="size", gigabytes=gigabytes, total=total, asked=25, written_here=round(written / 1e9, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=22_000_000)
    parser.add_argument("--labels", type=int, default=10_800_000_000)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where the store is made; a temporary folder by default")
    parser.add_argument("--keep", action="store_true", help="leave the store there")
    parser.add_argument("--task", choices=TASKS, help="only measure, on a store that is there")
    arguments = parser.parse_args()
    if arguments.task:
        TASKS[arguments.task](arguments.folder, arguments.cuts)
        return
    folder = Path(tempfile.mkdtemp(prefix="labels-", dir=arguments.folder))
    try:
        begin = time.perf_counter()
        make_shards(folder, arguments.cuts, arguments.labels, arguments.shards)
        report(what="synthetic shards", cuts=arguments.cuts, seconds=round(time.perf_counter() - begin, 1))
        in_fresh_process("merge", folder, arguments.cuts)
        sizes(folder)
        for task in list(TASKS)[1:]:
            in_fresh_process(task, folder, arguments.cuts)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
