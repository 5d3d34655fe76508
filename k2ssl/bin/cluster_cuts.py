"""What the clustering programs share: which audio, what it adds up to, and what of it had to be left out."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from k2ssl import distributed
from k2ssl.config import ConfigError

if TYPE_CHECKING:  # slow to import, and not needed to show --help
    from lhotse.cut import Cut

# How long one process waits for another. Their shares of a long labelling end hours apart; one that died is noticed by its launcher.
PATIENCE_MINUTES = 7 * 24 * 60.0

_MOST_WORKERS = max(1024, 4 * (os.cpu_count() or 1))
_LISTED = 20  # skipped cuts to look at, before a run ends early on account of them


@dataclass(frozen=True)
class LoaderConfig:
    """How audio is read.

    Attributes:
        max_duration: audio in a batch, s, padding included; a GPU is busier with more.
        num_workers: processes that decode audio; 0 decodes in the program itself.
    """

    max_duration: float = 200.0
    num_workers: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.max_duration <= 10**6:
            raise ValueError(f"LoaderConfig: max_duration is {self.max_duration}, allowed is > 0 and at most 1,000,000 seconds")
        if not 0 <= self.num_workers <= _MOST_WORKERS:
            raise ValueError(f"LoaderConfig: num_workers is {self.num_workers}, allowed are 0 to {_MOST_WORKERS} processes")


def check_job(job: Any) -> None:
    """Refuse settings that the programs share: cuts, device, max_skipped.

    Raises:
        ValueError: names the class, the field, the value and what is allowed.
    """
    name = type(job).__name__
    if not job.cuts:
        raise ValueError(f"{name}: cuts names no manifest, at least one is needed")
    if not 0 <= job.max_skipped <= 1:
        raise ValueError(f"{name}: max_skipped is {job.max_skipped}, allowed is a share from 0 to 1")
    check_device(job.device, f"{name}: ")


def check_seed(whose: str, seed: int) -> None:
    """Refuse what torch takes for no seed.

    Raises:
        ValueError: names it, and `whose` it is.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"{whose}: seed is {seed}, a whole number from 0 to 2^63 - 1 is needed")


