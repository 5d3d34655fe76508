"""A small LSTM over a tokenizer's tokens, which searches ask as they ask an n-gram model (`k2ssl.decode.lm.TokenLm`).

Blank, which no text holds, has two parts to play: at the input it is the start of a sentence, at the output its end.

Source: upstream's RnnLmModel (embedding, LSTM, linear), there without dropout and with symbols of their own for start and end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2ssl.batch import LossOutput, padding_mask_from_lens
from k2ssl.models.load import read_content
from k2ssl.nn.dropout import Dropout
from k2ssl.nn.schedule import Clock
from k2ssl.structure import check_types, from_dict, to_dict

KIND = "language-model"

_IGNORED = -100  # as `cross_entropy` has it


class TokenBatch(Protocol):
    """What `LanguageModel` asks of a batch; `k2ssl.data.text_batches.TextBatch` has it."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def token_lens(self) -> Tensor: ...


@dataclass(frozen=True)
class LanguageModelConfig:
    """Size of `LanguageModel`.

    Attributes:
        vocab_size: number of the tokenizer's symbols, blank (0) and the unknown one among them.
        dim: width of embedding and LSTM layers.
        num_layers: LSTM layers.
        dropout: rate behind the embedding and behind every layer, in training.

    Raises:
        ValueError: a field outside its range.
    """

    vocab_size: int
    dim: int = 512
    num_layers: int = 2
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in (("vocab_size", 2), ("dim", 1), ("num_layers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"LanguageModelConfig: {name} is {getattr(self, name)}, at least {least} is needed")
        if not (math.isfinite(self.dropout) and 0.0 <= self.dropout < 1.0):
            raise ValueError(f"LanguageModelConfig: dropout is {self.dropout}, allowed is 0 <= dropout < 1")


class LanguageModel(nn.Module):
    """Predicts the next token of a sentence from all before it.

    The state of a hypothesis is (2, num_layers, dim): output and cell of every layer after the tokens so far.
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.clock = Clock()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(nn.LSTM(config.dim, config.dim, batch_first=True) for _ in range(config.num_layers))
        self.dropout = Dropout(config.dropout, self.clock)
        self.output = nn.Linear(config.dim, config.vocab_size)

    def forward(self, batch: TokenBatch) -> LossOutput:
        """Minus the log-probability of all tokens and ends, nats; the targets are these.

        Args:
            batch: tokens (N, U) int64 and their counts (N,) int64 on the CPU; anything at padding.
        """
        tokens, device = batch.tokens, batch.tokens.device
        num_columns = tokens.shape[1] + 1
        tokens = tokens.masked_fill(padding_mask_from_lens(batch.token_lens, tokens.shape[1], device), 0)
        targets = F.pad(tokens, (0, 1)).masked_fill(padding_mask_from_lens(batch.token_lens + 1, num_columns, device), _IGNORED)
        logits = self.logits(F.pad(tokens, (1, 0)))
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=_IGNORED, reduction="sum")
        return LossOutput(loss, (targets != _IGNORED).sum())

    def logits(self, symbols: Tensor) -> Tensor:
        """(N, U) int64 symbols from the start of the sentence, which is 0 -> (N, U, V) for the symbol after each; 0 is the end."""
        x = self.dropout(self.embedding(symbols))
        for layer in self.layers:
            x = self.dropout(layer(x)[0])
        return self.output(x)

    def check_batch(self, batch: TokenBatch) -> None:
        """
        Raises:
            ValueError: a token that the model does not have; the batch is to be on the CPU still.
        """
        if not batch.tokens.numel():
            return
        padding = padding_mask_from_lens(batch.token_lens, batch.tokens.shape[1], batch.tokens.device)
        least, most = batch.tokens.masked_fill(padding, 0).aminmax()
        if least < 0 or most >= self.vocab_size:
            raise ValueError(f"LanguageModel: tokens from {int(least)} to {int(most)}, allowed are 0..{self.vocab_size - 1}")

    @torch.no_grad()
    def start(self, batch: int, device: torch.device) -> Tensor:
        """(batch, 2, num_layers, dim) states after the start of a sentence; the model moves to `device` if it is elsewhere."""
        self.to(device)
        nothing = torch.zeros(1, 2, self.config.num_layers, self.config.dim, dtype=self.embedding.weight.dtype, device=device)
        return self.advance(nothing, torch.zeros(1, dtype=torch.int64, device=device)).repeat(batch, 1, 1, 1)

    @torch.no_grad()
    def log_probs(self, state: Tensor) -> Tensor:
        """(M, V) natural logarithms for the next token; see `TokenLm`."""
        result = self._log_softmax(state)
        result[:, 0] = 0.0
        return result

    @torch.no_grad()
    def advance(self, state: Tensor, token: Tensor) -> Tensor:
        """(M, 2, num_layers, dim) states after the tokens (M,); see `TokenLm`."""
        x = self.embedding(token).unsqueeze(1)
        outputs, cells = [], []
        for number, layer in enumerate(self.layers):
            x, (output, cell) = layer(x, (state[:, 0, number].unsqueeze(0).contiguous(), state[:, 1, number].unsqueeze(0).contiguous()))
            outputs.append(output[0])
            cells.append(cell[0])
        return torch.stack([torch.stack(outputs, dim=1), torch.stack(cells, dim=1)], dim=1)

    @torch.no_grad()
    def final(self, state: Tensor) -> Tensor:
        """(M,) natural logarithms of the probability of the end; see `TokenLm`."""
        return self._log_softmax(state)[:, 0]

    def _log_softmax(self, state: Tensor) -> Tensor:
        return self.output(state[:, 0, -1]).float().log_softmax(-1)


def language_model_to_dict(config: LanguageModelConfig) -> dict[str, Any]:
    """What a checkpoint holds under "config"."""
    return {"kind": KIND, **to_dict(config)}


def load_language_model(path: str | Path, tokenizer_sha256: str) -> LanguageModel:
    """The model of a checkpoint of k2ssl.bin.train_lm, on the CPU, in evaluation mode and without gradients.

    Args:
        path: the checkpoint.
        tokenizer_sha256: of the tokenizer whose tokens the search puts together.

    Raises:
        ValueError: the file cannot be read, holds no language model, or one of another tokenizer.
    """
    content = read_content(path)
    table = content["config"]
    if not isinstance(table, Mapping) or table.get("kind") != KIND:
        raise ValueError(f"{path}: holds no language model; an ARPA file or a checkpoint of k2ssl.bin.train_lm is needed")
    if (sha256 := content.get("tokenizer_sha256")) != tokenizer_sha256:
        raise ValueError(
            f"{path}: the language model is of another tokenizer than the recognition model: sha256 {str(sha256)[:16]}..., "
            f"{tokenizer_sha256[:16]}... is needed"
        )
    config = from_dict(LanguageModelConfig, {key: value for key, value in table.items() if key != "kind"}, f"{path}: config")
    with torch.random.fork_rng(devices=[]):  # the values drawn at construction are overwritten
        model = LanguageModel(config)
    try:
        model.load_state_dict(content["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: the weights under 'model' do not fit the model under 'config': {error}") from error
    return model.eval().requires_grad_(False)
