"""The pre-training model: recorded loss and gradients, independence of the batch, and refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from k2ssl.batch import PretrainBatch
from k2ssl.models.frontend import LogMelConfig, WaveformConfig
from k2ssl.models.hubert import HubertConfig, HubertModel, labels_of_frames
from k2ssl.models.import_state import import_state_dict
from k2ssl.models.masking import MaskingConfig
from k2ssl.models.prediction_head import HeadConfig
from k2ssl.models.transformer import TransformerConfig


@pytest.fixture
def recorded(golden, recorded_encoder):
    arrays = golden("hubert_ce")
    config = HubertConfig(
        frontend=WaveformConfig(channels=16), encoder=recorded_encoder, head=HeadConfig(num_classes=(52,)), input_dropout=0.0
    )
    model = HubertModel(config).eval()
    state = {key.removeprefix("state."): value for key, value in arrays.items() if key.startswith("state.")}
    report = import_state_dict(model, state, "icefall")
    return model, arrays, report


def test_loss_and_its_parts_agree_with_the_recorded_ones(recorded, agreement) -> None:
    model, arrays, _ = recorded
    out = model(PretrainBatch(arrays["wav"], (arrays["labels"],)), arrays["mask"])
    agreement.relative("hubert_ce loss", out.loss, arrays["loss"], 1e-5)
    assert out.metrics["loss_masked"].item() == pytest.approx(arrays["loss_masked"].item(), rel=1e-6)
    assert 10 * out.metrics["feature_penalty"].item() == pytest.approx(arrays["loss_features_pen"].item(), rel=1e-6)
    assert int(out.num_targets) == int(out.metrics["num_masked"]) == int(arrays["num_masked"]) == int(arrays["count_masked"])
    assert int(out.metrics["correct_masked"]) == int(arrays["correct_masked"])
    assert int(out.metrics["predicted"].sum()) == int(arrays["num_masked"])


def test_every_parameter_gradient_agrees_with_the_recorded_one(recorded, agreement, regularise_as_recorded) -> None:
    model, arrays, report = recorded
    regularise_as_recorded(model, "hubert_ce")
    model(PretrainBatch(arrays["wav"], (arrays["labels"],)), arrays["mask"]).loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    compared = 0
    for theirs, name in report.matched:
        agreement.relative("hubert_ce gradients, worst tensor (see tests/golden/README.md)", ours[name], arrays[f"grad.{theirs}"], 1e-4)
        compared += 1
    assert compared == len(ours) == sum(key.startswith("grad.") for key in arrays)


def _tiny(**changes: object) -> HubertModel:
    torch.manual_seed(3)
    return HubertModel(dataclasses.replace(HubertConfig.tiny(), **changes))


def _batch(model: HubertModel, lens: list[int], seed: int = 0) -> PretrainBatch:
    generator = torch.Generator().manual_seed(seed)
    audio = torch.randn(len(lens), max(lens), generator=generator)
    labels = []
    for k, rate in zip(model.config.head.num_classes, model.label_rate, strict=True):
        counts = [int(model.frontend.num_frames(n) * rate / model.frontend.frame_rate) for n in lens]
        of_set = torch.randint(0, k, (len(lens), max(counts)), generator=generator)
        for i, count in enumerate(counts):
            of_set[i, count:] = -1
        labels.append(of_set)
    for i, n in enumerate(lens):
        audio[i, n:] = 0
    return PretrainBatch(audio, tuple(labels), torch.tensor(lens) if min(lens) < max(lens) else None)


_MODELS = {
    "zipformer, waveform": {},
    "zipformer, layer norms": {"frontend": WaveformConfig(channels=32, norm="layer")},
    "zipformer, log-mel": {"frontend": LogMelConfig(channels=(4, 8, 16), output_dim=32)},
    "transformer, waveform": {"encoder": TransformerConfig.tiny()},
    "transformer, log-mel": {
        "encoder": dataclasses.replace(TransformerConfig.tiny(), layer_norm_first=True),
        "frontend": LogMelConfig(channels=(4, 8, 16), output_dim=32),
    },
}


@pytest.mark.parametrize("name", _MODELS)
def test_an_utterance_is_encoded_the_same_alone_padded_and_in_a_batch(agreement, name: str) -> None:
    model = _tiny(**_MODELS[name]).eval()

    @settings(max_examples=12, deadline=None)
    @given(length=st.integers(400, 9000), padding=st.integers(0, 3000), seed=st.integers(0, 99))
    def check(length: int, padding: int, seed: int) -> None:
        audio = torch.randn(3, length + padding, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            alone = model.encode(audio[:1, :length]).output.frames
            lens = torch.tensor([length, length + padding, max(400, length // 2)])
            batched = model.encode(audio, lens).output.frames[:1, : alone.shape[1]]
        assert alone.shape[1] == model.frontend.num_frames(length)
        agreement.absolute(f"batch invariance: {name}", batched, alone, 1e-4)

    check()


@pytest.mark.parametrize("name", _MODELS)
def test_the_loss_of_a_batch_is_the_sum_of_the_losses_of_its_utterances(name: str) -> None:
    model = _tiny(**_MODELS[name], feature_penalty=0.0).eval()
    lens = [8000, 6111, 7003]
    batch = _batch(model, lens)
    mask = model.draw_mask(batch.audio, batch.audio_lens)
    together = model(batch, mask)
    apart = []
    for i, n in enumerate(lens):
        frames = model.frontend.num_frames(n)
        apart.append(model(PretrainBatch(batch.audio[i : i + 1, :n], (batch.labels[0][i : i + 1, :frames],)), mask[i : i + 1, :frames]))
    assert together.loss.item() == pytest.approx(sum(out.loss.item() for out in apart), rel=1e-5)
    assert int(together.num_targets) == sum(int(out.num_targets) for out in apart)
    for key in ("loss_masked", "correct_masked", "num_masked"):
        assert together.metrics[key].item() == pytest.approx(sum(out.metrics[key].item() for out in apart), rel=1e-5)


@pytest.mark.parametrize("similarity", ["linear", "cosine"])
def test_the_loss_agrees_with_a_loop_over_frames(similarity: str) -> None:
    model = _tiny(
        head=HeadConfig(num_classes=(7, 5), similarity=similarity, code_dim=6),
        label_rate=(50.0, 100.0),
        unmasked_weight=0.3,
        masked_weight=0.9,
    ).eval()
    batch = _batch(model, [5000, 4000])
    mask = model.draw_mask(batch.audio, batch.audio_lens)
    out = model(batch, mask)
    encoded = model.encode(batch.audio, batch.audio_lens, mask)
    loss, targets = 0.0, 0
    for i in range(2):
        for t in range(model.frontend.num_frames([5000, 4000][i])):
            frame = encoded.output.frames[i, t]
            targets += 1
            for s, head in enumerate(model.heads):
                projected = head.projection(frame)
                if similarity == "cosine":
                    logits = F.cosine_similarity(projected.unsqueeze(0), head.codes, dim=-1) / 0.1
                else:
                    logits = projected / 0.1
                label = batch.labels[s][i, t * (s + 1)]
                loss -= (0.9 if mask[i, t] else 0.3) * logits.log_softmax(dim=0)[label].item()
    valid = [encoded.features[i, : model.frontend.num_frames([5000, 4000][i])].flatten() for i in range(2)]
    penalty = torch.cat(valid).square().mean().item()
    assert int(out.num_targets) == targets
    assert out.loss.item() == pytest.approx(loss + 10 * penalty * targets, rel=1e-5)
    assert {"loss_masked", "loss_masked_1", "loss_unmasked", "num_unmasked_1", "predicted_1"} <= set(out.metrics)


def test_logits_are_computed_for_hidden_frames_only() -> None:
    model = _tiny()
    rows: list[int] = []
    model.heads[0].register_forward_hook(lambda module, args, output: rows.append(output.shape[0]))
    out = model(_batch(model, [9000, 9000]))
    assert rows == [int(out.num_targets)] and 0 < rows[0] < 2 * model.frontend.num_frames(9000)


def test_the_bound_used_on_accelerators_gives_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _tiny()
    batch = _batch(model, [9000, 9000])
    results = []
    for bounded in (False, True):
        if bounded:
            monkeypatch.setattr(model, "_num_selected", lambda weights, most_masked: weights.shape[0] * most_masked)
        model.zero_grad()
        model.clock.seed(1)
        out = model(batch)
        out.loss.backward()
        results.append((out.loss.item(), model.heads[0].projection.weight.grad.clone(), int(out.num_targets), out.metrics))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6) and results[0][2] == results[1][2]
    torch.testing.assert_close(results[0][1], results[1][1])
    assert torch.equal(results[0][3]["predicted"], results[1][3]["predicted"])


@pytest.mark.parametrize("lens", [[9000, 9000], [9000, 7000]])
@pytest.mark.parametrize("name", _MODELS)
def test_forward_and_backward_never_wait_for_the_device(
    name: str, lens: list[int], monkeypatch: pytest.MonkeyPatch, no_questions: type[TorchDispatchMode]
) -> None:
    model = _tiny(**_MODELS[name], masking=MaskingConfig(channel_probability=0.2), input_dropout=0.1)
    batch = _batch(model, lens)
    monkeypatch.setattr(model, "check_batch", lambda batch: None)  # reads values of tensors on the CPU only
    monkeypatch.setattr(model, "_num_selected", lambda weights, most_masked: weights.shape[0] * most_masked)  # as off the CPU
    with pytest.raises(AssertionError, match="waits"), no_questions():
        torch.ones(2)[torch.tensor([True, False])]
    for seed in range(2):
        model.clock.seed(seed)
        model.clock.advance(seed)
        with no_questions():
            model(batch).loss.backward()


def test_equal_seeds_give_bit_equal_losses_and_gradients() -> None:
    model = _tiny(masking=MaskingConfig(channel_probability=0.2), input_dropout=0.1)
    batch = _batch(model, [9000, 7000])

    def step(*seed: int) -> list[torch.Tensor]:
        model.zero_grad()
        model.clock.seed(*seed)
        model.clock.advance(50)
        out = model(batch)
        out.loss.backward()
        return [out.loss.detach(), *(p.grad for p in model.parameters())]

    first = step(1, 0, 2, 30)
    assert all(torch.equal(a, b) for a, b in zip(first, step(1, 0, 2, 30), strict=True))
    assert not torch.equal(first[0], step(1, 1, 2, 30)[0])


@pytest.mark.parametrize("name", _MODELS)
def test_every_parameter_has_a_gradient_in_every_training_step(name: str) -> None:
    model = _tiny(**_MODELS[name], head=HeadConfig(num_classes=(16, 9)))
    for seed in range(3):
        model.zero_grad()
        model.clock.seed(seed)
        model(_batch(model, [6000, 5000], seed)).loss.backward()
        assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_channel_masking_hides_whole_channels_only_where_frames_are_masked_too() -> None:
    model = _tiny(masking=MaskingConfig(channel_probability=0.5, channel_length=4))
    seen: list[torch.Tensor] = []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    audio = torch.randn(2, 6000)
    model.encode(audio, mask=model.draw_mask(audio))
    model.encode(audio)
    hidden = (seen[0] == 0).all(dim=1).sum(dim=1)
    assert (hidden > 4).all() and hidden[0] == hidden[1] and not (seen[1] == 0).all(dim=1).any()


def test_lengths_that_pad_nothing_make_no_padding_mask() -> None:
    model = _tiny()
    audio = torch.randn(2, 6000)
    frames = model.frontend.num_frames(6000)
    assert model.encode(audio, torch.tensor([6000, 6000])).padding_mask is None
    mask = model.encode(audio, torch.tensor([6000, 5000])).padding_mask
    assert mask is not None and (~mask).sum(dim=1).tolist() == [frames, model.frontend.num_frames(5000)]


def test_under_autocast_what_layers_add_to_and_the_logits_are_float32() -> None:
    model = _tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        frames = model.encode(torch.randn(1, 6000)).output.frames
        assert frames.dtype == model.heads[0](frames[0]).dtype == torch.float32


@pytest.mark.parametrize("name", _MODELS)
def test_features_of_a_layer_do_not_need_the_later_ones(name: str) -> None:
    model = _tiny(**_MODELS[name]).eval()
    audio, lens = torch.randn(2, 6000), torch.tensor([6000, 5000])
    full = model.encode(audio, lens, return_hidden=True)
    stopped = model.encode(audio, lens, stop_after=1)
    assert torch.equal(stopped.output.frames, full.output.hidden[0]) and not torch.equal(stopped.output.frames, full.output.frames)
    assert stopped.padding_mask is not None and torch.equal(stopped.padding_mask, full.padding_mask)


def test_hidden_frames_are_replaced_by_the_mask_embedding() -> None:
    model = _tiny()
    seen: list[torch.Tensor] = []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    audio = torch.randn(1, 6000)
    mask = model.draw_mask(audio)
    model.encode(audio, mask=mask)
    model.encode(audio)
    assert torch.equal(seen[0][mask], model.mask_embedding.expand(int(mask.sum()), -1)) and torch.equal(seen[0][~mask], seen[1][~mask])


def test_projected_frames_are_dropped_out_in_training_only() -> None:
    model = _tiny(input_dropout=0.3)
    seen: list[torch.Tensor] = []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    audio = torch.randn(2, 16000)
    model.encode(audio)
    model.eval().encode(audio)
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.03) and (seen[1] != 0).all()


def test_labels_at_another_rate_are_taken_at_the_frame_they_start_in() -> None:
    labels = torch.tensor([[0, 1, 2, 3, 4, 5]])
    assert labels_of_frames(labels, 4, 2.0).tolist() == [[0, 2, 4, -1]]
    assert labels_of_frames(labels, 4, 0.5).tolist() == [[0, 0, 1, 1]]
    assert labels_of_frames(labels.to(torch.int16), 3, 1.0).tolist() == [[0, 1, 2]]


def test_a_label_beyond_the_last_frame_of_a_shorter_utterance_makes_no_target() -> None:
    model = _tiny(unmasked_weight=1.0)
    lens = [6000, 5000]
    frames = [model.frontend.num_frames(n) for n in lens]
    labels = torch.zeros(2, frames[0] + 1, dtype=torch.long)
    labels[1, frames[1] + 1 :] = -1  # one label more than frames: allowed, and it falls on a padded frame
    batch = PretrainBatch(torch.randn(2, lens[0]), (labels,), torch.tensor(lens))
    assert int(model(batch).num_targets) == sum(frames)


def test_frames_without_a_label_are_not_targets() -> None:
    model = _tiny(unmasked_weight=1.0)
    batch = _batch(model, [6000])
    frames = model.frontend.num_frames(6000)
    assert int(model(dataclasses.replace(batch, labels=(batch.labels[0][:, :-1],))).num_targets) == frames - 1


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (HubertConfig.zipformer_base(), 94.56),
        (HubertConfig.zipformer_large(), 305.9),
        (HubertConfig.hubert_base(), 94.7),
        (HubertConfig.hubert_large(), 316.6),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(config: HubertConfig, millions: float) -> None:
    with torch.device("meta"):
        model = HubertModel(config)
    # the published figures are rounded, and HuBERT's count the code embeddings of another number of classes
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.06 if config.encoder.__class__.__name__[0] == "Z" else 0.3
    )


def _with_labels(change) -> PretrainBatch:
    batch = _batch(_tiny(), [6000, 5000])
    labels = batch.labels[0].clone()
    change(labels)
    return dataclasses.replace(batch, labels=(labels,))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda: _with_labels(lambda x: x.__setitem__((1, 3), 16)), r"labels\[0\], utterance 1: label 16 is outside .* 0 to 15"),
        (lambda: _with_labels(lambda x: x.__setitem__((0, 3), -7)), r"labels\[0\], utterance 0: label -7 is outside"),
        (lambda: _with_labels(lambda x: x.__setitem__((0, 3), -1)), "utterance 0: -1 stands before the last label"),
        (lambda: _with_labels(lambda x: x.__setitem__((1, slice(10, None)), -1)), "utterance 1: 10 labels for 15 frames"),
        (lambda: dataclasses.replace(_batch(_tiny(), [6000]), labels=()), "labels holds 0 label sets, the model has 1 heads"),
        (
            lambda: dataclasses.replace(_batch(_tiny(), [6000]), labels=(torch.zeros(1, 18),)),
            r"torch.float32, allowed are \(1, L >= 1\) and int64, int32, int16, int8, uint8",
        ),
        (lambda: dataclasses.replace(_batch(_tiny(), [6000]), labels=(torch.zeros(2, 18, dtype=torch.long),)), r"shape \(2, 18\)"),
        (
            lambda: PretrainBatch(torch.zeros(2, 6000), (torch.zeros(2, 18).long(),), torch.tensor([6000, 399])),
            "utterance 1 has 399 samples, at least 400",
        ),
        (lambda: PretrainBatch(torch.zeros(1, 200), (torch.zeros(1, 1).long(),)), "utterance 0 has 200 samples"),
    ],
)
def test_batches_that_do_not_fit_are_refused_before_any_compute(batch, message: str) -> None:
    model = _tiny()
    model.frontend.register_forward_pre_hook(lambda module, args: pytest.fail("computed"))
    with pytest.raises(ValueError, match=message):
        model(batch())


def test_a_mask_of_another_shape_is_refused() -> None:
    model = _tiny()
    with pytest.raises(ValueError, match=r"mask has shape \(1, 3\) .* allowed is \(1, 18\)"):
        model(_batch(model, [6000]), torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"type torch\.float32, allowed is \(2, 18\) and torch\.bool"):
        model.encode(torch.randn(2, 6000), mask=torch.zeros(2, 18))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masked_weight": -1.0}, "masked_weight is -1"),
        ({"masked_weight": 0.0}, "both 0"),
        ({"feature_penalty": float("nan")}, "feature_penalty is nan"),
        ({"label_rate": (50.0, 50.0)}, "label_rate has 2 entries, head.num_classes has 1"),
        ({"label_rate": (0.0,)}, "allowed are rates > 0"),
        ({"input_dropout": 1.0}, r"input_dropout is 1\.0, allowed is 0 <= input_dropout < 1"),
    ],
)
def test_impossible_configurations_are_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(HubertConfig.tiny(), **changes)


@pytest.mark.parametrize(("shift", "stride"), [(368, 320), (432, 320), (592, 320), (320, 320), (160, 320), (400, 320)])
def test_a_frame_has_the_label_that_lies_at_its_beginning(shift: int, stride: int) -> None:
    count = 1000 * stride // shift + 1
    labels = labels_of_frames(torch.arange(count).unsqueeze(0), 1000, (16000 / shift) / (16000 / stride))
    assert labels[0].tolist() == [t * stride // shift for t in range(1000)]


@pytest.mark.parametrize("window", [25.0, 50.0, 64.0])
def test_crops_of_any_frontend_may_have_labels_to_their_end(window: float) -> None:
    model = _tiny(frontend=LogMelConfig(channels=(2, 4, 8), output_dim=16, frame_length_ms=window))
    for samples in range(40000, 40320, 16):  # a crop has a label wherever one begins in it, see PretrainDataset
        model.check_batch(PretrainBatch(torch.zeros(1, samples), (torch.zeros(1, samples // 320, dtype=torch.int64),)))
    with pytest.raises(ValueError, match="labels for"):
        model.check_batch(PretrainBatch(torch.zeros(1, 40000), (torch.zeros(1, 132, dtype=torch.int64),)))
