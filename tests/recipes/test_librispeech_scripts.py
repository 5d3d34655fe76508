"""The LibriSpeech recipe's scripts that hold speakers out and import labels."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from k2ssl.data.cuts import read_cuts
from k2ssl.data.label_contract import check_labels_fit
from k2ssl.data.labels import LabelStore

RECIPE = Path(__file__).parents[2] / "recipes" / "librispeech"

# --- speakers held out ---------------------------------------------------------------------------------------------------------------------


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"librispeech_{name}", RECIPE / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for part, speaker, chapter in (("train-a", 1, 10), ("train-a", 2, 20), ("train-a", 2, 21), ("train-b", 2, 22), ("train-b", 3, 30)):
        folder = tmp_path / "corpus" / part / str(speaker) / str(chapter)
        folder.mkdir(parents=True)
        names = [f"{speaker}-{chapter}-{i:04d}" for i in range(2)]
        for name in names:
            soundfile.write(folder / f"{name}.flac", np.zeros(16000 + 400), 16000)
        (folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(f"{name} WORD\n" for name in names))
    return tmp_path / "corpus"


def prepare(corpus: Path, *options: str) -> int:
    return script("prepare_cuts").main(
        ["--corpus-dir", str(corpus), "--out", str(corpus.parent / "cuts"), "--num-jobs", "1", "--quiet", *options]
    )


def test_what_held_out_speakers_said_is_in_no_training_set_and_dealt_by_chapter(corpus: Path) -> None:
    assert prepare(corpus, "--held-out-speakers", "2") == 0
    found = {path.name[5:-9]: {cut.id for cut in read_cuts(path)} for path in (corpus.parent / "cuts").glob("cuts_*.jsonl.gz")}
    assert found == {
        "train-a": {"1-10-0000", "1-10-0001"},
        "train-b": {"3-30-0000", "3-30-0001"},
        "held-out-dev": {"2-20-0000", "2-20-0001", "2-22-0000", "2-22-0001"},
        "held-out-test": {"2-21-0000", "2-21-0001"},
    }


def test_manifests_with_other_speakers_held_out_are_not_taken(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(corpus, "--held-out-speakers", "2") == prepare(corpus, "--held-out-speakers", "2") == 0
    for options in (["--held-out-speakers", "2", "3"], []):
        assert prepare(corpus, *options) == 1
        assert "exists, made with source" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("speakers", "said"),
    [
        (["4"], "there is no 4; speakers found: 1, 2, 3"),
        (["1"], "speakers 1 have one chapter"),
        (["1", "2", "3"], "without speakers 1, 2, 3"),
    ],
)
def test_speakers_who_cannot_be_held_out_are_refused(
    corpus: Path, capsys: pytest.CaptureFixture[str], speakers: list[str], said: str
) -> None:
    assert prepare(corpus, "--held-out-speakers", *speakers) == 1
    assert said in capsys.readouterr().err and not list((corpus.parent / "cuts").glob("cuts_*.gz"))


# --- published labels ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuts(corpus: Path) -> Path:
    assert prepare(corpus, "--parts", "train-a") == 0
    return corpus.parent / "cuts/cuts_train-a.jsonl.gz"


def labels_of(cut_id: str) -> list[int]:
    """50 labels, others for every cut."""
    _, chapter, number = cut_id.split("-")
    first = 50 * (2 * ["10", "20", "21", "0"].index(chapter.replace("9", "0")) + int(number))
    return list(range(first, first + 50))


def published(ids: list[str], extension: str, folder: Path) -> Path:
    """Labels of cuts as others publish them; the cut's id is not ours, its supervision's is."""
    folder.mkdir(exist_ok=True)
    path = folder / f"labels{extension}"
    if extension == ".km":
        path.write_text("".join(" ".join(map(str, labels_of(name))) + "\n" for name in ids))
        path.with_suffix(".tsv").write_text("/root\n" + "".join(f"1/10/{name}.flac\t16400\n" for name in ids))
        return path
    lines = [
        json.dumps({"id": f"{name}-{i}", "supervisions": [{"id": name}], "custom": {"kmeans": " ".join(map(str, labels_of(name)))}}) + "\n"
        for i, name in enumerate(ids)
    ]
    with gzip.open(path, "wt") as file:
        file.writelines(lines)
    return path


def importing(source: Path, cuts: Path, *options: str) -> int:
    arguments = [
        "--labels",
        str(source),
        "--cuts",
        str(cuts),
        "--output",
        str(cuts.parent.parent / "labels"),
        "--num-classes",
        "500",
        *options,
    ]
    return script("import_labels").main(arguments)


@pytest.mark.parametrize("extension", [".jsonl.gz", ".km"])
def test_published_labels_are_those_of_the_store_and_fit_a_model(cuts: Path, extension: str) -> None:
    ids = [cut.id for cut in read_cuts(cuts)]
    source = published([*ids, "9-9-0000"], extension, cuts.parent.parent / "published")
    assert importing(source.parent, cuts) == 0
    store = LabelStore.open(cuts.parent.parent / "labels")
    assert len(store) == 6 and all(store.labels(name).tolist() == labels_of(name) for name in ids)
    assert store.contract.lineage.features == "imported: published"
    fit = check_labels_fit(
        store,
        num_classes=504,
        frame_rate=50.0,
        sample_rate=16000,
        num_frames=lambda samples: (samples - 400) // 320 + 1,
        cuts=read_cuts(cuts),
    )
    assert (fit.num_cuts, fit.largest_difference) == (6, 1.0)
    assert importing(source.parent, cuts) == 0  # finished, and left alone


def test_labels_that_do_not_fit_are_refused(cuts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [cut.id for cut in read_cuts(cuts)]
    folder = cuts.parent.parent / "published"
    source = published(ids, ".km", folder)
    assert importing(source, cuts, "--frame-rate", "100") == 1
    assert "50 labels of 1-10-0000 last 0.50 s at 100 a second, the cut 1.02 s" in capsys.readouterr().err
    assert not (cuts.parent.parent / "labels/contract.json").exists()
    (folder / "more.jsonl").write_text(json.dumps({"id": ids[0], "custom": {"kmeans": " ".join(["1"] * 50)}}) + "\n")
    other = ["--output", str(cuts.parent.parent / "other")]
    third = ["--output", str(cuts.parent.parent / "third")]
    assert importing(folder, cuts, *other) == 1 and "other labels for 1-10-0000" in capsys.readouterr().err
    (folder / "more.jsonl").write_text('{"id": "x"}\n')
    assert importing(folder / "more.jsonl", cuts, *third) == 1 and "line 1 is no cut with custom.kmeans" in capsys.readouterr().err
    (folder / "more.jsonl").unlink()
    for text, said in (("1 x 3\n", "line 1 holds something else than numbers"), ("1 2 3\n", "last 0.06 s"), ("", "has 0 lines")):
        source.write_text(text)
        assert importing(source, cuts, "--output", str(cuts.parent.parent / said)) == 1 and said in capsys.readouterr().err
    assert importing(folder / "none", cuts, *other) == 1 and "expected a file of labels" in capsys.readouterr().err


def test_half_a_file_of_labels_is_said_to_be_damaged(cuts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = published([cut.id for cut in read_cuts(cuts)], ".jsonl.gz", cuts.parent.parent / "published")
    source.write_bytes(source.read_bytes()[:-20])
    assert importing(source, cuts) == 1
    assert f"import_labels: {source} is damaged" in capsys.readouterr().err and not (cuts.parent.parent / "labels/contract.json").exists()


def test_cuts_without_published_labels_are_few_and_listed(cuts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [cut.id for cut in read_cuts(cuts)]
    source = published(ids[:-1], ".km", cuts.parent.parent / "published")
    assert importing(source, cuts) == 1 and f"no labels for 1 of 6 cuts of {cuts}, such as {ids[-1]}" in capsys.readouterr().err
    assert importing(source, cuts, "--max-missing", "0.2") == 0
    listed = (cuts.parent.parent / "labels/skipped-00000-of-00001.tsv").read_text()
    assert listed == f"{ids[-1]}\tthe published labels have none\n"
