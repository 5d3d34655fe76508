"""`hypotheses.jsonl`: what decoding found, one utterance a line, as JSON in UTF-8.

    {"id": "utt1", "ref": "a cat", "hyp": "a hat", "score": -3.2, "duration": 1.5, "speaker": "anna",
     "timestamps": [["a", 0.1, 0.2], ["hat", 0.3, 0.7]], "nbest": [{"hyp": "a hat", "score": -3.2}, {"hyp": "a cat", "score": -4.1}]}

`id`, `hyp`, `score` and `duration` are needed; `ref` and `speaker` may be null, and all others may be absent. A `ref` of "" says that nothing
was said, null that nobody knows. A key of another name is refused, because a misspelt one would drop what it holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_KEYS = ("id", "ref", "hyp", "score", "duration", "speaker", "timestamps", "nbest")
_NEEDED = ("id", "hyp", "score", "duration")


@dataclass(frozen=True, slots=True)
class Word:
    """When a word was said.

    Attributes:
        text: the word.
        begin, end: seconds from the beginning of the utterance.

    Raises:
        ValueError: not 0 <= begin <= end, or a time that is not finite.
    """

    text: str
    begin: float
    end: float

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.end < math.inf:
            raise ValueError(f"Word: {self.text!r} from {self.begin} to {self.end} s, allowed are 0 <= begin <= end")


@dataclass(frozen=True, slots=True)
class Alternative:
    """One of the best hypotheses.

    Attributes:
        hyp: the text.
        score: its log-probability in nats.

    Raises:
        ValueError: the score is not finite.
    """

    hyp: str
    score: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.score):
            raise ValueError(f"Alternative: score is {self.score}, a finite number is needed")


@dataclass(frozen=True, slots=True)
class Result:
    """What decoding found in one utterance.

    Attributes:
        id: of the utterance; not empty.
        hyp: the best text.
        score: its log-probability in nats, of whatever the search sums over.
        duration: of the audio, in seconds.
        ref: what was said; "" for nothing, None if nobody knows.
        speaker: who said it; None if nobody knows.
        words: of `hyp`, with times; empty where the search does not know.
        nbest: the best hypotheses, the best first; empty if they were not asked for.

    Raises:
        ValueError: `id` is empty, `score` is not finite, or `duration` is negative or not finite.
    """

    id: str
    hyp: str
    score: float
    duration: float
    ref: str | None = None
    speaker: str | None = None
    words: tuple[Word, ...] = ()
    nbest: tuple[Alternative, ...] = ()

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("Result: id is empty, a name is needed")
        if not math.isfinite(self.score):
            raise ValueError(f"Result: score of {self.id!r} is {self.score}, a finite number is needed")
        if not 0 <= self.duration < math.inf:
            raise ValueError(f"Result: duration of {self.id!r} is {self.duration} s, allowed is >= 0")


def to_line(result: Result) -> str:
    """The line of a result, without the line break; `from_line` gives an equal result back."""
    content = {
        "id": result.id,
        "ref": result.ref,
        "hyp": result.hyp,
        "score": result.score,
        "duration": result.duration,
        "speaker": result.speaker,
        "timestamps": [[word.text, word.begin, word.end] for word in result.words],
        "nbest": [{"hyp": other.hyp, "score": other.score} for other in result.nbest],
    }
    return json.dumps(content, ensure_ascii=False, allow_nan=False)


def from_line(text: str) -> Result:
    """The result that a line holds.

    Raises:
        ValueError: the line is not JSON, or has a wrong key or value; says which.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{_shown(content)}, an object in braces is needed")
    for key in content:
        if key not in _KEYS:
            raise ValueError(f"key {key!r} is unknown, allowed are {', '.join(_KEYS)}")
    for key in _NEEDED:
        if key not in content:
            raise ValueError(f"key {key!r} is missing")
    return Result(
        id=_text(content["id"], "id"),
        hyp=_text(content["hyp"], "hyp"),
        score=_number(content["score"], "score"),
        duration=_number(content["duration"], "duration"),
        ref=None if content.get("ref") is None else _text(content["ref"], "ref"),
        speaker=None if content.get("speaker") is None else _text(content["speaker"], "speaker"),
        words=tuple(_word(entry) for entry in _list(content.get("timestamps", []), "timestamps")),
        nbest=tuple(_alternative(entry) for entry in _list(content.get("nbest", []), "nbest")),
    )


def iterate_results(path: str | Path) -> Iterator[Result]:
    """The results of a file in its order, one at a time; empty lines are passed over.

    Raises:
        ValueError: a line is wrong, or an utterance appears twice; names the file, the line and what is wrong.
        OSError: the file cannot be read.
    """
    lines: dict[str, int] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                result = from_line(line.decode("utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            if result.id in lines:
                raise ValueError(f"{path}, line {number}: utterance {result.id!r} is also in line {lines[result.id]}; ids must differ")
            lines[result.id] = number
            yield result


def read_results(path: str | Path) -> list[Result]:
    """All results of a file, in its order.

    Raises:
        ValueError: as `iterate_results`.
        OSError: the file cannot be read.
    """
    return list(iterate_results(path))


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} is {_shown(value)}, a text is needed")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{key} is {value!r}, which holds half a character (a lone surrogate)") from error
    return value


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} is {_shown(value)}, a number is needed")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{key} is {_shown(value)}, which is too large") from error


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{key} is {_shown(value)}, a list is needed")
    return value


def _word(entry: Any) -> Word:
    if not isinstance(entry, list) or len(entry) != 3:
        raise ValueError(f"timestamps holds {_shown(entry)}, [word, begin, end] is needed")
    return Word(_text(entry[0], "word of timestamps"), _number(entry[1], "begin of timestamps"), _number(entry[2], "end of timestamps"))


def _alternative(entry: Any) -> Alternative:
    if not isinstance(entry, dict) or sorted(entry) != ["hyp", "score"]:
        raise ValueError(f'nbest holds {_shown(entry)}, {{"hyp": TEXT, "score": NUMBER}} is needed')
    return Alternative(_text(entry["hyp"], "hyp of nbest"), _number(entry["score"], "score of nbest"))


def _shown(value: Any) -> str:
    """A value of a file in a message; the long ones cut."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:57]}..."
