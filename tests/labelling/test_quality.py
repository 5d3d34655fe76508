"""Scores of labels: known labels give known scores, and scikit-learn agrees."""

from __future__ import annotations

from collections.abc import Callable
from math import log, log2

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from k2ssl.labelling.alignments import Alignments, Interval
from k2ssl.labelling.quality import (
    LONGEST_RUN,
    LabelQuality,
    entropy,
    measure_quality,
    mutual_information,
    normalized_mutual_information,
    phone_normalized_mutual_information,
)


class Store(dict[str, npt.NDArray[np.int64]]):
    """Labels by name, as a label store gives them."""

    def labels(self, cut_id: str) -> npt.NDArray[np.int64]:
        return self[cut_id]


def array(*labels: int) -> npt.NDArray[np.int64]:
    return np.array(labels)


def random_labels(seed: int, num_classes: int, num_utterances: int = 5) -> Store:
    draw = np.random.default_rng(seed)
    return Store({f"u{i}": draw.integers(num_classes, size=100 + 10 * i) for i in range(num_utterances)})


def test_usage_of_known_labels() -> None:
    use = measure_quality([("a", array(0, 0, 1, 1)), ("b", array(1, 1, 3, 3)), ("empty", array())], 5, 50.0).usage
    assert (use.num_utterances, use.num_labels, use.hours) == (3, 8, 8 / 50 / 3600)
    assert use.histogram == (2, 4, 0, 2, 0)
    assert use.dead_classes == 2
    assert use.entropy == pytest.approx(1.5)  # 1/4, 1/2, 1/4
    assert use.perplexity == pytest.approx(2**1.5)
    assert use.mean_run == 2.0  # 00 | 11, 11 | 33: a run does not go on in the next utterance
    assert use.run_histogram[:3] == (0, 4, 0)


def test_equally_used_classes_have_the_perplexity_of_their_number() -> None:
    use = measure_quality([("a", np.tile(np.arange(37), 3))], 37, 100.0).usage
    assert use.perplexity == pytest.approx(37)
    assert use.dead_classes == 0 and use.mean_run == 1.0


def test_one_class_alone_has_perplexity_one_and_long_runs_share_the_last_bin() -> None:
    use = measure_quality([("a", np.zeros(LONGEST_RUN + 7, np.uint16)), ("b", np.zeros(LONGEST_RUN - 1, np.uint16))], 3, 100.0).usage
    assert (use.perplexity, use.dead_classes, use.mean_run) == (1.0, 2, LONGEST_RUN + 3)
    assert use.run_histogram[-2:] == (1, 1)


def test_labels_that_agree_up_to_names_have_nmi_one_and_independent_ones_zero() -> None:
    labels = random_labels(0, 7)
    renamed = Store({name: (3 * found + 2) % 7 for name, found in labels.items()})
    assert nmi(labels, renamed) == pytest.approx(1.0)
    assert nmi(Store(a=np.repeat(np.arange(4), 5)), Store(a=np.tile(np.arange(5), 4))) == pytest.approx(0.0, abs=1e-12)


def nmi(labels: Store, other: Store, rate: float = 50.0, other_rate: float = 50.0) -> float:
    quality = measure_quality(labels.items(), 20, rate, previous=other, previous_classes=20, previous_rate=other_rate)
    assert quality.previous is not None
    return quality.previous.nmi


@pytest.mark.parametrize("seed", range(5))
def test_nmi_is_that_of_scikit_learn(seed: int) -> None:
    labels = random_labels(seed, 11)
    draw = np.random.default_rng(100 + seed)
    other = Store(
        {name: np.where(draw.random(len(found)) < 0.6, found % 5, draw.integers(8, size=len(found))) for name, found in labels.items()}
    )
    theirs = normalized_mutual_info_score(np.concatenate(list(other.values())), np.concatenate(list(labels.values())))
    assert 0.1 < theirs < 0.9
    assert nmi(labels, other) == pytest.approx(theirs, rel=1e-12)