def check_device(name: str, whose: str = "") -> None:
    """Refuse what is no name of a device.

    Raises:
        ValueError: names what is allowed.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise ValueError(f"{whose}device is {name!r}, allowed are auto, cpu, cuda and cuda:NUMBER")


def check_files(**paths: str | tuple[str, ...] | None) -> None:
    """Refuse settings that name files which are not there, before anything else is done.

    Raises:
        ConfigError: names the setting and the path.
    """
    for name, given in paths.items():
        for path in (given,) if isinstance(given, str) else given or ():
            if not Path(path).is_file():
                raise ConfigError(f"{name}: {path}: {what_is_there(path)}")


def what_is_there(path: str) -> str:
    """Of a path that is no file."""
    if not Path(path).is_dir():
        return "there is no such file"
    newest = max((*Path(path).glob("step-*[0-9].pt"), *Path(path).glob("checkpoints/step-*[0-9].pt")), default=None)
    return "this is a folder, not a file" if newest is None else f"this is the folder of a run, whose newest checkpoint is {newest}"


@dataclass(frozen=True)
class CutLists:
    """Manifests one after the other, read lazily each time they are iterated over."""

    paths: tuple[str, ...]

    def open(self) -> list[Iterable[Cut]]:
        """One lazy list for each manifest, checked as `read_cuts` does."""
        from k2ssl.data.cuts import read_cuts

        return [read_cuts(path) for path in self.paths]

    def seconds(self) -> float | None:
        """Of audio, as the summaries beside the manifests say; None if one has none."""
        from k2ssl.data.cuts import read_summary

        summaries = [read_summary(path).get("summary") for path in self.paths]
        hours = [summary.get("hours") if isinstance(summary, Mapping) else None for summary in summaries]
        return None if None in hours else 3600 * sum(hours)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Chained:
    """Several lists as one, which can be iterated over again; of them every `num_shares`-th cut from cut `share` on that is not `done`."""

    lists: list[Iterable[Cut]]
    share: int = 0
    num_shares: int = 1
    done: object = ()

    def __iter__(self) -> Iterator[Cut]:
        cuts = (cut for cuts in self.lists for cut in cuts)
        for number, cut in enumerate(cuts):
            if number % self.num_shares == self.share and cut.id not in self.done:  # type: ignore[operator]
                yield cut


@dataclass(frozen=True)
class CorpusPart:
    """The cuts of one part of a corpus, see `k2ssl.labelling.corpus_parts`; can be iterated over again."""

    cuts: Iterable[Cut]
    part: int
    num_parts: int
    seed: int

    def __iter__(self) -> Iterator[Cut]:
        from k2ssl.labelling.corpus_parts import part_of

        return (cut for cut in self.cuts if part_of(cut.id, self.seed, self.num_parts) == self.part)


@dataclass(frozen=True)
class Survey:
    """What a pass over the manifests tells: the hash of the cut list, how many cuts, how many seconds, and how many parts to deal them to."""

    cuts_sha256: str
    num_cuts: int
    seconds: float
    num_parts: int = 1


def on_main(work: Callable[[], Survey]) -> Survey:
    """What `work` returns on rank 0, on all ranks; only there it is called.

    Raises:
        Exception: what `work` raises; on the other ranks an `OtherRankError`.
    """
    text = b""
    with distributed.failing_together():
        if distributed.is_main():
            text = json.dumps(vars(work())).encode()
    size = distributed.broadcast(torch.tensor(len(text)))
    sent = torch.tensor(list(text), dtype=torch.uint8) if distributed.is_main() else torch.zeros(int(size), dtype=torch.uint8)
    return Survey(**json.loads(bytes(distributed.broadcast(sent).tolist())))


class SkippedCuts:
    """Cuts that had to be left out, with the reasons, listed in a file as they come.

    Attributes:
        share: of the cuts that this program reads, once it has read all it will read, for a program that does not read all.
    """

    def __init__(self, path: Path, num_cuts: int, max_skipped: float, resume: bool = False, advice: str = "") -> None:
        """
        Args:
            path: of this rank's list; without skipped cuts there is none.
            num_cuts: in the manifests.
            max_skipped: share of them that may be skipped.
            resume: go on with the list of an interrupted run, instead of beginning anew.
            advice: what else to do when more are skipped.
        """
        self.advice = advice
        self.path, self.num_cuts, self.max_skipped, self.share = path, num_cuts, max_skipped, 1.0
        self.reasons: dict[str, str] = read_skipped(path) if resume else {}
        if not self.reasons:
            path.unlink(missing_ok=True)

    def __call__(self, cut_id: str, reason: str) -> None:
        """One more, unless it is known already.

        Raises:
            ValueError: there are more than allowed, and enough of them in the list to find out why.
        """
        if cut_id in self.reasons:
            return
        self.reasons[cut_id] = " ".join(reason.split())
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(f"{cut_id}\t{self.reasons[cut_id]}\n")
        if len(self.reasons) > _LISTED:
            self.check(len(self.reasons), " so far")

    def check(self, number: int, so_far: str = "", of_all: bool = False) -> None:
        """Refuse more than is allowed.

        Args:
            number: skipped cuts, of this rank or of all.
            so_far: to be said of the number.
            of_all: hold it against all cuts, of which no later reading can make it a smaller share, whatever `share` says.

        Raises:
            ValueError: names the numbers, the lists, the first reason, and the share with which the same command goes on.
        """
        total = self.num_cuts * (1.0 if of_all else self.share)
        if number > self.max_skipped * total:
            first = next((f"; the first is {cut_id}: {reason}" for cut_id, reason in self.reasons.items()), "")
            raise ValueError(
                f"{number} of {math.ceil(total)} cuts{so_far} ({number / total:.1%}) cannot be used, max_skipped is {self.max_skipped:.1%}: "
                f"see {self.path.parent}/{self.path.name.rpartition('skipped-')[0]}skipped-*.tsv{first}; "
                f"--max-skipped {_rounded_up(number / total)} goes on with what is done{self.advice}"
            )

    def check_together(self, of_all: bool = False) -> int:
        """As `check`, of the cuts that any rank has skipped; on rank 0 their number is returned. To be called on every rank.

        Raises:
            ValueError: see `check`; on the other ranks an `OtherRankError`.
        """
        everyone, number = distributed.gather_objects(set(self.reasons)), 0
        with distributed.failing_together():
            if everyone is not None:
                number = len(set.union(*everyone))
                self.check(number, of_all=of_all)
        return number


def _rounded_up(share: float) -> str:
    """Of a share > 0, two digits."""
    digits = 1 - math.floor(math.log10(share))
    return f"{min(1.0, math.ceil(share * 10**digits) / 10**digits):.{digits}f}"


def read_skipped(path: Path) -> dict[str, str]:
    """The cuts that a list names, with the reasons; none if there is no list."""
    if not path.exists():
        return {}
    lines = (line.partition("\t") for line in path.read_text(encoding="utf-8").split("\n"))
    return {cut_id: reason for cut_id, tab, reason in lines if tab}  # a kill may have torn the last line


def id_checker(verb: str) -> Callable[[Cut], None]:
    """A function to show every cut to; it refuses one whose id another had before, in the same manifest or not.

    Args:
        verb: what may be done with the manifests apart, such as "decode".
    """
    ids: set[str] = set()

    def check(cut: Cut) -> None:
        if cut.id in ids:
            raise ConfigError(f"cuts: the id {cut.id!r} occurs twice; {verb} the manifests apart, or make manifests whose ids differ")
        ids.add(cut.id)

    return check


def cut_totals(cuts: Iterable[Cut], seen: Callable[[Cut], None]) -> Survey:
    """Read the manifests through once, showing every cut to `seen`."""
    from k2ssl.data.labels import cut_list_hash

    num_cuts, seconds = 0, 0.0

    def counted() -> Iterator[Cut]:
        nonlocal num_cuts, seconds
        for cut in cuts:
            seen(cut)
            num_cuts, seconds = num_cuts + 1, seconds + cut.duration
            yield cut

    return Survey(cut_list_hash(counted()), num_cuts, seconds)
