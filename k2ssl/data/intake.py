"""Which cuts of a manifest are used, and as what."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

from lhotse.cut import Cut, MultiCut

_log = logging.getLogger(__name__)


class Intake:
    """Lets through the cuts that can be used, at one sample rate and with one channel; looks at the manifest only.

    What is changed is logged once: the first cut of each other sample rate (resampled when it is read), and the first cut of several
    channels (the first channel is taken). What is refused is counted.

    Args:
        sample_rate: Hz, of the samples wanted.
        min_seconds: shorter cuts are refused; a cut without a single sample always is.
        max_seconds: longer cuts are refused; None refuses none.
        need_text: refuse cuts whose transcript is empty.
        labelled: refuse cuts whose id is missing in any of these; label stores answer from their index, without reading labels.
        on_refusal: told (cut id, reason) of every cut that is refused.
    """

    def __init__(
        self,
        sample_rate: int,
        min_seconds: float = 0.0,
        max_seconds: float | None = None,
        need_text: bool = False,
        labelled: Sequence[Container[str]] = (),
        on_refusal: Callable[[str, str], None] | None = None,
    ) -> None:
        self.sample_rate = sample_rate
        self.min_samples = max(1, round(min_seconds * sample_rate))
        self.max_samples = None if max_seconds is None else round(max_seconds * sample_rate)
        self.need_text = need_text
        self.labelled = tuple(labelled)
        self.on_refusal = on_refusal
        self.excluded: Counter[str] = Counter()
        self._said: set[object] = set()

    def __call__(self, cuts: Iterable[Cut], tell: bool = True) -> Iterator[Cut]:
        """The cuts let through, in order. `excluded` counts, by reason, the others of this pass; `tell` calls `on_refusal` with them."""
        self.excluded.clear()
        for cut in cuts:
            reason = self.refusal(cut)
            if reason is None:
                yield self.adapt(cut)
            else:
                self.excluded[reason] += 1
                if tell and self.on_refusal is not None:
                    self.on_refusal(cut.id, reason)

    def copy(self) -> Intake:
        """One that lets the same cuts through and counts for itself."""
        other = copy.copy(self)
        other.excluded = Counter()
        return other

    def refusal(self, cut: Cut) -> str | None:
        """Why `cut` cannot be used, or None if it can."""
        samples = round(cut.duration * self.sample_rate)
        if samples < self.min_samples:
            return "without a sample" if samples < 1 else f"shorter than {self.min_samples / self.sample_rate:g} s"
        if self.max_samples is not None and samples > self.max_samples:
            return f"longer than {self.max_samples / self.sample_rate:g} s"
        if not cut.has_recording:
            return "without a recording"
        if self.need_text and not transcript(cut):
            return "with an empty transcript"
        if not all(cut.id in store for store in self.labelled):
            return "without labels"
        return None

    def identity(self) -> dict[str, Any]:
        """What two must have in common to let the same cuts through, apart from what is labelled."""
        return {name: getattr(self, name) for name in ("sample_rate", "min_samples", "max_samples", "need_text")}

    def adapt(self, cut: Cut) -> Cut:
        """`cut` with one channel and at the wanted rate; nothing is read."""
        if isinstance(cut, MultiCut):
            self._say_once("channels", f"cut {cut.id} has {cut.num_channels} channels; of such cuts the first channel is used")
            cut = _first_channel(cut)
        if cut.sampling_rate != self.sample_rate:
            rate = cut.sampling_rate
            self._say_once(rate, f"cut {cut.id} is at {rate} Hz; such cuts are resampled to {self.sample_rate} Hz while they are read")
            cut = cut.resample(self.sample_rate)
        return cut

    def _say_once(self, what: object, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            _log.warning(message)


def transcript(cut: Cut) -> str:
    """The texts of a cut's supervisions in order of time, joined by spaces; empty if there are none. Of several channels the first counts."""
    if isinstance(cut, MultiCut):
        cut = _first_channel(cut)
    texts = (supervision.text for supervision in sorted(cut.supervisions, key=lambda s: s.start))
    return " ".join(text.strip() for text in texts if text and text.strip())


def _first_channel(cut: MultiCut) -> Cut:
    channels: Sequence[Any] = cut.channel if isinstance(cut.channel, list) else [cut.channel]
    return min(cut.to_mono(), key=lambda mono: channels.index(mono.channel)).with_id(cut.id)
