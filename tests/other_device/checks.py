"""Run by tests/test_other_device.py in a process of its own: what the device of apart.py refuses, and training steps there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import apart
import pytest
import torch
from torch import Tensor, nn

from k2ssl.batch import PretrainBatch
from k2ssl.decode import ctc, transducer
from k2ssl.decode.ctc_beam import prefix_beam_search
from k2ssl.models.asr import AsrConfig, AsrModel
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.language_model import LanguageModel, LanguageModelConfig
from k2ssl.models.logmel import LogMelConfig
from k2ssl.nn import schedule
from k2ssl.optim.build import OptimConfig, build_optimizer
from k2ssl.train.guard import Guard, GuardConfig
from k2ssl.train.metrics import MetricSums
from k2ssl.train.update import Moment, Update
from tests.update_cases import model_and_batch


def test_what_a_gpu_refuses_is_refused_and_what_it_waits_for_is_counted() -> None:
    there, here = torch.ones(3, device=apart.DEVICE), torch.ones(3)
    for wrong in (
        lambda: there + here,
        lambda: torch.where(here > 0, there, 0.0),
        lambda: there.masked_fill_(here > 0, 1.0),
        lambda: torch.rand(3, generator=torch.Generator(), device=apart.DEVICE),
        lambda: nn.Linear(3, 2)(there),
    ):
        with pytest.raises(RuntimeError, match=r"(on|for) the CPU"):
            wrong()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    apart.waits.clear()
    for waiting in (there.sum().item, there.cpu, there.tolist, lambda: there[there > 0], lambda: there[[0, 2]], lambda: bool(there[0] > 0)):
        waiting()
    assert sum(apart.waits.values()) == len(apart.waits) + 1 == 6  # two of them read a number


def test_values_gradients_views_and_draws_are_those_of_the_cpu() -> None:
    def computed(device: torch.device) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(3)
        x = torch.rand(4, 6, generator=generator, device=device).requires_grad_()
        loss = (x.softmax(1)[1:].T @ torch.arange(3.0, device=device)).square().sum()
        loss.backward()
        view = x.detach()[:, ::2]
        view += 1.0
        assert x.grad is not None and x.grad.device == x.device == device
        return [x.detach().cpu(), x.grad.cpu(), loss.detach().cpu()]

    assert all(torch.equal(one, two) for one, two in zip(computed(torch.device("cpu")), computed(apart.DEVICE), strict=True))


def test_autocast_follows_the_rules_of_cuda() -> None:
    x = torch.ones(2, 2, device=apart.DEVICE)
    with torch.autocast(apart.NAME, torch.bfloat16):
        product = x @ x
        types = [value.dtype for value in (product, product + product, product.softmax(1), product.exp(), product.sum(), product * x)]
    assert types == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32, torch.float32, torch.float32]


def _losses(case: str, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Losses per target of four updates of two micro-batches, in the last of which ScaledAdam updates the sizes of tensors."""
    model, batch = model_and_batch(case)
    model = model.to(device).train()
    update = Update(model, build_optimizer(OptimConfig(clipping_update_period=2), model), device, dtype)
    guard, losses = Guard(GuardConfig(), None, device), []
    for step in range(4):
        apart.waits.clear()
        update([batch, batch], Moment(0, step, 100.0 * step), guard)
        assert all(what.startswith("_ctc_loss") for what in apart.waits), apart.waits  # torch's kernel; see docs/performance.md
        assert bool(apart.waits) == (case == "both heads" and device == apart.DEVICE)
        losses.append(update.metrics.reduce()["loss"])
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in update.params)
    return losses


