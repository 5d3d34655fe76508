"""Settings of a pre-training job that have no effect: allowed, and yet not what was meant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from k2ssl.models.frontend import WaveformConfig
from k2ssl.models.transformer import TransformerConfig

if TYPE_CHECKING:
    from k2ssl.bin.pretrain import Pretrain


def settings_without_effect(job: Pretrain) -> Iterator[str]:
    """One line for each, naming the setting and why it does nothing."""
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
    if trainer.precision not in ("auto", "float16"):
        yield from _none(
            _changed(trainer.guard, "trainer.guard", "min_scale"), f"with trainer.precision {trainer.precision}, which has no loss scale"
        )
    if not trainer.guard.max_rollbacks:
        yield from _none(_changed(trainer.guard, "trainer.guard", "lr_factor"), "with trainer.guard.max_rollbacks 0")
    if not job.preflight.run and not job.tune:
        yield from _none(_changed(job.preflight, "preflight", "batches", "memory_limit_gib"), "with preflight.run False")
    if model.head.similarity == "linear":
        yield from _none(_changed(model.head, "model.head", "code_dim"), "with model.head.similarity linear")
    if not model.masking.channel_probability:
        yield from _none(_changed(model.masking, "model.masking", "channel_length"), "with model.masking.channel_probability 0")
    normalizes = isinstance(model.frontend, WaveformConfig) and model.frontend.normalizes_audio
    if data.normalize and not normalizes:
        yield "data.normalize: the trained model does not normalise audio by itself, so whoever uses it has to (see model.frontend.normalize_audio)"


def _changed(config: Any, path: str, *names: str) -> list[str]:
    """Which of these settings are not at the default of their class."""
    defaults = {field.name: field.default for field in fields(config)}
    return [f"{path}.{name}" for name in names if getattr(config, name) != defaults[name]]


def _none(named: list[str], why: str) -> Iterator[str]:
    if named:
        yield f"{', '.join(named)}: no effect {why}"
