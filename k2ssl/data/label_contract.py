"""Do these labels fit this model and these cuts? Asked before training starts, so that a mistake costs a message and not a month."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lhotse.cut import Cut

from k2ssl.data.label_index import IdListHash, id_digest
from k2ssl.data.labels import LabelStore, cut_digest, samples_of

SKIPPED = "skipped-*.tsv"  # in the folder of a store: lines "ID<tab>reason" of the cuts that labelling left out

_SHOWN = 5
_FAR_SMALLER = 0.8  # of the head's classes; published heads round 500 clusters up to 504


@dataclass(frozen=True)
class ContractReport:
    """What `check_labels_fit` found when nothing was wrong.

    Attributes:
        folder: of the labels.
        num_cuts: how many cuts were looked at.
        num_skipped: how many of them have no labels, as the lists of skipped cuts in the folder say.
        num_classes: of the labels.
        head_classes: of the model's head.
        unused_classes: how many of the labels' classes never occur.
        largest_difference: over the cuts, between a cut's labels and the labels that its frames ask for.
        notes: what is allowed and yet worth reading.
    """

    folder: str
    num_cuts: int
    num_skipped: int
    num_classes: int
    head_classes: int
    unused_classes: int
    largest_difference: float
    notes: tuple[str, ...]

    def text(self) -> str:
        """One line, and one for each note."""
        line = (
            f"labels in {self.folder}: {self.num_classes} classes ({self.unused_classes} unused) for a head of {self.head_classes}, "
            f"{self.num_cuts} cuts checked, lengths within {self.largest_difference:g} labels"
        )
        return "\n".join([line, *(f"note: {note}" for note in self.notes)])


def check_labels_fit(
    store: LabelStore,
    *,
    num_classes: int,
    frame_rate: float,
    sample_rate: int,
    num_frames: Callable[[int], int],
    cuts: Iterable[Cut],
    label_rate: float | None = None,
    max_unused_share: float = 0.5,
    require_lineage: bool = True,
) -> ContractReport:
    """Hold a label store against the model and the cuts that it is to be trained with.

    Cuts without labels are let through, and noted, if labelling listed them as skipped: loading leaves them out.

    Args:
        store: the labels.
        num_classes: of the model's head for this label set.
        frame_rate: frames per second of the frontend, Hz.
        sample_rate: of the audio that the frontend takes, Hz.
        num_frames: frames that the frontend makes of so many samples.
        cuts: every one is checked, in one pass; hand over a sample where the whole list takes too long.
        label_rate: labels per second that the head takes, Hz; the frame rate by default.
        max_unused_share: of the labels' classes that may never occur.
        require_lineage: refuse labels that do not say where they come from.

    Raises:
        ValueError: everything found wrong with the store as a whole or, if nothing is, with the cuts; names both sides of each mismatch.
            Or a list of skipped cuts is damaged.
        OSError: one cannot be read.
    """
    label_rate = frame_rate if label_rate is None else label_rate
    problems = list(_problems_of_store(store, num_classes, label_rate, sample_rate, max_unused_share, require_lineage))
    if problems:
        raise ValueError("\n".join(problems))
    pass_over_cuts = _CutPass(store, label_rate / frame_rate, sample_rate, num_frames)
    for cut in cuts:
        pass_over_cuts.add(cut)
    if problems := list(pass_over_cuts.problems()):
        raise ValueError("\n".join(problems))
    contract = store.contract
    return ContractReport(
        folder=str(store.folder),
        num_cuts=pass_over_cuts.num_cuts,
        num_skipped=pass_over_cuts.num_skipped,
        num_classes=contract.num_classes,
        head_classes=num_classes,
        unused_classes=contract.histogram.count(0),
        largest_difference=pass_over_cuts.largest_difference,
        notes=tuple(_notes(store, num_classes, pass_over_cuts)),
    )


def _problems_of_store(
    store: LabelStore, num_classes: int, label_rate: float, sample_rate: int, max_unused_share: float, require_lineage: bool
) -> Iterator[str]:
    contract, name = store.contract, f"labels in {store.folder}"
    if contract.num_classes > num_classes:
        yield f"{name}: {contract.num_classes} classes, the model's head has {num_classes}"
    if not math.isclose(contract.frame_rate, label_rate, rel_tol=1e-6):
        yield (
            f"{name}: {contract.frame_rate:g} labels per second, the model takes {label_rate:g}; "
            f"where these are meant (MFCC have 100), set model.label_rate to {contract.frame_rate:g}"
        )
    if contract.sampling_rate != sample_rate:
        yield f"{name}: made from audio at {contract.sampling_rate} Hz, the model's frontend takes {sample_rate} Hz"
    unused = contract.histogram.count(0)
    if unused > max_unused_share * contract.num_classes:
        share = unused / contract.num_classes
        yield f"{name}: {unused} of {contract.num_classes} classes never occur ({share:.0%}), allowed is a share of {max_unused_share:.0%}"
    missing = contract.lineage.missing()
    if require_lineage and missing:
        yield f"{name}: the contract does not say where they come from (lineage without {', '.join(missing)}), a known origin is required"


def _notes(store: LabelStore, num_classes: int, checked: _CutPass) -> Iterator[str]:
    if store.contract.num_classes < _FAR_SMALLER * num_classes:
        yield (
            f"labels in {store.folder} have {store.contract.num_classes} classes, the head {num_classes}: "
            f"{num_classes - store.contract.num_classes} outputs will never be a target"
        )
    if checked.num_skipped:
        yield (
            f"labels in {store.folder}: {checked.num_skipped} of {checked.num_cuts} cuts have none, being listed in {SKIPPED} there; "
            "loading leaves them out"
        )
    if checked.num_labelled < len(store):
        yield f"labels in {store.folder} are of {len(store)} cuts, {checked.num_labelled} were checked here"
    if missing := store.contract.lineage.missing():
        yield f"labels in {store.folder} do not say where they come from: lineage without {', '.join(missing)}"


def _skipped_ids(folder: Path) -> set[str]:
    """The cuts that labelling listed as left out; they are few (`max_skipped` of the program)."""
    skipped: set[str] = set()
    for path in sorted(folder.glob(SKIPPED)):
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            cut_id, tab, _ = line.partition(b"\t")
            try:
                skipped.add(cut_id.decode())
            except UnicodeDecodeError:
                tab = b""
            if not tab or not cut_id:
                raise ValueError(f"{path}: line {number} is {line!r}, not a cut id, a tab and a reason")
    return skipped


class _CutPass:
    """One pass over the cuts, collecting what is wrong with them; memory does not grow with their number."""

    def __init__(self, store: LabelStore, labels_per_frame: float, sample_rate: int, num_frames: Callable[[int], int]) -> None:
        self.store = store
        self.labels_per_frame = labels_per_frame
        self.sample_rate = sample_rate
        self.num_frames = num_frames
        self.num_cuts, self.num_labelled, self.num_skipped = 0, 0, 0
        self.largest_difference = 0.0
        self._skipped = _skipped_ids(store.folder)
        self._num_unlabelled, self._num_misfits = 0, 0
        self._unlabelled: list[str] = []
        self._misfits: list[str] = []
        self._ids, self._cuts = IdListHash(), IdListHash()

    def add(self, cut: Cut) -> None:
        """Look at one cut."""
        self.num_cuts += 1
        self._cuts.add(cut_digest(cut))
        if cut.id not in self.store:
            if cut.id in self._skipped:
                self.num_skipped += 1
                return
            self._num_unlabelled += 1
            if len(self._unlabelled) < _SHOWN:
                self._unlabelled.append(repr(cut.id))
            return
        self.num_labelled += 1
        self._ids.add(id_digest(cut.id))
        count = self.store.num_labels(cut.id)
        frames = self.num_frames(samples_of(cut, self.sample_rate))
        difference = abs(count - frames * self.labels_per_frame)
        self.largest_difference = max(self.largest_difference, difference)
        if difference > max(1.0, self.labels_per_frame):
            self._num_misfits += 1
            if len(self._misfits) < _SHOWN:
                self._misfits.append(f"{cut.id!r} has {count} labels, its {frames} frames take {frames * self.labels_per_frame:g}")

    def problems(self) -> Iterator[str]:
        """What is wrong, one message each."""
        name = f"labels in {self.store.folder} (split {self.store.contract.split!r}, {len(self.store)} cuts)"
        if self.num_cuts == 0:
            yield f"{name}: the cut list is empty, nothing can be checked or trained on"
        elif self.num_skipped == self.num_cuts:
            yield f"{name}: all {self.num_cuts} cuts of the cut list were skipped by labelling ({SKIPPED} there), nothing can be trained on"
        if self._num_unlabelled:
            of_another = ": these are labels of another split or cut list" if not self.num_labelled else ""
            shown = _shown(self._unlabelled, self._num_unlabelled)
            listed = f" (and {self.num_skipped} that were skipped)" if self.num_skipped else ""
            yield f"{name}: {self._num_unlabelled} of {self.num_cuts} cuts of the cut list have no labels{listed}{of_another}: {shown}"
        if self._num_misfits:
            shown = _shown(self._misfits, self._num_misfits, "; ")
            yield f"{name}: {self._num_misfits} of {self.num_cuts} cuts have labels of another length (allowed: one frame): {shown}"
        yield from self._problems_of_whole_list(name)

    def _problems_of_whole_list(self, name: str) -> Iterator[str]:
        """A list as long as the labelled one must be that one; a shorter one is a sample or was filtered."""
        labelled = self.store.contract.lineage.cuts_sha256
        if self._num_unlabelled or not self.num_labelled:
            return
        if self.num_labelled == len(self.store) and str(self._ids) != self.store.contract.ids_sha256:
            yield f"{name}: made for the cuts {self.store.contract.ids_sha256} (count:hash of ids), those of the cut list with labels are {self._ids}"
        elif labelled.startswith(f"{self.num_cuts}:") and str(self._cuts) != labelled:
            yield f"{name}: made for the cut list {labelled} (count:hash of ids and durations), this one is {self._cuts}"


def _shown(items: list[str], total: int, separator: str = ", ") -> str:
    return separator.join(items) + (f" and {total - len(items)} more" if total > len(items) else "")
