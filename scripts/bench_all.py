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
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark import device_here, machine, summary, table

from k2ssl.atomic_file import atomic_file

SCRIPTS = Path(__file__).parent
_LARGE_GB = 14  # memory that a step of the largest peer takes with 10 s of audio, with room to spare
_BASE = ("zipformer_base", "hubert_base", "torchaudio_hubert_base")
_LARGE = ("zipformer_large", "hubert_large", "torchaudio_hubert_large")
_PEAK_TFLOPS = {"H200": "989", "H100": "989", "A100": "312"}  # of bfloat16 without sparsity, from the makers' data sheets
_WITHOUT_FUSION = ("hubert", "torchaudio")  # beginnings of names
_START_UPS = 5  # of each program, after one that is not counted
_QUICK = {  # what a benchmark is asked for to see that it runs
    "step": ("--steps", "1"),
    "inference": ("--steps", "1"),
    "fused step": ("--steps", "1"),
    "step without Triton": ("--steps", "1"),
    "growth": ("--quick",),
    "optimizer": ("--steps", "5"),
    "trainer and checkpoint": ("--seconds", "2", "--steps", "1", "--checkpoints", "1"),
    "transducer loss": ("--batch", "2", "--frames", "100", "--symbols", "20", "--vocab", "50", "--dim", "64"),
    "searches": ("--size", "tiny", "--seconds", "2", "--utterances", "4", "--alone", "2", "--encoder-utterances", "1"),
    "data loader": ("--many-cuts", "1000", "--workers", "0", "1"),
    "k-means": ("--seconds", "100", "--restarts", "2"),
}


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
    device, cuda = ("--device", options.device), options.device.startswith("cuda")
    memory_gb = (
        torch.cuda.get_device_properties(0).total_memory / 1e9 if cuda else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    )
    models = ["tiny"] if options.quick else [*_BASE, *(_LARGE if memory_gb > _LARGE_GB else ())]
    sizes = ("--seconds", "15", "--utterances", "40") if cuda else ()  # a micro-batch of 600 s, as published
    if options.quick:
        sizes = ("--seconds", "1", "--utterances", "2")
    audio = () if options.audio_dir is None else (str(options.audio_dir),)

    def step(model: str) -> tuple[str, ...]:
        if model in _LARGE and not cuda:  # with 4 x 10 s torchaudio's takes over 20 GB, and a minute for a step
            return ("bench_step", *device, "--utterances", "1", "--models", model)
        case = ("bench_step", *device, *sizes, "--frontends", "waveform", "logmel", "--models", model)
        if not cuda:
            return (*case, "--precisions", "float32", "bfloat16")
        name = torch.cuda.get_device_name(0)
        peak = next((tflops for part, tflops in _PEAK_TFLOPS.items() if part in name), None)
        return (*case, "--precisions", "bfloat16", "--kernels", "10", *(("--peak-tflops", peak) if peak else ()))

    commands = [("step", *step(model)) for model in models]
    commands += [("inference", *step(model), "--inference") for model in models]
    commands += [("fused step", *step(model), "--fuse") for model in models if not model.startswith(_WITHOUT_FUSION)]
    if cuda:
        commands += [("step without Triton", *step(model), "--no-triton") for model in models if not model.startswith(_WITHOUT_FUSION)]
    commands += [
        ("growth", "bench_growth", *device),
        ("optimizer", "bench_optimizer", *device),
        ("trainer and checkpoint", "bench_trainer", *device, "--size", "tiny" if options.quick else "zipformer_base"),
        ("transducer loss", "bench_transducer", *device),
        ("searches", "bench_search", *device),
    ]
    if cuda and not options.quick:
        commands.append(("memory", "bench_memory", *device, "--precision", "bfloat16"))
    if audio:
        commands.append(("data loader", "bench_data", "--audio-dir", *audio, "--copies", "2", "--many-cuts", "20000"))
    commands.append(("k-means", "bench_kmeans", *device, *(("--audio", *audio) if audio else ())))
    return [
        Benchmark(name, (str(SCRIPTS / f"{script}.py"), *arguments, *(_QUICK[name] if options.quick else ())))
        for name, script, *arguments in commands
    ]


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
        lines.append({"what": name, **summary(seconds[1:]), **machine(torch.device("cpu"))})
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
    """A table's row: texts, and names of what is true, tell the case, numbers are the figures; what is the same in all rows is left out."""
    common = {"benchmark", "command", "device", "torch", "torchaudio", "python", "threads", "runs", "batch"}
    numbers = {
        key: value for key, value in line.items() if isinstance(value, int | float) and not isinstance(value, bool) and key not in common
    }
    texts = [" ".join(value.split()) for key, value in line.items() if isinstance(value, str) and key not in common]
    texts += [key for key, value in line.items() if value is True]
    figures = ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())
    return {"benchmark": line["benchmark"], "case": " ".join(texts)[:200], "figures": figures}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_here, default="cpu", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--audio-dir", type=Path, help="folder of 16 kHz FLAC, for the loader and k-means")
    parser.add_argument("--quick", action="store_true", help="small models and batches, five minutes: does it run, not how fast")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="first words of the benchmarks to run")
    parser.add_argument("--output", type=Path, default=Path("bench.jsonl"), help="where the lines go (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep what --output holds, and run what it lacks")
    options = parser.parse_args()
    if options.audio_dir is not None and next(options.audio_dir.rglob("*.flac"), None) is None:
        parser.error(f"--audio-dir: no .flac file in {options.audio_dir}")
    fitting = [Benchmark("start-up", ()), *benchmarks(options)]
    for begin in options.only:
        if not any(benchmark.name.startswith(begin) for benchmark in fitting):
            names = ", ".join(dict.fromkeys(benchmark.name for benchmark in fitting))
            parser.error(f"--only: no benchmark that fits this machine is called {begin!r}; there are {names}")
    options.benchmarks = [benchmark for benchmark in fitting if not options.only or benchmark.name.startswith(tuple(options.only))]
    if options.output.exists() and not options.resume:
        parser.error(f"--output: {options.output} is there already; --resume keeps its lines and runs what it lacks, or name another file")
    try:
        options.lines = kept_lines(options.output) if options.output.exists() else []
        write_lines(options.output, options.lines)  # now, not after an hour, is the time to learn that it cannot be written
    except (OSError, ValueError) as error:
        parser.error(f"--output: {error}")
    return options


def main() -> int:
    options = _options()
    lines: list[dict[str, Any]] = options.lines
    for number, benchmark in enumerate(options.benchmarks, 1):
        there = any(benchmark.mark.items() <= line.items() for line in lines)
        what = "is there" if there else shlex.join(benchmark.command)
        print(f"{number} of {len(options.benchmarks)}, {benchmark.name}: {what}", file=sys.stderr)
        if not there:
            started = time.perf_counter()
            measured = run(benchmark) if benchmark.command else start_up(1 if options.quick else _START_UPS)
            lines += [{**benchmark.mark, **line} for line in measured]
            write_lines(options.output, lines)
            print(f"  {len(measured)} lines, {time.perf_counter() - started:.0f} s", file=sys.stderr)
    print(table([row(line) for line in lines], ["benchmark", "case", "figures"]))
    return 1 if any("error" in line for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
