"""The settings that decode, align and tune_lm share are the same settings, told in the same words."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from k2ssl.bin.align import Align
from k2ssl.bin.decode import Decode
from k2ssl.bin.recognition_job import RecognitionJob
from k2ssl.bin.tune_lm import TuneLm
from k2ssl.bin.write_scores import WriteScores
from k2ssl.config import ConfigError

JOBS = {
    Decode: {"method": "ctc-greedy"},
    Align: {},
    TuneLm: {"method": "ctc-prefix-beam", "token_scores": (0.0, 1.0), "output": "best.json"},
}


@pytest.mark.parametrize("cls", JOBS)
def test_every_setting_is_told_of_once_in_the_words_of_the_program_where_it_has_its_own(cls: type[RecognitionJob]) -> None:
    entries = (cls.__doc__ or "").partition("Attributes:\n")[2]
    for field in fields(cls):
        assert entries.count(f"        {field.name}: ") == 1, field.name
    assert ("with a CTC head" in entries) is (cls is Align) and ("remove results that are in OUTPUT" in entries) is (cls is Decode)
    assert "        device: auto, cpu, cuda or cuda:NUMBER; auto takes the GPU if there is one.\n" in entries
    assert "the mean\n            of the weights is taken.\n        weights: raw" in entries or cls is not TuneLm


@pytest.mark.parametrize("cls", JOBS)
def test_all_refuse_the_same_in_their_own_name(cls: type[RecognitionJob]) -> None:
    good = {"cuts": ("a.jsonl",), "output": "out", **JOBS[cls]}
    assert cls(**good).device == "auto"
    for change, message in (({"cuts": ()}, "cuts names no manifest"), ({"device": "tpu"}, "device is 'tpu', allowed are auto")):
        with pytest.raises(ValueError, match=f"^{cls.__name__}: {message}"):
            cls(**{**good, **change})


@pytest.mark.parametrize("cls", [Align, WriteScores, TuneLm])
@pytest.mark.parametrize("name", ["checkpoints", "after", "cuts", "search.lm"])
def test_no_file_that_is_read_is_written_over(cls: type[RecognitionJob], name: str, tmp_path: Path) -> None:
    read = {key: str(tmp_path / f"{key}.json") for key in ("checkpoints", "after", "cuts", "search.lm")}
    for path in read.values():
        Path(path).write_text("mine")
    inputs = {"checkpoints": (read["checkpoints"],), "cuts": (read["cuts"],), "after": read["after"]}
    job = cls(**{**JOBS.get(cls, {}), **inputs, "output": read[name], "overwrite": True})
    with pytest.raises(ConfigError, match=rf"which is read \({name}: .*\); another file is needed"):
        job.check_file_and_process(**{"search.lm": read["search.lm"]})
