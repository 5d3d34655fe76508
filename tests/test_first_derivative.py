"""Second derivatives of what has a gradient written by hand are refused, never wrong."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import k2ssl
from k2ssl.batch import PretrainBatch
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.zipformer import Zipformer, ZipformerConfig
from k2ssl.nn.activation import swoosh_l, swoosh_linear
from k2ssl.nn.norm import BiasNorm
from k2ssl.nn.schedule import Clock

Case = tuple[Tensor, Callable[[Tensor], Tensor]]


def _bias_norm() -> Case:
    norm = BiasNorm(4, Clock()).eval()
    return torch.randn(2, 3, 4), lambda x: norm(x)[..., 0].sum()


def _swoosh() -> Case:
    weight = torch.randn(4, 4)
    return torch.randn(2, 3, 4), lambda x: swoosh_linear(x, weight, torch.zeros(4), swoosh_l).sum()


def _zipformer() -> Case:
    encoder = Zipformer(ZipformerConfig.tiny()).eval()
    return torch.randn(1, 9, 48), lambda x: encoder(x).frames.square().sum()


def _hubert() -> Case:
    model = HubertModel(HubertConfig.tiny()).eval()
    frames = model.frontend.num_frames(3000)
    labels, mask = torch.randint(16, (1, frames)), torch.arange(frames) % 2 == 0
    return 0.1 * torch.randn(1, 3000), lambda audio: model(PretrainBatch(audio, (labels,)), mask[None]).loss


@pytest.mark.parametrize("make", [_bias_norm, _swoosh, _zipformer, _hubert])
def test_a_penalty_on_gradients_is_refused_and_the_gradient_itself_is_not(make: Callable[[], Case]) -> None:
    torch.manual_seed(0)
    x, loss_of = make()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(x), x)
    assert grad.isfinite().all() and grad.any()
    with pytest.raises(RuntimeError, match=r"k2ssl\.nn\.\w+ can be differentiated once: .*create_graph=True"):
        torch.autograd.grad(loss_of(x), x, create_graph=True)


def test_every_gradient_that_is_written_by_hand_is_guarded() -> None:
    for room in ("nn", "losses", "models"):
        package = importlib.import_module(f"k2ssl.{room}")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    functions = [one for one in torch.autograd.Function.__subclasses__() if one.__module__.startswith(f"{k2ssl.__name__}.")]
    unguarded = {one.__module__ for one in functions if not hasattr(one.backward, "__wrapped__")}
    assert len(functions) >= 14
    assert unguarded == {"k2ssl.nn.gradient_scale"}  # which is linear: autograd differentiates its backward pass
