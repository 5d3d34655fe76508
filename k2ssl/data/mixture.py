"""Several corpora as one stream of cuts, drawn by weight."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lhotse.cut import Cut
from lhotse.utils import fastcopy

from k2ssl.data.stable_hash import stable_hash

_REPETITION = "repetition"  # key among a cut's custom fields


@dataclass(frozen=True)
class Corpora:
    """What an epoch is made of.

    Attributes:
        sets: cut sets, lazy or not, each iterated from its beginning in every epoch.
        weights: of which set the next cut is drawn, relative numbers of *cuts*, one > 0 for each set; None: all alike.
        repeat: keep the proportions to the end: a set that is used up starts again until every set has been read once, which ends the
            epoch. False: every cut once; sets that are used up drop out, so that weights shape the order only (as in lhotse's mux;
            the published recipes do so with weights that are the sizes of the sets).

    Raises:
        ValueError: no set, or weights that do not fit.
    """

    sets: tuple[Iterable[Cut], ...]
    weights: tuple[float, ...] | None = None
    repeat: bool = True

    def __post_init__(self) -> None:
        if not self.sets:
            raise ValueError("Corpora: sets is empty, at least one cut set is needed")
        if self.weights is not None and len(self.weights) != len(self.sets):
            raise ValueError(f"Corpora: weights has {len(self.weights)} entries, {len(self.sets)} are needed, one per cut set")
        if self.weights is not None and not all(math.isfinite(weight) and weight > 0 for weight in self.weights):
            raise ValueError(f"Corpora: weights is {self.weights}, finite numbers > 0 are needed")

    def cuts(self, seed: int, epoch: int) -> Iterator[Cut]:
        """The cuts of an epoch. A cut's later appearances in it are copies that `repetition` tells apart."""
        if len(self.sets) == 1:
            yield from self.sets[0]
            return
        draw = random.Random(stable_hash("mixture", seed, epoch))
        sources = [iter(cuts) for cuts in self.sets]
        rounds = [0] * len(sources)  # how often each set has been read to its end
        weights = list(self.weights or (1.0,) * len(sources))
        while any(weights):
            i = draw.choices(range(len(sources)), weights)[0]
            cut = next(sources[i], None)
            if cut is not None:
                yield _marked(cut, rounds[i])
                continue
            rounds[i] += 1
            if self.repeat and all(rounds):
                return
            if self.repeat:
                sources[i] = iter(self.sets[i])
            else:
                weights[i] = 0.0

    def identity(self) -> dict[str, Any]:
        """What two mixtures must have in common to give the same cuts, apart from the sets themselves."""
        return {"num_sets": len(self.sets), "weights": None if self.weights is None else list(self.weights), "repeat": self.repeat}


def repetition(cut: Cut) -> int:
    """How often the cut was drawn before in this epoch."""
    return int((cut.custom or {}).get(_REPETITION, 0))


def _marked(cut: Cut, rounds: int) -> Cut:
    return fastcopy(cut, custom={**(cut.custom or {}), _REPETITION: rounds}) if rounds else cut
