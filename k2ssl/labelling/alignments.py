"""Phone alignments from CTM files and from TextGrid files, as phones at given times."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SILENCE = "(silence)"  # an interval without text

# Praat reads texts in quotes (a quote inside is doubled), free-standing numbers and flags; all else is comment, such as `xmin =`
_TEXTGRID_TOKEN = re.compile(r'"((?:[^"]|"")*)"|(?<!\S)(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?!\S)|(<exists>|<absent>)')


@dataclass(frozen=True)
class Interval:
    """A phone from `start` to `end`, seconds from the beginning of the utterance."""

    start: float
    end: float
    phone: str


class Alignments:
    """Phones of utterances by name. Where no other alignment has the last part of its path, an utterance also goes by the end of its path, and
    by a longer path that ends in it (`a/7/utt-1`, `7/utt-1` and `utt-1` are the same one).

    Attributes:
        phones: the different phones, sorted.
    """

    def __init__(self, intervals: dict[str, list[Interval]]) -> None:
        self.phones: tuple[str, ...] = tuple(sorted({interval.phone for found in intervals.values() for interval in found}))
        number = {phone: i for i, phone in enumerate(self.phones)}
        self._utterances: dict[str, tuple[Floats, Floats, Ints]] = {}
        for name, found in intervals.items():
            found = sorted(found, key=lambda interval: interval.start)
            starts, ends = np.array([i.start for i in found]), np.array([i.end for i in found])
            self._utterances[name] = (starts, ends, np.array([number[i.phone] for i in found], np.int64))
        last_parts = Counter(_last_part(name) for name in intervals)
        self._by_last_part = {_last_part(name): name for name in intervals if last_parts[_last_part(name)] == 1}

    def __len__(self) -> int:
        return len(self._utterances)

    def __iter__(self) -> Iterator[str]:
        return iter(self._utterances)

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def phones_at(self, name: str, times: Floats) -> Ints:
        """(T,) numbers of the phones at (T,) times (seconds), -1 where no interval covers them.

        Raises:
            ValueError: there is no such utterance.
        """
        known = self._find(name)
        if known is None:
            raise ValueError(f"there is no alignment of {name}")
        starts, ends, phones = self._utterances[known]
        if not len(starts):
            return np.full(len(times), -1, np.int64)
        at = np.searchsorted(starts, times, side="right") - 1
        covered = (at >= 0) & (times < ends[at])
        return np.where(covered, phones[at], -1)

    def _find(self, name: str) -> str | None:
        if name in self._utterances:
            return name
        found = self._by_last_part.get(_last_part(name))
        is_same = found is not None and (name.endswith(f"/{found}") or found.endswith(f"/{name}"))
        return found if is_same else None


def read_alignments(path: str | Path, tier: str = "phones") -> Alignments:
    """Read a CTM file, or a folder with a TextGrid file for each utterance, at any depth; its path without suffix is the utterance's name.

    Args:
        path: a folder, or a CTM file: `utterance channel start duration phone [confidence]`, times in seconds; `;;` begins a comment.
        tier: the interval tier of TextGrid files that holds the phones.

    Raises:
        ValueError: nothing there, a line or a file that cannot be understood, or a TextGrid without that tier.
        OSError: a file cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        return Alignments(_read_ctm(path))
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() == ".textgrid")
    if not files:
        raise ValueError(f"{path}: this folder holds no .TextGrid file")
    intervals: dict[str, list[Interval]] = {}
    for file in files:
        intervals[file.relative_to(path).with_suffix("").as_posix()] = read_textgrid(file, tier)
    return Alignments(intervals)


def _last_part(name: str) -> str:
    return name.rpartition("/")[2]


def _read_ctm(path: Path) -> dict[str, list[Interval]]:
    intervals: dict[str, list[Interval]] = {}
    channels: dict[str, str] = {}
    with path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                columns = line.partition(";;")[0].split()
                if columns:
                    intervals.setdefault(columns[0], []).append(_ctm_interval(columns, f"{path}:{number}"))
                    if columns[1] != channels.setdefault(columns[0], columns[1]):
                        both = f"{channels[columns[0]]} and {columns[1]}"
                        raise ValueError(f"{path}:{number}: {columns[0]} is on channels {both}, one channel for each utterance is needed")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a text file in UTF-8, so no CTM file") from error
    if not intervals:
        raise ValueError(f"{path}: this CTM file is empty")
    return intervals


def _ctm_interval(columns: list[str], where: str) -> Interval:
    if len(columns) not in (5, 6):
        raise ValueError(f"{where}: has {len(columns)} columns, a CTM line is `utterance channel start duration phone [confidence]`")
    try:
        start, duration = float(columns[2]), float(columns[3])
    except ValueError as error:
        raise ValueError(f"{where}: start {columns[2]!r} and duration {columns[3]!r} must be numbers of seconds") from error
    if not (start >= 0 and duration >= 0):
        raise ValueError(f"{where}: start {start} and duration {duration} must be >= 0")
    return Interval(start, start + duration, columns[4])


def read_textgrid(path: str | Path, tier: str = "phones") -> list[Interval]:
    """Intervals of one tier of a TextGrid file, long or short form, UTF-8 or UTF-16; empty texts are silence.

    Raises:
        ValueError: no TextGrid, or none with that interval tier.
    """
    raw = Path(path).read_bytes()
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        tiers = _textgrid_tiers(text)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: cannot be read as a TextGrid file") from error
    if tier not in tiers:
        raise ValueError(f"{path}: no interval tier {tier!r}; it has {', '.join(map(repr, tiers)) or 'none'}")
    return tiers[tier]


def _textgrid_tiers(text: str) -> dict[str, list[Interval]]:
    tokens = [
        match.group(1).replace('""', '"') if match.group(1) is not None else match.group() for match in _TEXTGRID_TOKEN.finditer(text)
    ]
    if tokens[1] != "TextGrid" or tokens[4] != "<exists>":
        raise ValueError("not a TextGrid")
    tiers: dict[str, list[Interval]] = {}
    position = 6
    for _ in range(int(tokens[5])):
        kind, name, count = tokens[position], tokens[position + 1], int(tokens[position + 4])
        position += 5
        width = 3 if kind == "IntervalTier" else 2
        entries = [tokens[position + width * i : position + width * (i + 1)] for i in range(count)]
        position += width * count
        if kind == "IntervalTier":
            tiers[name] = [Interval(float(start), float(end), phone.strip() or SILENCE) for start, end, phone in entries]
    return tiers
