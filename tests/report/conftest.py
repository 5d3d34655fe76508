"""A recipe's output folder written by hand: labels, a pre-training run, two fine-tuning runs, decodings and a score; every number is chosen."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

PNG = bytes.fromhex("89504e470d0a1a0a") + b"picture of labels"
REFERENCES = [("call the fire department", "call a fire apartment"), ("enter nine four eight", "enter nine for eight"), ("yes", "oh yes")]


class World:
    """The folder `out` in `base`, which is the working folder that the programs had."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.out = base / "out"
        self.cuts("train", hours=2.5, cuts=1000)
        self.labels()
        self.run("pretrain", "pretrain", seconds=(360.0, 720.0), steps=100, data={"labels": ["out/mfcc/labels/train"]})
        self.model("out/pretrained.pt", "out/pretrain")
        self.run("ssl", "finetune", seconds=(180.0,), steps=50, init="out/pretrained.pt")
        self.run("scratch", "finetune", seconds=(360.0,), steps=50)
        self.decoding("ssl-greedy", "ssl", ["a b c d", "e f g h", "i"], ["a b c d", "e f g x", "i"])
        self.decoding("scratch-greedy", "scratch", ["a b c d", "e f g h", "i"], ["a x c d", "e f x h", "i y"])

    def write(self, path: str, content: Any) -> Path:
        file = self.base / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content), encoding="utf-8")
        return file

    def cuts(self, name: str, **summary: Any) -> Path:
        path = self.base / f"out/cuts/cuts_{name}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(name.encode(), mtime=0))
        self.write(f"out/cuts/summary_{name}.json", {"summary": summary})
        return path

    def ledger(self, folder: str, *entries: Mapping[str, Any]) -> None:
        lines = []
        for number, entry in enumerate(entries):
            plain = {"session": f"{folder}{number}", "status": "done", "device": "Chip", "num_devices": 1, "wall_seconds": 0.0}
            plain |= {
                "gpu_seconds": 0.0,
                "cpu_seconds": 0.0,
                "audio_seconds": 0.0,
                "steps": 0,
                "peak_gpu_bytes": 0,
                "peak_host_bytes": 2**30,
            }
            lines.append(json.dumps({**plain, **entry}))
        path = self.base / folder / "ledger.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def labels(self) -> None:
        lineage = {"features": "mfcc", "kmeans_sha256": "k" * 64, "checkpoint_sha256": None, "cuts_sha256": "3:abc"}
        self.write("out/mfcc/labels/train/contract.json", {"num_classes": 100, "lineage": lineage})
        self.write(
            "out/mfcc/labels/train/settings.json",
            {"kmeans": "out/mfcc/kmeans.pt", "checkpoint": None, "output": "out/mfcc/labels/train"},
        )
        (self.out / "mfcc/labels/train/quality.png").write_bytes(PNG)
        self.ledger("out/mfcc/labels/train", {"program": "label", "cpu_seconds": 36.0, "wall_seconds": 36.0})
        self.ledger(
            "out/mfcc", {"program": "fit_kmeans", "cpu_seconds": 72.0, "wall_seconds": 72.0}, {"program": "align", "cpu_seconds": 9999.0}
        )

    def run(
        self, name: str, program: str, *, seconds: tuple[float, ...], steps: int, init: str = "", gpu: bool = False, data: Any = None
    ) -> Path:
        folder = self.out / name
        settings = {
            "output": f"out/{name}",
            "init": init,
            "init_weights": "raw",
            "data": {"cuts": ["out/cuts/cuts_train.jsonl.gz"], **(data or {})},
        }
        self.write(f"out/{name}/settings.json", settings)
        unit = "gpu_seconds" if gpu else "cpu_seconds"
        entries = [{"program": program, unit: used, "wall_seconds": used, "audio_seconds": 10 * used, "steps": steps} for used in seconds]
        self.ledger(f"out/{name}", *entries)
        records: list[dict[str, Any]] = []
        for step in (steps // 2, steps):
            falling = 3.0 - step / steps
            records.append({"kind": "train", "step": step, "loss": falling + 1, "loss_masked": falling, "accuracy_masked": 0.4})
        records.append({"kind": "valid", "step": steps, "loss": 3.5, "loss_masked": 2.5, "wer": 0.3, "accuracy_masked": 0.5})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        self.model(f"out/{name}/checkpoints/step-{steps:09d}.pt", f"out/{name}")
        return folder

    def model(self, path: str, output: str) -> Path:
        file = self.base / path
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"job": {"output": output}, "model": {"weight": torch.zeros(3)}, "made": path}, file)
        return file

    def decoding(self, name: str, run: str, refs: list[str], hyps: list[str], **changes: Any) -> Path:
        """A decoding of the last checkpoint of `run`; `changes` are of "what", "settings" or the whole record."""
        from k2ssl.decode.results import Result, to_line
        from k2ssl.decode.wer import error_report

        checkpoint = changes.pop("checkpoint", f"out/{run}/checkpoints/step-000000050.pt")
        file = self.base / checkpoint
        found = error_report(list(zip(refs, hyps, strict=True)))
        counts = {name: getattr(found.counts, name) for name in ("errors", "substitutions", "insertions", "deletions", "reference")}
        settings = {"cuts": ["out/cuts/cuts_test.jsonl.gz"], "output": f"out/decode/{name}", "checkpoints": [checkpoint], "after": None}
        what = {"method": "greedy", "search": {"max_symbols_per_frame": 1, "blank_penalty": 0.0}, "files": {}, "weights": "raw weights"}
        what |= {"checkpoints": [hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "gone"], "cuts": f"3:{'c' * 64}"}
        result = {"utterances": len(refs), "audio_seconds": 6.0, "wer": found.rate, "words": counts}
        result |= {"real_time_factor": 0.5, "ranks": 1, "device": "cpu"}
        record = {
            "k2ssl": "0.1.0",
            "what": {**what, **changes.pop("what", {})},
            "settings": {**settings, "search": {"lm": None}, **changes.pop("settings", {})},
            "result": result,
            **changes,
        }
        folder = self.out / "decode" / name
        self.write(f"out/decode/{name}/decode.json", record)
        lines = [to_line(Result(f"u{i}", hyp, -1.0, 2.0, ref)) for i, (ref, hyp) in enumerate(zip(refs, hyps, strict=True))]
        (folder / "hypotheses.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return folder


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "k2ssl.bin.finetune", "--output", "out/ssl"])
    return World(tmp_path)
