"""Which number format the forward pass computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16", "float16"]


def choose_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The format that `precision` names; "auto" is bfloat16 on GPUs that have it, float16 on other GPUs, float32 on the CPU.

    Raises:
        ValueError: float16 on the CPU, or bfloat16 on a GPU that lacks it.
    """
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if precision == "bfloat16" and not has_bfloat16:
        raise ValueError(f"precision is 'bfloat16', which {torch.cuda.get_device_name(device)} lacks; allowed are 'float16' and 'float32'")
    if precision == "float16" and device.type == "cpu":
        raise ValueError("precision is 'float16', allowed on the CPU are 'float32' and 'bfloat16'")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Compute in `dtype` where that is safe; nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
