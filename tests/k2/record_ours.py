"""What our own code computes on random input, written for tests that cannot import it: they run where k2 does (scripts/test_k2.sh).

    python tests/k2/record_ours.py FOLDER

FOLDER gets one .npz a subject: the input, and losses, gradients, windows, hypotheses, values.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from k2ssl.decode.ctc import greedy_search
from k2ssl.decode.transducer import modified_beam_search
from k2ssl.losses.ctc import ctc_sums
from k2ssl.losses.transducer import full_loss, pruned_loss, simple_loss
from k2ssl.losses.transducer_lattice import make_boundary
from k2ssl.losses.transducer_pruning import prune_ranges
from k2ssl.models.predictor import Joiner, JoinerConfig, Predictor, PredictorConfig
from k2ssl.nn.activation import swoosh_l, swoosh_r
from k2ssl.nn.schedule import Clock

SCALES = ((0.0, 0.0), (0.25, 0.0), (0.1, 0.2))  # lm_scale, am_scale
NUM_LOSSES = 12


def with_gradients(losses: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Losses of each utterance, and the gradients of the sum of the finite ones."""
    return [losses, *torch.autograd.grad(losses[losses.isfinite()].sum(), inputs)]


def transducer_losses(seed: int) -> dict[str, Tensor]:
    """A batch of random size, and its three losses."""
    generator = torch.Generator().manual_seed(seed)

    def one(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    batch, frames, symbols, vocab, prune_range = one(1, 6), one(4, 40), one(1, 20), one(3, 30), one(2, 6)
    symbols = min(symbols, frames)  # k2 takes no more
    symbol_lens, frame_lens = (
        torch.randint(0, symbols + 1, (batch,), generator=generator),
        torch.randint(1, frames + 1, (batch,), generator=generator),
    )
    symbol_lens[0], frame_lens[-1] = symbols, frames
    boundary = make_boundary(symbol_lens, frame_lens)
    targets = torch.randint(1, vocab, (batch, symbols), generator=generator)
    am, lm = (torch.randn(batch, n, vocab, generator=generator).requires_grad_() for n in (frames, symbols + 1))
    found = {"boundary": boundary, "symbols": targets, "am": am, "lm": lm}
    lm_scale, am_scale = SCALES[seed % len(SCALES)]
    simple = simple_loss(am, lm, targets, boundary, lm_scale=lm_scale, am_scale=am_scale)
    found |= dict(zip(("simple", "simple_am_grad", "simple_lm_grad"), with_gradients(simple.loss, am, lm), strict=True))
    found |= {"px_grad": simple.px_grad, "py_grad": simple.py_grad, "scales": torch.tensor([lm_scale, am_scale])}
    ranges = prune_ranges(simple.px_grad, simple.py_grad, boundary, prune_range)
    logits = torch.randn(*ranges.shape, vocab, generator=generator).requires_grad_()
    found |= {"ranges": ranges, "prune_range": torch.tensor(prune_range), "logits": logits}
    found |= dict(zip(("pruned", "pruned_grad"), with_gradients(pruned_loss(logits, targets, ranges, boundary), logits), strict=True))
    every = torch.randn(batch, frames, symbols + 1, vocab, generator=generator).requires_grad_()
    found |= {"every": every}
    return found | dict(zip(("full", "full_grad"), with_gradients(full_loss(every, targets, boundary), every), strict=True))


def ctc(seed: int) -> dict[str, Tensor]:
    """A batch of random size, its loss, and what greedy search makes of it."""
    generator = torch.Generator().manual_seed(seed)
    batch, frames, vocab = 5, 30, 8
    log_probs = (2 * torch.randn(batch, frames, vocab, generator=generator)).log_softmax(-1).requires_grad_()
    lens = torch.tensor([frames, 17, 9, 2, 1])
    target_lens = torch.tensor([12, 8, 3, 1, 0])
    targets = torch.randint(1, vocab, (batch, 12), generator=generator)
    loss = ctc_sums(log_probs, lens, targets, target_lens).loss
    (gradient,) = torch.autograd.grad(loss, log_probs)
    found = greedy_search(log_probs.detach(), lens)
    return {
        **{"log_probs": log_probs, "lens": lens, "targets": targets, "target_lens": target_lens, "loss": loss, "grad": gradient},
        **{"tokens": padded(found, "tokens"), "frames": padded(found, "frames"), "scores": torch.tensor([each.score for each in found])},
    }


def padded(found: list, name: str) -> Tensor:
    """Rows of numbers, -1 behind the end."""
    rows = [torch.tensor(getattr(each, name), dtype=torch.int64) for each in found]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def modified_beam(seed: int) -> dict[str, Tensor]:
    """All that the modified beam search keeps of short utterances; its networks are written out as a table over contexts."""
    torch.manual_seed(seed)
    vocab, lens = 4, torch.tensor([5, 3, 1])
    predictor = Predictor(PredictorConfig(vocab, dim=8), Clock()).eval()
    joiner = Joiner(JoinerConfig(encoder_dim=6, predictor_dim=8, vocab_size=vocab, dim=10)).eval()
    with torch.no_grad():
        joiner.output_linear.weight.mul_(4)
        encoder_out = torch.randn(len(lens), 5, 6)
        contexts = torch.cartesian_prod(torch.arange(-1, vocab), torch.arange(vocab))
        projected = joiner.project_encoder(encoder_out).flatten(0, 1).unsqueeze(1)
        logits = joiner(projected, joiner.project_predictor(predictor.step(contexts)), project_input=False)
    found = modified_beam_search(predictor, joiner, encoder_out, lens, beam=2000, num_hypotheses=4)
    rows = [hypothesis for each in found for hypothesis in each]
    return {
        "lens": lens,
        "log_probs": logits.log_softmax(-1).view(len(lens), 5, vocab + 1, vocab, vocab),  # utterance, frame, last but one token + 1, last
        "utterance": torch.tensor([row for row, each in enumerate(found) for _ in each]),
        "tokens": padded(rows, "tokens"),
        "scores": torch.tensor([hypothesis.score for hypothesis in rows]),
    }


def swoosh() -> dict[str, Tensor]:
    """Both activations and their derivatives."""
    x = torch.cat([torch.linspace(-30, 30, 2001), torch.tensor([-1e3, 1e3])])
    named = {"l": swoosh_l, "r": swoosh_r}
    return {"x": x, **{name: one(x) for name, one in named.items()}, **{f"{name}_grad": one.derivative(x) for name, one in named.items()}}


def write(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """As numpy keeps them."""
    np.savez(path, **{name: array.detach().numpy() for name, array in arrays.items()})


def main() -> None:
    """Write everything."""
    folder = Path(sys.argv[1])
    for seed in range(NUM_LOSSES):
        torch.manual_seed(seed)
        write(folder / f"transducer_{seed}.npz", transducer_losses(seed))
    for seed in range(3):
        write(folder / f"ctc_{seed}.npz", ctc(seed))
        write(folder / f"modified_beam_{seed}.npz", modified_beam(seed))
    write(folder / "swoosh.npz", swoosh())


if __name__ == "__main__":
    main()
