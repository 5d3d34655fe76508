"""Measuring the quality of a label store and writing it down; shared by `label` and `label_report`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from k2ssl.atomic_file import atomic_file
from k2ssl.bin.progress import AudioProgress
from k2ssl.labelling.alignments import Alignments, read_alignments
from k2ssl.labelling.quality import LabelQuality, Labels, measure_quality
from k2ssl.labelling.quality_chart import quality_png

if TYPE_CHECKING:  # slow to import, and not needed to show --help
    from k2ssl.data.labels import LabelStore

_FORMAT = "k2ssl-label-quality"
_VERSION = 1


@dataclass(frozen=True)
class CompareConfig:
    """What labels are held against.

    Attributes:
        previous: folder of other labels of the same utterances, such as those of the previous iteration; at any label rate.
        alignments: phone alignments: a CTM file, or a folder of TextGrid files named like the cuts.
        tier: of TextGrid files, the tier with the phones.
    """

    previous: str | None = None
    alignments: str | None = None
    tier: str = "phones"


@dataclass(frozen=True)
class Comparison:
    """What `CompareConfig` names, opened."""

    previous: LabelStore | None
    alignments: Alignments | None


def open_comparison(config: CompareConfig) -> Comparison:
    """Open what labels are to be held against, before there is much to lose.

    Raises:
        ValueError, OSError: it is not there or cannot be read.
    """
    from k2ssl.data.labels import LabelStore

    return Comparison(
        None if config.previous is None else LabelStore.open(config.previous),
        None if config.alignments is None else read_alignments(config.alignments, config.tier),
    )


def measure_store(store: LabelStore, compare: Comparison, quiet: bool) -> LabelQuality:
    """Read all labels of a store once and measure them.

    Raises:
        ValueError: what they are compared with has nothing in common with them.
    """
    contract, previous = store.contract, compare.previous
    with AudioProgress("quality", contract.num_labels * contract.frame_shift, quiet=quiet) as progress:

        def utterances() -> Iterator[tuple[str, Labels]]:
            for cut_id, labels in store.items():
                yield cut_id, labels
                progress.add(len(labels) * contract.frame_shift)

        return measure_quality(
            utterances(),
            contract.num_classes,
            contract.frame_rate,
            previous=previous,
            previous_classes=0 if previous is None else previous.contract.num_classes,
            previous_rate=0.0 if previous is None else previous.contract.frame_rate,
            alignments=compare.alignments,
        )


def write_report(quality: LabelQuality, store: LabelStore, compare: CompareConfig, output: Path) -> None:
    """Write OUTPUT (JSON) and the picture beside it, with the suffix .png; both replace older ones, the JSON file last.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    contract = store.contract
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "labels": {"split": contract.split, "ids_sha256": contract.ids_sha256, "lineage": asdict(contract.lineage)},
        "compared_with": asdict(compare),
        **quality.to_dict(),
    }
    with atomic_file(picture_path(output)) as file:
        file.write(quality_png(quality))
    with atomic_file(output) as file:
        file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def picture_path(output: Path) -> Path:
    """Where the picture of a report lies."""
    return output.with_suffix(".png")
