"""The whole model against torchaudio's HuBERT, with weights copied by the importer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.models import hubert_pretrain_base, hubert_pretrain_model

from k2ssl.batch import PretrainBatch
from k2ssl.models.frontend import WaveformConfig
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.import_state import import_state_dict
from k2ssl.models.prediction_head import HeadConfig
from k2ssl.models.transformer import TransformerConfig

CLASSES = 20
CONV_LAYERS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
MASKS = {"mask_selection": "static", "mask_other": 0.0, "mask_length": 10, "no_mask_overlap": False, "mask_min_space": 1}
CHANNEL_MASKS = {
    "mask_channel_selection": "static",
    "mask_channel_other": 0.0,
    "mask_channel_length": 10,
    "no_mask_channel_overlap": False,
    "mask_channel_min_space": 1,
}


def torchaudio_model(layer_norm_first: bool) -> nn.Module:
    """Three narrow layers in the shape of Base or of Large."""
    return hubert_pretrain_model(
        extractor_mode="layer_norm" if layer_norm_first else "group_norm",
        extractor_conv_layer_config=[(24, kernel, stride) for kernel, stride in CONV_LAYERS],
        extractor_conv_bias=False,
        encoder_embed_dim=32,
        encoder_projection_dropout=0.1,
        encoder_pos_conv_kernel=16,
        encoder_pos_conv_groups=4,
        encoder_num_layers=3,
        encoder_num_heads=4,
        encoder_attention_dropout=0.1,
        encoder_ff_interm_features=64,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.1,
        encoder_layer_norm_first=layer_norm_first,
        encoder_layer_drop=0.05,
        mask_prob=0.8,
        **MASKS,
        mask_channel_prob=0.0,
        **CHANNEL_MASKS,
        skip_masked=False,
        skip_nomask=False,
        num_classes=CLASSES,
        final_dim=16,
        feature_grad_mult=0.1,
    )


def our_config(layer_norm_first: bool) -> HubertConfig:
    encoder = TransformerConfig(
        num_layers=3, dim=32, feedforward_dim=64, num_heads=4, conv_pos_kernel=16, conv_pos_groups=4, layer_norm_first=layer_norm_first
    )
    return HubertConfig(
        frontend=WaveformConfig(
            channels=24, norm="layer" if layer_norm_first else "group", normalize_audio=False, gradient_scale=0.1
        ),  # torchaudio leaves the normalisation of audio to its caller
        encoder=encoder,
        head=HeadConfig(num_classes=(CLASSES,), similarity="cosine", code_dim=16),
    )


def pair(layer_norm_first: bool) -> tuple[HubertModel, nn.Module]:
    theirs = torchaudio_model(layer_norm_first).eval()
    for name, parameter in theirs.named_parameters():  # norms and biases away from one and zero, and weights of visible size
        if "norm" in name or "bias" in name:
            nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.2)
        elif "layers" in name:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    ours = HubertModel(our_config(layer_norm_first)).eval()
    import_state_dict(ours, theirs.state_dict(), "torchaudio")
    return ours, theirs


def hide(theirs: nn.Module, mask: Tensor) -> None:
    """Make torchaudio's model use `mask` in place of one that it draws."""
    embedding = theirs.mask_generator.mask_embedding
    theirs.mask_generator.forward = lambda x, padding_mask: (torch.where(mask.unsqueeze(-1), embedding, x), mask)


