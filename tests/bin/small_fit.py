"""Sixteen sounds, and centres that are fitted to them in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from k2ssl.bin import fit_kmeans
from k2ssl.data.prepare_cuts import prepare_folder
from k2ssl.labelling import assign

RATE = 16000
READ = ["--loader.num-workers", "0", "--loader.max-duration", "1", "--device", "cpu", "--quiet", "True"]
SMALL = ["--kmeans.num-clusters", "4", "--kmeans.batch-frames", "200", "--kmeans.max-batches", "10", "--kmeans.num-restarts", "2", *READ]


def sixteen_sounds(folder: Path) -> Path:
    """A manifest of sounds of half a second, which lie in `folder` as well."""
    draw, audio = np.random.default_rng(0), folder / "audio"
    audio.mkdir()
    for i in range(16):
        soundfile.write(audio / f"u{i:02d}.wav", 0.1 * draw.standard_normal(RATE // 2), RATE)
    prepare_folder(audio, folder, split="all", progress=False)
    return folder / "cuts_all.jsonl.gz"


def ids_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Receives the ids of the cuts whose features are computed from now on."""
    ids: list[str] = []
    real = assign._frames

    def frames(batch, *rest):  # type: ignore[no-untyped-def]
        ids.extend(batch.ids)
        return real(batch, *rest)

    monkeypatch.setattr(assign, "_frames", frames)
    return ids


def fit(cuts: Path, output: Path, *options: str) -> int:
    """The exit status."""
    return fit_kmeans.main(["--cuts", str(cuts), "--output", str(output), *SMALL, *options])
