"""Run every benchmark that fits this machine, one after the other, and print one table.

    OMP_NUM_THREADS=2 PYTHONPATH=. python scripts/bench_all.py [--quick] [--device cpu] [--audio-dir FOLDER] [--only step optimizer]

The JSON lines go to --output as they come, each with the name of its benchmark and its command. A run that was interrupted goes on with
--resume: benchmarks whose lines are there, of the same command, are not run again. Benchmarks that need recorded audio are left out
without --audio-dir, the step of the large models where memory does not suffice. --quick asks each for little, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark import machine, summary, table

from k2ssl.atomic_file import atomic_file

SCRIPTS = Path(__file__).parent
_LARGE_GB = 20  # memory that a step of the largest peer takes, with room to spare
_QUICK_LOSS = ("--batch", "2", "--frames", "100", "--symbols", "20", "--vocab", "50", "--dim", "64")


@dataclass(frozen=True)
class Benchmark:
    """A name and the command line after `python`; what it prints holds JSON objects."""

    name: str
    command: tuple[str, ...]

    @property
    def mark(self) -> dict[str, str]:
        """What each of its lines begins with."""
        return {"benchmark": self.name, "command": shlex.join(self.command)}


def benchmarks(options: argparse.Namespace) -> list[Benchmark]:
    """Those that this machine can run."""
    device, quick = ("--device", options.device), options.quick
    cuda = options.device.startswith("cuda")
    memory_gb = (
        torch.cuda.get_device_properties(0).total_memory / 1e9 if cuda else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    )
    models = ["tiny"] if quick else ["zipformer_base", "hubert_base", "torchaudio_hubert_base"]
    if memory_gb > _LARGE_GB and not quick:
        models += ["zipformer_large", "hubert_large", "torchaudio_hubert_large"]
    sizes = ("--seconds", "15", "--utterances", "40") if cuda else ()  # a micro-batch of 600 s, as published
    seconds = ("--seconds", "1", "--utterances", "2") if quick else sizes
    cases = (*device, *seconds, "--frontends", "waveform", "logmel", "--precisions", *(("bfloat16",) if cuda else ("float32", "bfloat16")))
    step = (_script("bench_step"), *cases, "--models", *models)
    zipformers = [model for model in models if not model.startswith(("hubert", "torchaudio"))]
    found = [
        Benchmark("step", step),
        Benchmark("inference", (*step, "--inference")),
        Benchmark("fused step", (_script("bench_step"), *cases, "--models", *zipformers, "--fuse")),
        Benchmark("growth", (_script("bench_growth"), *device, *(("--quick",) if quick else ()))),
        Benchmark("optimizer", (_script("bench_optimizer"), *device, *(("--steps", "5") if quick else ()))),
        Benchmark("trainer and checkpoint", (_script("bench_trainer"), *device, "--size", "tiny" if quick else "zipformer_base")),
        Benchmark("transducer loss", (_script("bench_transducer"), *device, *(_QUICK_LOSS if quick else ()))),
        Benchmark("searches", (_script("bench_search"), *device, *(("--size", "tiny", "--utterances", "10") if quick else ()))),
    ]
    if cuda and not quick:
        found.append(Benchmark("memory", (_script("bench_memory"), *device, "--precision", "bfloat16")))
    if options.audio_dir is not None:
        folder, cuts = str(options.audio_dir), "1000" if quick else "20000"
        found.append(Benchmark("data loader", (_script("bench_data"), "--audio-dir", folder, "--copies", "2", "--many-cuts", cuts)))
        found.append(Benchmark("k-means", (_script("bench_kmeans"), "--audio", folder, "--seconds", "300" if quick else "3000", *device)))
    else:
        found.append(Benchmark("k-means", (_script("bench_kmeans"), "--seconds", "300" if quick else "3000", *device)))
    return found


def start_up(runs: int) -> list[dict[str, Any]]:
    """Seconds until `--help` of each program is printed, and what of that importing torch takes."""
    files = sorted((SCRIPTS.parent / "k2ssl" / "bin").glob("*.py"))
    programs = [file.stem for file in files if "\ndef main(" in file.read_text(encoding="utf-8")]
    commands = {f"{name} --help": ("-m", f"k2ssl.bin.{name}", "--help") for name in programs} | {"import torch": ("-c", "import torch")}
    lines = []
    for name, command in commands.items():
        seconds = []
        for _ in range(runs + 1):
            started = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - started)
        lines.append({"what": name, "seconds": statistics.median(seconds[1:]), **summary(seconds[1:]), **machine(torch.device("cpu"))})
    return lines


def run(benchmark: Benchmark) -> list[dict[str, Any]]:
    """The JSON objects that it prints; one with "error" if it fails."""
    done = subprocess.run([sys.executable, *benchmark.command], capture_output=True, text=True)
    lines = json_objects(done.stdout)
    if done.returncode:
        lines.append({"error": f"exit status {done.returncode}: {done.stderr.strip()[-300:]}"})
    return lines


def json_objects(text: str) -> list[dict[str, Any]]:
    """All JSON objects in `text`, on one line each or on several; other text is passed over."""
    decoder, found, position = json.JSONDecoder(), [], text.find("{")
    while position >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
            found.append(value)
        except json.JSONDecodeError:
            end = position + 1
        position = text.find("{", end)
    return found


def kept_lines(file: Path) -> list[dict[str, Any]]:
    """Those of an earlier run, without the benchmarks of which a measurement failed.

    Raises:
        ValueError: something else is in the file.
    """
    lines = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not {"benchmark", "command"} <= line.keys():
            raise ValueError(f"{file}, line {number}: {text[:80]!r} is not a line of this program")
        lines.append(line)
    failed = {(line["benchmark"], line["command"]) for line in lines if "error" in line}
    return [line for line in lines if (line["benchmark"], line["command"]) not in failed]


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    with atomic_file(file) as output:
        output.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def row(line: dict[str, Any]) -> dict[str, Any]:
    """A table's row: texts name the case, numbers are the figures; what is the same in all rows is left out."""
    common = {"benchmark", "command", "device", "torch", "torchaudio", "python", "threads", "runs", "batch"}
    numbers = {
        key: value for key, value in line.items() if isinstance(value, int | float) and not isinstance(value, bool) and key not in common
    }
    texts = [str(value) for key, value in line.items() if key not in numbers and key not in common]
    figures = ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())
    return {"benchmark": line["benchmark"], "case": " ".join(texts)[:200], "figures": figures}


