"""The data of a pre-training run: manifests with their labels, checked against the model before anything else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from k2ssl.bin.cluster_cuts import CutLists, check_files
from k2ssl.bin.training_data import TrainingData, corpora_of, most_to_check, reading_options
from k2ssl.train.plan import BatchPlan

if TYPE_CHECKING:  # slow to import, and not needed to show --help
    from lhotse.cut import Cut

    from k2ssl.batch import PretrainBatch
    from k2ssl.data.label_union import LabelUnion
    from k2ssl.data.labels import LabelStore
    from k2ssl.data.loader import BatchLoader
    from k2ssl.models.hubert import HubertModel

_QUICK = 1000  # cuts of each manifest that a resumed run checks again


@dataclass(frozen=True, kw_only=True)
class PretrainData(TrainingData):
    """What is trained on.

    Attributes:
        labels: folders of labels, one for each manifest; with several label sets first all folders of the first set, then all of the
            second, and so on.
        valid_labels: folders of labels of the validation data, ordered like `labels`.
        min_seconds: shorter utterances are left out, s.
        max_seconds: utterances are cropped to this length at random, s; all of a batch to the shortest among them.
        crop_step: lengths of crops are max_seconds less a multiple of this, s, so that batches have few lengths and kernels that are chosen
            or compiled for a length are so for few; 0: no rounding.
    """

    labels: tuple[str, ...]
    valid_labels: tuple[str, ...] = ()
    min_seconds: float = 2.0
    max_seconds: float = 15.625
    crop_step: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.crop_step <= self.max_seconds or math.isinf(self.crop_step):
            raise ValueError(
                f"PretrainData: crop_step is {self.crop_step}, a finite number from 0 to max_seconds ({self.max_seconds}) is needed"
            )
        for manifests, folders in (("cuts", "labels"), ("valid_cuts", "valid_labels")):
            num_manifests, num_folders = len(getattr(self, manifests)), len(getattr(self, folders))
            if (num_folders == 0) != (num_manifests == 0) or (num_manifests and num_folders % num_manifests):
                raise ValueError(
                    f"PretrainData: {folders} has {num_folders} entries for {num_manifests} {manifests}; one folder of labels for every "
                    "manifest (and label set) is needed"
                )


class OpenedData:
    """The manifests and label stores of a run, opened."""

    def __init__(self, config: PretrainData) -> None:
        """
        Raises:
            ValueError: a manifest or a folder of labels is missing or damaged, or labels do not go together.
        """
        check_files(**{"data.cuts": config.cuts, "data.valid_cuts": config.valid_cuts})
        self.config = config
        self.train_cuts, self.train_labels = _open(config.cuts, config.labels)
        self.valid_cuts, self.valid_labels = _open(config.valid_cuts, config.valid_labels)

    @property
    def lineage(self) -> dict[str, dict[str, Any]]:
        """Where the training labels come from, for the record: one entry for each folder."""
        stores = [store for union in self.train_labels for store in union.stores]
        return {
            f"labels[{number}]": {
                "features": store.contract.lineage.features,
                "kmeans_sha256": store.contract.lineage.kmeans_sha256,
                "checkpoint_sha256": store.contract.lineage.checkpoint_sha256,
                "cuts_sha256": store.contract.lineage.cuts_sha256,
                "num_classes": store.contract.num_classes,
            }
            for number, store in enumerate(stores)
        }

    def seconds(self) -> float | None:
        """Audio of one epoch as the summaries beside the manifests say; None if one has none."""
        return CutLists(self.config.cuts).seconds()

    def check(self, model: HubertModel, quick: bool = False) -> list[str]:
        """Hold all labels against the model and the cuts; `quick` looks at 1,000 cuts of each manifest at most.

        Returns:
            What was found, one line each.

        Raises:
            ValueError: labels that do not fit; names both sides of each mismatch.
        """
        lines: list[str] = []
        most = most_to_check(self.config, _QUICK if quick else 0)
        for cuts, unions in ((self.train_cuts, self.train_labels), (self.valid_cuts, self.valid_labels)):
            if cuts and len(unions) != len(model.heads):
                raise ValueError(f"data: {len(unions)} label sets are given, the model has {len(model.heads)} heads (head.num_classes)")
            for label_set, union in enumerate(unions):
                for manifest, store in zip(cuts, union.stores, strict=True):
                    checked = union.without_conflicts(islice(manifest, most))
                    lines += check_store(model, label_set, checked, store)
        return lines

    def train_loader(self, plan: BatchPlan, sample_rate: int, seed: int, device: torch.device) -> BatchLoader[PretrainBatch]:
        """Random crops, other ones in every epoch."""
        return self._loader(
            corpora_of(self.train_cuts, self.config.weights), self.train_labels, plan, sample_rate, seed, device, shuffle=True
        )

    def valid_loader(
        self, plan: BatchPlan, sample_rate: int, device: torch.device, drop_incomplete: bool
    ) -> BatchLoader[PretrainBatch] | None:
        """The same crops every time, of every utterance unless `drop_incomplete` keeps the ranks in step; None without validation data."""
        if not self.valid_cuts:
            return None
        return self._loader(
            corpora_of(self.valid_cuts), self.valid_labels, plan, sample_rate, 0, device, shuffle=False, drop_incomplete=drop_incomplete
        )

    def _loader(
        self, corpora: Any, labels: list[LabelUnion], plan: BatchPlan, sample_rate: int, seed: int, device: torch.device, **options: Any
    ) -> BatchLoader[PretrainBatch]:
        from k2ssl.data.loader import pretrain_loader

        config = self.config
        return pretrain_loader(
            corpora,
            labels,
            min_seconds=config.min_seconds,
            max_seconds=config.max_seconds,
            crop_step=config.crop_step,
            **reading_options(config, plan, sample_rate, seed, device),
            **options,
        )


def check_store(model: HubertModel, label_set: int, cuts: Iterable[Cut], store: LabelStore, **limits: Any) -> list[str]:
    """Hold a store against the head of a label set and against cuts; `limits` as in `check_labels_fit`. What was found, one line each.

    Raises:
        ValueError: labels that do not fit; names both sides of each mismatch.
    """
    from k2ssl.data.label_contract import check_labels_fit

    report = check_labels_fit(
        store,
        num_classes=model.config.head.num_classes[label_set],
        frame_rate=model.frontend.frame_rate,
        sample_rate=model.frontend.sample_rate,
        num_frames=model.frontend.num_frames,
        cuts=cuts,
        label_rate=model.label_rate[label_set],
        **limits,
    )
    return report.text().splitlines()


def _open(manifests: tuple[str, ...], folders: tuple[str, ...]) -> tuple[list[Iterable[Cut]], list[LabelUnion]]:
    from k2ssl.data.cuts import read_cuts
    from k2ssl.data.label_union import LabelUnion
    from k2ssl.data.labels import LabelStore

    cuts: list[Iterable[Cut]] = [read_cuts(path) for path in manifests]
    stores = [LabelStore.open(folder) for folder in folders]
    step = max(len(manifests), 1)
    return cuts, [LabelUnion(stores[start : start + step]) for start in range(0, len(stores), step)]
