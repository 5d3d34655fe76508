from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from k2ssl.batch import LossOutput
from k2ssl.train.inf_check import InfCheck, NonFiniteError, find_nonfinite


class Inverse(torch.autograd.Function):
    """Something whose gradient alone can be spoilt."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return grad / 0.0


class Fault(nn.Module):
    """Returns its input, times factors, with a healthy gradient or a spoilt one."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = self.extra = 1.0
        self.spoils_gradient = False

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = Inverse.apply(x) if self.spoils_gradient else x
        return x * self.factor, {"extra": x * self.extra}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.fault = Fault()

    def forward(self, x: Tensor) -> Tensor:
        y = self.fault(self.linear(x))[0]
        y += x  # in place, on what a module returned
        return y.relu_()


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.second = Block()
        self.head = nn.Linear(4, 1)
        self.unused = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self, audio: Tensor) -> LossOutput:
        return LossOutput(self.head(self.second(self.first(audio))).square().sum(), torch.tensor(len(audio)))


@pytest.fixture
def toy() -> Toy:
    return Toy()


def runner(toy: Toy, audio: Tensor | None = None) -> Callable[[], Tensor]:
    return lambda: toy(torch.randn(3, 4) if audio is None else audio).loss


def spoil_parameter(toy: Toy) -> None:
    toy.second.linear.bias.data[1] = math.nan


def spoil_frozen_parameter(toy: Toy) -> None:
    toy.frozen.data[1] = math.inf


def spoil_output(toy: Toy) -> None:
    toy.second.fault.factor = math.inf


def spoil_part_of_output(toy: Toy) -> None:
    toy.first.fault.extra = math.inf


def spoil_both(toy: Toy) -> None:
    toy.first.fault.factor = math.nan
    toy.second.fault.factor = math.nan


def spoil_gradient(toy: Toy) -> None:
    toy.second.fault.spoils_gradient = True


def spoil_later_gradient_and_output(toy: Toy) -> None:
    toy.first.fault.spoils_gradient = True
    toy.second.fault.factor = math.nan


@pytest.mark.parametrize(
    ("spoil", "place"),
    [
        (spoil_parameter, "parameter second.linear.bias"),
        (spoil_frozen_parameter, "parameter frozen"),
        (spoil_output, "output of second.fault"),
        (spoil_part_of_output, "output of first.fault"),
        (spoil_both, "output of first.fault"),
        (spoil_gradient, "gradient at the output of second.linear"),
        (spoil_later_gradient_and_output, "output of second.fault"),
        (lambda toy: None, None),
    ],
)
def test_the_first_place_is_named(toy: Toy, spoil: Callable[[Toy], None], place: str | None) -> None:
    spoil(toy)
    assert find_nonfinite(toy, runner(toy)) == place


def test_the_input_is_told_from_the_model(toy: Toy) -> None:
    audio = torch.randn(3, 4)
    audio[1, 2] = math.inf
    assert find_nonfinite(toy, runner(toy, audio)) == "input of the model"


def test_a_loss_computed_outside_modules_is_named(toy: Toy) -> None:
    assert find_nonfinite(toy, lambda: runner(toy)() * math.nan) == "loss"


def test_a_gradient_that_overflows_in_a_parameter_alone_is_named(toy: Toy) -> None:
    toy.head.weight.register_hook(lambda grad: grad * math.inf)
    assert find_nonfinite(toy, runner(toy)) == "gradient of parameter head.weight"


def test_a_scaled_half_precision_loss_shows_where_it_overflows(toy: Toy) -> None:
    def run(scale: float) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            with torch.autocast("cpu", torch.float16):
                return toy(torch.ones(3, 4)).loss.float() * scale

        return forward

    assert find_nonfinite(toy, run(1.0)) is None
    assert find_nonfinite(toy, run(1e30)) == "gradient at the output of the model"


@pytest.mark.parametrize("spoil", [spoil_output, spoil_gradient, lambda toy: None])
def test_no_hooks_and_no_gradients_are_left(toy: Toy, spoil: Callable[[Toy], None]) -> None:
    toy.head.bias.grad = torch.tensor([3.0])
    spoil(toy)
    find_nonfinite(toy, runner(toy))
    assert not any(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks for module in toy.modules())
    assert not any(param._backward_hooks for param in toy.parameters())
    assert {name: param.grad.item() for name, param in toy.named_parameters() if param.grad is not None} == {"head.bias": 3.0}


def test_an_error_of_the_model_comes_through_and_leaves_no_hooks(toy: Toy) -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        find_nonfinite(toy, runner(toy, torch.ones(3, 5)))
    assert not any(module._forward_hooks for module in toy.modules())


def test_a_check_that_stays_on_lets_healthy_steps_pass_and_stops_at_the_fault(toy: Toy) -> None:
    with InfCheck(toy):
        runner(toy)().backward()
        assert toy.head.weight.grad is not None
        spoil_gradient(toy)
        loss = runner(toy)()
        with pytest.raises(FloatingPointError, match=r"^gradient at the output of second.linear is not finite$"):
            loss.backward()
        spoil_output(toy)
        with pytest.raises(NonFiniteError, match=r"^output of second.fault is not finite$"):
            runner(toy)()
    runner(toy)()


def test_checking_changes_no_number(toy: Toy) -> None:
    audio = torch.randn(3, 4)
    loss = toy(audio).loss
    plain = torch.autograd.grad(loss, toy.head.weight)[0]
    with InfCheck(toy):
        checked = toy(audio).loss
        checked.backward()
    assert torch.equal(checked, loss) and torch.equal(toy.head.weight.grad, plain)
