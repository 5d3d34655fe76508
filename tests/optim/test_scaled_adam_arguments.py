from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from k2ssl.optim.scaled_adam import ScaledAdam


def make_params() -> dict[str, torch.nn.Parameter]:
    return {"w": torch.nn.Parameter(torch.ones(3, 4)), "u": torch.nn.Parameter(torch.ones(3, 4)), "s": torch.nn.Parameter(torch.ones(()))}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: ScaledAdam(p.values()), "not a .name, parameter. pair"),
        (lambda p: ScaledAdam([("a", p["w"]), ("a", p["u"])]), "'a' is given to more than one"),
        (lambda p: ScaledAdam([{"params": [("a", p["w"])]}, {"params": [("a", p["u"])]}]), "'a' is given to more than one"),
        (lambda p: ScaledAdam([{"params": [("a", p["w"])]}, {"params": [("b", p["w"])]}]), "more than one parameter group"),
        (lambda p: ScaledAdam([("a", p["w"]), ("b", p["w"])]), "listed twice"),
        (lambda p: ScaledAdam([{"params": [p["w"], p["u"]], "names": ["a"]}]), "names has 1 entries for 2"),
        (lambda p: ScaledAdam([{"params": [p["w"], p["u"]], "names": ["a", ""]}]), "not a .name, parameter. pair"),
        (lambda p: ScaledAdam([("a", torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)))]), "'a' is torch.bfloat16"),
        (lambda p: ScaledAdam(p.items(), lr=-1.0), "lr is -1.0"),
        (lambda p: ScaledAdam(p.items(), betas=(0.9, 1.0)), "betas is"),
        (lambda p: ScaledAdam(p.items(), clipping_scale=0.0), "clipping_scale is 0.0"),
        (lambda p: ScaledAdam(p.items(), size_update_period=0), "size_update_period is 0"),
        (lambda p: ScaledAdam(p.items(), param_max_rms=1e-6), "param_max_rms is 1e-06"),
        (lambda p: ScaledAdam(p.items(), eps=float("nan")), "eps is nan"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[dict], ScaledAdam], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(make_params())


def test_names_may_be_given_beside_parameters() -> None:
    params = make_params()
    optimizer = ScaledAdam([{"params": list(params.values()), "names": list(params)}])
    assert optimizer.param_groups[0]["param_names"] == list(params)


def test_sparse_gradients_and_mixed_groups_are_refused() -> None:
    param = torch.nn.Parameter(torch.ones(3, 2))
    param.grad = torch.eye(3, 2).to_sparse()
    with pytest.raises(ValueError, match="gradient of 'p' is sparse"):
        ScaledAdam([("p", param)]).step()
    mixed = {"a": torch.nn.Parameter(torch.ones(2)), "b": torch.nn.Parameter(torch.ones(3, dtype=torch.float64))}
    for other in mixed.values():
        other.grad = torch.ones_like(other)
    with pytest.raises(ValueError, match="one group per dtype and device"):
        ScaledAdam(mixed.items()).step()


def test_a_closure_is_evaluated_with_gradients() -> None:
    param = torch.nn.Parameter(torch.ones(3))

    def closure() -> Tensor:
        loss = param.square().sum()
        loss.backward()
        return loss

    assert ScaledAdam([("p", param)]).step(closure).item() == 3.0
    assert (param < 1).all()
