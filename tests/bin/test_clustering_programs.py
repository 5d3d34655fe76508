"""fit_kmeans, label and label_report on a small corpus of synthetic sounds: results, resuming, reports, and every refusal."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from k2ssl.bin import fit_kmeans, label, label_report
from k2ssl.bin.cluster_features import HiddenConfig, build_features
from k2ssl.bin.program import run_program
from k2ssl.data.cuts import read_cuts, write_cuts
from k2ssl.data.labels import LabelShardWriter, LabelStore, Lineage, cut_list_hash
from k2ssl.data.prepare_cuts import prepare_folder
from k2ssl.labelling.features import MfccFeatures
from k2ssl.labelling.kmeans_model import KMeans
from k2ssl.models.frontend import WaveformConfig, normalize_audio
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.load import load_model, save_model

RATE = 16000
SMALL = ["--kmeans.num-clusters", "5", "--kmeans.batch-frames", "200", "--kmeans.max-batches", "20", "--kmeans.num-restarts", "2"]
SMALL += ["--loader.num-workers", "0", "--loader.max-duration", "4", "--device", "cpu", "--quiet", "True"]
READ = ["--loader.num-workers", "0", "--loader.max-duration", "4", "--device", "cpu", "--quiet", "True"]


class Corpus:
    """Twelve sounds of 0.4 to 1.7 s, centres of their MFCC and of a layer of an untrained model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        draw = np.random.default_rng(0)
        audio = folder / "audio"
        audio.mkdir()
        for i in range(12):
            time = np.arange(int(RATE * (0.4 + 0.12 * i))) / RATE
            sound = 0.3 * np.sin(2 * np.pi * (200 + 150 * (i % 4)) * time) + 0.02 * draw.standard_normal(len(time))
            soundfile.write(audio / f"u{i:02d}.wav", sound, RATE)
        prepare_folder(audio, folder, split="all", progress=False)
        self.cuts = folder / "cuts_all.jsonl.gz"
        self.kmeans = folder / "mfcc.pt"
        assert fit(self.cuts, self.kmeans) == 0
        self.model = folder / "model.pt"
        torch.manual_seed(0)
        save_model(self.model, HubertModel(HubertConfig.tiny()))
        self.hidden = folder / "layer2.pt"
        assert fit(self.cuts, self.hidden, *self.layer(2)) == 0

    def layer(self, number: int, kind: str = "layer") -> list[str]:
        return ["--features.kind", "hidden", "--features.checkpoint", str(self.model), f"--features.{kind}", str(number)]


def fit(cuts: Path, output: Path, *options: str) -> int:
    return fit_kmeans.main(["--cuts", str(cuts), "--output", str(output), *SMALL, *options])


def assign(corpus: Corpus, output: Path, *options: str, kmeans: Path | None = None, cuts: Path | None = None) -> int:
    files = ["--kmeans", str(kmeans or corpus.kmeans), "--cuts", str(cuts or corpus.cuts), "--output", str(output)]
    return label.main([*files, *READ, *options])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def labels(corpus: Corpus) -> Path:
    assert assign(corpus, corpus.folder / "labels") == 0
    return corpus.folder / "labels"


def contents(store: Path) -> dict[str, list[int]]:
    return {cut_id: found.tolist() for cut_id, found in LabelStore.open(store).items()}


def test_every_frame_of_every_cut_gets_the_nearest_centre(corpus: Corpus, labels: Path) -> None:
    centres = KMeans.load(corpus.kmeans).centroids.double()
    found = contents(labels)
    assert len(found) == 12
    for cut in read_cuts(corpus.cuts):
        audio = torch.from_numpy(soundfile.read(cut.recording.sources[0].source, dtype="float32")[0]).unsqueeze(0)
        frames, _ = MfccFeatures()(audio, torch.tensor([audio.shape[1]]))
        nearest = (frames[0].double().unsqueeze(1) - centres).square().sum(2).argmin(1)
        assert found[cut.id] == nearest.tolist()


