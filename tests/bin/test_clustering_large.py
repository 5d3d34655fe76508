"""What fit_kmeans and label do so that a large corpus is no trouble: parts of it, interruptions, early ends, one count for all ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from k2ssl.bin import label
from k2ssl.bin.cluster_cuts import SkippedCuts, read_skipped
from k2ssl.bin.cluster_features import HiddenConfig, build_features
from k2ssl.data.cuts import read_cuts
from k2ssl.data.labels import LabelStore
from k2ssl.labelling import kmeans_sample
from k2ssl.labelling.corpus_parts import part_of
from k2ssl.labelling.kmeans_model import KMeans
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.load import load_model, save_model
from k2ssl.models.transformer import TransformerConfig
from k2ssl.structure import to_dict
from k2ssl.train.ledger import total
from tests.bin.small_fit import READ, fit, ids_read, sixteen_sounds


@pytest.fixture
def cuts(tmp_path: Path) -> Path:
    return sixteen_sounds(tmp_path)


def label_command(cuts: Path, kmeans: Path, output: Path) -> list[str]:
    return ["--cuts", str(cuts), "--kmeans", str(kmeans), "--output", str(output), *READ]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return ids_read(monkeypatch)


def test_the_sample_is_one_part_of_the_corpus_and_every_epoch_reads_another(cuts: Path, tmp_path: Path, read: list[str]) -> None:
    # 16 x 0.5 s; a part of 2 s would give 4 parts, of which the smallest would not fill two batches of 1 s
    assert fit(cuts, tmp_path / "k.pt", "--kmeans.sample-batches", "2", "--kmeans.max-batches", "3") == 0
    ids = {cut.id for cut in read_cuts(cuts)}
    number = next(n for n in (3, 2) if {c for c in ids if part_of(c, 0, n) == 0} == set(read[: sum(part_of(c, 0, n) == 0 for c in ids)]))
    parts = [{cut_id for cut_id in ids if part_of(cut_id, 0, number) == part} for part in range(number)]
    assert set(read[: len(parts[0])]) == parts[0] and set(read[len(parts[0]) :][: len(parts[1])]) == parts[1]
    read.clear()
    assert fit(cuts, tmp_path / "w.pt", "--kmeans.sample-batches", "0", "--kmeans.max-batches", "3") == 0
    assert set(read[:16]) == ids


def test_an_interrupted_sampling_reads_no_audio_twice_and_ends_with_the_same_centres(
    cuts: Path, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(next(iter(read_cuts(cuts))).recording.sources[0].source).unlink()  # u00, which will be listed once
    skip = ["--max-skipped", "0.2", "--kmeans.reservoir-frames", "300", "--kmeans.held-out-frames", "60"]  # so that not all frames are held
    assert fit(cuts, tmp_path / "whole.pt", *skip) == 0
    uninterrupted = read.copy()
    read.clear()
    monkeypatch.setattr(kmeans_sample, "_SAVE_EVERY", 0.0)
    show: Callable[[kmeans_sample.Reservoir, Tensor], None] = kmeans_sample.Reservoir.show

    kept = 0

    def interrupted(self: kmeans_sample.Reservoir, frames: Tensor) -> None:
        nonlocal kept
        if len(read) > 10:
            raise KeyboardInterrupt
        show(self, frames)
        kept = len(read)

    with monkeypatch.context() as patch:
        patch.setattr(kmeans_sample.Reservoir, "show", interrupted)
        assert fit(cuts, tmp_path / "k.pt", *skip) == 130
    assert (tmp_path / "k.pt.progress.sampling-00000").exists() and 0 < kept < len(read)
    del read[kept:]
    listed = tmp_path / "k.pt.skipped-00000.tsv"
    with listed.open("a") as file:
        file.write("another\twas there before the interruption\n")
    assert fit(cuts, tmp_path / "k.pt", *skip) == 0
    assert read == uninterrupted
    assert KMeans.load(tmp_path / "k.pt").sha256 == KMeans.load(tmp_path / "whole.pt").sha256
    assert read_skipped(listed).keys() == {"another", "u00"}
    told = capsys.readouterr().out
    assert "1 unreadable cuts left out" in told and "2 unreadable cuts left out" in told
    assert not list(tmp_path.glob("*.progress*"))
    spent = total(tmp_path)
    assert spent.sessions == {"done": 2, "interrupted": 1} and spent.audio_hours * 3600 > 3 * 0.45 * len(set(read))


def test_what_was_skipped_before_an_interruption_still_counts_after_it(tmp_path: Path) -> None:
    path = tmp_path / "k.pt.skipped-00000.tsv"
    skipped = SkippedCuts(path, 30, 0.5)
    for number in range(15):
        skipped(f"cut {number}", "no\tsuch\nfile")
    with path.open("a") as file:
        file.write("cut 99")  # torn
    again = SkippedCuts(path, 30, 0.5, resume=True)
    assert again.reasons == {f"cut {number}": "no such file" for number in range(15)}
    again("cut 3", "again")
    again.check(15)
    with pytest.raises(
        ValueError, match=r"16 of 30 cuts \(53.3%\) cannot be used, .* see .*/k\.pt\.skipped-\*\.tsv; the first is cut 0: no such"
    ):
        again.check(16)
    again.share = 0.9  # of the corpus was read
    with pytest.raises(ValueError, match="15 of 27 cuts"):
        again.check(15)
    assert SkippedCuts(path, 30, 0.5).reasons == {} and not path.exists()


def test_a_run_ends_as_soon_as_too_many_are_skipped_for_sure(tmp_path: Path) -> None:
    skipped = SkippedCuts(tmp_path / "skipped-0.tsv", 100_000, 0.001)
    for number in range(100):
        skipped(f"cut {number}", "gone")
    with pytest.raises(ValueError, match="101 of 100000 cuts so far"):
        skipped("cut 100", "gone")
    few = SkippedCuts(tmp_path / "skipped-1.tsv", 1000, 0.0)
    for number in range(20):
        few(f"cut {number}", "gone")  # enough to see what is wrong
    with pytest.raises(ValueError, match=r"21 of 1000 cuts so far \(2.1%\)"):
        few("cut 20", "gone")
    assert len(read_skipped(tmp_path / "skipped-1.tsv")) == 21


def test_labelling_ends_early_and_keeps_its_labels(
    cuts: Path, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(cuts, tmp_path / "k.pt") == 0
    monkeypatch.setattr("k2ssl.bin.cluster_cuts._LISTED", 1)
    audio = sorted((tmp_path / "audio").iterdir())
    kept = {path: path.read_bytes() for path in audio[6:9]}
    for path in kept:
        path.unlink()
    read.clear()
    command = label_command(cuts, tmp_path / "k.pt", tmp_path / "labels")
    assert label.main(command) == 1
    assert "2 of 16 cuts so far (12.5%) cannot be used" in capsys.readouterr().err
    before = set(read)
    assert 0 < len(before) < 13
    for path, content in kept.items():
        path.write_bytes(content)
    read.clear()
    assert label.main(command) == 0
    assert not before & set(read) and len(LabelStore.open(tmp_path / "labels")) == 16
    assert not list((tmp_path / "labels").glob("skipped-*"))
    spent = total(tmp_path / "labels")
    assert spent.sessions == {"failed": 1, "done": 1} and spent.audio_hours * 3600 == pytest.approx(8.0, abs=0.6)


def test_the_share_that_may_be_skipped_is_one_of_all_ranks_cuts(cuts: Path, tmp_path: Path) -> None:
    assert fit(cuts, tmp_path / "k.pt") == 0
    audio = sorted((tmp_path / "audio").iterdir())
    audio[0].unlink()
    audio[2].unlink()  # both are rank 0's, a quarter of its cuts
    command = label_command(cuts, tmp_path / "k.pt", tmp_path / "labels")

    def with_two(*options: str) -> subprocess.CompletedProcess[str]:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "k2ssl.bin.label"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.run([*launch, *command, *options], capture_output=True, text=True, env=environment)

    refused = with_two("--max-skipped", "0.12")  # 1.92 of 16
    assert refused.returncode == 1 and not (tmp_path / "labels" / "contract.json").exists()
    for rank in (0, 1):  # which has skipped nothing itself
        assert f"label (rank {rank}): 2 of 16 cuts (12.5%) cannot be used, max_skipped is 12.0%" in refused.stderr
    assert sorted(path.name for path in (tmp_path / "labels").glob("*.partial"))
    done = with_two("--max-skipped", "0.125")
    assert done.returncode == 0, done.stderr
    assert len(LabelStore.open(tmp_path / "labels")) == 14
    assert "6 cuts are labelled already" in done.stderr  # of rank 0, which alone says so


@pytest.mark.parametrize("chosen", [{"layer": 1}, {"layer": 3}, {"stack": 1}, {"stack": 2}])
def test_features_of_a_layer_are_the_same_bits_whether_or_not_later_layers_run(tmp_path: Path, chosen: dict[str, int]) -> None:
    configs = [HubertConfig.tiny()]
    if chosen.get("layer", 9) <= 2:
        configs.append(replace(configs[0], encoder=TransformerConfig.tiny()))
    for config in configs:
        model = HubertModel(config).eval()
        save_model(tmp_path / "m.pt", model)
        audio, lens = 0.1 * torch.randn(2, 9000), torch.tensor([9000, 7000])
        found, counts = build_features(HiddenConfig(str(tmp_path / "m.pt"), **chosen), "cpu")(audio, lens)  # type: ignore[arg-type]
        with torch.no_grad():
            output = model.encode(audio, lens, return_hidden=True).output
        expected = output.hidden[chosen["layer"] - 1] if "layer" in chosen else output.stacks[chosen["stack"] - 1]
        for row, count in enumerate(counts.tolist()):
            assert torch.equal(found[row, :count], expected[row, :count])


def test_layers_after_the_wanted_one_are_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "m.pt", HubertModel(HubertConfig.tiny()))
    stops: list[int | None] = []
    real = HubertModel.encode

    def encode(self: HubertModel, *args: object, stop_after: int | None = None, **keywords: object):  # type: ignore[no-untyped-def]
        stops.append(stop_after)
        return real(self, *args, stop_after=stop_after, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(HubertModel, "encode", encode)
    for chosen, last in (({"layer": 2}, 2), ({"stack": 2}, sum(HubertConfig.tiny().encoder.num_layers[:2]))):  # type: ignore[index]
        features = build_features(HiddenConfig(str(tmp_path / "m.pt"), **chosen), "cpu")  # type: ignore[arg-type]
        stops.clear()
        features(torch.zeros(1, 8000), torch.tensor([8000]))
        assert stops == [last]


def test_averaged_weights_are_clustered_if_asked_for_and_the_labels_say_so(cuts: Path, tmp_path: Path) -> None:
    model, path = HubertModel(HubertConfig.tiny()), tmp_path / "checkpoint.pt"
    average = {
        name: value.double() if value.is_floating_point() else value for name, value in HubertModel(model.config).state_dict().items()
    }
    content = {"config": to_dict(model.config), "model": model.state_dict(), "average": {"step": 1, "model": average}}
    torch.save(content, path)
    raw, averaged = (HiddenConfig(str(path), layer=2, weights=weights) for weights in ("raw", "average"))  # type: ignore[arg-type]
    audio, lens = 0.1 * torch.randn(1, 9000), torch.tensor([9000])
    features = build_features(averaged, "cpu")
    with torch.no_grad():
        expected = load_model(path, weights="average").eval().encode(audio, return_hidden=True).output.hidden[1]
    assert torch.equal(features(audio, lens)[0], expected)
    assert not torch.equal(build_features(raw, "cpu")(audio, lens)[0], expected)
    options = ["--features.kind", "hidden", "--features.checkpoint", str(path), "--features.layer", "2", "--features.weights", "average"]
    assert fit(cuts, tmp_path / "k.pt", *options) == 0
    assert KMeans.load(tmp_path / "k.pt").description["weights"] == "average"
    assert label.main([*label_command(cuts, tmp_path / "k.pt", tmp_path / "labels"), "--checkpoint", str(path)]) == 0
    assert LabelStore.open(tmp_path / "labels").contract.lineage.settings["weights"] == "average"
