"""fit_kmeans on what earlier runs left: progress of this run is gone on with, that of another is refused or, if asked for, removed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from k2ssl.bin import fit_kmeans
from k2ssl.bin.cluster_cuts import SkippedCuts
from k2ssl.data.cuts import read_cuts, write_cuts
from k2ssl.labelling import assign, kmeans
from k2ssl.labelling.corpus_parts import part_of
from k2ssl.labelling.kmeans_model import KMeans
from k2ssl.train.ledger import total
from tests.bin.small_fit import SMALL, fit, ids_read, sixteen_sounds


@pytest.fixture
def cuts(tmp_path: Path) -> Path:
    return sixteen_sounds(tmp_path)


def interrupt(cuts: Path, output: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """End a fit when its centres have begun to move."""

    def stop(self: object, now: object) -> None:
        if now.batches == 3:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit_kmeans.FitProgress, "__call__", stop)
        assert fit(cuts, output, "--kmeans.checkpoint-every", "1", *options) == 130
    assert progress_of(output) == [f"{output.name}.progress", f"{output.name}.progress.sample"]


def progress_of(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.glob(f"{output.name}.progress*"))


def fewer(cuts: Path) -> Path:
    path = cuts.with_name("cuts_fewer.jsonl.gz")
    write_cuts(list(read_cuts(cuts))[:12], path)
    return path


def test_a_folder_of_a_few_seconds_is_read_once_and_comes_to_an_end(
    cuts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = ids_read(monkeypatch)
    with caplog.at_level("INFO"):
        assert fit(cuts, tmp_path / "k.pt", "--kmeans.batch-frames", "10000", "--kmeans.max-batches", "300") == 0
    assert sorted(read) == sorted(cut.id for cut in read_cuts(cuts))
    (said,) = [message for message in caplog.messages if "passes over all frames in memory" in message]
    assert 1 < int(said.split(": ")[1].split(",")[0]) < 100
    assert total(tmp_path).audio_hours * 3600 == pytest.approx(8.0, rel=0.1)


def test_progress_of_another_run_is_refused_before_the_work_and_all_files_in_the_way_are_named(
    cuts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "k.pt"
    interrupt(fewer(cuts), output, monkeypatch)
    before = {path.name: path.read_bytes() for path in output.parent.iterdir()}
    assert fit(cuts, output) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "k.pt.progress: holds the progress of another run: stream.cuts is '" in error
    assert f"; remove {output}.progress {output}.progress.sample to begin anew" in error and "; --overwrite True removes them" in error
    assert {path.name: path.read_bytes() for path in output.parent.iterdir()} == before


def test_overwriting_removes_the_progress_of_another_run(
    cuts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(cuts, tmp_path / "new.pt") == 0
    interrupt(fewer(cuts), tmp_path / "k.pt", monkeypatch)
    (tmp_path / "k.pt.skipped-00000.tsv").write_text("gone\tof the other run\n")
    capsys.readouterr()
    assert fit(cuts, tmp_path / "k.pt", "--overwrite", "True") == 0
    assert "0 unreadable cuts left out" in capsys.readouterr().out
    assert KMeans.load(tmp_path / "k.pt").sha256 == KMeans.load(tmp_path / "new.pt").sha256
    assert not progress_of(tmp_path / "k.pt")


def test_overwriting_that_was_interrupted_goes_on_where_it_was(cuts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "k.pt"
    assert fit(cuts, output) == 0
    finished = KMeans.load(output).sha256
    interrupt(cuts, output, monkeypatch, "--overwrite", "True")

    def never(*_: object) -> None:
        raise AssertionError("the sample is drawn again")

    monkeypatch.setattr(kmeans, "draw_sample", never)
    assert fit(cuts, output, "--overwrite", "True") == 0
    assert KMeans.load(output).sha256 == finished and not progress_of(output)


def test_a_sample_begun_by_another_run_is_in_the_way_like_any_progress(
    cuts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kmeans, "best_start", interrupted)
        assert fit(fewer(cuts), tmp_path / "k.pt") == 130
    assert progress_of(tmp_path / "k.pt") == ["k.pt.progress.sampling-00000"]
    assert fit(cuts, tmp_path / "k.pt") == 2
    assert f"; remove {tmp_path}/k.pt.progress.sampling-00000 to begin anew" in capsys.readouterr().err
    assert fit(cuts, tmp_path / "k.pt", "--overwrite", "True") == 0


@pytest.mark.parametrize("damaged", ["k.pt.progress", "k.pt.progress.sample"])
def test_damaged_progress_is_refused_and_can_be_overwritten(
    damaged: str, cuts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(cuts, tmp_path / "k.pt", monkeypatch)
    (tmp_path / damaged).write_bytes((tmp_path / damaged).read_bytes()[:500])
    assert fit(cuts, tmp_path / "k.pt") == 2
    error = capsys.readouterr().err
    assert f"{damaged}: a k2ssl-kmeans-" in error and "this one is cut off" in error and "--overwrite True removes them" in error
    assert fit(cuts, tmp_path / "k.pt", "--overwrite", "True") == 0


def test_too_many_unreadable_cuts_are_refused_before_anything_is_fitted_and_the_advice_finishes_the_fit(
    cuts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("u03.wav", "u07.wav"):
        (tmp_path / "audio" / name).write_bytes((tmp_path / "audio" / name).read_bytes()[:300])
    output = tmp_path / "k.pt"

    def never(*_: object) -> None:
        raise AssertionError("this is work for nothing")

    with monkeypatch.context() as patch:
        patch.setattr(kmeans, "best_start", never)
        assert fit(cuts, output) == 1
        error = capsys.readouterr().err
        assert "2 of 16 cuts (12.5%) cannot be used, max_skipped is 1.0%: see " in error
        assert "; --max-skipped 0.13 goes on with what is done; where they have been mended, remove " in error
        patch.setattr(kmeans, "draw_sample", never)
        assert fit(cuts, output) == 1 and "2 of 16 cuts (12.5%)" in capsys.readouterr().err  # from the list
    monkeypatch.setattr(assign, "_frames", never)
    assert fit(cuts, output, "--max-skipped", "0.13") == 0
    assert "2 unreadable cuts left out" in capsys.readouterr().out


def test_a_part_of_the_corpus_is_not_held_against_the_share_of_all(
    cuts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ["--kmeans.sample-batches", "2", "--kmeans.max-batches", "1"]
    number = 2
    first = [cut for cut in read_cuts(cuts) if part_of(cut.id, 0, number) == 0]
    (tmp_path / "audio" / f"{first[0].id}.wav").unlink()
    assert fit(cuts, tmp_path / "k.pt", *parts, "--max-skipped", "0.07") == 0  # 1 of 16, though more of this part
    (tmp_path / "audio" / f"{first[1].id}.wav").unlink()
    monkeypatch.setattr(kmeans, "best_start", None)
    assert fit(cuts, tmp_path / "other.pt", *parts, "--max-skipped", "0.07") == 1
    assert "2 of 16 cuts (12.5%) cannot be used" in capsys.readouterr().err


def test_ranks_refuse_too_many_unreadable_cuts_together_before_anything_is_fitted(cuts: Path, tmp_path: Path) -> None:
    for name in ("u03.wav", "u07.wav"):
        (tmp_path / "audio" / name).unlink()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "k2ssl.bin.fit_kmeans"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*launch, "--cuts", str(cuts), "--output", str(tmp_path / "k.pt"), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "k-means start" not in done.stderr
    assert "fit_kmeans (rank 0): 2 of 16 cuts (12.5%) cannot be used" in done.stderr
    assert "fit_kmeans (rank 1): rank 0 failed" in done.stderr


@pytest.mark.parametrize(
    ("number", "total", "said"), [(2, 42, "0.048"), (1, 10, "0.10"), (1, 1, "1.0"), (3, 3, "1.0"), (1, 999, "0.0011"), (995, 1000, "1.00")]
)
def test_the_share_that_is_advised_suffices(number: int, total: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"--max-skipped {re.escape(said)} goes on"):
        SkippedCuts(tmp_path / "skipped-0.tsv", total, 0.0).check(number)
    SkippedCuts(tmp_path / "skipped-0.tsv", total, float(said)).check(number)