def test_the_contract_tells_the_whole_lineage(corpus: Corpus, labels: Path) -> None:
    contract = LabelStore.open(labels).contract
    assert (contract.num_classes, contract.frame_rate, contract.sampling_rate, contract.num_cuts) == (5, 100.0, RATE, 12)
    lineage = contract.lineage
    assert not lineage.missing()
    assert (lineage.features, lineage.checkpoint_sha256, lineage.kmeans_sha256) == ("mfcc", None, KMeans.load(corpus.kmeans).sha256)
    assert lineage.cuts_sha256 == cut_list_hash(read_cuts(corpus.cuts))
    assert lineage.settings["num_ceps"] == 13 and {"k2ssl", "torch", "lhotse"} <= set(lineage.versions)


def test_labels_of_a_layer_are_those_of_its_hidden_states(corpus: Corpus, capsys: pytest.CaptureFixture[str], labels: Path) -> None:
    output = corpus.folder / "hidden"
    assert assign(corpus, output, "--checkpoint", str(corpus.model), "--compare.previous", str(labels), kmeans=corpus.hidden) == 0
    assert "agreement" in capsys.readouterr().out
    contract = LabelStore.open(output).contract
    assert (contract.lineage.features, contract.frame_rate) == ("layer 2", 50.0) and contract.lineage.checkpoint_sha256
    centres, model = KMeans.load(corpus.hidden).centroids.double(), load_model(corpus.model).eval()
    for cut in list(read_cuts(corpus.cuts))[::5]:
        audio = torch.from_numpy(soundfile.read(cut.recording.sources[0].source, dtype="float32")[0]).unsqueeze(0)
        with torch.no_grad():
            frames = model.encode(audio, return_hidden=True).output.hidden[1][0].double()
        distances = (frames.unsqueeze(1) - centres).square().sum(2)
        ours = torch.tensor(contents(output)[cut.id])
        excess = distances.gather(1, ours.unsqueeze(1)).squeeze(1) - distances.amin(1)
        assert excess.max() < 1e-4 * distances.mean()  # padding within a batch moves hidden states by rounding


def test_a_stack_is_clustered_in_the_same_way(corpus: Corpus, tmp_path: Path) -> None:
    assert fit(corpus.cuts, tmp_path / "stack.pt", *corpus.layer(1, "stack")) == 0
    assert KMeans.load(tmp_path / "stack.pt").description["features"] == "stack 1"


def test_the_settings_beside_the_centres_repeat_the_run(corpus: Corpus, tmp_path: Path) -> None:
    settings = corpus.folder / "mfcc.pt.json"
    assert fit_kmeans.main([str(settings), "--output", str(tmp_path / "again.pt")]) == 0
    assert KMeans.load(tmp_path / "again.pt").sha256 == KMeans.load(corpus.kmeans).sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.pt", "again.pt.json", "ledger.jsonl"]


