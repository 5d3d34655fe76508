"""What every encoder takes and returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EncoderOutput:
    """Frames of the last layer and, if asked for, of the layers before it.

    Attributes:
        frames: (N, T, C) the encoder's output; of an encoder that was told to stop after layer L, the output of layer L, which is
            `hidden[L - 1]`. Values at padded frames are finite and carry no meaning.
        hidden: the output of every block that ran, in order, (N, T, C_i) each and all at the full frame rate; empty unless asked for. A block is
            a layer of the Transformer, or a layer of a Zipformer stack upsampled to the full rate. "The features of layer L" are
            `hidden[L - 1]`: layers count from 1, as in the HuBERT paper (arXiv 2106.07447). An encoder's final normalisation, where
            it has one, is part of `frames` only.
        stacks: the output of every Zipformer stack whose last layer ran, (N, T, C_i); empty for a Transformer, and unless asked for.
    """

    frames: Tensor
    hidden: tuple[Tensor, ...] = ()
    stacks: tuple[Tensor, ...] = ()


def check_encoder_input(x: Tensor, padding_mask: Tensor | None, input_dim: int) -> None:
    """Refuse frames or masks that do not fit; looks at shapes and types only, so it never waits for a device.

    Raises:
        ValueError: `x` is not (N, T >= 1, input_dim), or `padding_mask` is not a bool tensor (N, T).
    """
    if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != input_dim or not x.is_floating_point():
        raise ValueError(f"encoder: x has shape {tuple(x.shape)} and type {x.dtype}, allowed are floats of shape (N, T >= 1, {input_dim})")
    if padding_mask is not None and (padding_mask.shape != x.shape[:2] or padding_mask.dtype != torch.bool):
        raise ValueError(
            f"encoder: padding_mask has shape {tuple(padding_mask.shape)} and type {padding_mask.dtype}, "
            f"allowed is {tuple(x.shape[:2])} and torch.bool"
        )


def check_stop_after(stop_after: int | None, num_layers: int) -> None:
    """Refuse a layer to stop after that the encoder does not have.

    Raises:
        ValueError: `stop_after` is neither None nor 1 to `num_layers`.
    """
    if stop_after is not None and not 1 <= stop_after <= num_layers:
        raise ValueError(f"encoder: stop_after is {stop_after}, allowed are layers 1 to {num_layers}, or None for all of them")
