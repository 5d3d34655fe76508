"""HuBERT's own encoder: convolutional positions and Transformer layers, the Zipformer's baseline in the paper's comparison."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from k2ssl.models.encoder_output import EncoderOutput, check_encoder_input, check_stop_after
from k2ssl.nn.conv_position import ConvPosition
from k2ssl.nn.dropout import Dropout
from k2ssl.nn.fused_attention import FusedSelfAttention
from k2ssl.nn.keep_in_graph import keep_in_graph
from k2ssl.nn.recompute import recompute
from k2ssl.nn.schedule import Clock
from k2ssl.structure import check_types


@dataclass(frozen=True)
class TransformerConfig:
    """Size and regularisation of HuBERT's Transformer; the defaults are HuBERT Base.

    Attributes:
        num_layers: layers of the encoder.
        dim: width of the encoder, its input and its output.
        feedforward_dim: hidden width of the feed-forward modules.
        num_heads: attention heads, a divisor of `dim`.
        layer_norm_first: normalise before attention and feed-forward (pre-norm: Large) instead of after the residual sum (Base).
        dropout: rate after the positions, after attention and after feed-forward.
        attention_dropout: rate on attention weights.
        activation_dropout: rate inside feed-forward modules.
        layer_drop: probability to skip a layer in a training step, at most 1.
        conv_pos_kernel: width in frames of the positional convolution.
        conv_pos_groups: groups of the positional convolution, a divisor of `dim`.

    Raises:
        ValueError: a field outside its range.
    """

    num_layers: int = 12
    dim: int = 768
    feedforward_dim: int = 3072
    num_heads: int = 12
    layer_norm_first: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    layer_drop: float = 0.05
    conv_pos_kernel: int = 128
    conv_pos_groups: int = 16

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("num_layers", "dim", "feedforward_dim", "num_heads", "conv_pos_kernel", "conv_pos_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"TransformerConfig: {name} is {getattr(self, name)}, at least 1 is needed")
        for name in ("num_heads", "conv_pos_groups"):
            if self.dim % getattr(self, name):
                raise ValueError(f"TransformerConfig: {name} is {getattr(self, name)}, a divisor of dim {self.dim} is needed")
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"TransformerConfig: {name} is {getattr(self, name)}, a rate in [0, 1) is needed")
        if not 0 <= self.layer_drop <= 1:
            raise ValueError(f"TransformerConfig: layer_drop is {self.layer_drop}, a probability in [0, 1] is needed")

    @classmethod
    def base(cls) -> TransformerConfig:
        """HuBERT Base; 89.8 M parameters."""
        return cls()

    @classmethod
    def large(cls) -> TransformerConfig:
        """HuBERT Large; 310.7 M parameters."""
        return cls(
            num_layers=24,
            dim=1024,
            feedforward_dim=4096,
            num_heads=16,
            layer_norm_first=True,
            dropout=0.0,
            attention_dropout=0.0,
            layer_drop=0.0,
        )

    @classmethod
    def tiny(cls) -> TransformerConfig:
        """Base's shape in miniature, for tests and dry runs."""
        return cls(num_layers=2, dim=32, feedforward_dim=64, num_heads=4, conv_pos_kernel=16, conv_pos_groups=4)