def test_a_finished_store_is_measured_again_but_not_written(corpus: Corpus, labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changing = ("quality", "settings", "ledger")
    before = {path.name: path.stat().st_mtime_ns for path in labels.iterdir() if not path.name.startswith(changing)}
    assert assign(corpus, labels) == 0
    assert "perplexity" in capsys.readouterr().out
    assert {name: (labels / name).stat().st_mtime_ns for name in before} == before


def test_an_interrupted_labelling_goes_on_and_ends_with_the_same_labels(
    corpus: Corpus, labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = label.label_batches
    seen: list[int] = []

    def interrupted(*arguments: object) -> Iterator[object]:
        for number, batch in enumerate(whole(*arguments)):  # type: ignore[arg-type]
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    def counted(*arguments: object) -> Iterator[object]:
        for batch in whole(*arguments):  # type: ignore[arg-type]
            seen.append(len(batch.ids))
            yield batch

    monkeypatch.setattr(label, "label_batches", interrupted)
    assert assign(corpus, tmp_path / "labels") == 130
    assert not (tmp_path / "labels" / "contract.json").exists()
    monkeypatch.setattr(label, "label_batches", counted)
    assert assign(corpus, tmp_path / "labels") == 0
    assert 0 < sum(seen) < 12
    assert contents(tmp_path / "labels") == contents(labels)


def test_two_processes_write_the_same_labels_as_one(corpus: Corpus, labels: Path, tmp_path: Path) -> None:
    files = ["--kmeans", str(corpus.kmeans), "--cuts", str(corpus.cuts), "--output", str(tmp_path / "labels")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "k2ssl.bin.label"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*command, *files, *READ], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(LabelStore.open(tmp_path / "labels").contract.shards) == 2
    assert contents(tmp_path / "labels") == contents(labels)


def test_cuts_that_cannot_be_labelled_are_listed_with_the_reason(
    corpus: Corpus, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cuts = list(read_cuts(corpus.cuts))
    broken = cuts[3].recording.sources[0].source
    damaged = tmp_path / "damaged.wav"
    damaged.write_bytes(Path(broken).read_bytes()[:300])
    cuts[3].recording.sources[0].source = str(damaged)
    cuts.append(cuts[5].truncate(duration=0.01, preserve_id=False).with_id("short"))
    write_cuts(cuts, tmp_path / "cuts_some.jsonl.gz")
    assert assign(corpus, tmp_path / "labels", cuts=tmp_path / "cuts_some.jsonl.gz") == 1
    assert "2 of 13 cuts (15.4%) cannot be used, max_skipped is 1.0%" in capsys.readouterr().err
    assert not (tmp_path / "labels" / "contract.json").exists()
    assert assign(corpus, tmp_path / "labels", "--max-skipped", "0.2", cuts=tmp_path / "cuts_some.jsonl.gz") == 0
    assert "2 of 13 cuts have no labels" in capsys.readouterr().out
    skipped = dict(line.split("\t") for line in (tmp_path / "labels" / "skipped-00000-of-00001.tsv").read_text().splitlines())
    assert skipped.keys() == {cuts[3].id, "short"} and skipped["short"] == "too short for a label"
    expected = {cut_id: found for cut_id, found in contents(labels).items() if cut_id != cuts[3].id}
    assert contents(tmp_path / "labels") == expected


def test_overwriting_replaces_labels_of_another_run(corpus: Corpus, labels: Path, tmp_path: Path) -> None:
    output = tmp_path / "labels"
    assert assign(corpus, output, "--checkpoint", str(corpus.model), kmeans=corpus.hidden) == 0
    assert assign(corpus, output) == 1
    assert assign(corpus, output, "--overwrite", "True") == 0
    assert contents(output) == contents(labels)


def test_a_report_holds_the_scores_and_a_picture(corpus: Corpus, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = {cut.id: cut.duration for cut in read_cuts(corpus.cuts)}
    (tmp_path / "phones.ctm").write_text("".join(f"{cut_id} 1 0 {seconds} p{cut_id[-1]}\n" for cut_id, seconds in lengths.items()))
    compare = ["--compare.previous", str(labels), "--compare.alignments", str(tmp_path / "phones.ctm")]
    output = tmp_path / "report.json"
    assert label_report.main(["--labels", str(labels), "--output", str(output), *compare, "--quiet", "True"]) == 0
    content = json.loads(output.read_text())
    store = LabelStore.open(labels)
    assert content["usage"]["histogram"] == list(store.contract.histogram)
    assert content["previous"]["nmi"] == pytest.approx(1.0)
    assert content["phones"]["num_phones"] == 10 and 0 < content["phones"]["pnmi"] < 1
    assert content["labels"]["lineage"]["kmeans_sha256"] == store.contract.lineage.kmeans_sha256
    assert f"PNMI {content['phones']['pnmi']:.4f}" in capsys.readouterr().out
    picture = output.with_suffix(".png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(set(zlib.decompress(picture[picture.index(b"IDAT") + 4 :]))) > 3
    assert label_report.main(["--labels", str(labels), "--output", str(output), "--quiet", "True"]) == 2
    assert label_report.main(["--labels", str(labels), "--output", str(output), "--overwrite", "True", "--quiet", "True"]) == 0
    assert json.loads(output.read_text())["previous"] is None


def other_model(folder: Path) -> str:
    torch.manual_seed(1)
    save_model(folder / "other.pt", HubertModel(HubertConfig.tiny()))
    return str(folder / "other.pt")


def text_file(folder: Path) -> Path:
    (folder / "text.pt").write_text("hello")
    return folder / "text.pt"


def other_centres(folder: Path, features: str) -> Path:
    KMeans(torch.randn(5, 7), {"features": features, **MfccFeatures().description, "num_ceps": 13} if features == "mfcc" else {}).save(
        folder / "other.km"
    )
    return folder / "other.km"


def folder_with_a_file(folder: Path) -> Path:
    (folder / "home").mkdir()
    (folder / "home" / "thesis.tex").touch()
    return folder / "home"


def setting(name: str, value: str, message: str) -> tuple[Callable[[Corpus, Path], int], int, str]:
    return lambda c, t: fit(c.cuts, t / "k.pt", f"--{name}", value), 2, message


REFUSALS: dict[str, tuple[Callable[[Corpus, Path], int], int, str]] = {
    "cuts that are not there": (lambda c, t: fit(t / "none.jsonl.gz", t / "k.pt"), 2, "none.jsonl.gz: there is no such file"),
    "cuts that are none": (lambda c, t: fit(c.model, t / "k.pt"), 2, "a manifest of cuts ends in"),
    "more classes than frames": (
        lambda c, t: fit(c.cuts, t / "k.pt", "--kmeans.num-clusters", "5000"),
        1,
        "num_clusters is 5000, but the features hold only",
    ),
    "centres that exist": (lambda c, t: fit(c.cuts, c.kmeans), 2, "mfcc.pt exists; --overwrite True replaces it"),
    "a layer that is not there": (
        lambda c, t: fit(c.cuts, t / "k.pt", *c.layer(99)),
        2,
        "model.pt: layer 99 was asked for, the model has layers 1 to",
    ),
    "a stack that is not there": (lambda c, t: fit(c.cuts, t / "k.pt", *c.layer(9, "stack")), 2, "stack 9 was asked for"),
    "layer zero": (lambda c, t: fit(c.cuts, t / "k.pt", *c.layer(0)), 2, "they count from 1"),
    "layer and stack": (lambda c, t: fit(c.cuts, t / "k.pt", *c.layer(1), "--features.stack", "1"), 2, "exactly one of the two"),
    "a checkpoint that is none": (
        lambda c, t: fit(c.cuts, t / "k.pt", "--features.kind", "hidden", "--features.checkpoint", str(c.cuts), "--features.layer", "1"),
        2,
        "cannot be read as a checkpoint",
    ),
    "an unknown device": (lambda c, t: fit(c.cuts, t / "k.pt", "--device", "gpu"), 2, "device is 'gpu', allowed are auto, cpu"),
    "a folder for cuts": (lambda c, t: assign(c, t / "l", cuts=t), 2, "this is a folder, not a file"),
    "a missing checkpoint for the fit": (
        lambda c, t: fit(
            c.cuts, t / "k.pt", "--features.kind", "hidden", "--features.checkpoint", str(t / "m.pt"), "--features.layer", "1"
        ),
        2,
        "m.pt: there is no such file",
    ),
    "averaged weights that are not there": (
        lambda c, t: fit(c.cuts, t / "k.pt", *c.layer(1), "--features.weights", "average"),
        2,
        "holds no averaged weights",
    ),
    "windows without a hop": (
        lambda c, t: fit(c.cuts, t / "k.pt", *c.layer(1), "--features.window-seconds", "8"),
        2,
        "overlap_seconds is 8.0 and window_seconds 8.0",
    ),
    "a folder for the centres": (lambda c, t: fit(c.cuts, t, "--overwrite", "True"), 2, "which is a folder"),
    "an unknown device for labels": (lambda c, t: assign(c, t / "l", "--device", "tpu"), 2, "Label: device is 'tpu', allowed are auto"),
    "no sample rate": setting("features.sample-rate", "0", "MfccConfig: sample_rate is 0"),
    "no frame shift": setting("features.frame-shift-ms", "0", "MfccConfig: frame_shift_ms is 0.0"),
    "a band beyond the audio": setting("features.high-freq", "8001", "MfccConfig: high_freq is 8001.0"),
    "too many bands": setting("features.num-bins", "500", "MfccConfig: num_bins is 500, so many that"),
    "absurd mini-batches": setting("kmeans.batch-frames", "1000000000000", "batch_frames is 1000000000000, allowed are integers from 1 to"),
    "absurdly many workers": setting("loader.num-workers", "999999", "LoaderConfig: num_workers is 999999, allowed are 0 to"),
    "endless batches": setting("loader.max-duration", "inf", "LoaderConfig: max_duration is inf"),
    "a negative share": setting("max-skipped", "-0.1", "FitKMeans: max_skipped is -0.1, allowed is a share"),
    "a share beyond one": (lambda c, t: assign(c, t / "l", "--max-skipped", "5"), 2, "max_skipped is 5.0, allowed is a share"),
    "no cuts at all": (lambda c, t: fit_kmeans.main(["--output", str(t / "k.pt")]), 2, "cuts: this key is missing"),
    "k-means that is not there": (lambda c, t: assign(c, t / "l", kmeans=t / "none.pt"), 2, "none.pt: there is no such file"),
    "k-means that is none": (
        lambda c, t: assign(c, t / "l", kmeans=text_file(t)),
        2,
        "text.pt: a k2ssl-kmeans file is needed, this one is text: 'hello'",
    ),
    "a model for k-means": (lambda c, t: assign(c, t / "l", kmeans=c.model), 2, "format is 'k2ssl-model', 'k2ssl-kmeans' is needed"),
    "k-means of unknown features": (
        lambda c, t: assign(c, t / "l", kmeans=other_centres(t, "")),
        2,
        "other.km was fitted to features that it does not name",
    ),
    "k-means of another dimension": (
        lambda c, t: assign(c, t / "l", kmeans=other_centres(t, "mfcc")),
        2,
        "k-means centres have 7 dimensions, the features (mfcc) 39",
    ),
    "a checkpoint for MFCC": (lambda c, t: assign(c, t / "l", "--checkpoint", str(c.model)), 2, "was fitted to MFCC, which need none"),
    "no checkpoint for a layer": (lambda c, t: assign(c, t / "l", kmeans=c.hidden), 2, "checkpoint is missing: "),
    "a missing checkpoint": (
        lambda c, t: assign(c, t / "l", "--checkpoint", str(t / "no.pt"), kmeans=c.hidden),
        2,
        "no.pt: there is no such file",
    ),
    "another checkpoint": (
        lambda c, t: assign(c, t / "l", "--checkpoint", other_model(t), kmeans=c.hidden),
        2,
        "other.pt is not the checkpoint that",
    ),
    "labels of another run": (
        lambda c, t: assign(c, c.folder / "labels", "--checkpoint", str(c.model), kmeans=c.hidden),
        1,
        "was begun with another set-up",
    ),
    "a folder of other files": (lambda c, t: assign(c, folder_with_a_file(t)), 2, "home holds other files and no labels"),
    "an output that is a file": (lambda c, t: assign(c, text_file(t)), 2, "text.pt: cannot write into this folder"),
    "previous labels that are none": (lambda c, t: assign(c, t / "l", "--compare.previous", str(t)), 2, "is no finished label store"),
    "a report without labels": (
        lambda c, t: label_report.main(["--labels", str(t / "l"), "--output", str(t / "r.json")]),
        2,
        "there is no such folder of labels",
    ),
    "a report of another name": (
        lambda c, t: label_report.main(["--labels", str(t / "l"), "--output", str(t / "r.txt")]),
        2,
        "a name that ends in .json is needed",
    ),
    "alignments of other audio": (
        lambda c, t: label_report.main(
            ["--labels", str(c.folder / "labels"), "--output", str(t / "r.json"), "--compare.alignments", str(text_file(t))]
        ),
        2,
        "text.pt:1: has 1 columns",
    ),
}


@pytest.mark.usefixtures("labels")
@pytest.mark.parametrize("name", REFUSALS)
def test_a_mistake_is_one_line_and_a_status_and_leaves_no_result(
    name: str, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, status, message = REFUSALS[name]
    assert work(corpus, tmp_path) == status
    output = capsys.readouterr()
    assert message in output.err.splitlines()[-1], output.err
    assert "Traceback" not in output.err and not output.out
    assert status == 1 or not list(tmp_path.glob("**/ledger.jsonl")), "touched before the settings were refused"
    assert not list(tmp_path.glob("**/k.pt")) and not list(tmp_path.glob("**/contract.json")) and not list(tmp_path.glob("**/r.*"))


def on_a_full_disk(program: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a program whose files may not grow beyond 1,500 bytes; the system then refuses to write, as it does on a full disk.

    The limit is the child's alone: it would also hold for the log that the tests themselves are writing.
    """
    return subprocess.run(
        [sys.executable, "-m", f"k2ssl.bin.{program}", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.getrlimit(resource.RLIMIT_FSIZE)[1])),
    )


def test_a_full_disk_is_one_line_and_nothing_half_written_under_a_final_name(corpus: Corpus, tmp_path: Path) -> None:
    cuts = ["--cuts", str(corpus.cuts)]
    fitted = on_a_full_disk("fit_kmeans", *cuts, "--output", str(tmp_path / "k.pt"), *SMALL)
    assert fitted.returncode == 1
    assert "k.pt.progress.sampling-00000: File too large" in fitted.stderr.splitlines()[-1], fitted.stderr
    assert not list(tmp_path.glob("k.pt")) and not list(tmp_path.glob("**/*.part"))
    labelled = on_a_full_disk("label", *cuts, "--kmeans", str(corpus.kmeans), "--output", str(tmp_path / "l"), *READ)
    assert labelled.returncode == 1
    assert "File too large" in labelled.stderr.splitlines()[-1], labelled.stderr
    assert not list(tmp_path.glob("**/contract.json"))


def test_help_is_there_for_all_programs_and_names_units(capsys: pytest.CaptureFixture[str]) -> None:
    for program in (fit_kmeans, label, label_report):
        with pytest.raises(SystemExit) as stop:
            program.main(["--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and "usage: " in text and "Exit status" in text
    for program in (fit_kmeans, label):
        with pytest.raises(SystemExit):
            program.main(["--help"])
        assert "audio in a batch, s" in capsys.readouterr().out


def test_overwriting_labels_begins_only_when_everything_else_is_right(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "labels"
    assert assign(corpus, output) == 0
    before = contents(output)
    for previous in (tmp_path / "nothere", output):
        assert assign(corpus, output, "--overwrite", "True", "--compare.previous", str(previous)) == 2
        assert contents(output) == before
    assert "the very labels that overwrite would remove" in capsys.readouterr().err
    assert assign(corpus, output, "--overwrite", "True") == 0


def test_what_a_kill_left_in_the_folder_is_no_obstacle(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / ".labels-00000-of-00001.setup.json.77.part").touch()
    assert assign(corpus, tmp_path / "labels") == 0


def test_manifests_that_share_ids_are_refused_before_anything_is_labelled(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "cuts_copy.jsonl.gz"
    write_cuts(read_cuts(corpus.cuts), copy)
    files = ["--kmeans", str(corpus.kmeans), "--cuts", str(corpus.cuts), str(copy), "--output", str(tmp_path / "labels")]
    assert label.main([*files, *READ]) == 1
    assert "the manifests share cut ids" in capsys.readouterr().err


def test_damage_in_the_middle_of_a_store_is_reported(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "labels"
    assert assign(corpus, output) == 0
    store = next(output.glob("labels-*.bin"))
    damaged = bytearray(store.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    store.write_bytes(damaged)
    report = ["--labels", str(output), "--output", str(tmp_path / "q.json"), "--quiet", "True"]
    assert label_report.main(report) == 2
    assert store.name in capsys.readouterr().err


def test_finished_centres_are_left_alone_if_the_same_settings_led_to_them(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "k.pt"
    assert fit(corpus.cuts, output) == 0
    before = output.read_bytes()
    assert fit(corpus.cuts, output, "--skip-finished", "True") == 0
    assert fit(corpus.cuts, output, "--skip-finished", "True", "--kmeans.seed", "7") == 2
    assert "made with other settings: kmeans.seed is 0 there, 7 here; --overwrite True" in capsys.readouterr().err
    assert fit(corpus.cuts, output, "--skip-finished", "True", "--loader.max-duration", "2") == 2
    assert "loader.max_duration is 4.0 there, 2.0 here" in capsys.readouterr().err
    newer = tmp_path / "cuts_all.jsonl.gz"
    write_cuts(read_cuts(corpus.cuts), newer)
    assert fit(newer, tmp_path / "n.pt") == 0
    os.utime(newer, (2e9, 2e9))
    assert fit(newer, tmp_path / "n.pt", "--skip-finished", "True") == 2
    assert "is newer" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_only_processors_and_cuda_are_devices(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(corpus.cuts, tmp_path / "k.pt", "--device", "meta") == 2
    assert "allowed are auto, cpu, cuda and cuda:NUMBER" in capsys.readouterr().err


def test_centres_are_not_fitted_to_what_is_left_of_a_corpus(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audio = tmp_path / "audio"
    audio.mkdir()
    for path in sorted((corpus.folder / "audio").iterdir()):
        (audio / path.name).write_bytes(path.read_bytes())
    prepare_folder(audio, tmp_path, split="all", progress=False)
    for path in sorted(audio.iterdir())[:3]:
        path.unlink()
    cuts = tmp_path / "cuts_all.jsonl.gz"
    assert fit(cuts, tmp_path / "k.pt") == 1
    assert "3 of 12 cuts (25.0%) cannot be used, max_skipped is 1.0%" in capsys.readouterr().err
    assert not (tmp_path / "k.pt").exists()
    assert len((tmp_path / "k.pt.skipped-00000.tsv").read_text().splitlines()) == 3
    assert fit(cuts, tmp_path / "k.pt", "--max-skipped", "0.3") == 0


def test_a_termination_is_saved_from_like_an_interruption(corpus: Corpus, tmp_path: Path) -> None:
    def interrupted(job: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    options = ["--cuts", str(corpus.cuts), "--output", str(tmp_path / "k.pt")]
    assert run_program(interrupted, fit_kmeans.FitKMeans, options, "fit_kmeans", "") == 130
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_model_that_normalises_hears_the_whole_recording_normalised(corpus: Corpus, tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = dataclasses.replace(HubertConfig.tiny(), frontend=WaveformConfig(channels=32, norm="layer"))
    model = HubertModel(config).eval()
    save_model(tmp_path / "m.pt", model)
    hidden = HiddenConfig(str(tmp_path / "m.pt"), layer=2, window_seconds=1.0, overlap_seconds=0.5)
    features = build_features(hidden, "cpu")
    audio = torch.cat([0.01 * torch.randn(1, 12800), torch.randn(1, 3200)], dim=1)  # 1 s: loud only at its end
    with torch.no_grad():
        expected = model.encode(audio, return_hidden=True).output.hidden[1]
        model.frontend.normalizes_audio = False
        long = torch.cat([audio, audio], dim=1)
        first_window = model.encode(normalize_audio(long)[:, :16000], return_hidden=True).output.hidden[1]
    torch.testing.assert_close(features(audio, torch.tensor([16000]))[0], expected, atol=1e-4, rtol=0)
    found = features(long, torch.tensor([32000]))[0]
    torch.testing.assert_close(found[:, :30], first_window[:, :30], atol=1e-4, rtol=0)  # frames far from the first seam
    options = ["--features.kind", "hidden", "--features.checkpoint", str(tmp_path / "m.pt"), "--features.layer", "2"]
    assert fit(corpus.cuts, tmp_path / "k.pt", *options) == 0
    assert assign(corpus, tmp_path / "labels", "--checkpoint", str(tmp_path / "m.pt"), kmeans=tmp_path / "k.pt") == 0
    assert LabelStore.open(tmp_path / "labels").contract.lineage.settings["normalize"] is True


def test_labels_that_another_process_is_writing_are_not_overwritten(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lineage = Lineage("mfcc", {"num_ceps": 13}, "centres", None, cut_list_hash(read_cuts(corpus.cuts)))
    with LabelShardWriter(tmp_path / "store", 0, 1, 5, 100.0, lineage, sampling_rate=RATE):
        before = sorted(path.name for path in (tmp_path / "store").iterdir())
        assert assign(corpus, tmp_path / "store", "--overwrite", "True") == 2
        assert "another process is writing this shard" in capsys.readouterr().err
        assert sorted(path.name for path in (tmp_path / "store").iterdir() if path.name != "ledger.jsonl") == before
    assert assign(corpus, tmp_path / "store", "--overwrite", "True") == 0
