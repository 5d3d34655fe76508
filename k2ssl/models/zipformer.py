"""The Zipformer encoder: stacks of layers at different frame rates and widths.

Source: arXiv 2310.11230; published sizes for self-supervised training: arXiv 2411.17100 and its recipe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2ssl.models.encoder_output import EncoderOutput, check_encoder_input, check_stop_after
from k2ssl.models.zipformer_layer import LayerSizes, ZipformerLayer
from k2ssl.nn.bypass import Bypass
from k2ssl.nn.dropout import Dropout, keep_mask
from k2ssl.nn.positional import relative_positions
from k2ssl.nn.recompute import recompute
from k2ssl.nn.resample import Downsample, downsample_mask, upsample
from k2ssl.nn.schedule import Clock, Schedule
from k2ssl.structure import check_types

_FEATURE_MASK_RATE = 0.125
_POSITION_DROPOUT = 0.15
_PER_STACK = ("num_layers", "downsampling", "dim", "feedforward_dim", "unmasked_dim", "num_heads", "kernel")


@dataclass(frozen=True)
class ZipformerConfig:
    """Sizes of a Zipformer; tuples have one entry per stack. The defaults are the published Base.

    Attributes:
        num_layers: layers of each stack.
        downsampling: frame-rate divisor of each stack.
        dim: width C of each stack; the first is the width of the input, the largest that of the output.
        feedforward_dim: hidden width of the second feed-forward (the first has 3/4 of it, the third 5/4).
        unmasked_dim: how many of the leading channels the training-time feature mask never touches.
        num_heads: attention heads of each stack.
        kernel: odd taps of the depthwise convolutions of each stack.
        query_head_dim: width of queries and keys per head.
        pos_head_dim: width per head of what attends by relative position.
        value_head_dim: width of values per head.
        pos_dim: width of the relative-position table, even.
        dropout: initial and final rate inside feed-forwards, reached at batch count 20,000.
        warmup: batch count until which whole layers are skipped often, staggered from the first stack to the last.
    """

    num_layers: tuple[int, ...] = (2, 2, 3, 4, 3, 2)
    downsampling: tuple[int, ...] = (1, 2, 4, 8, 4, 2)
    dim: tuple[int, ...] = (192, 256, 448, 768, 448, 192)
    feedforward_dim: tuple[int, ...] = (512, 768, 1024, 1536, 1024, 768)
    unmasked_dim: tuple[int, ...] = (192, 192, 256, 256, 256, 192)
    num_heads: tuple[int, ...] = (4, 4, 4, 8, 4, 4)
    kernel: tuple[int, ...] = (31, 31, 15, 15, 15, 31)
    query_head_dim: int = 32
    pos_head_dim: int = 4
    value_head_dim: int = 12
    pos_dim: int = 48
    dropout: tuple[float, float] = (0.3, 0.1)
    warmup: float = 4000.0

    def __post_init__(self) -> None:
        check_types(self)
        self._check_stacks()
        for name in ("query_head_dim", "pos_head_dim", "value_head_dim"):
            _check_at_least(name, getattr(self, name), 1)
        if self.pos_dim < 2 or self.pos_dim % 2:
            raise ValueError(f"ZipformerConfig: pos_dim is {self.pos_dim}, allowed are even numbers >= 2")
        if len(self.dropout) != 2 or not all(0.0 <= rate < 1.0 for rate in self.dropout):
            raise ValueError(f"ZipformerConfig: dropout is {self.dropout}, allowed are two rates in [0, 1)")
        if not (math.isfinite(self.warmup) and self.warmup > 0):
            raise ValueError(f"ZipformerConfig: warmup is {self.warmup}, allowed is a batch count > 0")

    def _check_stacks(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in _PER_STACK}
        if len(set(lengths.values())) != 1 or not self.dim:
            raise ValueError(f"ZipformerConfig: one entry per stack is needed in each of these, but their lengths are {lengths}")
        for name in lengths:
            for stack, value in enumerate(getattr(self, name)):
                _check_at_least(f"{name}[{stack}]", value, 4 if name in ("dim", "feedforward_dim") else 1)
        for stack, (kernel, unmasked, dim) in enumerate(zip(self.kernel, self.unmasked_dim, self.dim, strict=True)):
            if kernel % 2 == 0:
                raise ValueError(f"ZipformerConfig: kernel[{stack}] is {kernel}, allowed are odd numbers")
            if unmasked > dim:
                raise ValueError(f"ZipformerConfig: unmasked_dim[{stack}] is {unmasked}, allowed is at most dim[{stack}] = {dim}")

    @classmethod
    def base(cls) -> ZipformerConfig:
        """89.9 M parameters, the size of HuBERT Base with its frontend."""
        return cls()

    @classmethod
    def large(cls) -> ZipformerConfig:
        """301 M parameters, the size of HuBERT Large."""
        return cls(
            num_layers=(2, 2, 4, 5, 4, 2),
            dim=(256, 512, 768, 1024, 768, 512),
            feedforward_dim=(768, 1536, 2048, 3072, 2048, 1536),
            unmasked_dim=(192, 192, 256, 320, 256, 192),
        )

    @classmethod
    def tiny(cls) -> ZipformerConfig:
        """About 0.3 M parameters, for tests and for a laptop core."""
        return cls(
            num_layers=(1, 1, 2),
            downsampling=(1, 2, 4),
            dim=(48, 64, 96),
            feedforward_dim=(96, 128, 192),
            unmasked_dim=(32, 48, 64),
            num_heads=(2, 2, 4),
            kernel=(15, 15, 7),
            query_head_dim=16,
            pos_head_dim=4,
            value_head_dim=8,
            pos_dim=16,
        )


class ZipformerStack(nn.Module):
    """Layers of one width at one frame rate; where that rate is reduced, with a bypass around the whole stack.

    Args:
        sizes: sizes of every layer; num_layers: how many.
        downsampling: frame-rate divisor.
        skip_window: batch counts between which the layers, one after the other, come to be skipped rarely.
        dropout: schedule inside the feed-forwards.
        clock: source of the batch count and of randomness.
    """

    def __init__(
        self, sizes: LayerSizes, num_layers: int, downsampling: int, skip_window: tuple[float, float], dropout: Schedule, clock: Clock
    ) -> None:
        super().__init__()
        self.clock = clock
        self.downsampling = downsampling
        self.pos_dim = sizes.pos_dim
        self.position_dropout = Dropout(_POSITION_DROPOUT, clock)
        begin, step = skip_window[0], (skip_window[1] - skip_window[0]) / num_layers
        final_rate = 0.035 * math.sqrt(downsampling)
        self.layers = nn.ModuleList(
            ZipformerLayer(sizes, Schedule((begin + i * step, 0.5), (begin + (i + 1) * step, final_rate)), dropout, clock)
            for i in range(num_layers)
        )
        self.downsample = Downsample(downsampling) if downsampling > 1 else None
        self.out_bypass = Bypass(sizes.dim, clock) if downsampling > 1 else None  # upstream: out_combiner

    def forward(
        self,
        x: Tensor,
        padding_mask: Tensor | None,
        feature_mask: Tensor | None,
        most_layers: int | None = None,
        recompute_layers: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the layers, or the first `most_layers` of them.

        Args:
            x: (N, T, C).
            padding_mask: (N, T) bool, True at padding, or None.
            feature_mask: (N, 1, C) of zeros and ones, or None.
            most_layers: None for all.
            recompute_layers: keep only the inputs of layers for the backward pass, see `recompute`.

        Returns:
            The stack's output (N, T, C), and the output of each layer run at the stack's frame rate.
        """
        start = x
        if self.downsample is not None:
            x = self.downsample(x, padding_mask)
            padding_mask = downsample_mask(padding_mask, self.downsampling)
        positions = self.position_dropout(relative_positions(x.shape[1], self.pos_dim, x.device).to(x.dtype))
        x = _mask_features(x, feature_mask)
        hidden = []
        for layer in islice(self.layers, most_layers):
            inputs = (x, positions, padding_mask)
            x = _mask_features(recompute(layer, self.clock, *inputs) if recompute_layers else layer(*inputs), feature_mask)
            hidden.append(x)
        if self.out_bypass is not None:
            x = self.out_bypass(start, upsample(x, self.downsampling, start.shape[1]))
        return x, hidden


