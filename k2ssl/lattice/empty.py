"""The error of a search that finds nothing; kept apart so that it can be caught without k2."""

from __future__ import annotations

from collections.abc import Sequence


class EmptyLatticeError(ValueError):
    """No path of the graph survived, at the given width nor at twice that.

    Attributes:
        rows: places of the utterances in the batch.
        why: what was tried.
    """

    def __init__(self, rows: Sequence[int], why: str, names: Sequence[str] = ()) -> None:
        self.rows, self.why = tuple(rows), why
        said = ", ".join(names) if names else f"{', '.join(map(str, self.rows))} of the batch"
        super().__init__(f"utterance {said}: no path of the decoding graph is left: {why}")

    def named(self, names: Sequence[str]) -> EmptyLatticeError:
        """The same with the names of all utterances of the batch."""
        return EmptyLatticeError(self.rows, self.why, [names[row] for row in self.rows])
