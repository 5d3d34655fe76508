"""Log-probabilities of utterances in a file, for searches in another environment than that of the model; needs no k2.

An .npz file, without pickles: `ids`, `refs`, `seconds` and `lens` of N utterances, `log_probs` (frames of all utterances, classes) in their
order, the `symbols` of the classes, and the `delimiter` between words, "" where symbols hold the mark of a word.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


@dataclass(frozen=True)
class Scores:
    """What the file holds, as arrays of numpy.

    Attributes:
        ids: (N,) names of the utterances.
        refs: (N,) what was said.
        has_ref: (N,) whether that is known.
        seconds: (N,) of audio.
        lens: (N,) frames, 0 where the audio was too short for one.
        log_probs: (sum of lens, V) float32.
        symbols: (V,) texts of the tokens; the first is blank.
        delimiter: the token between words, "" for none.
    """

    ids: Any
    refs: Any
    has_ref: Any
    seconds: Any
    lens: Any
    log_probs: Any
    symbols: Any
    delimiter: str = ""

    def frames(self) -> list[Any]:
        """The log-probabilities of each utterance, (frames, V)."""
        return np.split(self.log_probs, np.cumsum(self.lens)[:-1])


def write_scores(file: BinaryIO, scores: Scores) -> None:
    """Write what the file holds."""
    content: dict[str, Any] = {field.name: np.asarray(getattr(scores, field.name)) for field in fields(Scores)}
    np.savez(file, **content)


def read_scores(path: str | Path) -> Scores:
    """
    Raises:
        ValueError: no such file, or it is damaged, or its arrays do not fit together.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            content = {field.name: arrays[field.name] for field in fields(Scores)}
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: no file of scores of k2ssl.bin.write_scores: {error}") from error
    content["delimiter"] = str(content["delimiter"])
    scores = Scores(**content)
    number = len(scores.ids)
    if any(len(getattr(scores, name)) != number for name in ("refs", "has_ref", "seconds", "lens")):
        raise ValueError(f"{path}: its arrays are not of as many utterances")
    if scores.log_probs.shape != (int(scores.lens.sum()), len(scores.symbols)):
        raise ValueError(
            f"{path}: log_probs has shape {scores.log_probs.shape}, ({int(scores.lens.sum())}, {len(scores.symbols)}) is needed"
        )
    return scores
