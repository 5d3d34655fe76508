"""Train a small LSTM language model over a tokenizer's tokens, for the beam searches of k2ssl.bin.decode.

    python -m k2ssl.bin.train_lm --text corpus.txt more.txt.gz --tokenizer tokenizer.pt --check-cuts cuts_dev.jsonl.gz --output exp/lm
    python -m k2ssl.bin.decode step-000010000.pt --cuts cuts_test.jsonl.gz --method modified-beam \\
        --search.lm LM_CHECKPOINT --output exp/test

LM_CHECKPOINT is the file that the first program names at its end. Runs in one process. OUTPUT is as for k2ssl.bin.finetune; every checkpoint holds the model's size and the tokenizer's hash. The best
checkpoints are those with the lowest loss of the text to check, in nats per token, whose exponential is the perplexity. The same command goes
on where it was interrupted, exactly. Exit status: 0 done; 1 the run failed or diverged; 2 refused before training; 130 interrupted, with a
checkpoint written. See docs/language_models.md.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from k2ssl import distributed
from k2ssl.bin.cluster_cuts import check_device, check_files, check_seed
from k2ssl.bin.cluster_features import choose_device
from k2ssl.bin.folder_lock import alone_in
from k2ssl.bin.pretrain_remarks import ending_in_warm_up
from k2ssl.bin.program import run_program
from k2ssl.bin.refusal import refusing, say
from k2ssl.bin.run_folder import Start, check_disk, find_start, record_settings, told_at_end
from k2ssl.bin.sentences import Sentences
from k2ssl.config import ConfigError
from k2ssl.data.text_batches import TextLoader, TokenizedText
from k2ssl.data.tokenizer import Tokenizer, load_tokenizer
from k2ssl.models.language_model import LanguageModel, LanguageModelConfig, language_model_to_dict
from k2ssl.optim.build import OptimConfig, ScheduleConfig, build_optimizer, build_schedule
from k2ssl.structure import to_dict
from k2ssl.train.checkpoint import KeepConfig
from k2ssl.train.plan import BatchConfig
from k2ssl.train.precision import Precision
from k2ssl.train.trainer import Trainer, TrainerConfig

_log = logging.getLogger(__name__)

# What may be changed between two starts of one run; of files it is their content that counts, which `lineage` has.
_MAY_CHANGE = (
    *("output", "tokenizer", "text", "cuts", "check_text", "check_cuts"),
    *("max_steps", "max_epochs", "valid_every", "log_every", "keep", "device", "quiet"),
)


@dataclass(frozen=True)
class TrainLm:
    """Settings of the program.

    Attributes:
        output: folder of the run.
        tokenizer: file of the tokenizer whose tokens are predicted.
        text: text files with a sentence a line, UTF-8 (.gz too), to train on. Empty lines are left out. All is held in memory, 2 bytes a
            token.
        cuts: manifests whose transcripts are taken too (.jsonl.gz).
        check_text: text files whose perplexity is told, at every validation and at the end.
        check_cuts: manifests of transcripts that are taken for that too.
        dim: width of embedding and layers.
        num_layers: LSTM layers.
        dropout: rate behind the embedding and behind every layer.
        tokens_per_update: most tokens of an optimizer step, padding and the ends of sentences counted. Longer sentences are left out.
        max_steps: optimizer steps after which training ends; 0: only max_epochs ends it.
        max_epochs: passes over the text after which it ends.
        optim: the optimizer.
        schedule: of the learning rate.
        valid_every: optimizer steps between validations; 0: only at the end.
        log_every: optimizer steps between lines of the log.
        keep: which checkpoints are written and kept.
        precision: number format; auto: bfloat16 on GPUs that have it, float16 on others, float32 on the CPU.
        seed: of the weights that are drawn, the order of the text and what dropout hides.
        device: auto, cpu, cuda or cuda:NUMBER; auto takes the GPU if there is one.
        quiet: plain lines instead of a progress bar.
    """

    output: str
    tokenizer: str
    text: tuple[str, ...] = ()
    cuts: tuple[str, ...] = ()
    check_text: tuple[str, ...] = ()
    check_cuts: tuple[str, ...] = ()
    dim: int = 512
    num_layers: int = 2
    dropout: float = 0.1
    tokens_per_update: int = 16384
    max_steps: int = 0
    max_epochs: int = 10
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(name="adamw", lr=2e-3, max_grad_norm=1.0))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(name="eden2", warmup_batches=500.0))
    valid_every: int = 1000
    log_every: int = 50
    keep: KeepConfig = field(default_factory=KeepConfig)
    precision: Precision = "auto"
    seed: int = 42
    device: str = "auto"
    quiet: bool = False

    def __post_init__(self) -> None:
        check_device(self.device, "TrainLm: ")
        if not self.text and not self.cuts:
            raise ValueError("TrainLm: text and cuts name no file, at least one is needed")
        if self.tokens_per_update < 2:
            raise ValueError(f"TrainLm: tokens_per_update is {self.tokens_per_update}, a whole number >= 2 is needed")
        check_seed("TrainLm", self.seed)
        self.model(vocab_size=2)
        self.trainer()

    def model(self, vocab_size: int) -> LanguageModelConfig:
        """The model for so many symbols."""
        return LanguageModelConfig(vocab_size, self.dim, self.num_layers, self.dropout)

    def trainer(self) -> TrainerConfig:
        """For the trainer, whose seconds of audio are tokens here."""
        tokens = float(self.tokens_per_update)
        return TrainerConfig(
            max_steps=self.max_steps,
            max_epochs=self.max_epochs,
            batch=BatchConfig(seconds_per_update=tokens, seconds_per_micro_batch=tokens, reference_seconds=tokens),
            precision=self.precision,
            average_period=0,
            valid_every=self.valid_every,
            log_every=self.log_every,
            keep=self.keep,
        )


class Text:
    """The text of a job, read.

    Raises:
        ValueError: a file that is damaged or no text in UTF-8, or text without a sentence.
    """

    def __init__(self, job: TrainLm) -> None:
        self.tokenizer = load_tokenizer(job.tokenizer)
        self.train, found = _tokenized(job.text, job.cuts, self.tokenizer)
        self.loader = TextLoader(self.train, job.tokens_per_update, job.seed)
        self.description = [f"text: {found}{_too_long(self.loader)}"]
        self.check: TokenizedText | None = None
        self.valid_loader: TextLoader | None = None
        if job.check_text or job.check_cuts:
            self.check, found = _tokenized(job.check_text, job.check_cuts, self.tokenizer)
            longest = int(self.check.lens.max(initial=0))  # of the text to check nothing is left out
            self.valid_loader = TextLoader(self.check, max(job.tokens_per_update, longest + 1), None)
            self.description.append(f"text to check: {found}")

    @property
    def lineage(self) -> Mapping[str, Any]:
        """What the run is made of, by content."""
        check = None if self.check is None else self.check.sha256
        return {"tokenizer_sha256": self.tokenizer.sha256, "text_sha256": self.train.sha256, "check_sha256": check}


def _tokenized(text: tuple[str, ...], cuts: tuple[str, ...], tokenizer: Tokenizer) -> tuple[TokenizedText, str]:
    """The sentences of files, and in words how much there is."""
    ids = {symbol: token for token, symbol in enumerate(tokenizer.symbols)}
    sentences = Sentences(text, cuts, tokenizer=tokenizer)
    tokenized = TokenizedText(([ids[symbol] for symbol in sentence] for sentence in sentences), tokenizer.vocab_size)
    if not len(tokenized):
        raise ValueError(f"there is no sentence in {', '.join((*text, *cuts))}; at least one is needed")
    unknown = f", {sentences.unknown:,} characters that the tokenizer does not have" if sentences.unknown else ""
    return tokenized, f"{len(tokenized):,} sentences with {len(tokenized.tokens):,} tokens{unknown}"


def _too_long(loader: TextLoader) -> str:
    return f"; {loader.left_out:,} sentences longer than tokens_per_update are left out" if loader.left_out else ""


def train(job: TrainLm) -> None:
    """Do the job.

    Raises:
        ConfigError: refused before training; no file of an earlier run has been changed then.
        ValueError: training diverged.
        KeyboardInterrupt: a signal ended it; a checkpoint has been written.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(f"{os.environ['WORLD_SIZE']} processes were started, this program runs in one")
    output = Path(job.output)
    check_files(tokenizer=job.tokenizer, text=job.text, cuts=job.cuts, check_text=job.check_text, check_cuts=job.check_cuts)
    with distributed.set_up(choose_device(job.device)) as device, ExitStack() as held:
        with refusing():
            held.enter_context(alone_in(output))
            text = Text(job)
            settings = {**to_dict(job), "lineage": text.lineage}
            start = _find_start(output, settings)
        say(*text.description)
        trainer = build_trainer(job, text, device, settings)
        for remark in ending_in_warm_up(job.schedule, trainer.expected_steps):
            _log.warning("warning: %s", remark)
        if start.checkpoint is not None:
            with refusing():
                trainer.resume(start.checkpoint, text.loader, checked=True)
            say(f"going on from {start.checkpoint} at step {trainer.progress.step:,}")
        with refusing():
            say(check_disk(trainer, output, trainer.expected_steps))
        record_settings(output, job)
        before = trainer.progress.step
        if not trainer.fit(text.loader, text.valid_loader):
            raise KeyboardInterrupt
        if text.valid_loader is not None:
            values = trainer.validate(text.valid_loader)
            say(f"perplexity of the text to check: {math.exp(values['loss']):.2f} over {values['num_targets']:,.0f} tokens and ends")
        say(*told_at_end(trainer, output, before))


