"""Label stores of several corpora as one: the same centres, other cuts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from lhotse.cut import Cut

from k2ssl.data.label_format import LabelContract
from k2ssl.data.labels import LabelStore
from k2ssl.data.stable_hash import stable_hash


class LabelUnion:
    """One label set over several stores; a cut's labels are those of the first store that has any.

    Args:
        stores: one at least.

    Raises:
        ValueError: the stores differ in classes, frame rate, or the centres that made them: equal numbers would mean different sounds.
    """

    def __init__(self, stores: Sequence[LabelStore]) -> None:
        if not stores:
            raise ValueError("LabelUnion: stores is empty, at least one label store is needed")
        first = stores[0].contract
        for store in stores[1:]:
            for name, there, here in (
                ("num_classes", first.num_classes, store.contract.num_classes),
                ("frame_rate", first.frame_rate, store.contract.frame_rate),
                ("lineage.kmeans_sha256", first.lineage.kmeans_sha256, store.contract.lineage.kmeans_sha256),
            ):
                if there != here:
                    raise ValueError(
                        f"labels in {stores[0].folder} and {store.folder} cannot be trained on together: {name} is {there} and {here}"
                    )
        self.stores = tuple(stores)

    @property
    def contract(self) -> LabelContract:
        """Of the first store; what matters for training is equal in all."""
        return self.stores[0].contract

    @property
    def identity(self) -> str:
        """Differs as soon as any label differs."""
        return f"{stable_hash(*(store.identity for store in self.stores)):016x}"

    def __contains__(self, cut_id: object) -> bool:
        return any(cut_id in store for store in self.stores)

    def labels(self, cut_id: str) -> np.ndarray:
        """(L,) integers of one cut.

        Raises:
            ValueError: no store has any.
        """
        for store in self.stores:
            if cut_id in store:
                return store.labels(cut_id)
        return self.stores[0].labels(cut_id)  # tells that there are none

    def without_conflicts(self, cuts: Iterable[Cut]) -> Iterator[Cut]:
        """`cuts` as they are, as long as all stores mean the same cut by an id.

        Raises:
            ValueError: two stores have different numbers of labels for one id, or most of them differ: different cuts have got the same
                name. (Where the same cut was labelled twice by the same centres, rounding may have changed a few.)
        """
        for cut in cuts:
            found = [store for store in self.stores if cut.id in store] if len(self.stores) > 1 else []
            for store in found[1:]:
                there, here = found[0].labels(cut.id), store.labels(cut.id)
                what = (
                    f"{len(there)} labels there and {len(here)} here" if len(there) != len(here) else "mostly other labels there than here"
                )
                if len(there) != len(here) or 2 * np.count_nonzero(there != here) > len(there):
                    raise ValueError(
                        f"labels in {found[0].folder} and {store.folder} cannot be trained on together: cut {cut.id!r} has {what}; "
                        "different cuts have the same id: rename those of one of them"
                    )
            yield cut
