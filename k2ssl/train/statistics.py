"""How large activations, parameters and gradients are, over a few steps: what to look at when training goes wrong slowly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from k2ssl.optim.shards import is_sharded_tensor
from k2ssl.train.inf_check import tensors_in


class StatisticsRecorder:
    """Collects statistics of a model over the steps made within a block.

        with StatisticsRecorder(model) as recorder:
            for _ in range(5):
                ...  # forward and backward passes
                recorder.end_step()  # gradients are complete, the optimizer has not used them yet
                optimizer.step()
        print(recorder.table())

    Everything is summed in float64 on the device, whatever the type of activations, and leaves the graph alone; only `to_dict` and
    `table` wait for the device. Values that are not finite are counted and left out of everything else.
    """

    def __init__(self, model: nn.Module) -> None:
        self.steps = 0
        self._model = model
        self._handles: list[RemovableHandle] = []
        self._outputs: dict[str, Tensor] = {}
        self._params: dict[str, Tensor] = {}
        self._grads: dict[str, Tensor] = {}

    def __enter__(self) -> StatisticsRecorder:
        self._handles += [
            module.register_forward_hook(self._output_hook(name or "the model")) for name, module in self._model.named_modules()
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def end_step(self) -> None:
        """Take in parameters and gradients as they are now, and count a step."""
        self.steps += 1
        for name, param in self._model.named_parameters():
            _add(self._params, name, _whole(param))
            if param.grad is not None:
                _add(self._grads, name, _whole(param.grad))

    def to_dict(self) -> dict[str, Any]:
        """All statistics, as plain numbers; waits for the device.

        Returns:
            "steps"; "modules": name -> of its output "rms", "mean", "max" (of absolute values) and "non_finite" (share of values), in
            order of first execution; "parameters": name -> "rms", "gradient_rms", "ratio" of that to rms, and "non_finite" (share of the
            gradient's values). NaN stands where there was no finite value, or no gradient.
        """
        modules, params, grads = (
            {name: _summary(sums) for name, sums in sums_by_name.items()} for sums_by_name in (self._outputs, self._params, self._grads)
        )
        return {"steps": self.steps, "modules": modules, "parameters": {name: _joined(params[name], grads.get(name)) for name in params}}

    def table(self) -> str:
        """`to_dict` as text: a line for each module, then one for each parameter."""
        found = self.to_dict()
        lines = [f"statistics over {self.steps} steps"]
        for title, rows in (("output of module", found["modules"]), ("parameter", found["parameters"])):
            columns = list(next(iter(rows.values()), {}))
            width = max(map(len, [title, *rows]))
            lines.append(f"{title:<{width}}" + "".join(f"{column:>14}" for column in columns))
            lines += [f"{name:<{width}}" + "".join(f"{row[column]:>14.4g}" for column in columns) for name, row in rows.items()]
        return "\n".join(lines)

    def _output_hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            for tensor in tensors_in(output):
                _add(self._outputs, name, tensor)

        return hook


@torch.no_grad()
def _add(sums: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """Add `tensor` to the entry `name` of `sums`: (count, not finite, sum, sum of squares, largest absolute value)."""
    values = tensor.detach()
    finite = torch.isfinite(values)
    values = torch.where(finite, values, 0.0)
    largest = values.abs().max().double() if values.numel() else values.new_zeros((), dtype=torch.float64)
    new = torch.stack(
        [
            values.new_full((), values.numel(), dtype=torch.float64),
            values.numel() - finite.sum().double(),
            values.sum(dtype=torch.float64),
            torch.linalg.vector_norm(values, dtype=torch.float64).square(),
        ]
    )
    old = sums.get(name)
    total = new if old is None else old[:4] + new
    sums[name] = torch.cat([total, (largest if old is None else torch.maximum(old[4], largest)).view(1)])


def _whole(value: Tensor) -> Tensor:
    """A tensor of which every rank has a piece, put together on all of them; every rank calls it."""
    return value.full_tensor() if is_sharded_tensor(value) else value


def _summary(sums: Tensor) -> dict[str, float]:
    count, bad, total, squares, largest = sums.tolist()
    finite = count - bad
    return {
        "rms": math.sqrt(squares / finite) if finite else math.nan,
        "mean": total / finite if finite else math.nan,
        "max": largest if finite else math.nan,
        "non_finite": bad / count if count else math.nan,
    }


def _joined(param: Mapping[str, float], grad: Mapping[str, float] | None) -> dict[str, float]:
    gradient_rms = math.nan if grad is None else grad["rms"]
    ratio = gradient_rms / param["rms"] if param["rms"] else math.nan
    return {
        "rms": param["rms"],
        "gradient_rms": gradient_rms,
        "ratio": ratio,
        "non_finite": math.nan if grad is None else grad["non_finite"],
    }
