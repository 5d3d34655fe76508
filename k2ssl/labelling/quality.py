"""How good are frame labels? How evenly classes are used, how they agree with other labels, how well they follow phones.

Everything is computed from counts that are added up utterance by utterance, so memory does not grow with the corpus.

Source of the phone measures: arXiv 2106.07447 (HuBERT), section IV-D: with the joint distribution p(y, z) of phones y and classes z over
frames, phone purity is the sum over z of max_y p(y, z), cluster purity the sum over y of max_z p(y, z), and PNMI is I(y; z) / H(y).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from k2ssl.labelling.alignments import Alignments

Counts = npt.NDArray[np.int64]
Labels = npt.NDArray[Any]

LONGEST_RUN = 50  # runs of at least as many labels share the last bin of the histogram of run lengths


class OtherLabels(Protocol):
    """Labels of the same utterances to compare with, such as those of the previous iteration in a label store."""

    def __contains__(self, cut_id: str) -> bool: ...

    def labels(self, cut_id: str) -> Labels: ...


@dataclass(frozen=True)
class Usage:
    """How classes are used.

    Attributes:
        num_utterances, num_labels: how many were counted.
        hours: of audio that the labels span.
        frame_rate: labels per second, Hz.
        histogram: (K,) how many labels each class has.
        run_histogram: how many runs of equal labels have length 1, 2, ...; the last bin also holds all longer ones.
        entropy: of the usage, bits; log2 K where all classes are used equally.
        perplexity: 2 to the entropy: as many equally used classes would be as unpredictable.
        dead_classes: classes without a label.
        mean_run: mean length of runs of equal labels within an utterance, labels.
    """

    num_utterances: int
    num_labels: int
    hours: float
    frame_rate: float
    histogram: tuple[int, ...]
    run_histogram: tuple[int, ...]
    entropy: float
    perplexity: float
    dead_classes: int
    mean_run: float


@dataclass(frozen=True)
class Agreement:
    """How much labels tell about other labels of the same audio.

    Attributes:
        nmi: mutual information over the mean of both entropies, 0 (independent) to 1 (the same up to names).
        num_labels: pairs counted: one for each of our labels, at the middle of its frame.
        utterances_in_both: how many utterances have both.
        other_classes, other_frame_rate: of the labels compared with; the rate in Hz.
    """

    nmi: float
    num_labels: int
    utterances_in_both: int
    other_classes: int
    other_frame_rate: float


@dataclass(frozen=True)
class PhoneScores:
    """How well classes follow phones; see the head of this file.

    Attributes:
        phone_purity: share of frames with the phone that is most frequent in their class.
        cluster_purity: share of frames with the class that is most frequent in their phone; few classes make it large.
        pnmi: share of the phone's entropy that the class explains.
        num_phones: different phones, silence among them.
        num_labels: labels whose middle lies in a phone.
        labels_without_phone: of aligned utterances, labels outside every interval; counted nowhere else.
        utterances_aligned: utterances with an alignment.
        joint: (phones, K) how many labels of each class lie in each phone.
        phones: the names of its rows.
    """

    phone_purity: float
    cluster_purity: float
    pnmi: float
    num_phones: int
    num_labels: int
    labels_without_phone: int
    utterances_aligned: int
    joint: tuple[tuple[int, ...], ...]
    phones: tuple[str, ...]


@dataclass(frozen=True)
class LabelQuality:
    """What is known of a set of labels; `previous` and `phones` only where there was something to compare with."""

    usage: Usage
    previous: Agreement | None = None
    phones: PhoneScores | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def table(self) -> str:
        """A few lines for people."""
        use = self.usage
        most = int(np.argmax(use.histogram))
        num_classes = len(use.histogram)
        rows = [
            ("labels", f"{use.num_labels:,} at {use.frame_rate:g} Hz: {use.num_utterances:,} utterances, {use.hours:.2f} h"),
            ("classes", f"{num_classes}, unused: {use.dead_classes} ({use.dead_classes / num_classes:.1%})"),
            ("perplexity", f"{use.perplexity:.1f} (entropy {use.entropy:.2f} of {np.log2(num_classes):.2f} bits)"),
            ("most used", f"class {most} with {use.histogram[most] / use.num_labels:.1%} of the labels"),
            ("mean run", f"{use.mean_run:.2f} labels ({1000 * use.mean_run / use.frame_rate:.0f} ms)"),
        ]
        if self.previous is not None:
            other = self.previous
            name = f"{other.other_classes} classes at {other.other_frame_rate:g} Hz, {other.utterances_in_both:,} utterances in both"
            rows.append(("agreement", f"NMI {other.nmi:.4f} with the previous labels ({name})"))
        if self.phones is not None:
            phones = self.phones
            scores = f"phone purity {phones.phone_purity:.4f}, cluster purity {phones.cluster_purity:.4f}, PNMI {phones.pnmi:.4f}"
            rows.append(("phones", f"{scores} ({phones.num_phones} phones, {phones.num_labels:,} labels)"))
        return "\n".join(f"{name:<12}{text}" for name, text in rows)


def measure_quality(
    utterances: Iterable[tuple[str, Labels]],
    num_classes: int,
    frame_rate: float,
    *,
    previous: OtherLabels | None = None,
    previous_classes: int = 0,
    previous_rate: float = 0.0,
    alignments: Alignments | None = None,
) -> LabelQuality:
    """Measure labels in one pass.

    Args:
        utterances: pairs of utterance name and (L,) integer labels.
        num_classes: K.
        frame_rate: labels per second, Hz; label t stands for the time from t / rate to (t + 1) / rate.
        previous: labels to compare with, at their own rate; needs `previous_classes` and `previous_rate` (Hz).
        alignments: phones of some of the utterances.

    Raises:
        ValueError: no labels at all; labels outside the classes; nothing in common with `previous` or with `alignments`.
    """
    usage = UsageCounts(num_classes, frame_rate)
    agreement = None if previous is None else _AgreementCounts(previous, previous_classes, previous_rate, num_classes, frame_rate)
    phones = None if alignments is None else _PhoneCounts(alignments, num_classes, frame_rate)
    for name, labels in utterances:
        usage.add(name, labels)
        for counts in (agreement, phones):
            if counts is not None:
                counts.add(name, labels)
    return LabelQuality(usage.result(), None if agreement is None else agreement.result(), None if phones is None else phones.result())


class UsageCounts:
    """Adds up what `Usage` is computed from."""

    def __init__(self, num_classes: int, frame_rate: float) -> None:
        if num_classes < 1 or not frame_rate > 0:
            raise ValueError(f"num_classes is {num_classes} and frame_rate {frame_rate} Hz, both must be > 0")
        self.frame_rate = frame_rate
        self.histogram: Counts = np.zeros(num_classes, np.int64)
        self.runs: Counts = np.zeros(LONGEST_RUN, np.int64)
        self.num_utterances = self.num_runs = 0

    def add(self, name: str, labels: Labels) -> None:
        """Count the (L,) labels of an utterance.

        Raises:
            ValueError: a label outside the classes.
        """
        self.num_utterances += 1
        if not len(labels):
            return
        check_range(f"labels of {name}", labels, len(self.histogram))
        self.histogram += np.bincount(labels, minlength=len(self.histogram))
        ends = np.append(np.flatnonzero(labels[1:] != labels[:-1]), len(labels) - 1)
        lengths = np.diff(ends, prepend=-1)
        self.num_runs += len(lengths)
        self.runs += np.bincount(np.minimum(lengths, LONGEST_RUN) - 1, minlength=LONGEST_RUN)

    def result(self) -> Usage:
        """Of what has been counted.

        Raises:
            ValueError: there was nothing to count.
        """
        total = int(self.histogram.sum())
        if total == 0:
            raise ValueError(f"there are no labels in {self.num_utterances} utterances")
        bits = entropy(self.histogram) / np.log(2)
        return Usage(
            num_utterances=self.num_utterances,
            num_labels=total,
            hours=total / self.frame_rate / 3600,
            frame_rate=self.frame_rate,
            histogram=tuple(self.histogram.tolist()),
            run_histogram=tuple(self.runs.tolist()),
            entropy=float(bits),
            perplexity=float(2**bits),
            dead_classes=int((self.histogram == 0).sum()),
            mean_run=total / self.num_runs,
        )


class _AgreementCounts:
    def __init__(self, other: OtherLabels, other_classes: int, other_rate: float, num_classes: int, rate: float) -> None:
        if other_classes < 1 or not other_rate > 0:
            raise ValueError(f"previous_classes is {other_classes} and previous_rate {other_rate} Hz, both must be > 0")
        self.other, self.other_rate, self.rate = other, other_rate, rate
        self.joint: Counts = np.zeros((num_classes, other_classes), np.int64)
        self.num_utterances = 0

    def add(self, name: str, labels: Labels) -> None:
        if name not in self.other:
            return
        self.num_utterances += 1
        theirs = self.other.labels(name)
        check_range(f"previous labels of {name}", theirs, self.joint.shape[1])
        # a little is added so that rounding does not make 2.9999999 of 3, where one rate is a multiple of the other
        at = (middles(len(labels), self.rate) * self.other_rate + 1e-6).astype(np.int64)
        at = at[at < len(theirs)]
        add_pairs(self.joint, labels[: len(at)], theirs[at])

    def result(self) -> Agreement:
        if not self.joint.any():
            raise ValueError("the previous labels are of other utterances: none is in both")
        return Agreement(
            normalized_mutual_information(self.joint), int(self.joint.sum()), self.num_utterances, self.joint.shape[1], self.other_rate
        )


class _PhoneCounts:
    def __init__(self, alignments: Alignments, num_classes: int, rate: float) -> None:
        self.alignments, self.rate = alignments, rate
        self.joint: Counts = np.zeros((len(alignments.phones), num_classes), np.int64)
        self.num_utterances = self.outside = 0

    def add(self, name: str, labels: Labels) -> None:
        if name not in self.alignments:
            return
        self.num_utterances += 1
        phones = self.alignments.phones_at(name, middles(len(labels), self.rate))
        inside = phones >= 0
        self.outside += int((~inside).sum())
        add_pairs(self.joint, phones[inside], labels[inside])

    def result(self) -> PhoneScores:
        if not self.joint.any():
            example = next(iter(self.alignments), "none")
            raise ValueError(f"the alignments are of other utterances: none is in both (an aligned one: {example})")
        used = self.joint.sum(axis=1) > 0
        joint = self.joint[used]
        total = int(joint.sum())
        return PhoneScores(
            phone_purity=int(joint.max(axis=0).sum()) / total,
            cluster_purity=int(joint.max(axis=1).sum()) / total,
            pnmi=phone_normalized_mutual_information(joint),
            num_phones=len(joint),
            num_labels=total,
            labels_without_phone=self.outside,
            utterances_aligned=self.num_utterances,
            joint=tuple(map(tuple, joint.tolist())),
            phones=tuple(phone for phone, there in zip(self.alignments.phones, used, strict=True) if there),
        )


def middles(num_frames: int, rate: float) -> npt.NDArray[Any]:
    """(T,) times of the middles of frames, seconds."""
    return (np.arange(num_frames) + 0.5) / rate


def add_pairs(joint: Counts, rows: Labels, columns: Labels) -> None:
    """Count the pairs (rows[i], columns[i]) in the table `joint`, in place."""
    cells = rows.astype(np.int64) * joint.shape[1] + columns
    joint += np.bincount(cells, minlength=joint.size).reshape(joint.shape)


def check_range(name: str, labels: Labels, num_classes: int) -> None:
    """ValueError unless all labels are in [0, num_classes)."""
    if not len(labels):
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"{name}: {low if low < 0 else high} is outside the classes 0 to {num_classes - 1}")


def entropy(counts: Counts) -> float:
    """Entropy of the distribution that counts describe, nats."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def mutual_information(joint: Counts) -> float:
    """I(row; column) of a table of counts, nats; at least 0."""
    return max(0.0, entropy(joint.sum(axis=1)) + entropy(joint.sum(axis=0)) - entropy(joint.ravel()))


def normalized_mutual_information(joint: Counts) -> float:
    """I / ((H(row) + H(column)) / 2); 1 where both sides have a single class, as scikit-learn defines it."""
    mean = (entropy(joint.sum(axis=1)) + entropy(joint.sum(axis=0))) / 2
    return 1.0 if mean == 0 else min(1.0, mutual_information(joint) / mean)


def phone_normalized_mutual_information(joint: Counts) -> float:
    """I(phone; class) / H(phone) of a table of phones x classes; 1 where there is a single phone, which needs no explaining."""
    phones = entropy(joint.sum(axis=1))
    return 1.0 if phones == 0 else min(1.0, mutual_information(joint) / phones)
