"""The heads of recognition by themselves: float32 whatever the autocast, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from k2ssl.models.ctc_head import CtcConfig, CtcHead
from k2ssl.models.transducer_head import TransducerConfig, TransducerHead
from k2ssl.nn.schedule import Clock


def test_under_autocast_the_losses_are_those_of_float32() -> None:
    frames, lens = torch.randn(3, 24, 32), torch.tensor([24, 18, 13])
    tokens, token_lens = torch.randint(1, 6, (3, 6)), torch.tensor([4, 1, 6])
    ctc = CtcHead(CtcConfig(), 32, 6, Clock()).eval()
    # a predictor of one symbol only looks up, which autocast leaves alone
    transducer = TransducerHead(TransducerConfig(predictor_dim=32, context_size=1, joiner_dim=32), 32, 6, 0, Clock()).eval()
    exact = [ctc.loss(frames, lens, tokens, token_lens, 0), transducer.loss(frames, lens, tokens, token_lens)]
    with torch.autocast("cpu", torch.bfloat16):
        half = [ctc.loss(frames, lens, tokens, token_lens, 0), transducer.loss(frames, lens, tokens, token_lens)]
    assert torch.equal(exact[0].loss, half[0].loss) and torch.equal(exact[1].simple, half[1].simple)
    assert half[1].pruned.dtype == torch.float32  # of logits in bfloat16
    assert half[1].pruned.item() == pytest.approx(exact[1].pruned.item(), rel=1e-2)


def test_the_ctc_head_drops_out_in_training_and_gives_log_probabilities() -> None:
    head, frames = CtcHead(CtcConfig(dropout=0.5), 32, 6, Clock()), torch.randn(2, 9, 32)
    assert torch.allclose(head(frames).exp().sum(-1), torch.ones(2, 9))
    assert not torch.equal(head(frames), head(frames))
    assert torch.equal(head.eval()(frames), head(frames))


def test_the_simple_loss_begins_small() -> None:
    """Published: a quarter of the usual initial weights."""
    head = TransducerHead(TransducerConfig(predictor_dim=64), 64, 500, 0, Clock())
    for layer in (head.simple_am, head.simple_lm):
        assert layer.weight.abs().max().item() == pytest.approx(0.25 / 8, rel=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictor_dim": 0}, "TransducerConfig: predictor_dim is 0"),
        ({"context_size": 0}, "TransducerConfig: context_size is 0"),
        ({"joiner_dim": 0}, "TransducerConfig: joiner_dim is 0"),
        ({"prune_range": 1}, "TransducerConfig: prune_range is 1, allowed are whole numbers >= 2"),
        ({"lm_scale": 0.7, "am_scale": 0.4}, "lm_scale is 0.7 and am_scale 0.4"),
        ({"am_scale": -0.1}, "am_scale -0.1"),
    ],
)
def test_a_bad_transducer_or_ctc_configuration_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransducerConfig(**change)
    with pytest.raises(ValueError, match=r"CtcConfig: dropout is 1\.0"):
        CtcConfig(dropout=1.0)