class FeedForward(nn.Module):
    """Two linear maps around a GELU, frame by frame; dropout on the hidden channels and on the output."""

    def __init__(self, config: TransformerConfig, clock: Clock) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, config.feedforward_dim)
        self.activation_dropout = Dropout(config.activation_dropout, clock)
        self.down = nn.Linear(config.feedforward_dim, config.dim)
        self.dropout = Dropout(config.dropout, clock)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to (N, T, C)."""
        return self.dropout(self.down(self.activation_dropout(gelu(self.up(x)))))


class TransformerLayer(nn.Module):
    """Self-attention and feed-forward, each with a residual connection and a LayerNorm before (pre-norm) or after it (post-norm)."""

    def __init__(self, config: TransformerConfig, clock: Clock) -> None:
        super().__init__()
        self.layer_norm_first = config.layer_norm_first
        self.attention = FusedSelfAttention(config.dim, config.num_heads, config.attention_dropout, clock)
        self.dropout = Dropout(config.dropout, clock)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.feedforward = FeedForward(config, clock)
        self.final_norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """(N, T, C) to (N, T, C); `visible` as in `FusedSelfAttention`."""
        if self.layer_norm_first:
            x = x + self.dropout(self.attention(self.attention_norm(x), visible))
            return x + self.feedforward(self.final_norm(x))
        x = self.attention_norm(x + self.dropout(self.attention(x, visible)))
        return self.final_norm(x + self.feedforward(x))


class TransformerEncoder(nn.Module):
    """The context network of wav2vec 2.0 and HuBERT.

    Padded frames neither reach the positional convolution nor are attended to: an utterance has the same output alone, padded and
    batched with longer ones.

    Args:
        config: sizes and rates.
        clock: the model's clock, which seeds dropout and layer drop; a new one when None.

    Attributes:
        recompute_layers: in training, keep only the inputs of layers and run each a second time in the backward pass: less memory,
            more time, the same gradients. Off unless set.

    Source: arXiv 2106.07447 (HuBERT), arXiv 2006.11477 (wav2vec 2.0); fairseq's wav2vec2.TransformerEncoder.
    """

    def __init__(self, config: TransformerConfig, clock: Clock | None = None) -> None:
        super().__init__()
        self.clock = Clock() if clock is None else clock
        self.input_dim = config.dim
        self.output_dim = config.dim
        self.num_layers = config.num_layers
        self.layer_drop = config.layer_drop
        self.layer_norm_first = config.layer_norm_first
        self.position = ConvPosition(config.dim, config.conv_pos_kernel, config.conv_pos_groups)
        self.dropout = Dropout(config.dropout, self.clock)
        self.layers = nn.ModuleList(TransformerLayer(config, self.clock) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)
        self.recompute_layers = False
        self.apply(_init_as_bert)

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, return_hidden: bool = False, stop_after: int | None = None
    ) -> EncoderOutput:
        """Encode.

        Args:
            x: (N, T, C) float frames, C = `input_dim`.
            padding_mask: (N, T) bool, True at padding, which lies at the end and leaves each utterance a frame; None means no padding.
            return_hidden: also return the output of each layer. With pre-norm these lie before the final LayerNorm; of a layer dropped
                in training the output is its input.
            stop_after: compute the layers up to this one only, counted from 1; `frames` is then its output, without the final
                LayerNorm of pre-norm. None: all.

        Returns:
            Frames (N, T, C) and a hidden tensor (N, T, C) for each layer computed, or none.

        Raises:
            ValueError: `x` or `padding_mask` has another shape or type; no such layer.
        """
        check_encoder_input(x, padding_mask, self.input_dim)
        check_stop_after(stop_after, self.num_layers)
        visible = None if padding_mask is None else ~padding_mask[:, None, None, :]
        x = self._add_positions(x, padding_mask)
        hidden = []
        for layer in islice(self.layers, stop_after):
            x = self._drop_layer(layer, x) if self._chance_to_drop() else self._run_layer(layer, x, visible)
            if return_hidden:
                hidden.append(x)
        if self.layer_norm_first and stop_after is None:
            x = self.norm(x)
        return EncoderOutput(frames=x, hidden=tuple(hidden))

    def _add_positions(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        if padding_mask is not None:
            x = x.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        x = x + self.position(x)
        return self.dropout(x if self.layer_norm_first else self.norm(x))

    def _run_layer(self, layer: nn.Module, x: Tensor, visible: Tensor | None) -> Tensor:
        if self.recompute_layers and self.training and torch.is_grad_enabled():
            return recompute(layer, self.clock, x, visible)
        return layer(x, visible)

    def _chance_to_drop(self) -> bool:
        return self.training and self.layer_drop > 0 and self.clock.chance(self.layer_drop)

    def _drop_layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        return keep_in_graph(x, layer.parameters())  # zero gradients, without which DDP would wait for the layer


def _init_as_bert(module: nn.Module) -> None:
    """Linear maps as in BERT (arXiv 1810.04805): normal weights of deviation 0.02, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
