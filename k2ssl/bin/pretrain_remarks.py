"""Settings of a training job that have no effect: allowed, and yet not what was meant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from k2ssl.models.ctc_head import CtcConfig
from k2ssl.models.frontend import WaveformConfig
from k2ssl.models.transducer_head import TransducerConfig
from k2ssl.models.transformer import TransformerConfig
from k2ssl.optim.build import ScheduleConfig

if TYPE_CHECKING:
    from k2ssl.bin.finetune import Finetune
    from k2ssl.bin.pretrain import Pretrain


def settings_without_effect(job: Pretrain) -> Iterator[str]:
    """Of a pre-training job: one line for each, naming the setting and why it does nothing."""
    model, data = job.model, job.data
    yield from without_effect_anywhere(job)
    if model.head.similarity == "linear":
        yield from _none(_changed(model.head, "model.head", "code_dim"), "with model.head.similarity linear")
    normalizes = isinstance(model.frontend, WaveformConfig) and model.frontend.normalizes_audio
    if data.normalize and not normalizes:
        yield "data.normalize: the trained model does not normalise audio by itself, so whoever uses it has to (see model.frontend.normalize_audio)"


def asr_settings_without_effect(job: Finetune) -> Iterator[str]:
    """The same of a fine-tuning job."""
    model = job.model
    yield from without_effect_anywhere(job)
    if model.heads == "ctc":
        yield from _none(_changed(model, "model", "simple_scale", "warmup_steps"), "with model.heads ctc")
        if model.transducer != TransducerConfig():
            yield "model.transducer: no effect with model.heads ctc"
    if model.heads == "transducer" and model.ctc != CtcConfig():
        yield "model.ctc: no effect with model.heads transducer"
    if model.heads != "both":
        yield from _none(_changed(model, "model", "ctc_scale"), f"with model.heads {model.heads}")
    if not model.masking.probability:
        yield from _none(_changed(model.masking, "model.masking", "length", "min_spans"), "with model.masking.probability 0")
    if model.freeze_frontend_steps and model.freeze_frontend_steps <= model.freeze_encoder_steps:
        yield "model.freeze_frontend_steps: no effect below model.freeze_encoder_steps, which freezes the frontend too"
    masks = job.data.spec_augment
    for kind, names in (("band", ["band_width"]), ("time", ["time_width", "time_share"])):
        if not getattr(masks, f"{kind}_masks"):
            yield from _none(_changed(masks, "data.spec_augment", *names), f"with data.spec_augment.{kind}_masks 0")
    if not job.init:
        yield from _none(_changed(job, "", "init_weights", "init_batch_count"), "without init")
    if model.heads != "ctc" and 0 < job.trainer.max_steps < model.warmup_steps:
        yield (
            f"model.warmup_steps is {model.warmup_steps}, more than trainer.max_steps, {job.trainer.max_steps}: training ends before the pruned "
            "loss, which the search relies on, has its full weight"
        )


def without_effect_anywhere(job: Pretrain | Finetune) -> Iterator[str]:
    """What both kinds of jobs have in common."""
    trainer, model, data = job.trainer, job.model, job.data
    if not data.valid_cuts:
        named = [*_changed(trainer, "trainer", "valid_every", "valid_average"), *_changed(trainer.keep, "trainer.keep", "keep_best")]
        if named:
            yield f"{', '.join(named)}: no effect without data.valid_cuts"
    if len(data.cuts) == 1 and data.weights:
        yield "data.weights: no effect with one manifest"
    if isinstance(model.encoder, TransformerConfig):
        yield from _none(
            _changed(trainer.batch, "trainer.batch", "reference_seconds"), "with a Transformer, which has no schedules of its own"
        )
    if job.schedule.name == "tri_stage":
        length = job.schedule.max_batches
        names = ["warmup_batches", "hold_batches", "decay_batches"] if length else ["phase_ratio"]
        yield from _none(_changed(job.schedule, "schedule", *names), f"with schedule.max_batches {length:g}")
    if trainer.precision not in ("auto", "float16"):
        yield from _none(
            _changed(trainer.guard, "trainer.guard", "min_scale"), f"with trainer.precision {trainer.precision}, which has no loss scale"
        )
    if not trainer.guard.max_rollbacks:
        yield from _none(_changed(trainer.guard, "trainer.guard", "lr_factor"), "with trainer.guard.max_rollbacks 0")
    if not job.preflight.run and not job.tune:
        yield from _none(_changed(job.preflight, "preflight", "batches", "memory_limit_gib"), "with preflight.run False")
    if not model.masking.channel_probability:
        yield from _none(_changed(model.masking, "model.masking", "channel_length"), "with model.masking.channel_probability 0")


def ending_in_warm_up(schedule: ScheduleConfig, steps: int) -> Iterator[str]:
    """Of any training job: whether it ends while its rate still rises.

    Args:
        schedule: of the learning rate.
        steps: updates of the whole run; 0: not known.
    """
    has_warm_up = schedule.name != "tri_stage" or not schedule.max_batches
    if has_warm_up and 0 < steps <= schedule.warmup_batches:
        yield (
            f"schedule.warmup_batches is {schedule.warmup_batches:g}, and the run has {steps:,} updates: it ends before the learning rate is "
            "what optim.lr says; give fewer warmup_batches, or more updates"
        )


def _changed(config: Any, path: str, *names: str) -> list[str]:
    """Which of these settings are not at the default of their class."""
    defaults = {field.name: field.default for field in fields(config)}
    return [f"{path}.{name}".lstrip(".") for name in names if getattr(config, name) != defaults[name]]


def _none(named: list[str], why: str) -> Iterator[str]:
    if named:
        yield f"{', '.join(named)}: no effect {why}"
