"""Whole utterances with their transcripts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from k2ssl.batch import AsrBatch
from k2ssl.data.audio import read_padded
from k2ssl.data.audio_dataset import BatchDataset, Loaded, Request, as_pairs
from k2ssl.data.intake import transcript

if TYPE_CHECKING:
    from k2ssl.data.tokenizer import Tokenizer, Unknown


class AsrDataset(BatchDataset[AsrBatch]):
    """Audio zero-padded at the end, and the text of each cut's supervisions.

    Args:
        normalize: bring every utterance, without its padding, to zero mean and unit variance.
        tokenizer: makes token ids of the texts; None makes none.
        unknown: what it does with characters that it does not have; see `Tokenizer.encode`.
    """

    def __init__(self, normalize: bool = False, tokenizer: Tokenizer | None = None, unknown: Unknown = "refuse") -> None:
        super().__init__(normalize)
        self.tokenizer = tokenizer
        self.unknown: Unknown = unknown

    def __getitem__(self, request: Request) -> Loaded[AsrBatch]:
        """The batch asked for; cuts that cannot be read are left out of it and named.

        Raises:
            ValueError: the tokenizer refuses a transcript; names the utterance.
        """
        audio, lens, read, failures = read_padded(request.cuts, self.normalize)
        if not read:
            return Loaded(None, as_pairs(failures))
        padded = int(lens.min()) < audio.shape[1]
        texts = tuple(transcript(cut) for cut in read)
        ids = tuple(cut.id for cut in read)
        tokens, token_lens = (None, None) if self.tokenizer is None else self.tokenizer.encode_batch(texts, ids, self.unknown)
        return Loaded(AsrBatch(audio, lens if padded else None, texts, ids, tokens, token_lens), as_pairs(failures))

    def identity(self) -> dict[str, Any]:
        """As of every dataset, and whose tokens these are."""
        tokenizer = None if self.tokenizer is None else self.tokenizer.sha256
        return {**super().identity(), "tokenizer": tokenizer, "unknown": self.unknown}