def _script(name: str) -> str:
    return str(SCRIPTS / f"{name}.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--audio-dir", type=Path, help="folder of 16 kHz FLAC, for the loader and k-means")
    parser.add_argument("--quick", action="store_true", help="small models and batches: does it run, not how fast")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="first words of the benchmarks to run")
    parser.add_argument("--output", type=Path, default=Path("bench.jsonl"), help="where the lines go (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep what --output holds, and run what it lacks")
    options = parser.parse_args()
    if options.output.exists() and not options.resume:
        parser.error(f"--output: {options.output} is there already; --resume keeps its lines and runs what it lacks, or name another file")
    try:
        lines = kept_lines(options.output) if options.output.exists() else []
        write_lines(options.output, lines)  # now, not after an hour, is the time to learn that it cannot be written
    except (OSError, ValueError) as error:
        parser.error(f"--output: {error}")
    chosen = [
        benchmark
        for benchmark in (Benchmark("start-up", ()), *benchmarks(options))
        if not options.only or any(benchmark.name.startswith(name) for name in options.only)
    ]
    for number, benchmark in enumerate(chosen, 1):
        there = any(benchmark.mark.items() <= line.items() for line in lines)
        print(f"{number} of {len(chosen)}, {benchmark.name}: {'is there' if there else shlex.join(benchmark.command)}", file=sys.stderr)
        if not there:
            lines += [{**benchmark.mark, **line} for line in (run(benchmark) if benchmark.command else start_up(5))]
            write_lines(options.output, lines)
    print(table([row(line) for line in lines], ["benchmark", "case", "figures"]))
    return 1 if any("error" in line for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
