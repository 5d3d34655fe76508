"""What all programs that read manifests with a recognition model are told: which model, which cuts, where and how to compute."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from k2ssl.bin.cluster_cuts import LoaderConfig, check_device, check_files
from k2ssl.bin.decode_model import TrainedModel, check_checkpoints, load_trained
from k2ssl.bin.output_file import check_one_process, check_output
from k2ssl.models.load import Weights
from k2ssl.train.precision import Precision, choose_precision

_ENTRY = r"(?m)^(?= {8}\w)"  # where a setting of a docstring begins


@dataclass(frozen=True, kw_only=True)
class RecognitionJob:
    """Settings that decode, align and tune_lm share; each program has more of its own.

    Attributes:
        checkpoints: training checkpoints of k2ssl.bin.finetune; the first arguments of the command line are these too. Of several the mean
            of the weights is taken.
        cuts: manifests of the utterances (.jsonl.gz).
        weights: raw, as the last optimizer step left them, or average, the mean over all steps that a training checkpoint holds.
        after: with averaged weights of one checkpoint: the checkpoint after which the range of steps begins.
        loader: how audio is read.
        precision: number format of the encoder; float32 gives the same text in every batch. auto is bfloat16 on GPUs that have it.
        device: auto, cpu, cuda or cuda:NUMBER; auto takes the GPU if there is one.
        overwrite: replace what is in OUTPUT already.
        quiet: plain lines instead of a progress bar, for logs.
    """

    cuts: tuple[str, ...]
    output: str
    checkpoints: tuple[str, ...] = ()
    weights: Weights = "raw"
    after: str | None = None
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    precision: Precision = "float32"
    device: str = "auto"
    overwrite: bool = False
    quiet: bool = False

    def __init_subclass__(cls) -> None:
        """Programs make --help from the docstring of one class: that of a subclass tells of what it inherits, too, in words of its own
        where it has any."""
        own = cls.__doc__ or ""
        shared = re.split(_ENTRY, (RecognitionJob.__doc__ or "").partition("Attributes:\n")[2])[1:]
        cls.__doc__ = (
            own.rstrip() + "\n" + "".join(entry for entry in shared if not re.search(f"(?m)^ {{8}}{entry.split(':')[0].strip()}: ", own))
        )

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not self.cuts:
            raise ValueError(f"{name}: cuts names no manifest, at least one is needed")
        check_device(self.device, f"{name}: ")

    def check_inputs(self, **files: str) -> None:
        """Refuse checkpoints, manifests and other files that are not there, before anything else is done.

        Raises:
            ConfigError: names the setting and the path.
        """
        check_checkpoints(self.checkpoints, self.weights, self.after)
        check_files(cuts=self.cuts, **files)

    def check_file_and_process(self, advice: str = "", **files: str) -> Path:
        """OUTPUT of a program that writes a file, runs in one process, and reads checkpoints, manifests and `files`.

        Raises:
            ConfigError: there are several processes, or the file must not or cannot be written.
        """
        check_one_process(advice)
        return check_output(self.output, self.overwrite, checkpoints=self.checkpoints, after=self.after, cuts=self.cuts, **files)

    def load_model(self, device: torch.device) -> TrainedModel:
        """The model with the weights that are asked for.

        Raises:
            ValueError: see `load_trained`.
        """
        return load_trained(self.checkpoints, self.weights, self.after, device, choose_precision(self.precision, device))

    def load_ctc_model(self, device: torch.device, use: str) -> TrainedModel:
        """The same, for a program that needs a CTC head; `use` says for what.

        Raises:
            ValueError: as `load_model`; the model has no such head.
        """
        trained = self.load_model(device)
        if trained.model.ctc is None:
            raise ValueError(f"{self.checkpoints[0]}: has no CTC head, {use}; its heads are {trained.model.config.heads!r}")
        return trained