def test_nmi_by_hand() -> None:
    # joint (in eighths): 2 2 / 0 4; H(row) = log 2, H(column) = H(1/4) = 2 log 2 - 3/4 log 3, H(joint) = 3/2 log 2
    joint = np.array([[2, 2], [0, 4]])
    column = 2 * log(2) - 0.75 * log(3)
    information = log(2) + column - 1.5 * log(2)
    assert mutual_information(joint) == pytest.approx(information)
    assert normalized_mutual_information(joint) == pytest.approx(information / ((log(2) + column) / 2))
    assert phone_normalized_mutual_information(joint) == pytest.approx(information / log(2))
    assert entropy(np.array([1, 0, 1])) == pytest.approx(log(2))


def test_labels_of_another_rate_are_compared_at_the_middle_of_each_frame() -> None:
    slow = Store(a=array(0, 1, 2, 3, 4))  # 50 Hz: 0-20 ms, 20-40 ms, ...
    fast = Store(a=np.repeat(np.arange(5), 2))  # 100 Hz, the same events
    assert nmi(slow, fast, 50.0, 100.0) == pytest.approx(1.0)
    assert nmi(fast, slow, 100.0, 50.0) == pytest.approx(1.0)
    shifted = Store(a=np.repeat(np.arange(6), 2)[1:])
    assert nmi(fast, shifted, 100.0, 100.0) < 0.9


def test_rounding_takes_no_label_for_its_neighbour_where_one_rate_is_a_multiple_of_the_other() -> None:
    draw = np.random.default_rng(0)
    slow, fast = draw.integers(0, 20, 20_000), draw.integers(0, 20, 40_000)
    fast[1::2] = slow  # at the middle of frame t lies the label 2 t + 1
    assert nmi(Store(a=slow), Store(a=fast), 50.0, 100.0) == pytest.approx(1.0)


def test_labels_beyond_the_end_of_the_other_ones_are_left_out() -> None:
    quality = measure_quality(
        [("a", array(0, 1, 2, 3)), ("new", array(1))], 4, 50.0, previous=Store(a=array(0, 1)), previous_classes=2, previous_rate=50.0
    )
    assert quality.previous is not None
    assert (quality.previous.num_labels, quality.previous.utterances_in_both, quality.previous.other_classes) == (2, 1, 2)


def phones_of(**utterances: str) -> Alignments:
    """A phone for each 20 ms, one letter each; a dot is a hole."""
    return Alignments(
        {
            name: [Interval(0.02 * i, 0.02 * (i + 1), phone) for i, phone in enumerate(phones) if phone != "."]
            for name, phones in utterances.items()
        }
    )


def test_phone_scores_by_hand() -> None:
    # joint of phones a, b and classes 0, 1, 2: a: 3 1 0, b: 0 1 3
    quality = measure_quality([("u", array(0, 0, 0, 1, 1, 2, 2, 2))], 4, 50.0, alignments=phones_of(u="aaaabbbb"))
    scores = quality.phones
    assert scores is not None
    assert scores.phone_purity == pytest.approx(7 / 8)  # classes 0 and 2 wholly, half of class 1
    assert scores.cluster_purity == pytest.approx(6 / 8)
    assert scores.pnmi == pytest.approx(1 - 2 / 8)  # I(y; z) = H(y) - H(y | z), and only class 1 leaves a bit open
    assert (scores.phones, scores.joint) == (("a", "b"), ((3, 1, 0, 0), (0, 1, 3, 0)))