class Zipformer(nn.Module):
    """Encoder from frames (N, T, dim[0]) to frames (N, T, max(dim)) at the same rate.

    Args:
        config: sizes.
        clock: what drives schedules and randomness in training; a clock of its own when None.

    Attributes:
        recompute_layers: in training, keep only the inputs of layers and run each a second time in the backward pass: less memory,
            more time, the same gradients. Off unless set.
    """

    def __init__(self, config: ZipformerConfig, clock: Clock | None = None) -> None:
        super().__init__()
        self.config = config
        self.clock = Clock() if clock is None else clock
        self.input_dim = config.dim[0]
        self.output_dim = max(config.dim)
        self.num_layers = sum(config.num_layers)
        self.recompute_layers = False
        dropout = Schedule((0.0, config.dropout[0]), (20000.0, config.dropout[1]))
        num_stacks = len(config.dim)
        window = config.warmup / (num_stacks + 1)
        self.stacks = nn.ModuleList(
            ZipformerStack(
                sizes=LayerSizes(
                    dim=config.dim[i],
                    feedforward_dim=config.feedforward_dim[i],
                    num_heads=config.num_heads[i],
                    query_head_dim=config.query_head_dim,
                    pos_head_dim=config.pos_head_dim,
                    value_head_dim=config.value_head_dim,
                    pos_dim=config.pos_dim,
                    kernel=config.kernel[i],
                ),
                num_layers=config.num_layers[i],
                downsampling=config.downsampling[i],
                skip_window=(window * (i + 1), window * (i + 2)),
                dropout=dropout,
                clock=self.clock,
            )
            for i in range(num_stacks)
        )

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, return_hidden: bool = False, stop_after: int | None = None
    ) -> EncoderOutput:
        """Encode frames.

        Args:
            x: (N, T, dim[0]).
            padding_mask: (N, T) bool, True at padding, which must follow the frames of an utterance; None when nothing is padded.
            return_hidden: also return the output of every layer and of every stack, at the full frame rate.
            stop_after: compute the layers up to this one only, counted from 1 through all stacks; `frames` is then its output at the
                full frame rate. After the last layer of a stack, `stacks` includes that stack. None: all.

        Raises:
            ValueError: wrong width, or a mask of another shape or type; no such layer.
        """
        check_encoder_input(x, padding_mask, self.input_dim)
        check_stop_after(stop_after, self.num_layers)
        recompute_layers = self.recompute_layers and self.training and torch.is_grad_enabled()
        feature_masks = self._draw_feature_masks(x)
        layers_left = self.num_layers if stop_after is None else stop_after
        outputs: list[Tensor] = []
        hidden: list[Tensor] = []
        config = self.config
        stacks = zip(self.stacks, config.num_layers, config.dim, config.downsampling, feature_masks, strict=True)
        for stack, num_layers, dim, factor, feature_mask in stacks:
            x, stack_hidden = stack(_set_channels(x, dim), padding_mask, feature_mask, layers_left, recompute_layers)
            if layers_left >= num_layers:
                outputs.append(x)
            if return_hidden:
                hidden += [upsample(h, factor, x.shape[1]) for h in stack_hidden]
            layers_left -= len(stack_hidden)
            if layers_left == 0:
                break
        frames = _last_stack_of_each_channel(outputs) if stop_after is None else upsample(stack_hidden[-1], factor, x.shape[1])
        return EncoderOutput(frames, tuple(hidden), tuple(outputs) if return_hidden else ())

    def _draw_feature_masks(self, x: Tensor) -> list[Tensor | None]:
        """Per stack (N, 1, C) or None: two Bernoulli draws per sequence, shared by all stacks and constant over time."""
        if not self.training:
            return [None] * len(self.stacks)
        first = keep_mask((x.shape[0], 1, 1), _FEATURE_MASK_RATE, self.clock, x)
        both = first * keep_mask((x.shape[0], 1, 1), _FEATURE_MASK_RATE, self.clock, x)
        masks: list[Tensor | None] = []
        for dim, unmasked in zip(self.config.dim, self.config.unmasked_dim, strict=True):
            half = (dim - unmasked) // 2
            widths = (unmasked, half, dim - unmasked - half)
            parts = (torch.ones_like(first), first, both)
            mask = torch.cat([part.expand(-1, -1, width) for part, width in zip(parts, widths, strict=True)], dim=-1)
            masks.append(mask if dim > unmasked else None)
        return masks


def _set_channels(x: Tensor, num_channels: int) -> Tensor:
    """Drop the last channels or append zeros."""
    if num_channels <= x.shape[-1]:
        return x[..., :num_channels]
    return F.pad(x, (0, num_channels - x.shape[-1]))


def _mask_features(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _last_stack_of_each_channel(outputs: list[Tensor]) -> Tensor:
    """(N, T, C_i) per stack -> (N, T, max C_i): each channel from the last stack that has it."""
    pieces = [outputs[-1]]
    width = outputs[-1].shape[-1]
    for output in reversed(outputs[:-1]):
        if output.shape[-1] > width:
            pieces.append(output[..., width:])
            width = output.shape[-1]
    return torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0]


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"ZipformerConfig: {name} is {value}, allowed are whole numbers >= {least}")
