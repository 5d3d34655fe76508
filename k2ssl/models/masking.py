"""Span masking of frames and channels, drawn on the device.

Statistics: fairseq's compute_mask_indices (static spans, overlap allowed), as used by wav2vec 2.0 (arXiv 2006.11477) and HuBERT
(arXiv 2106.07447).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from k2ssl.structure import check_types


@dataclass(frozen=True)
class MaskingConfig:
    """Which frames are hidden from the encoder.

    Attributes:
        probability: spans times their length over the number of frames; as spans overlap, 0.8 hides about 57 % of the frames.
        length: frames per span.
        min_spans: spans drawn in any utterance, however short.
        channel_probability: spans of channels, set to 0 at all frames of an utterance, times their length over the number of channels;
            0: no channels are hidden.
        channel_length: channels per such span.
        equal_counts: hide as many frames, and as many channels, in all utterances of a batch, as published: what goes beyond the one with
            fewest is shown again, at random. That is little where lengths are equal, as in pre-training; where they differ it leaves
            single frames of the spans. False: every utterance keeps its own spans.
    """

    probability: float = 0.8
    length: int = 10
    min_spans: int = 2
    channel_probability: float = 0.0
    channel_length: int = 10
    equal_counts: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("probability", "channel_probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"MaskingConfig: {name} is {getattr(self, name)}, allowed is 0 <= {name} <= 1")
        for name, least in (("length", 1), ("channel_length", 1), ("min_spans", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"MaskingConfig: {name} is {getattr(self, name)}, allowed are whole numbers >= {least}")


def draw_span_mask(
    lens: Tensor, max_len: int, probability: float, length: int, min_spans: int, generator: torch.Generator, equal_counts: bool
) -> Tensor:
    """Draw a mask for each row.

    Per row of `n` valid positions: floor(probability n / length + u) spans, u uniform in [0, 1), at least `min_spans`; their starts
    drawn without replacement; their union taken; then, with `equal_counts`, entries dropped at random until every row has as many as the
    row with fewest. Where fairseq fails, on rows hardly longer than a span, spans are cut at the row's end; at least one position of a
    row with two or more stays visible.

    Args:
        lens: (N,) valid positions per row, >= 1, on the generator's device; no value of it is read on the host.
        max_len: columns of the mask.
        probability, length, min_spans, equal_counts: see `MaskingConfig`.
        generator: where the draws come from.

    Returns:
        (N, max_len) bool, True where hidden.
    """
    lens = lens.unsqueeze(1)
    shape, device = (lens.shape[0], max_len), lens.device
    columns = torch.arange(max_len, device=device).unsqueeze(0)

    dither = torch.rand((shape[0], 1), generator=generator, device=device)
    num_spans = (lens * (probability / length) + dither).floor().long().clamp(min=min_spans)
    num_starts = torch.minimum(torch.maximum(lens - length, num_spans + 1), lens)
    order = torch.rand(shape, generator=generator, device=device).masked_fill(columns >= num_starts, 2.0)
    starts = _rank(order) < num_spans  # of a row shorter than its number of spans, starts beyond the row, which count for nothing

    covered = starts.cumsum(dim=1)
    covered[:, length:] -= covered[:, :-length].clone()
    mask = (covered > 0) & (columns < lens)

    num_hidden = torch.minimum(mask.sum(dim=1, keepdim=True), (lens - 1).clamp(min=1))
    if equal_counts:
        num_hidden = num_hidden.min()
    order = torch.rand(shape, generator=generator, device=device).masked_fill(~mask, 2.0)
    return mask & (_rank(order) < num_hidden)


def most_hidden(max_len: int, probability: float, length: int, min_spans: int) -> int:
    """An upper bound, known on the host, of the True entries per row of `draw_span_mask`."""
    num_spans = max(min_spans, int(probability * max_len / length + 1.0))
    return min(max_len, num_spans * length)


def select_true(mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Flat positions of the True entries of `mask`, in order, in a tensor whose size is known on the host.

    Args:
        mask: bool, any shape.
        size: at least the number of True entries.

    Returns:
        positions (size,) int64, and valid (size,) bool, False for the filling at the end, whose position is 0.
    """
    flat = mask.flatten()
    slot = torch.where(flat, flat.cumsum(dim=0) - 1, size)
    positions = flat.new_zeros(size + 1, dtype=torch.int64)
    positions.scatter_(0, slot, torch.arange(flat.numel(), device=flat.device))
    positions = positions[:size]
    valid = torch.arange(size, device=flat.device) < flat.sum()
    return positions.masked_fill(~valid, 0), valid


def _rank(order: Tensor) -> Tensor:
    """Rank of each entry in its row, 0 for the smallest."""
    return order.argsort(dim=1).argsort(dim=1)
