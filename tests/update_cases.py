"""Small models with batches for them, one of each kind of training, for tests of updates on whatever device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from k2ssl.batch import AsrBatch, PretrainBatch, padding_mask_from_lens
from k2ssl.models.asr import AsrConfig, AsrModel
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.logmel import LogMelConfig

LENS = torch.tensor([24000, 16000, 9000])
LOGMEL = LogMelConfig(channels=(2, 4, 8), output_dim=16)
PRETRAINING = {"waveform": HubertConfig.tiny(), "log-mel": replace(HubertConfig.tiny(), frontend=LOGMEL)}


def model_and_batch(case: str) -> tuple[Any, Any]:
    """A model on the CPU and a batch of noise for it.

    Args:
        case: "waveform" or "log-mel", with ", unpadded" or ", recomputing" after it if need be, "transducer" or "both heads".
    """
    torch.manual_seed(1)
    name, _, more = case.partition(", ")
    if name in PRETRAINING:
        model = HubertModel(PRETRAINING[name])
        model.encoder.recompute_layers = more == "recomputing"
        return model, _pretraining_batch(model, torch.full((3,), 24000) if more == "unpadded" else LENS)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 0], [2, 0, 0]])
    audio = torch.randn(3, int(LENS.max()))
    batch = AsrBatch(audio, LENS, ("",) * 3, ("a", "b", "c"), tokens, torch.tensor([3, 2, 1]))
    heads = {"transducer": "transducer", "both heads": "both"}[name]
    return AsrModel(replace(AsrConfig.tiny(6, heads), ctc_scale=1.0)), batch


def _pretraining_batch(model: HubertModel, lens: Tensor) -> PretrainBatch:
    """Noise and labels for all frames."""
    frames = model.frontend.num_frames(lens)
    labels = torch.randint(16, (3, int(frames.max()))).masked_fill(padding_mask_from_lens(frames, int(frames.max()), lens.device), -1)
    return PretrainBatch(torch.randn(3, int(lens.max())), (labels,), lens if len(set(lens.tolist())) > 1 else None)