def example(samples: int, num_classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    """Two utterances, labels, and a mask over two spans of each."""
    generator = torch.Generator().manual_seed(samples)
    audio = 0.3 * torch.randn(2, samples, generator=generator) + 0.02
    frames = (samples - 400) // 320 + 1
    labels = torch.randint(num_classes, (2, frames), generator=generator)
    mask = torch.zeros(2, frames, dtype=torch.bool)
    mask[0, 2:9] = mask[0, 12:15] = mask[1, 4:11] = True
    return audio, labels, mask


def check_forward(agreement, ours: HubertModel, theirs: nn.Module, audio: Tensor, labels: Tensor, mask: Tensor) -> None:
    """Encoder output within 1e-4; logits; loss within 1e-5 and feature penalty within 1e-5, relative."""
    hide(theirs, mask)
    their_frames: list[Tensor] = []
    hook = theirs.wav2vec2.encoder.transformer.register_forward_hook(lambda *call: their_frames.append(call[2]))
    logits, _, penalty = theirs(audio, labels)
    hook.remove()

    frames = ours.encode(audio, mask=mask).output.frames
    agreement.absolute("torchaudio HuBERT: encoder output", frames, their_frames[0], 1e-4)
    our_logits = ours.heads[0](frames[mask])
    of_label = F.one_hot(labels[mask], our_logits.shape[1]).bool()
    torch.testing.assert_close(our_logits[of_label], logits[:, 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(our_logits[~of_label], logits[:, 1:][~of_label], rtol=0, atol=1e-4)

    output = ours(PretrainBatch(audio, (labels,)), mask)
    num_masked = int(mask.sum())
    expected = F.cross_entropy(logits, torch.zeros(num_masked, dtype=torch.long), reduction="sum")
    assert output.num_targets.item() == num_masked
    torch.testing.assert_close(output.metrics["feature_penalty"], penalty.detach() * num_masked, rtol=1e-5, atol=0)
    agreement.relative("torchaudio HuBERT: masked loss", output.loss - 10.0 * output.metrics["feature_penalty"], expected, 1e-5)


@pytest.mark.parametrize("layer_norm_first", [False, True])
def test_output_logits_loss_and_penalty_equal_torchaudios(agreement, layer_norm_first: bool) -> None:
    ours, theirs = pair(layer_norm_first)
    with torch.no_grad():
        check_forward(agreement, ours, theirs, *example(6400))


@pytest.mark.parametrize("layer_norm_first", [False, True])
def test_every_gradient_equals_torchaudios(layer_norm_first: bool) -> None:
    ours, theirs = pair(layer_norm_first)
    audio, labels, mask = example(6400)
    hide(theirs, mask)
    logits, _, penalty = theirs(audio, labels)
    their_loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="sum") + 10.0 * penalty * len(logits)
    their_loss.backward()
    ours(PretrainBatch(audio, (labels,)), mask).loss.backward()

    expected = HubertModel(ours.config)  # a model whose parameters are torchaudio's gradients
    import_state_dict(expected, {name: parameter.grad for name, parameter in theirs.named_parameters()}, "torchaudio")
    for (name, parameter), value in zip(ours.named_parameters(), expected.parameters(), strict=True):
        assert (parameter.grad - value).norm() <= 1e-4 * value.norm() + 1e-5, name
        assert value.norm() > 0, name


def test_a_padded_batch_has_torchaudios_output_and_loss_on_the_valid_frames() -> None:
    # Large's shape only: in Base's, torchaudio's statistics of the first normalisation include padding, ours do not
    ours, theirs = pair(layer_norm_first=True)
    audio, labels, mask = example(9600)
    audio[1, 7000:] = 0.0
    audio_lens = torch.tensor([9600, 7000])
    frame_lens = ours.frontend.num_frames(audio_lens)
    hide(theirs, mask)
    labels[1, frame_lens[1] :] = -1
    with torch.no_grad():
        logits, _, _ = theirs(audio, labels.clamp(min=0), audio_lens)
        output = ours(PretrainBatch(audio, (labels,), audio_lens), mask)
    expected = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="sum")
    torch.testing.assert_close(output.metrics["loss_masked"], expected, rtol=1e-5, atol=0)


def test_the_published_base_size_equals_torchaudios(agreement) -> None:
    theirs = hubert_pretrain_base(num_classes=100).eval().requires_grad_(False)
    config = HubertConfig.hubert_base()
    with torch.device("meta"):
        ours = HubertModel(replace(config, head=replace(config.head, num_classes=(100,))))
    ours = ours.to_empty(device="cpu").eval().requires_grad_(False)  # every value is imported
    report = import_state_dict(ours, theirs.state_dict(), "torchaudio")
    assert not report.missing and not report.left_over
    with torch.no_grad():
        check_forward(agreement, ours, theirs, *example(8000, num_classes=100))