def _find_start(output: Path, settings: Mapping[str, Any]) -> Start:
    start = find_start(output, "auto", TrainLm, settings, _MAY_CHANGE, accept_changes=True)
    if start.changes:
        raise ValueError(f"{start.checkpoint}: of a run with other settings: {'; '.join(start.changes)}. Choose another output folder")
    return start


def build_trainer(job: TrainLm, text: Text, device: torch.device, settings: Mapping[str, Any]) -> Trainer:
    """A new model and what trains it.

    Raises:
        ConfigError: settings that do not go together, or that the device cannot meet.
    """
    config = job.model(text.tokenizer.vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = LanguageModel(config)
    model.to(device)
    in_epochs = text.loader.num_batches() * job.max_epochs
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"model of {parameters:,} parameters on {device.type}; {text.loader.num_batches():,} updates an epoch")
    try:
        optimizer = build_optimizer(job.optim, model)
        return Trainer(
            model,
            optimizer,
            build_schedule(job.schedule, optimizer),
            job.trainer(),
            device=device,
            folder=Path(job.output),
            model_config=language_model_to_dict(config),
            job=settings,
            extra={"tokenizer_sha256": text.tokenizer.sha256},
            seed=job.seed,
            program="train_lm",
            expected_steps=min(job.max_steps or in_epochs, in_epochs),
            quiet=job.quiet,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_program(train, TrainLm, sys.argv[1:] if argv is None else argv, "train_lm", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
