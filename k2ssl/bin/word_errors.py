"""Word error rates of a model under training, by greedy search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from k2ssl import distributed
from k2ssl.batch import AsrBatch
from k2ssl.decode import ctc, transducer
from k2ssl.decode.hypotheses import Hypothesis
from k2ssl.decode.wer import ErrorCounts, count_errors
from k2ssl.models.asr import AsrModel

if TYPE_CHECKING:
    from k2ssl.data.tokenizer import Tokenizer


class WordErrors:
    """Errors of all utterances of one validation, for each head; an `Evaluation` of the trainer.

    References are normalised as the tokenizer does it; what it does not have counts as an error. Utterances that are too long for a
    loss count here.

    Args:
        model: what recognises.
        tokenizer: of its tokens.
    """

    def __init__(self, model: AsrModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.heads = [name for name in ("ctc", "transducer") if getattr(model, name) is not None]
        self.counts = {head: ErrorCounts() for head in self.heads}

    def add(self, batch: AsrBatch) -> None:
        """Recognise a batch; once for all heads through the encoder."""
        output = self.model.recognition_frames(batch.audio, batch.audio_lens)
        if self.model.ctc is not None:
            self._count("ctc", batch.texts, ctc.greedy_search(self.model.ctc(output.frames), output.lens, self.tokenizer.blank))
        if self.model.transducer is not None:
            head = self.model.transducer
            self._count("transducer", batch.texts, transducer.greedy_search(head.predictor, head.joiner, output.frames, output.lens))

    def result(self) -> dict[str, float]:
        """`wer_HEAD`, errors per word over all ranks, and `wer`, that of the transducer if there is one; `num_words` of the references.

        Raises:
            ValueError: the references have no words.
        """
        own = torch.tensor([[counts.errors, counts.reference] for counts in self.counts.values()])
        rows = distributed.all_reduce_sum(own).tolist()
        if not rows[0][1]:
            raise ValueError("validation: the transcripts have no words")
        rates = {f"wer_{head}": errors / words for head, (errors, words) in zip(self.heads, rows, strict=True)}
        return {**rates, "wer": rates[f"wer_{self.heads[-1]}"], "num_words": rows[0][1]}

    def _count(self, head: str, texts: Sequence[str], found: Sequence[Hypothesis]) -> None:
        for text, hypothesis in zip(texts, found, strict=True):
            self.counts[head] += count_errors(self.tokenizer.normalization(text), self.tokenizer.decode(hypothesis.tokens))
