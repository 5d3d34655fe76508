"""The data of a fine-tuning run: manifests whose transcripts are held against tokenizer and model before anything else."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch

from k2ssl.bin.cluster_cuts import CutLists, check_files
from k2ssl.bin.training_data import TrainingData, corpora_of, most_to_check, reading_options
from k2ssl.data.spec_augment import SpecAugmentConfig
from k2ssl.train.plan import BatchPlan

if TYPE_CHECKING:  # slow to import, and not needed to show --help
    from lhotse.cut import Cut

    from k2ssl.batch import AsrBatch
    from k2ssl.data.loader import BatchLoader
    from k2ssl.models.asr import AsrModel

_log = logging.getLogger(__name__)

_QUICK = 1000  # cuts of each manifest that a resumed run checks again
_LISTED = 10  # utterances that a warning names
_SHORTEST = 0.1  # seconds; audio of less than 25 ms has no frame


@dataclass(frozen=True, kw_only=True)
class FinetuneData(TrainingData):
    """What is trained on: manifests with transcripts. Validation takes every utterance as it was recorded.

    Attributes:
        unknown: what becomes of a character that the tokenizer does not have: refuse the run and name the utterance, or mark it as unknown.
        min_seconds: shorter utterances are not trained on, s; at least 0.1.
        max_seconds: longer utterances are not trained on, s.
        speeds: factors, one of which is drawn for every utterance and epoch and makes it so much faster and higher, such as 0.9 1.0 1.1;
            lengths then are those heard; none: as recorded, as published.
        spec_augment: see there.
    """

    unknown: Literal["refuse", "mark"] = "refuse"
    min_seconds: float = 1.0
    max_seconds: float = 20.0
    speeds: tuple[float, ...] = ()
    spec_augment: SpecAugmentConfig = field(default_factory=SpecAugmentConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_seconds < _SHORTEST:
            raise ValueError(f"FinetuneData: min_seconds is {self.min_seconds}, at least {_SHORTEST} is needed")
        from k2ssl.data.speed import check_speeds

        check_speeds("FinetuneData", self.speeds)


class OpenedTranscripts:
    """The manifests and the tokenizer of a run, opened."""

    def __init__(self, config: FinetuneData, tokenizer: str) -> None:
        """
        Raises:
            ValueError: a manifest or the tokenizer is missing or damaged.
        """
        from k2ssl.data.cuts import read_cuts
        from k2ssl.data.tokenizer import load_tokenizer

        check_files(**{"data.cuts": config.cuts, "data.valid_cuts": config.valid_cuts})
        self.config = config
        self.tokenizer = load_tokenizer(tokenizer)
        self.train_cuts: list[Iterable[Cut]] = [read_cuts(path) for path in config.cuts]
        self.valid_cuts: list[Iterable[Cut]] = [read_cuts(path) for path in config.valid_cuts]

    @property
    def lineage(self) -> dict[str, str]:
        """Whose tokens are trained, for the record."""
        return {"tokenizer_sha256": self.tokenizer.sha256}

    def seconds(self) -> float | None:
        """Audio of one epoch, at an average of the speeds, as the summaries beside the manifests say; None if one has none."""
        from k2ssl.data.speed import mean_length

        recorded = CutLists(self.config.cuts).seconds()
        return None if recorded is None else recorded * mean_length(self.config.speeds)

    def check(self, model: AsrModel, quick: bool = False) -> list[str]:
        """Hold the tokenizer against the model, and all transcripts against both; `quick` looks at 1,000 cuts of each manifest at most.

        Returns:
            What was found, one line for each manifest; utterances that the model will leave out are named in warnings.

        Raises:
            ValueError: the model has another number of tokens, or a transcript cannot be made tokens of; names the utterance.
        """
        vocab_size = model.config.vocab_size
        if self.tokenizer.vocab_size != vocab_size:
            raise ValueError(
                f"model.vocab_size is {vocab_size}, the tokenizer has {self.tokenizer.vocab_size} tokens; give --model.vocab-size "
                f"{self.tokenizer.vocab_size}, or the tokenizer that belongs to the model"
            )
        most = most_to_check(self.config, _QUICK if quick else 0)
        fastest = max(self.config.speeds, default=1.0)
        training = [(path, manifest, fastest) for path, manifest in zip(self.config.cuts, self.train_cuts, strict=True)]
        validation = [(path, manifest, 1.0) for path, manifest in zip(self.config.valid_cuts, self.valid_cuts, strict=True)]
        return [self._check_manifest(path, islice(cuts, most), model, speed) for path, cuts, speed in [*training, *validation]]

    def train_loader(self, plan: BatchPlan, sample_rate: int, seed: int, device: torch.device) -> BatchLoader[AsrBatch]:
        """Whole utterances, in another order and at other speeds in every epoch."""
        config = self.config
        corpora = corpora_of(self.train_cuts, config.weights)
        options = reading_options(config, plan, sample_rate, seed, device)
        lengths = {"min_seconds": config.min_seconds, "max_seconds": config.max_seconds}
        return self._loader(corpora, speeds=config.speeds, shuffle=True, **lengths, **options)

    def valid_loader(self, plan: BatchPlan, sample_rate: int, device: torch.device, drop_incomplete: bool) -> BatchLoader[AsrBatch] | None:
        """Every utterance that has a frame, whatever its length, in the same order every time; None without validation data."""
        if not self.valid_cuts:
            return None
        options = reading_options(self.config, plan, sample_rate, 0, device)
        corpora = corpora_of(self.valid_cuts)
        return self._loader(corpora, min_seconds=_SHORTEST, shuffle=False, drop_incomplete=drop_incomplete, **options)

    def _loader(self, corpora: Any, **options: Any) -> BatchLoader[AsrBatch]:
        from k2ssl.data.loader import asr_loader

        return asr_loader(corpora, tokenizer=self.tokenizer, unknown=self.config.unknown, **options)

    def _check_manifest(self, path: str, cuts: Iterable[Cut], model: AsrModel, speed: float) -> str:
        from k2ssl.data.intake import transcript

        found: Counter[str] = Counter()
        too_long: dict[str, list[str]] = {head: [] for head in ("ctc", "transducer") if getattr(model, head) is not None}
        for cut in cuts:
            text = transcript(cut)
            found["cuts"] += 1
            if not text:
                found["without a transcript, left out"] += 1
                continue
            try:
                tokens = self.tokenizer.encode(text, self.config.unknown)
            except ValueError as error:
                choice = "" if "is empty" in str(error) else "; --data.unknown mark takes them for the unknown symbol"
                raise ValueError(f"{path}: utterance {cut.id!r}: {error}{choice}") from error
            found["unknown characters"] += len(self.tokenizer.outside(text))
            for head in _too_long(tokens, cut.duration / speed, model):
                too_long[head].append(cut.id)
        for head, ids in too_long.items():
            if ids:
                more = f" and {len(ids) - _LISTED:,} more" if len(ids) > _LISTED else ""
                _log.warning(
                    "%s: too few frames for their tokens%s, so that the %s loss leaves them out: %s%s",
                    path,
                    f" at {speed:g} times the speed" if speed != 1.0 else "",
                    head,
                    ", ".join(ids[:_LISTED]),
                    more,
                )
                found[f"with too few frames for {head}"] = len(ids)
        if not found["cuts"] - found["without a transcript, left out"]:
            raise ValueError(f"{path}: none of its {found['cuts']} cuts has a transcript")
        return f"{path}: " + ", ".join(f"{number:,} {what}" for what, number in found.items() if number)


def _too_long(tokens: list[int], seconds: float, model: AsrModel) -> list[str]:
    """The heads whose loss would be infinite."""
    frames = model.frontend.num_frames(round(seconds * model.frontend.sample_rate))
    frames = -(-frames // model.config.output_downsampling)
    heads = []
    if model.ctc is not None and frames < len(tokens) + sum(one == two for one, two in pairwise(tokens)):
        heads.append("ctc")
    if model.transducer is not None and len(tokens) > (model.config.transducer.prune_range - 1) * frames:
        heads.append("transducer")
    return heads
