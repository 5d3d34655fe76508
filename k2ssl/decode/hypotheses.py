"""What a search returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hypothesis:
    """One recognised token sequence.

    Attributes:
        tokens: token ids, without blanks.
        score: log-probability in nats, of whatever the search sums over (one alignment, or all that it merged); not normalised by length.
        frames: encoder frame at which each token was emitted; empty where a search does not know.
        words: what a search over words of a lexicon found; None: what the tokens spell.

    Raises:
        ValueError: `frames` neither empty nor as long as `tokens`.
    """

    tokens: tuple[int, ...]
    score: float
    frames: tuple[int, ...] = ()
    words: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.frames and len(self.frames) != len(self.tokens):
            raise ValueError(f"Hypothesis: frames has {len(self.frames)} entries for {len(self.tokens)} tokens; as many or none are needed")