def test_phone_scores_follow_the_formulas_of_the_paper_and_scikit_learn() -> None:
    draw = np.random.default_rng(3)
    phones = draw.integers(6, size=400)
    classes = np.where(draw.random(400) < 0.7, phones, draw.integers(9, size=400))
    alignments = phones_of(u="".join("abcdef"[p] for p in phones))
    scores = measure_quality([("u", classes)], 9, 50.0, alignments=alignments).phones
    assert scores is not None
    joint = np.array([[((phones == y) & (classes == z)).mean() for z in range(9)] for y in range(6)])
    of_class, of_phone = joint.sum(0), joint.sum(1)
    assert scores.phone_purity == pytest.approx(sum(of_class[z] * max(joint[:, z] / of_class[z]) for z in range(9)))
    assert scores.cluster_purity == pytest.approx(sum(of_phone[y] * max(joint[y] / of_phone[y]) for y in range(6)))
    information = sum(p * log(p / of_phone[y] / of_class[z]) for y, row in enumerate(joint) for z, p in enumerate(row) if p)
    assert scores.pnmi == pytest.approx(information / -sum(p * log(p) for p in of_phone))
    assert scores.pnmi == pytest.approx(mutual_info_score(phones, classes) / -sum(p * log(p) for p in of_phone))


def test_classes_that_are_phones_have_scores_of_one_and_a_class_per_label_has_low_cluster_purity() -> None:
    alignments = phones_of(u="aabbccaabb")
    same = measure_quality([("u", array(4, 4, 1, 1, 2, 2, 4, 4, 1, 1))], 5, 50.0, alignments=alignments).phones
    fine = measure_quality([("u", np.arange(10))], 10, 50.0, alignments=alignments).phones
    assert same is not None and fine is not None
    assert (same.phone_purity, same.cluster_purity, same.pnmi) == (1.0, 1.0, pytest.approx(1.0))
    assert (fine.phone_purity, fine.cluster_purity, fine.pnmi) == (1.0, 0.3, pytest.approx(1.0))


def test_labels_outside_all_phones_are_counted_apart() -> None:
    quality = measure_quality([("u", array(0, 1, 1, 0, 1)), ("v", array(1))], 2, 50.0, alignments=phones_of(u="a.bb", w="z"))
    scores = quality.phones
    assert scores is not None
    assert (scores.num_labels, scores.labels_without_phone, scores.utterances_aligned) == (3, 2, 1)
    assert scores.phones == ("a", "b")  # z is not in any labelled utterance


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda: measure_quality([("u", array(0, 5))], 5, 50.0), "labels of u: 5 is outside the classes 0 to 4"),
        (lambda: measure_quality([("u", array(0, -1))], 5, 50.0), "labels of u: -1 is outside"),
        (lambda: measure_quality([], 5, 50.0), "there are no labels in 0 utterances"),
        (lambda: measure_quality([("u", array(0))], 0, 50.0), "num_classes is 0"),
        (lambda: nmi(Store(a=array(0)), Store(b=array(0))), "none is in both"),
        (lambda: measure_quality([("u", array(0))], 1, 50.0, alignments=phones_of(v="a")), "an aligned one: v"),
        (lambda: measure_quality([("u", array(0))], 1, 50.0, previous=Store(u=array(0))), "previous_classes is 0"),
        (lambda: nmi(Store(a=array(0)), Store(a=array(20))), "previous labels of a: 20 is outside"),
    ],
)
def test_what_cannot_be_measured_is_refused(measure: Callable[[], LabelQuality], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure()


def test_the_table_shows_every_score() -> None:
    quality = measure_quality(
        [("u", array(0, 0, 0, 1, 1, 2, 2, 2))],
        4,
        50.0,
        previous=Store(u=array(0, 0, 0, 1, 1, 2, 2, 2)),
        previous_classes=3,
        previous_rate=50.0,
        alignments=phones_of(u="aaaabbbb"),
    )
    table = quality.table()
    bits = -2 * 3 / 8 * log2(3 / 8) + 1 / 2
    for part in (
        "8 at 50 Hz",
        "unused: 1 (25.0%)",
        f"{2**bits:.1f} (entropy {bits:.2f} of 2.00 bits)",
        "2.67 labels (53 ms)",
        "NMI 1.0000",
    ):
        assert part in table, table
    assert "phone purity 0.8750, cluster purity 0.7500, PNMI 0.7500 (2 phones, 8 labels)" in table