@pytest.fixture(autouse=True)
def _flags_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the flags of regularisers are copied to the host with an event, which has come by the time they are read."""
    monkeypatch.setattr(
        schedule, "_start_copy", lambda flags: (flags.raw.clone() if isinstance(flags, apart.Apart) else flags.clone(), None)
    )


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in ("waveform", "waveform, unpadded", "waveform, recomputing", "log-mel", "both heads")),
        *((case, torch.bfloat16) for case in ("waveform", "log-mel", "both heads")),
    ],
    ids=str,
)
def test_updates_wait_for_no_more_than_ctc_and_their_losses_are_those_of_the_cpu(case: str, dtype: torch.dtype) -> None:
    here, there = (_losses(case, device, dtype) for device in (torch.device("cpu"), apart.DEVICE))
    assert there == pytest.approx(here, rel=1e-3 if dtype == torch.float32 else 0.03)


def test_a_value_that_is_read_in_an_update_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    add = MetricSums.add

    def curious(sums: MetricSums, output: Any) -> None:
        output.loss.item()
        add(sums, output)

    monkeypatch.setattr(MetricSums, "add", curious)
    with pytest.raises(AssertionError, match=r"_local_scalar_dense in train/update.py"):
        _losses("log-mel", apart.DEVICE, torch.float32)


def test_searches_wait_as_often_for_many_frames_as_for_few() -> None:
    torch.manual_seed(2)
    model = AsrModel(AsrConfig.tiny(6, "transducer")).to(apart.DEVICE).eval()
    networks = (model.transducer.predictor, model.transducer.joiner)
    lm = LanguageModel(LanguageModelConfig(vocab_size=6, dim=8, num_layers=1)).eval().requires_grad_(False)
    fusion: dict[str, Any] = {"lm": lm, "lm_scale": 0.3}
    searches = {
        "ctc greedy": lambda frames, lens: ctc.greedy_search(frames[:, :, :6].log_softmax(2), lens),
        "ctc prefix beam": lambda frames, lens: prefix_beam_search(frames[:, :, :6].log_softmax(2), lens, beam=3, **fusion),
        "greedy": lambda frames, lens: transducer.greedy_search(*networks, frames, lens),
        "modified beam": lambda frames, lens: transducer.modified_beam_search(*networks, frames, lens, beam=3, **fusion),
    }
    for name, search in searches.items():
        counts = []
        for length in (4, 12):
            frames = torch.randn(2, length, model.encoder.output_dim).to(apart.DEVICE)
            apart.waits.clear()
            assert len(search(frames, torch.tensor([length, length - 1]))) == 2
            counts.append(dict(apart.waits))
        assert counts[0] == counts[1] and counts[0], name


def _kept(config: HubertConfig, device: torch.device) -> float:
    """Megabytes that the loss of 6 s of audio keeps for the backward pass under autocast to bfloat16, parameters not counted."""
    torch.manual_seed(3)
    model = HubertModel(config).to(device).train()
    frames = model.frontend.num_frames(96000)
    batch = PretrainBatch(torch.randn(1, 96000), (torch.zeros(1, frames, dtype=torch.int64),)).to(device)
    held: dict[int, Tensor] = {}

    def storage(tensor: Tensor) -> int:
        return getattr(tensor, "raw", tensor).untyped_storage().data_ptr()

    def keep(tensor: Tensor) -> Tensor:
        held[storage(tensor)] = tensor  # so that nothing else can lie there
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast(device.type, torch.bfloat16):
        loss = model(batch).loss
    assert loss.isfinite()
    for parameter in model.parameters():
        held.pop(storage(parameter), None)
    return sum(getattr(tensor, "raw", tensor).untyped_storage().nbytes() for tensor in held.values()) / 1e6


@pytest.mark.parametrize("frontend", ["waveform", "log-mel"])
def test_under_the_rules_of_cuda_no_more_is_kept_for_the_backward_pass_than_on_the_cpu(frontend: str) -> None:
    base = HubertConfig.zipformer_base()
    config = base if frontend == "waveform" else replace(base, frontend=LogMelConfig(gradient_scale=0.1))
    here, there = (_kept(config, device) for device in (torch.device("cpu"), apart.DEVICE))
    print(f"Zipformer Base, {frontend}, 6 s: {here:.1f} MB by the CPU's rules, {there:.1f} MB by CUDA's")
    assert there < 1.05 * here
