"""Fine-tune an encoder for speech recognition, with CTC, the pruned transducer, or both; or train one from scratch.

    python -m k2ssl.bin.finetune conf/ctc_letters.toml --data.cuts cuts_train.jsonl.gz --tokenizer tokenizer.pt \\
        --init exp/base/checkpoints/step-000400000.pt --init-weights average --output exp/ctc
    torchrun --nproc-per-node 8 -m k2ssl.bin.finetune conf/ctc_letters.toml ...

The defaults of the model are the published ones of Zipformer Base; rates and lengths come from a configuration, see recipes/*/conf/finetune.
Without --init the encoder begins with drawn weights. With --data.valid-cuts validation tells the word error rate of each head by greedy search,
and the best checkpoints are those with the lowest one (the transducer's, if there are two). The same command goes on where it was interrupted,
exactly; OUTPUT is as for k2ssl.bin.pretrain, and every checkpoint holds the tokenizer.
Exit status: 0 done; 1 the run failed or diverged; 2 refused before training; 130 interrupted, with a checkpoint written. See docs/finetuning.md.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Any

import torch

from k2ssl.bin.cluster_cuts import check_files
from k2ssl.bin.finetune_data import FinetuneData, OpenedTranscripts
from k2ssl.bin.pretrain_remarks import asr_settings_without_effect
from k2ssl.bin.program import run_program
from k2ssl.bin.run_folder import Start
from k2ssl.bin.training_run import Run as TrainingRun
from k2ssl.bin.training_run import TrainingJob, prepare_model, run_training
from k2ssl.bin.word_errors import WordErrors
from k2ssl.data.spec_augment import SpecAugment
from k2ssl.models.asr import AsrConfig, AsrModel
from k2ssl.models.frontend import LogMelConfig
from k2ssl.models.initialise import load_encoder
from k2ssl.models.load import Weights, config_to_dict

_PUBLISHED_VOCABULARY = 500


@dataclass(frozen=True, kw_only=True)
class Finetune(TrainingJob):
    """Settings of the program.

    Attributes:
        output: folder of the run.
        data: manifests with transcripts.
        tokenizer: file of `k2ssl.bin.train_tokenizer`.
        init: checkpoint or model file whose encoder is taken; none: weights are drawn.
        init_weights: raw, as the last optimizer step of that checkpoint left them (as published), or average.
        init_batch_count: with init, where the model's own schedules (dropouts, skipped layers, balancers) begin, in batches of
            trainer.batch.reference_seconds; 0, as published, puts a trained encoder through their warm-up again, 20000 is past it.
        model: what is trained; model.vocab_size is that of the tokenizer.
        optim: the optimizer; its lr_scales give parts of the model rates of their own.
        schedule: of the learning rate.
        trainer: length, batches, checkpoints.
        preflight: what is tried before training.
        seed: of the weights that are drawn, the order of the data and everything drawn during training.
        device: auto, cpu, cuda or cuda:NUMBER; auto takes the GPU if there is one.
        activation_checkpointing: compute the layers again in the backward pass: less memory, a third more time.
        fuse: compile chains of elementwise operations into one kernel each; needs a C++ compiler on a CPU, Triton on a GPU, and takes a
            minute or two more at the first start on a machine. Results differ in rounding.
        triton: on a GPU, let Triton's kernels compute Swoosh and parts of the waveform frontend where they can.
        resume: auto: go on with the run in OUTPUT if there is one; never: refuse such a folder; or the checkpoint to go on from where OUTPUT
            has none yet, of a fine-tuning run with this tokenizer.
        accept_changes: go on with settings that have changed. Of those of the optimizer only the rates are taken over.
        estimate: only time some steps and tell how long the run will take.
        tune: only find the largest micro-batch that fits, and print the settings with it; for a single process.
        diagnose: only run a few steps, observed: inf-check, statistics or profile, as for k2ssl.bin.pretrain.
        quiet: plain lines instead of a progress bar.
    """

    tokenizer: str
    data: FinetuneData
    model: AsrConfig = field(default_factory=lambda: AsrConfig(vocab_size=_PUBLISHED_VOCABULARY))
    init: str = ""
    init_weights: Weights = "raw"
    init_batch_count: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trainer.sharding != "none":
            raise ValueError(f"Finetune: trainer.sharding is {self.trainer.sharding!r}, allowed is 'none': searches need the whole model")
        if not (math.isfinite(self.init_batch_count) and self.init_batch_count >= 0):
            raise ValueError(f"Finetune: init_batch_count is {self.init_batch_count}, a finite number >= 0 is needed")
        if self.data.spec_augment.hides:
            self._check_spec_augment()

    def _check_spec_augment(self) -> None:
        frontend, masks = self.model.frontend, self.data.spec_augment
        if not isinstance(frontend, LogMelConfig):
            raise ValueError(
                "Finetune: data.spec_augment hides parts of log-mel features, which the waveform frontend does not have, allowed are 0 "
                "band_masks and 0 time_masks; model.masking hides frames and channels behind any frontend"
            )
        if masks.band_masks and masks.band_width > frontend.num_bins:
            raise ValueError(
                f"Finetune: data.spec_augment.band_width is {masks.band_width}, allowed is at most model.frontend.num_bins, {frontend.num_bins}"
            )


def finetune(job: Finetune) -> None:
    """Do the job on this rank; errors as `run_training`."""
    run_training(job, lambda: OpenedTranscripts(job.data, job.tokenizer), asr_settings_without_effect(job), build_model, Run)


class Run(TrainingRun):
    """Of fine-tuning; see `TrainingRun`."""

    program = "finetune"

    def __init__(self, job: Finetune, *arguments: Any, **options: Any) -> None:
        super().__init__(job, *arguments, **options)
        self.trainer.progress.batch_count = job.init_batch_count if job.init else 0.0

    @classmethod
    def check_start(cls, start: Start) -> None:
        """
        Raises:
            ValueError: the checkpoint's tokens are others, so that its heads mean something else; see also `Run.check_start`.
        """
        super().check_start(start)
        for text in start.changes:
            if text.startswith("lineage.tokenizer_sha256 "):
                raise ValueError(f"{start.checkpoint}: of a run with another tokenizer: {text}; only its encoder can be used, by --init")

    @classmethod
    def initialise(cls, job: Finetune, model: AsrModel) -> list[str]:
        """The encoder of `job.init`, if there is one."""
        if not job.init:
            return ["encoder: from scratch"]
        check_files(init=job.init)
        unused = load_encoder(model, job.init, job.init_weights)
        return [f"encoder: {job.init_weights} weights of {job.init}; not taken: {', '.join(unused) or 'nothing'}"]

    def model_config(self) -> dict[str, Any]:
        return config_to_dict(self.job.model)

    def more(self) -> dict[str, Any]:
        tokenizer = self.data.tokenizer
        return {
            "extra": {"tokenizer": tokenizer.to_dict()},
            "evaluation": lambda: WordErrors(self.model, tokenizer),
            "score_by": "wer",
        }


def build_model(job: Finetune, device: torch.device) -> AsrModel:
    """The model with weights drawn from the seed, the same on every rank and on every device; with what hides its features in training."""
    model = prepare_model(job, lambda: AsrModel(job.model), device)
    frontend: Any = model.frontend
    if job.data.spec_augment.hides:
        masks = SpecAugment(job.data.spec_augment, frontend.sample_rate / frontend.mel.frame_shift)
        masks.attach(frontend, model.clock.generator)
    return model


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run_program(finetune, Finetune, sys.argv[1:] if argv is None else argv, "finetune", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
