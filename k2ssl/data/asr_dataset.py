"""Whole utterances with their transcripts."""

from __future__ import annotations

from k2ssl.batch import AsrBatch
from k2ssl.data.audio import read_padded
from k2ssl.data.audio_dataset import BatchDataset, Loaded, Request, as_pairs
from k2ssl.data.intake import transcript


class AsrDataset(BatchDataset[AsrBatch]):
    """Audio zero-padded at the end, and the text of each cut's supervisions.

    Args:
        normalize: bring every utterance, without its padding, to zero mean and unit variance.
    """

    def __getitem__(self, request: Request) -> Loaded[AsrBatch]:
        audio, lens, read, failures = read_padded(request.cuts, self.normalize)
        if not read:
            return Loaded(None, as_pairs(failures))
        padded = int(lens.min()) < audio.shape[1]
        texts = tuple(transcript(cut) for cut in read)
        return Loaded(AsrBatch(audio, lens if padded else None, texts, tuple(cut.id for cut in read)), as_pairs(failures))
