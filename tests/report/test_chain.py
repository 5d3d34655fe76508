"""Hours along the chain of a run, against sums made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from k2ssl.bin.report import interval
from k2ssl.report.chain import Chain, Cost, cost_of, follow
from k2ssl.report.experiments import find


def chain(world: Any, name: str, *roots: str) -> Chain:
    runs = find(roots or ("out",), interval).runs
    return follow(next(run for run in runs.values() if run.name == name), runs)


def cost(world: Any, name: str, *roots: str) -> Cost:
    return cost_of(chain(world, name, *roots))


def test_the_hours_of_a_chain_are_those_of_its_ledgers(world: Any) -> None:
    found = cost(world, "ssl")
    assert found.labels.cpu_hours == pytest.approx((36 + 72) / 3600)  # not what else the folder of the k-means has seen
    assert found.pretraining.cpu_hours == pytest.approx((360 + 720) / 3600)
    assert found.finetuning.cpu_hours == pytest.approx(180 / 3600)
    assert found.total.cpu_hours == pytest.approx((36 + 72 + 360 + 720 + 180) / 3600)
    assert found.pretraining.audio_hours == pytest.approx(10 * 1080 / 3600)
    assert (found.pretraining_updates, found.finetuning_updates, found.missing) == (100, 50, ())
    assert found.total.devices == ("1 x Chip",) and found.total.gpu_hours == 0


def test_a_run_from_scratch_costs_itself_alone(world: Any) -> None:
    found = cost(world, "scratch")
    assert found.total.cpu_hours == pytest.approx(0.1) and found.finetuning == found.total
    assert (found.pretraining_updates, found.pretraining_data, found.missing) == (0, (), ())


def test_a_pre_training_run_has_no_fine_tuning(world: Any) -> None:
    found = cost(world, "pretrain")
    assert found.finetuning_updates is None and found.total.cpu_hours == pytest.approx(1188 / 3600)


def test_labels_of_a_model_cost_what_that_model_cost(world: Any) -> None:
    """Second iteration: labels of features of the first pre-training run."""
    lineage = {"features": "layer 1", "kmeans_sha256": "m" * 64, "checkpoint_sha256": "p" * 64}
    world.write("out/second/labels/train/contract.json", {"num_classes": 50, "lineage": lineage})
    settings = {"kmeans": "out/second/kmeans.pt", "checkpoint": "out/pretrained.pt", "output": "out/second/labels/train"}
    world.write("out/second/labels/train/settings.json", settings)
    world.ledger("out/second/labels/train", {"program": "label", "gpu_seconds": 3600.0})
    world.ledger("out/second", {"program": "fit_kmeans", "gpu_seconds": 7200.0})
    world.run(
        "again",
        "pretrain",
        seconds=(36000.0,),
        steps=400,
        gpu=True,
        data={"labels": ["out/second/labels/train", "out/second/labels/train"]},
    )
    found = cost(world, "again")
    assert found.labels.gpu_hours == pytest.approx(3.0) and found.labels.cpu_hours == pytest.approx(0.03)
    assert found.pretraining.gpu_hours == pytest.approx(10.0) and found.pretraining.cpu_hours == pytest.approx(0.3)
    assert found.pretraining_updates == 500 and not found.missing
    text = "\n".join(chain(world, "again").steps_text)
    assert "50 classes of layer 1, k-means mmmmmmmmmmmm, features of checkpoint pppppppppppp" in text and "100 classes of mfcc" in text


def test_a_run_that_is_not_below_the_folders_still_counts(world: Any) -> None:
    assert cost(world, "ssl", "out/ssl").total == cost(world, "ssl").total


@pytest.mark.parametrize(
    ("gone", "why"),
    [
        ("out/pretrained.pt", "pretrained.pt does not say which run it is from"),
        ("out/pretrain/ledger.jsonl", "out/pretrain is not there"),
        ("out/mfcc/ledger.jsonl", "the k-means out/mfcc/kmeans.pt"),
        ("out/mfcc/labels/train/ledger.jsonl", "labels/train cost was not recorded"),
        ("out/mfcc/labels/train/settings.json", "do not say with which k-means"),
    ],
)
def test_a_link_that_is_gone_is_named(world: Any, gone: str, why: str) -> None:
    (world.base / gone).unlink()
    found = cost(world, "ssl")
    assert len(found.missing) == 1 and why in found.missing[0]


def test_a_model_that_is_gone_is_followed_by_what_the_card_remembers(world: Any) -> None:
    from k2ssl.report.card import begin_card
    from k2ssl.report.origin import read_json

    begin_card(world.out / "ssl", "finetune", read_json(world.out / "ssl/settings.json"), ["x"], 1)
    (world.out / "pretrained.pt").unlink()
    assert cost(world, "ssl").total.cpu_hours == pytest.approx(0.38)


def test_a_run_that_began_with_itself_ends(world: Any) -> None:
    world.run("loop", "finetune", seconds=(3600.0,), steps=1, init="out/loop/checkpoints/step-000000001.pt")
    assert cost(world, "loop").total.cpu_hours == pytest.approx(1.0)


def test_the_way_is_told_in_words(world: Any) -> None:
    lines = chain(world, "ssl").steps_text
    assert lines[0] == "ssl: finetune from out/pretrained.pt, on out/cuts/cuts_train.jsonl.gz (2.50 h)"
    assert lines[1].startswith("pretrain: pretrain from drawn weights")
    assert lines[2] == "labels train: 100 classes of mfcc, k-means kkkkkkkkkkkk" and Path("out").is_dir()
