"""Averages of whole models from their files, for those who write them and for those who decode with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from k2ssl.models.load import AnyModel, Weights, config_to_dict, model_from, read_content, weights_in
from k2ssl.train.averaging import average_of, average_over_range

_BELONGS_TO_A_MODEL = ("tokenizer", "job")


@dataclass(frozen=True)
class ModelFile:
    """A model and the file that it is from.

    Attributes:
        path: the file.
        content: all that it holds.
        weights: which weights the model has.
        model: on the CPU.
    """

    path: str
    content: Mapping[str, Any]
    weights: Weights
    model: AnyModel

    @property
    def belongings(self) -> dict[str, Any]:
        """What is to go with an average of the weights: tokenizer and settings of the run, as far as the file has them."""
        return {key: self.content[key] for key in _BELONGS_TO_A_MODEL if key in self.content}

    @property
    def normalizes(self) -> bool | None:
        """Whether the run that wrote the file normalised its audio; None: the file does not say."""
        job = self.content.get("job")
        data = job.get("data") if isinstance(job, Mapping) else None
        return bool(data.get("normalize", False)) if isinstance(data, Mapping) else None


def open_model(path: str, weights: Weights, of: type[AnyModel] | None = None) -> ModelFile:
    """Read a training checkpoint or model file.

    Raises:
        ValueError: see `k2ssl.models.load.load_model`.
    """
    content = read_content(path)
    return ModelFile(path, content, weights, model_from(content, path, weights, of=of))


def mean_of_models(first: ModelFile, others: Sequence[str]) -> dict[str, Tensor]:
    """The plain mean of the same weights of several files, float64 on the CPU.

    Raises:
        ValueError: a file cannot be read, or models do not belong together, or weights are not finite; names the files and what differs.
    """

    def states() -> Iterator[Mapping[str, Tensor]]:
        yield _finite_weights(first)
        for path in others:  # one file is read after the other, so that memory does not grow with their number
            other = open_model(path, first.weights, type(first.model))
            _check_same(first, other)
            yield _finite_weights(other)

    return average_of(states())


def mean_over_steps(start: str | None, end: ModelFile) -> tuple[dict[str, Tensor], str]:
    """The mean over the steps from `start` (exclusive; None: the beginning) to `end`, float64 on the CPU, and in words which steps.

    Raises:
        ValueError: a file cannot be read or has no running average, or weights that are not finite, or the two do not belong together or are
            in the wrong order.
    """
    before = None if start is None else open_model(start, "average", type(end.model))
    if before is not None:
        _check_same(before, end)
        _finite_weights(before)
    _finite_weights(end)
    try:
        mean = average_over_range(None if before is None else before.content, end.content)
    except ValueError as error:
        raise ValueError(f"from {start} to {end.path}: {error}") from error
    first = 1 if before is None else before.content["average"]["step"] + 1
    return mean, f"mean over steps {first} to {end.content['average']['step']}"


def _finite_weights(file: ModelFile) -> Mapping[str, Tensor]:
    """The weights of a file that are to be averaged.

    Raises:
        ValueError: one value that is not finite, from a run that diverged, would be in every average.
    """
    key, state = weights_in(file.content, file.path, file.weights)
    for name, value in state.items():
        if lost := int((~value.isfinite()).sum()):
            raise ValueError(
                f"{file.path}: cannot be averaged, {lost:,} of {value.numel():,} values of {name} under {key!r} are not finite numbers"
            )
    return state


def _check_same(one: ModelFile, two: ModelFile) -> None:
    def refuse(what: str) -> None:
        raise ValueError(f"{one.path} and {two.path} cannot be averaged: {what}")

    for key, left, right in _differences(config_to_dict(one.model.config), config_to_dict(two.model.config), "config"):
        refuse(f"{key} is {left!r} in {one.path}, {right!r} in {two.path}")
    if _tokenizer_sha256(one) != _tokenizer_sha256(two):
        refuse("their tokenizers differ")
    if one.normalizes is not None and two.normalizes is not None and one.normalizes != two.normalizes:
        refuse(f"data.normalize was {one.normalizes} for {one.path}, {two.normalizes} for {two.path}")


def _tokenizer_sha256(file: ModelFile) -> Any:
    return file.content["tokenizer"].get("sha256") if "tokenizer" in file.content else None


def _differences(left: Any, right: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for key in [*left, *(key for key in right if key not in left)]:
            yield from _differences(left.get(key), right.get(key), f"{path}.{key}")
    elif left != right:
        yield path, left, right
