"""Sets with little supervision, drawn from a manifest: what a pre-trained encoder is worth shows where few transcripts are left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import zip_longest

from lhotse.cut import Cut

from k2ssl.data.stable_hash import stable_hash


def draw_limited(cuts: Iterable[Cut], seconds: float, seed: int = 0) -> list[Cut]:
    """As much of `cuts` as fits into a duration, spread over speakers: each gives one cut after the other, in turns.

    So all speakers have as many cuts, or one more, as far as they have so many; the limited sets of arXiv 1912.07875 are spread
    over speakers, too. A cut's place in line is drawn from the seed and its id: a set does not depend on the order of the manifest, and
    a set of fewer seconds lies within one of more.

    Args:
        cuts: with at most one speaker each, that of the first supervision; those without one count as one speaker's.
        seconds: how much is taken, at most; what is left out of it is shorter than a cut.
        seed: of the draw.

    Returns:
        The cuts that were drawn, in the order of `cuts`.

    Raises:
        ValueError: `cuts` hold less than `seconds`, or not one of them fits.
    """
    everything = list(cuts)
    available = sum(cut.duration for cut in everything)
    if not 0 < seconds <= available:
        raise ValueError(f"draw_limited: seconds is {seconds:g}, allowed is more than 0 and at most what there is, {available:.1f}")
    drawn: set[str] = set()
    for cut in _in_turns(everything, seed):
        if cut.duration > seconds:
            break
        seconds -= cut.duration
        drawn.add(cut.id)
    if not drawn:
        raise ValueError(f"draw_limited: seconds is {seconds:g}, less than the first cut that is drawn has")
    return [cut for cut in everything if cut.id in drawn]


def _in_turns(cuts: Iterable[Cut], seed: int) -> Iterable[Cut]:
    """All cuts: the first of every speaker, the second of every speaker that has two, and so on."""
    lines: dict[str, list[Cut]] = defaultdict(list)
    for cut in cuts:
        speaker = cut.supervisions[0].speaker if cut.supervisions else None
        lines[speaker or ""].append(cut)
    speakers = sorted(lines, key=lambda speaker: stable_hash(seed, speaker))
    in_line = [sorted(lines[speaker], key=lambda cut: stable_hash(seed, cut.id)) for speaker in speakers]
    return [cut for turn in zip_longest(*in_line) for cut in turn if cut is not None]
