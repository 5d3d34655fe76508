"""Sums on the device against sums by hand, alone and over two real processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from k2ssl import distributed
from k2ssl.batch import LossOutput, PretrainBatch
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.train.metrics import MetricSums, perplexity
from tests.ranks import spawn


def output(seed: int, loss: float | None = None, **more: Tensor) -> LossOutput:
    """As the masked-prediction model reports, with arbitrary numbers."""
    draw = torch.Generator().manual_seed(seed)
    number = torch.randint(50, 100, (), generator=draw)
    metrics = {
        "num_masked": number,
        "loss_masked": 300 * torch.rand((), generator=draw),
        "correct_masked": number // 3,
        "num_unmasked": number * 2,
        "loss_unmasked": 100 * torch.rand((), generator=draw),
        "correct_unmasked": number,
        "feature_penalty": 7 * torch.rand((), generator=draw),
        "predicted": torch.randint(0, 9, (12,), generator=draw) * (torch.rand(12, generator=draw) < 0.7),
        **more,
    }
    return LossOutput(500 * torch.rand((), generator=draw) if loss is None else torch.tensor(loss), number * 3, metrics)


def by_hand(outputs: list[LossOutput]) -> dict[str, float]:
    def summed(name: str) -> float:
        return math.fsum(float(entry.metrics[name]) for entry in outputs)

    targets = sum(int(entry.num_targets) for entry in outputs)
    predicted = [sum(int(entry.metrics["predicted"][k]) for entry in outputs) for k in range(12)]
    bits = -sum(count / sum(predicted) * math.log2(count / sum(predicted)) for count in predicted if count)
    return {
        "loss": math.fsum(float(entry.loss) for entry in outputs) / targets,
        "num_targets": targets,
        "dropped_batches": 0,
        "loss_masked": summed("loss_masked") / summed("num_masked"),
        "accuracy_masked": summed("correct_masked") / summed("num_masked"),
        "loss_unmasked": summed("loss_unmasked") / summed("num_unmasked"),
        "accuracy_unmasked": summed("correct_unmasked") / summed("num_unmasked"),
        "feature_penalty": summed("feature_penalty") / targets,
        "perplexity_predicted": 2**bits,
        "classes_predicted": sum(count > 0 for count in predicted),
    }


def test_what_is_read_equals_a_computation_by_hand() -> None:
    sums = MetricSums()
    outputs = [output(seed) for seed in range(20)]
    for entry in outputs:
        sums.add(entry)
    assert sums.reduce() == pytest.approx(by_hand(outputs), rel=1e-13)


def test_reading_clears() -> None:
    sums = MetricSums()
    sums.add(output(0))
    sums.reduce()
    sums.add(output(1))
    assert sums.reduce() == pytest.approx(by_hand([output(1)]), rel=1e-13)


def test_a_month_of_counts_stays_exact() -> None:
    sums = MetricSums()
    sums.add(LossOutput(torch.tensor(1.0), torch.tensor(2**40), {"predicted": torch.tensor([2**40, 1])}))
    sums.add(LossOutput(torch.tensor(1.0), torch.tensor(1), {"predicted": torch.tensor([1, 2**25])}))
    assert sums.state_dict()["sums"]["predicted"].tolist() == [2**40 + 1, 2**25 + 1]
    assert sums.reduce()["num_targets"] == 2**40 + 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_without_a_finite_loss_is_left_out_and_counted(bad: float) -> None:
    sums = MetricSums()
    sums.add(output(0))
    sums.add(output(1, loss=bad, loss_masked=torch.tensor(math.nan)))
    sums.add(output(2))
    assert sums.reduce() == pytest.approx({**by_hand([output(0), output(2)]), "dropped_batches": 1}, rel=1e-13)


def test_adding_never_asks_the_device_for_a_number() -> None:
    class Watch(TorchDispatchMode):
        seen: list[str]

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    sums, watch = MetricSums(), Watch()
    watch.seen = []
    with watch:
        sums.add(output(0))
        sums.add(output(1))
    waiting = [name for name in watch.seen if "local_scalar" in name or "nonzero" in name or "equal" in name]
    assert any("isfinite" in name or "where" in name for name in watch.seen) and not waiting


def test_nothing_added_gives_no_numbers_but_the_same_keys() -> None:
    values = MetricSums().reduce()
    assert math.isnan(values.pop("loss")) and values == {"num_targets": 0.0, "dropped_batches": 0.0}


def test_a_metric_without_its_count_is_divided_by_the_targets() -> None:
    sums = MetricSums()
    sums.add(LossOutput(torch.tensor(8.0), torch.tensor(4), {"correct_x": torch.tensor(2), "num_y": torch.tensor(6)}))
    assert sums.reduce() == {"loss": 2.0, "num_targets": 4.0, "dropped_batches": 0.0, "correct_x": 0.5, "num_y": 1.5}


def test_perplexity_of_known_shares() -> None:
    assert perplexity(torch.tensor([5, 5, 5, 5])) == pytest.approx(4)
    assert perplexity(torch.tensor([0, 7, 0])) == 1
    assert perplexity(torch.tensor([2, 1, 1])) == pytest.approx(2**1.5)
    assert math.isnan(perplexity(torch.zeros(3)))


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": torch.tensor(1.0)}, "a metric is named 'loss', allowed are names other than loss, num_targets, dropped_batches"),
        ({"x": torch.zeros(2, 3)}, r"metric 'x' has shape \(2, 3\), allowed are scalars and histograms"),
        ({"predicted": torch.zeros(13)}, r"metric 'predicted' has shape \(13,\), before it had \(12,\)"),
        ({"predicted": torch.zeros(())}, r"metric 'predicted' has shape \(\), before it had \(12,\)"),
    ],
)
def test_metrics_that_cannot_be_added_are_refused_and_nothing_is_added(metrics: dict[str, Tensor], message: str) -> None:
    sums = MetricSums()
    sums.add(output(0))
    with pytest.raises(ValueError, match=message):
        sums.add(LossOutput(torch.tensor(1.0), torch.tensor(1), {"before": torch.tensor(1), **metrics}))
    assert sums.reduce() == pytest.approx(by_hand([output(0)]), rel=1e-13)


def test_a_saved_state_goes_on(tmp_path: Path) -> None:
    straight, first, second, third = (MetricSums() for _ in range(4))
    for seed in range(4):
        straight.add(output(seed))
        if seed < 2:
            first.add(output(seed))
    state = first.state_dict()
    first.add(output(9))  # what was taken stays as it was
    torch.save(state, tmp_path / "state.pt")
    for resumed in (second, third):  # nor does going on from it change it
        resumed.load_state_dict(state)
        resumed.add(output(2))
        resumed.add(output(3))
    expected = straight.reduce()
    assert second.reduce() == third.reduce() == expected
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.reduce() == pytest.approx(by_hand([output(0), output(1)]), rel=1e-13)
    with pytest.raises(ValueError, match=r"keys are \['loss'\]"):
        second.load_state_dict({"loss": 1})


def test_a_real_model_is_read() -> None:
    torch.manual_seed(0)
    model = HubertModel(HubertConfig.tiny())
    audio = torch.randn(2, 16000)
    classes = model.config.head.num_classes[0]
    labels = torch.randint(0, classes, (2, model.frontend.num_frames(16000)))
    sums = MetricSums()
    result = model(PretrainBatch(audio, (labels,)))
    sums.add(result)
    values = sums.reduce()
    assert values["loss"] == pytest.approx(result.loss.item() / result.num_targets.item(), rel=1e-12)
    assert values["accuracy_masked"] == pytest.approx(result.metrics["correct_masked"].item() / result.metrics["num_masked"].item())
    assert 1 <= values["perplexity_predicted"] <= values["classes_predicted"] <= classes


def _two_ranks(folder: Path) -> None:
    rank = distributed.rank()
    sums = MetricSums()
    values = []
    for seed in range(5):  # 2 for rank 0, 3 for rank 1, which has a metric of its own
        if seed % 2 != rank:
            sums.add(output(seed, **({"num_only_here": torch.tensor(3)} if rank else {})))
    values.append(sums.reduce())
    if rank == 0:
        sums.add(output(7))
    values.append(sums.reduce())  # rank 1 has nothing
    values.append(sums.reduce())  # nobody has anything
    sums.add(LossOutput(torch.tensor(1.0), torch.tensor(1), {"x": torch.zeros(3 + rank)}))
    with pytest.raises(ValueError, match="metric 'x' has length 4 on rank 1 and 3 before"):
        sums.reduce()
    torch.save(values, folder / f"{rank}.pt")


def test_two_ranks_read_the_same_sums_even_if_one_has_other_metrics_or_none(tmp_path: Path) -> None:
    spawn(2, _two_ranks, tmp_path)
    mine, others = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    everything = by_hand([output(seed) for seed in range(5)])
    everything["num_only_here"] = 3 * 3 / everything["num_targets"]
    assert mine[:2] == others[:2]
    assert mine[0] == pytest.approx(everything, rel=1e-13)
    assert mine[1] == pytest.approx(by_hand([output(7)]), rel=1e-13)
    assert math.isnan(mine[2].pop("loss")) and mine[2] == {"num_targets": 0.0, "dropped_batches": 0.0}
