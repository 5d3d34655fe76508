"""Settings of the data that the training programs share have one owner, are all documented, and are refused in the name of the program's own."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest

from k2ssl.bin.finetune_data import FinetuneData
from k2ssl.bin.pretrain_data import PretrainData
from k2ssl.bin.training_data import TrainingData
from k2ssl.config import _attribute_docs

PROGRAMS: dict[type[TrainingData], dict[str, Any]] = {
    PretrainData: {"cuts": ("a",), "labels": ("b",)},
    FinetuneData: {"cuts": ("a",)},
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_every_setting_is_explained_once(kind: type[TrainingData]) -> None:
    docs = _attribute_docs(kind)
    names = {field.name for field in fields(kind)}
    assert docs.keys() | {"spec_augment"} == names | {"spec_augment"} and all(len(text) > 10 or "see" in text for text in docs.values())
    shared = _attribute_docs(TrainingData)
    assert {name: docs[name] for name in shared} == shared
    own = set(inspect.get_annotations(kind))
    assert own & set(inspect.get_annotations(TrainingData)) == {"min_seconds", "max_seconds"} and not own & shared.keys()
    lines = (kind.__doc__ or "").splitlines()
    assert all(sum(line.strip().startswith(f"{name}:") for line in lines) == 1 for name in docs)


def test_the_programs_keep_their_own_lengths() -> None:
    assert [(kind(**given).min_seconds, kind(**given).max_seconds) for kind, given in PROGRAMS.items()] == [(2.0, 15.625), (1.0, 20.0)]


@pytest.mark.parametrize("step", [-0.5, 15.7, float("nan"), float("inf")])
def test_steps_of_crops_that_cannot_be_are_refused(step: float) -> None:
    with pytest.raises(
        ValueError, match=rf"^PretrainData: crop_step is {step}, a finite number from 0 to max_seconds \(15.625\) is needed"
    ):
        PretrainData(**PROGRAMS[PretrainData], crop_step=step)


@pytest.mark.parametrize("kind", PROGRAMS)
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cuts": ()}, "cuts is empty, at least one manifest"),
        ({"weights": (1.0, 2.0)}, "weights has 2 entries for 1 cuts"),
        ({"min_seconds": 30.0}, "min_seconds is 30.0 and max_seconds"),
        ({"num_buckets": 0}, "num_buckets is 0, a whole number >= 1"),
        ({"buffer_size": 0}, "buffer_size is 0, a whole number >= 1"),
        ({"num_workers": -1}, "num_workers is -1, a whole number >= 0"),
        ({"num_workers": 257}, "num_workers is 257, at most 256"),
        ({"max_check": -1}, "max_check is -1, a whole number >= 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(kind: type[TrainingData], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{kind.__name__}: {said}"):
        kind(**{**PROGRAMS[kind], **settings})
