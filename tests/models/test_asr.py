"""The recognition model: its losses do not depend on the batch, its heads learn, its parts freeze, and bad batches are refused by name."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

from k2ssl.batch import AsrBatch
from k2ssl.decode.transducer import greedy_search
from k2ssl.models.asr import AsrConfig, AsrModel
from k2ssl.models.ctc_head import CtcConfig
from k2ssl.models.frontend import LogMelConfig, WaveformConfig
from k2ssl.models.masking import MaskingConfig
from k2ssl.models.transducer_head import TransducerConfig
from k2ssl.models.transformer import TransformerConfig
from k2ssl.optim.scaled_adam import ScaledAdam
from k2ssl.train.metrics import MetricSums

TINY = replace(
    AsrConfig.tiny(6, "both"),
    frontend=WaveformConfig(channels=24, gradient_scale=0.1),
    encoder=replace(TransformerConfig.tiny(), dropout=0.0, attention_dropout=0.0, layer_drop=0.0),
    masking=MaskingConfig(probability=0.0),
    ctc=CtcConfig(dropout=0.0),
    transducer=TransducerConfig(predictor_dim=32, joiner_dim=32),
)
ENCODERS = {"transformer": TINY.encoder, "zipformer": AsrConfig.tiny(6).encoder}
FRONTENDS = {"waveform": TINY.frontend, "logmel": LogMelConfig(channels=(2, 4, 8), output_dim=16)}


def make_model(step: int = 0, **changes: Any) -> AsrModel:
    torch.manual_seed(3)
    model = AsrModel(replace(TINY, **changes))
    model.step = step
    model.clock.seed(1)
    return model


def make_batch(samples: list[int], texts: list[list[int]], padding: int = 0) -> AsrBatch:
    """Noise of so many samples each, with these tokens."""
    generator = torch.Generator().manual_seed(5)
    audio = pad_sequence([0.1 * torch.randn(length, generator=generator) for length in samples], batch_first=True)
    tokens = pad_sequence([torch.tensor(text, dtype=torch.int64) for text in texts], batch_first=True, padding_value=padding)
    lens = torch.tensor(samples) if len(set(samples)) > 1 else None
    ids = tuple(f"utt-{number}" for number in range(len(samples)))
    return AsrBatch(audio, lens, ("",) * len(samples), ids, tokens, torch.tensor([len(text) for text in texts]))


def row(batch: AsrBatch, number: int) -> AsrBatch:
    """One utterance without its padding."""
    assert batch.audio_lens is not None and batch.tokens is not None and batch.token_lens is not None
    samples, length = int(batch.audio_lens[number]), int(batch.token_lens[number])
    return AsrBatch(
        batch.audio[number : number + 1, :samples],
        None,
        ("",),
        (batch.ids[number],),
        batch.tokens[number : number + 1, :length],
        batch.token_lens[number : number + 1],
    )


BATCH = make_batch([8000, 6100, 4333], [[1, 2, 2, 3], [5], [4, 3, 1, 2, 5, 1]])


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_an_utterance_has_the_same_losses_alone_and_in_a_padded_batch(frontend: str, encoder: str, factor: int) -> None:
    model = make_model(frontend=FRONTENDS[frontend], encoder=ENCODERS[encoder], output_downsampling=factor).eval()
    assert BATCH.tokens is not None and BATCH.token_lens is not None
    garbage = torch.where(torch.arange(6) < BATCH.token_lens.unsqueeze(1), BATCH.tokens, torch.tensor([[-7], [99], [0]]))
    with torch.no_grad():
        together, alone = model(replace(BATCH, tokens=garbage)), [model(row(BATCH, number)) for number in range(3)]
    assert together.loss.item() == pytest.approx(sum(each.loss.item() for each in alone), rel=1e-5)
    assert int(together.num_targets) == 11
    for name, value in together.metrics.items():
        assert float(value) == pytest.approx(sum(float(each.metrics[name]) for each in alone), rel=1e-5), name


def test_frames_for_the_heads_come_at_the_rate_asked_for() -> None:
    shapes = {}
    for factor in (1, 2):
        output = make_model(output_downsampling=factor).eval().recognition_frames(BATCH.audio, BATCH.audio_lens)
        shapes[factor] = (tuple(output.frames.shape), output.lens.tolist())
        assert output.lens.dtype == torch.int64 and output.lens.device.type == "cpu"
    assert shapes == {1: ((3, 24, 32), [24, 18, 13]), 2: ((3, 12, 32), [12, 9, 7])}
    assert make_model().eval().recognition_frames(BATCH.audio).lens.tolist() == [24, 24, 24]


def test_the_loss_is_the_published_sum_and_its_weights_go_by_steps() -> None:
    expected = {0: (1.0, 0.1), 1000: (0.75, 0.55), 2000: (0.5, 1.0), 9000: (0.5, 1.0)}
    model = make_model()
    model.clock.advance(1e6)  # seconds of audio have no say
    for step, weights in expected.items():
        model.step = step
        assert model.transducer_scales() == pytest.approx(weights)
        out = model(BATCH)
        simple, pruned, ctc = (out.metrics[f"loss_{name}"].item() for name in ("simple", "pruned", "ctc"))
        assert out.loss.item() == pytest.approx(weights[0] * simple + weights[1] * pruned + 0.2 * ctc, rel=1e-6)
    model.step = 0
    assert model.eval().transducer_scales() == (0.5, 1.0)
    assert make_model(warmup_steps=0).transducer_scales() == (0.5, 1.0)
    alone = make_model(heads="ctc")(BATCH)
    assert alone.loss.item() == alone.metrics["loss_ctc"].item() and "loss_simple" not in alone.metrics


def test_metrics_are_sums_that_give_nats_per_token() -> None:
    sums = MetricSums()
    out = make_model()(BATCH)
    sums.add(out)
    sums.add(make_model()(BATCH))
    means = sums.reduce()
    for name in ("simple", "pruned", "ctc"):
        assert means[f"loss_{name}"] == pytest.approx(out.metrics[f"loss_{name}"].item() / 11, rel=1e-6)
    assert not any(value.requires_grad for value in out.metrics.values())


@pytest.mark.parametrize("heads", ["transducer", "ctc", "both"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_parameter_gets_a_gradient(encoder: str, heads: str) -> None:
    model = make_model(heads=heads, encoder=ENCODERS[encoder], masking=MaskingConfig(probability=0.65), output_downsampling=2)
    model.clock.advance(1e5)
    model(BATCH).loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None] == []
    own = ("ctc.", "transducer.") if heads == "both" else (f"{heads}.",)
    for part in ("frontend.", "projection.", "mask_embedding", "encoder.", "downsample.", *own):
        assert any(grad is not None and grad.abs().sum() > 0 for name, grad in grads.items() if name.startswith(part)), part
    assert (model.ctc is None) == (heads == "transducer") and (model.transducer is None) == (heads == "ctc")


def test_utterances_with_too_few_frames_are_counted_and_change_nothing() -> None:
    """13 frames: eight equal tokens need 15 for CTC; more than 13 do not fit into windows of two positions."""
    short = replace(TINY.transducer, prune_range=2)
    fine, repeats, many = [1, 2, 3], [4] * 8, [1, 2] * 7
    batch = make_batch([8000, 4333, 4333], [fine, repeats, many], padding=1)
    model = make_model(transducer=short).eval()
    out = model(batch)
    assert (int(out.metrics["count_too_long_ctc"]), int(out.metrics["count_too_long_transducer"])) == (2, 1)
    assert int(out.num_targets) == int(out.metrics["num_pruned"]) == int(out.metrics["num_simple"]) == 3 + 8
    assert int(out.metrics["num_ctc"]) == 3 and int(out.metrics["count_utterances"]) == 3
    alone = [model(row(batch, number)) for number in range(3)]
    assert out.loss.item() == pytest.approx(sum(each.loss.item() for each in alone), rel=1e-5)
    assert alone[2].loss.item() == 0 and int(alone[2].num_targets) == 0
    ctc_only = make_model(heads="ctc").eval()(batch)
    assert int(ctc_only.num_targets) == 3


def test_a_batch_of_which_nothing_is_left_gives_gradients_of_zero() -> None:
    model = make_model(transducer=replace(TINY.transducer, prune_range=2))
    model(make_batch([4333], [[1, 2] * 7])).loss.backward()
    for name, parameter in model.named_parameters():
        assert name == "mask_embedding" or (parameter.grad is not None and not parameter.grad.any()), name


def test_in_bfloat16_the_losses_and_their_metrics_are_float32() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = make_model()(BATCH)
    out.loss.backward()
    assert {out.loss.dtype, *(out.metrics[f"loss_{name}"].dtype for name in ("simple", "pruned", "ctc"))} == {torch.float32}


# --- masking ---


def hidden_by(model: AsrModel, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor | None, Tensor]:
    """The mask of a forward pass, and what the encoder was given."""
    seen: dict[str, Any] = {}
    encode, encoder = model.encode, model.encoder.forward

    def note_mask(audio: Tensor, lens: Tensor | None, mask: Tensor | None) -> Any:
        seen["mask"] = mask
        return encode(audio, lens, mask)

    def note_input(x: Tensor, *rest: Any) -> Any:
        seen["x"] = x.detach()
        return encoder(x, *rest)

    monkeypatch.setattr(model, "encode", note_mask)
    monkeypatch.setattr(model.encoder, "forward", note_input)
    model(BATCH)
    return seen["mask"], seen["x"]


def test_frames_are_hidden_behind_the_mask_embedding_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(masking=MaskingConfig(probability=0.65, length=3))
    mask, x = hidden_by(model, monkeypatch)
    assert mask is not None and 0.2 < mask.float().mean() < 0.8
    assert torch.equal(x[mask], model.mask_embedding.detach().expand_as(x[mask]))
    assert not (x[~mask] == model.mask_embedding).all(dim=-1).any()
    mask, _ = hidden_by(model.eval(), monkeypatch)
    assert mask is None


def test_channels_are_hidden_in_training_with_and_without_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    for probability in (0.0, 0.65):
        model = make_model(masking=MaskingConfig(probability=probability, channel_probability=0.5, channel_length=4))
        mask, x = hidden_by(model, monkeypatch)
        assert mask is not None and mask.any() == (probability > 0)
        zero = (x == 0).all(dim=1)
        assert 0.2 < zero.float().mean() < 0.8 and not torch.equal(zero[0], zero[1])
        assert not (hidden_by(model.eval(), monkeypatch)[1] == 0).all(dim=1).any()


def test_with_masking_off_nothing_is_hidden_and_the_mask_embedding_does_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(masking=MaskingConfig(probability=0.0, min_spans=2))
    assert hidden_by(model, monkeypatch)[0] is None
    assert not model.mask_embedding.requires_grad
    assert make_model(masking=MaskingConfig()).mask_embedding.requires_grad


# --- freezing ---


def gradients(model: AsrModel) -> dict[str, Tensor]:
    model(BATCH).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_freezing_the_frontend_changes_no_other_gradient() -> None:
    changes: dict[str, Any] = {"masking": MaskingConfig(probability=0.65), "warmup_steps": 0}
    free = gradients(make_model(step=2, **changes))
    frozen = gradients(make_model(step=2, freeze_frontend_steps=3, **changes))
    assert free.keys() == frozen.keys()
    for name, grad in frozen.items():
        expected = torch.zeros_like(grad) if name.startswith("frontend.") else free[name]
        assert torch.equal(grad, expected), name
    model = make_model(step=3, freeze_frontend_steps=3, **changes)
    assert not list(model.frozen_parameters())
    thawed = gradients(model)
    assert all(torch.equal(thawed[name], grad) for name, grad in free.items())


def test_freezing_the_encoder_leaves_the_heads_and_the_new_downsampling_to_learn() -> None:
    changes: dict[str, Any] = {"masking": MaskingConfig(probability=0.65), "output_downsampling": 2}
    free = gradients(make_model(step=2, **changes))
    model = make_model(step=2, freeze_encoder_steps=3, freeze_frontend_steps=1, **changes)
    frozen = gradients(model)
    assert free.keys() == frozen.keys()
    heads = {name for name in free if name.startswith(("ctc.", "transducer.", "downsample."))}
    assert len(heads) == 15
    for name, grad in frozen.items():
        assert torch.equal(grad, free[name] if name in heads else torch.zeros_like(grad)), name
    by_id = {id(parameter) for parameter in model.frozen_parameters()}
    assert {name for name, parameter in model.named_parameters() if id(parameter) not in by_id} == heads
    with torch.no_grad():
        assert not model(BATCH).loss.requires_grad


def test_in_training_the_step_must_have_been_told() -> None:
    model = AsrModel(TINY)
    with pytest.raises(ValueError, match="step is None"):
        model(BATCH)
    assert torch.isfinite(model.eval()(BATCH).loss)


def _join_and_train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.save(_train(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _train(rank: int) -> list[dict[str, torch.Tensor]]:
    """The weights before the first step and after each; the parallel model must not outlive its group, see `k2ssl.distributed`."""
    masking = MaskingConfig(probability=0.65)
    model = make_model(encoder=ENCODERS["zipformer"], masking=masking, freeze_encoder_steps=1, freeze_frontend_steps=2)
    ddp = DistributedDataParallel(model)  # not told to look for unused parameters
    optimizer = ScaledAdam(model.named_parameters(), lr=0.02, clipping_scale=2.0)
    states = [{name: value.clone() for name, value in model.state_dict().items()}]
    for step in range(3):
        model.step = step
        model.clock.advance(step)
        model.clock.seed(1, step, rank)
        optimizer.zero_grad()
        ddp(make_batch([6000 + 320 * rank], [[1 + rank, 2, 3]])).loss.backward()
        optimizer.step()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states


def test_two_ranks_freeze_and_thaw_together(tmp_path: Path) -> None:
    mp.spawn(_join_and_train, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(value, two[step][name]) for step in range(4) for name, value in one[step].items())
    changed = []
    for before, after in pairwise(one):
        moved = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
        changed.append(moved & {"frontend", "encoder", "projection", "feature_norm", "mask_embedding", "ctc", "transducer"})
    heads, middle = {"ctc", "transducer"}, {"encoder", "projection", "feature_norm", "mask_embedding"}
    assert changed == [heads, heads | middle, heads | middle | {"frontend"}]


# --- learning ---


def tones(texts: list[list[int]]) -> AsrBatch:
    """Each token is a tenth of a second of its own pitch."""
    time = torch.arange(1600) / 16000
    pieces = [[torch.sin(2 * torch.pi * 350 * token * time) * torch.hann_window(1600) for token in text] for text in texts]
    batch = make_batch([1600 * len(text) for text in texts], texts)
    return replace(batch, audio=0.01 * batch.audio + 0.3 * pad_sequence([torch.cat(each) for each in pieces], batch_first=True))


def recognised(model: AsrModel, batch: AsrBatch) -> list[list[int]]:
    with torch.no_grad():
        output = model.eval().recognition_frames(batch.audio, batch.audio_lens)
        if model.transducer is not None:
            found = greedy_search(model.transducer.predictor, model.transducer.joiner, output.frames, output.lens)
            return [list(each.tokens) for each in found]
        assert model.ctc is not None
        best = [path[:length].unique_consecutive() for path, length in zip(model.ctc(output.frames).argmax(-1), output.lens, strict=True)]
        return [[token for token in path.tolist() if token] for path in best]


@pytest.mark.parametrize("heads", ["ctc", "transducer"])
def test_four_utterances_are_learnt_without_an_error(heads: str) -> None:
    texts = [[1, 2, 3, 4], [4, 3, 2, 1], [2, 5, 1, 3], [5, 4, 1]]
    batch = tones(texts)
    model = make_model(heads=heads, warmup_steps=50, transducer=TransducerConfig(predictor_dim=64, joiner_dim=64))
    optimizer = ScaledAdam(model.named_parameters(), lr=0.02, clipping_scale=2.0)
    assert recognised(model, batch) != texts
    for step in range(300):
        model.train()
        model.step = step
        model.clock.seed(0, step)
        optimizer.zero_grad()
        out = model(batch)
        (out.loss / out.num_targets).backward()
        optimizer.step()
        if step % 20 == 19 and recognised(model, batch) == texts:
            break
    assert recognised(model, batch) == texts


# --- refusals ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "tokens and token_lens are needed"),
        ({"token_lens": None}, "tokens and token_lens are needed"),
        ({"token_lens": torch.tensor([4, 0, 6])}, "utterance 'utt-1': its transcript is empty"),
        ({"token_lens": torch.tensor([4, 1, 7])}, "utterance 'utt-2': token_lens is 7, allowed are 1 to 6"),
        ({"token_lens": torch.tensor([4, 1])}, r"token_lens is torch.int64 \(2,\) on cpu, allowed is int64 \(3,\)"),
        ({"token_lens": torch.tensor([4.0, 1.0, 6.0])}, "token_lens is torch.float32"),
        ({"token_lens": torch.tensor([4, 1, 6], device="meta")}, "on meta, allowed is int64"),
        ({"tokens": torch.ones(3, 6)}, "tokens is torch.float32"),
        ({"tokens": torch.ones(2, 6, dtype=torch.int64)}, r"tokens is torch.int64 \(2, 6\), allowed is int64 \(3, U\)"),
        ({"tokens": torch.full((3, 6), 6)}, "utterance 'utt-0': token 0 is 6, allowed are 1 to 5"),
        ({"tokens": torch.tensor([[1] * 6, [1] * 6, [1, 1, 1, 1, 1, 0]])}, "utterance 'utt-2': token 5 is 0, allowed are 1 to 5"),
        ({"tokens": torch.full((3, 6), -1), "ids": ()}, "utterance 0: token 0 is -1"),
        ({"audio_lens": torch.tensor([8000, 6100, 100])}, "utterance 2 has 100 samples, at least 400"),
    ],
)
def test_a_bad_batch_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    model = make_model()
    model.check_batch(BATCH)
    for check in (model.check_batch, model):
        with pytest.raises(ValueError, match=message):
            check(replace(BATCH, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 1}, "AsrConfig: vocab_size is 1"),
        ({"heads": "rnn"}, "heads: is 'rnn', allowed are 'transducer', 'ctc', 'both'"),
        ({"output_downsampling": 0}, "AsrConfig: output_downsampling is 0"),
        ({"warmup_steps": -1}, "AsrConfig: warmup_steps is -1"),
        ({"freeze_frontend_steps": -1}, "AsrConfig: freeze_frontend_steps is -1"),
        ({"freeze_encoder_steps": -1}, "AsrConfig: freeze_encoder_steps is -1"),
        ({"simple_scale": -0.1}, "AsrConfig: simple_scale is -0.1"),
        ({"ctc_scale": float("inf")}, "AsrConfig: ctc_scale is inf"),
        ({"input_dropout": 1.0}, "AsrConfig: input_dropout is 1.0"),
    ],
)
def test_a_bad_configuration_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)
