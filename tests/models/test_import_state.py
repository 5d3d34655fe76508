from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchaudio.models import hubert_base, wav2vec2_model
from torchaudio.models.wav2vec2.utils import import_fairseq

from k2ssl.batch import PretrainBatch
from k2ssl.models.frontend import WaveformConfig
from k2ssl.models.hubert import HubertConfig, HubertModel
from k2ssl.models.import_names import SOURCES, Source, guess_source
from k2ssl.models.import_state import ImportReport, fit_config, import_state_dict
from k2ssl.models.prediction_head import HeadConfig
from k2ssl.models.transformer import TransformerConfig, TransformerEncoder
from k2ssl.models.zipformer import Zipformer, ZipformerConfig

GOLDEN = Path(__file__).parents[1] / "golden"
CONV_LAYERS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
State = dict[str, Tensor]


def weights_of(arrays: State) -> State:
    """The recorded weights under the names that they had."""
    return {key.removeprefix("state."): value for key, value in arrays.items() if key.startswith("state.")}


def shapes(name: str) -> State:
    """A recorded list of names and shapes as tensors without values."""
    return {key: torch.empty(shape, device="meta") for key, shape in json.loads((GOLDEN / f"{name}.json").read_text()).items()}


def on_meta(config: HubertConfig) -> HubertModel:
    with torch.device("meta"):
        return HubertModel(config)


def values_of(model: nn.Module) -> State:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


class FairseqModel(nn.Module):
    """Modules nested and numbered as in fairseq's HuBERT, so that torch itself gives the parameters fairseq's names."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        encoder, head, frontend = config.encoder, config.head, config.frontend
        assert isinstance(encoder, TransformerConfig) and isinstance(frontend, WaveformConfig)
        self.mask_emb = nn.Parameter(torch.rand(encoder.dim))
        self.label_embs_concat = nn.Parameter(torch.rand(sum(head.num_classes), head.code_dim))
        self.feature_extractor = nn.Module()
        self.feature_extractor.conv_layers = nn.ModuleList()
        for i, (kernel, stride) in enumerate(frontend.layers):
            conv = nn.Conv1d(frontend.channels if i else 1, frontend.channels, kernel, stride, bias=frontend.bias)
            norm: list[nn.Module] = []
            if frontend.norm == "layer":  # transpose, normalise, transpose
                norm = [nn.Sequential(nn.Identity(), nn.LayerNorm(frontend.channels), nn.Identity())]
            elif i == 0:
                norm = [nn.GroupNorm(frontend.channels, frontend.channels)]
            self.feature_extractor.conv_layers.append(nn.Sequential(conv, nn.Dropout(0.0), *norm, nn.GELU()))
        self.layer_norm = nn.LayerNorm(frontend.channels)
        self.post_extract_proj = nn.Linear(frontend.channels, encoder.dim)
        self.encoder = nn.Module()
        conv = nn.Conv1d(encoder.dim, encoder.dim, encoder.conv_pos_kernel, groups=encoder.conv_pos_groups)
        direction = conv.weight.data
        del conv.weight  # weight normalisation's older names, in fairseq's time the only ones
        conv.weight_g = nn.Parameter(torch.rand(1, 1, encoder.conv_pos_kernel) + 0.5)
        conv.weight_v = nn.Parameter(direction)
        self.encoder.pos_conv = nn.Sequential(conv, nn.Identity(), nn.GELU())
        self.encoder.layers = nn.ModuleList()
        for _ in range(encoder.num_layers):
            layer = nn.Module()
            layer.self_attn = nn.Module()
            for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
                layer.self_attn.add_module(name, nn.Linear(encoder.dim, encoder.dim))
            layer.self_attn_layer_norm = nn.LayerNorm(encoder.dim)
            layer.fc1 = nn.Linear(encoder.dim, encoder.feedforward_dim)
            layer.fc2 = nn.Linear(encoder.feedforward_dim, encoder.dim)
            layer.final_layer_norm = nn.LayerNorm(encoder.dim)
            self.encoder.layers.append(layer)
        self.encoder.layer_norm = nn.LayerNorm(encoder.dim)
        self.final_proj = nn.Linear(encoder.dim, head.code_dim * len(head.num_classes))


def small_config(layer_norm_first: bool = False, num_classes: tuple[int, ...] = (20,)) -> HubertConfig:
    """HuBERT with the sizes of the recorded Hugging Face models."""
    return HubertConfig(
        frontend=WaveformConfig(channels=16, norm="layer" if layer_norm_first else "group", normalize_audio=False),
        encoder=replace(TransformerConfig.tiny(), layer_norm_first=layer_norm_first),
        head=HeadConfig(num_classes=num_classes, similarity="cosine", code_dim=8),
    )


def fairseq_state(config: HubertConfig) -> State:
    model = FairseqModel(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.2)
    return {key: value.detach() for key, value in model.state_dict().items()}


# --- names and values


@pytest.mark.parametrize(("size", "num_parameters"), [("base", 94_697_600), ("large", 316_609_408)])
def test_fairseqs_published_sizes_load_with_nothing_missing_and_nothing_left_over(size: str, num_parameters: int) -> None:
    config = {"base": HubertConfig.hubert_base, "large": HubertConfig.hubert_large}[size]()
    with torch.device("meta"):
        state = FairseqModel(config).state_dict()
    assert sum(value.numel() for value in state.values()) == num_parameters
    assert guess_source(state) == "fairseq"
    report = import_state_dict(on_meta(config), state, "fairseq")
    assert report.missing == report.left_over == report.dead == ()


def test_the_recorded_upstream_model_gives_its_recorded_loss(golden: Callable[[str], State], recorded_encoder: ZipformerConfig) -> None:
    arrays = golden("hubert_ce")
    state = weights_of(arrays)
    classes = state["final_proj.weight"].shape[0]
    config = HubertConfig(frontend=WaveformConfig(channels=16), encoder=recorded_encoder, head=HeadConfig(num_classes=(classes,)))
    model = HubertModel(config).eval()
    report = import_state_dict(model, state, "icefall")
    assert len(report.dead) == 5
    with torch.no_grad():
        output = model(PretrainBatch(arrays["wav"], (arrays["labels"],)), arrays["mask"])
    torch.testing.assert_close(output.loss, arrays["loss"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_state_of_an_encoder_alone_fits_an_encoder_alone(
    wrapped: bool, golden: Callable[[str], State], recorded_encoder: ZipformerConfig
) -> None:
    arrays = golden("zipformer")
    state = {f"encoder.{key}" if wrapped else key: value for key, value in weights_of(arrays).items()}
    encoder = Zipformer(recorded_encoder).eval()
    import_state_dict(encoder, state, "icefall")
    with torch.no_grad():
        frames = encoder(arrays["x"].transpose(0, 1)).frames
    torch.testing.assert_close(frames.transpose(0, 1), arrays["y"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("older_names", [False, True])
@pytest.mark.parametrize(("norm", "layer_norm_first"), [("group", False), ("layer", True)])
def test_the_recorded_hugging_face_models_give_their_recorded_frames(
    norm: str, layer_norm_first: bool, older_names: bool, golden: Callable[[str], State]
) -> None:
    arrays = golden(f"huggingface_hubert_{norm}")  # recorded with transformers 5.23: random weights, evaluation mode
    state = weights_of(arrays)
    if older_names:  # of weight normalisation, and of a fine-tuned model
        spelling = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        for key in list(state):
            prefix, _, name = key.partition("conv.param")
            older = prefix + "conv." + spelling["param" + name] if name else key
            state["hubert." + older] = state.pop(key)
    model = HubertModel(small_config(layer_norm_first)).eval()
    import_state_dict(model, state, "huggingface", allow_missing=("heads.",))
    with torch.no_grad():
        output = model.encode(arrays["audio"], return_hidden=True).output
        torch.testing.assert_close(output.frames, arrays["frames"], rtol=0, atol=1e-4)
        torch.testing.assert_close(output.hidden[0], arrays["hidden_1"], rtol=0, atol=1e-4)
        if norm == "layer":  # with "group" their statistics include padding
            padded = model.encode(arrays["audio"], arrays["audio_lens"])
            valid = ~padded.padding_mask
            torch.testing.assert_close(padded.output.frames[valid], arrays["frames_padded"][valid], rtol=0, atol=1e-4)
            assert valid.sum() < valid.numel()


@pytest.mark.parametrize("layer_norm_first", [False, True])
def test_fairseqs_names_lead_to_the_same_frames_by_torchaudios_own_translation(layer_norm_first: bool) -> None:
    config = small_config(layer_norm_first)
    state = fairseq_state(config)
    ours = HubertModel(config).eval()
    import_state_dict(ours, state, "fairseq")
    theirs = wav2vec2_model(
        extractor_mode="layer_norm" if layer_norm_first else "group_norm",
        extractor_conv_layer_config=[(16, kernel, stride) for kernel, stride in CONV_LAYERS],
        extractor_conv_bias=False,
        encoder_embed_dim=32,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=16,
        encoder_pos_conv_groups=4,
        encoder_num_layers=2,
        encoder_num_heads=4,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=64,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=layer_norm_first,
        encoder_layer_drop=0.0,
        aux_num_out=None,
    ).eval()
    differences = theirs.load_state_dict(import_fairseq._convert_state_dict(state), strict=False)
    assert not differences.missing_keys and differences.unexpected_keys == ["label_embs_concat"]
    audio = 0.3 * torch.randn(2, 6400)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(audio).output.frames, theirs(audio)[0], rtol=0, atol=1e-4)
    assert torch.equal(ours.mask_embedding, state["mask_emb"])
    assert torch.equal(ours.heads[0].codes, state["label_embs_concat"])
    assert torch.equal(ours.heads[0].projection.weight, state["final_proj.weight"])


def test_queries_keys_and_values_lie_in_this_order() -> None:
    state = fairseq_state(small_config())
    model = HubertModel(small_config())
    import_state_dict(model, state, "fairseq")
    for kind in ("weight", "bias"):
        fused = model.state_dict()[f"encoder.layers.1.attention.qkv.{kind}"]
        parts = [state[f"encoder.layers.1.self_attn.{part}_proj.{kind}"] for part in "qkv"]
        assert torch.equal(fused, torch.cat(parts))


def test_one_matrix_for_all_label_sets_is_divided_among_the_heads(
    golden: Callable[[str], State], recorded_encoder: ZipformerConfig
) -> None:
    state = weights_of(golden("hubert_ce"))
    total = state["final_proj.weight"].shape[0]
    frontend = WaveformConfig(channels=16)
    config = HubertConfig(frontend=frontend, encoder=recorded_encoder, head=HeadConfig(num_classes=(10, 7, total - 17)))
    model = HubertModel(config)
    report = import_state_dict(model, state, "icefall")
    assert [len(head.projection.weight) for head in model.heads] == [10, 7, total - 17]
    assert torch.equal(torch.cat([head.projection.weight for head in model.heads]), state["final_proj.weight"])
    assert torch.equal(torch.cat([head.projection.bias for head in model.heads]), state["final_proj.bias"])
    assert ("final_proj.weight", "heads.2.projection.weight") in report.matched


def test_fairseqs_projection_is_divided_among_label_sets_or_shared_by_them() -> None:
    config = small_config(num_classes=(20, 12))
    state = fairseq_state(config)
    model = HubertModel(config)
    import_state_dict(model, state, "fairseq")
    assert torch.equal(torch.cat([head.codes for head in model.heads]), state["label_embs_concat"])
    assert torch.equal(model.heads[1].projection.weight, state["final_proj.weight"][8:])
    tied = {**state, "final_proj.weight": state["final_proj.weight"][:8], "final_proj.bias": state["final_proj.bias"][:8]}
    import_state_dict(model, tied, "fairseq")
    assert all(torch.equal(head.projection.weight, tied["final_proj.weight"]) for head in model.heads)


@pytest.mark.parametrize("prefix", ["module.", "model.", "w2v_encoder.w2v_model.", "model.w2v_model."])
def test_names_inside_trainers_and_fine_tuned_models_are_understood(prefix: str) -> None:
    state = fairseq_state(small_config())
    plain, wrapped = HubertModel(small_config()), HubertModel(small_config())
    import_state_dict(plain, state, "fairseq")
    import_state_dict(wrapped, {prefix + key: value for key, value in state.items()}, "fairseq")
    assert same(values_of(plain), values_of(wrapped))


def test_half_precision_weights_become_the_models_type() -> None:
    state = {key: value.half() for key, value in fairseq_state(small_config()).items()}
    model = HubertModel(small_config())
    import_state_dict(model, state, "fairseq")
    assert model.mask_embedding.dtype == torch.float32
    assert torch.equal(model.mask_embedding, state["mask_emb"].float())
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- the account, and refusals


def test_the_report_names_everything() -> None:
    state = fairseq_state(small_config())
    del state["layer_norm.bias"], state["encoder.layers.0.self_attn.q_proj.weight"]
    state["proj.weight"] = torch.zeros(3)
    report = import_state_dict(HubertModel(small_config()), state, "fairseq", strict=False)
    assert set(report.missing) == {"feature_norm.bias", "encoder.layers.0.attention.qkv.weight"}
    unused = {f"encoder.layers.0.self_attn.{part}_proj.weight" for part in "kv"}  # without queries they make no whole
    assert set(report.left_over) == {"proj.weight", *unused}
    assert {theirs for theirs, _ in report.matched} == set(state) - set(report.left_over)
    text = str(report)
    assert all(name in text for pair in report.matched for name in pair)
    assert all(f"\n  {name}\n" in text for name in report.missing + report.left_over)


def test_the_summary_of_a_report_can_be_shortened() -> None:
    report = ImportReport((("a", "b"), ("c", "b")), ("m0", "m1", "m2"), (), ("d",))
    assert report.summary(2).splitlines() == [
        "matched: 2 tensors of the source, 1 of ours",
        "missing, ours that got nothing: 3",
        "  m0",
        "  m1",
        "  ... and 1 more",
        "left over, the source's that were not used: 0",
        "dead, the source's that it never uses itself: 1",
        "  d",
    ]
    assert "m2" in report.summary()


def without(key: str) -> Callable[[State], None]:
    return lambda state: state.__delitem__(key)


def with_tensor(key: str, value: object) -> Callable[[State], None]:
    return lambda state: state.update({key: value})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("mask_emb"), r"missing .*: 1\n  mask_embedding$"),
        (with_tensor("lm_head.weight", torch.zeros(2)), r"left over .*: 1\n  lm_head.weight$"),
        (with_tensor("mask_emb", torch.zeros(31)), r"mask_emb has shape \(31,\), not the \(32,\) of mask_embedding"),
        (with_tensor("mask_emb", torch.zeros(32, dtype=torch.int8)), r"mask_emb has type torch.int8"),
        (with_tensor("mask_emb", torch.zeros(32, device="meta")), r"mask_emb is on the meta device"),
        (with_tensor("module.mask_emb", torch.zeros(32)), r"mask_emb and module.mask_emb are both for mask_embedding"),
        (with_tensor("step", 7), r"tensors only; it has step \(int\)"),
        (with_tensor("label_embs_concat", torch.zeros(21, 8)), r"label_embs_concat has shape \(21, 8\), not the \(20, 8\) of heads"),
        (
            with_tensor("encoder.layers.0.self_attn.k_proj.weight", torch.zeros(30, 32)),
            r"k_proj.weight has shape \(30, 32\), not the \(32, 32\) of encoder.layers.0.attention.qkv.weight",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(change: Callable[[State], None], message: str) -> None:
    state = fairseq_state(small_config())
    change(state)
    model = HubertModel(small_config())
    before = values_of(model)
    with pytest.raises(ValueError, match=message):
        import_state_dict(model, state, "fairseq")
    assert same(before, values_of(model))


def test_all_wrong_shapes_are_listed_even_when_not_strict() -> None:
    state = fairseq_state(small_config())
    model = HubertModel(replace(small_config(), encoder=replace(TransformerConfig.tiny(), feedforward_dim=48)))
    before = values_of(model)
    with pytest.raises(ValueError) as caught:
        import_state_dict(model, state, "fairseq", strict=False)
    assert str(caught.value).count("has shape") == 2 * 3  # per layer both matrices, and the bias of the first
    assert same(before, values_of(model))


def test_what_is_allowed_to_be_missing_or_left_over_is_reported_only() -> None:
    state = fairseq_state(small_config())
    head = {"label_embs_concat", "final_proj.weight", "final_proj.bias"}
    tuned = {key: value for key, value in state.items() if key not in head} | {"proj.weight": torch.zeros(3)}
    model = HubertModel(small_config())
    with pytest.raises(ValueError, match="allow_missing"):
        import_state_dict(model, tuned, "fairseq", allow_left_over=("proj.",))
    with pytest.raises(ValueError, match="allow_left_over"):
        import_state_dict(model, tuned, "fairseq", allow_missing=("heads.",))
    for wrong in ({"allow_missing": "heads."}, {"allow_left_over": "proj."}, {"allow_missing": [""]}):
        with pytest.raises(ValueError, match="a list of beginnings of names is needed"):
            import_state_dict(model, tuned, "fairseq", **wrong)
    report = import_state_dict(model, tuned, "fairseq", allow_missing=("heads.",), allow_left_over=("proj.",))
    assert len(report.missing) == 3 and report.left_over == ("proj.weight",)


def test_wrong_sources_and_foreign_states_are_refused_with_advice() -> None:
    state = fairseq_state(small_config())
    model = HubertModel(small_config())
    with pytest.raises(ValueError, match="source is 'espnet', allowed are icefall"):
        import_state_dict(model, state, "espnet")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is empty"):
        import_state_dict(model, {}, "fairseq")
    with pytest.raises(ValueError, match=r"none of the 1 names .* they look like conv1.weight"):
        import_state_dict(model, {"conv1.weight": torch.zeros(1)}, "fairseq", strict=False)
    with pytest.raises(ValueError, match="is the source fairseq"):
        import_state_dict(model, state, "torchaudio")
    with pytest.raises(ValueError, match="is the source fairseq"):
        import_state_dict(model, state, "torchaudio", strict=False)
    encoder = TransformerEncoder(TransformerConfig.tiny())
    with pytest.raises(ValueError, match="belongs in this model"):
        import_state_dict(encoder, {"mask_emb": torch.zeros(32)}, "fairseq", strict=False)


def test_a_transformers_state_in_a_zipformer_is_refused_with_all_that_differs() -> None:
    model = HubertModel(replace(small_config(), encoder=ZipformerConfig.tiny()))
    with pytest.raises(ValueError) as caught:
        import_state_dict(model, fairseq_state(small_config()), "fairseq")
    message = str(caught.value)
    assert "mask_emb has shape (32,), not the (48,) of mask_embedding" in message
    assert "\n  encoder.stacks.0.layers.0." in message and "\n  encoder.pos_conv.0.weight_g\n" in message
    assert "\n  mask_embedding\n" not in message  # named once, not among the missing again


def test_every_source_is_told_by_its_names(golden: Callable[[str], State]) -> None:
    with torch.device("meta"):
        torchaudio_state = hubert_base().state_dict()
    states: dict[Source, State] = {
        "icefall": weights_of(golden("zipformer")),
        "fairseq": fairseq_state(small_config()),
        "torchaudio": torchaudio_state,
        "huggingface": {f"hubert.{key}": value for key, value in shapes("huggingface_keys_base").items()},
    }
    assert tuple(states) == SOURCES
    for source, state in states.items():
        assert guess_source(state) == source
    with pytest.raises(ValueError, match="none of the 1 names"):
        guess_source({"fc.weight": torch.zeros(1)})


def test_a_state_tells_its_head_and_its_frontends_kind() -> None:
    found = fit_config(HubertConfig.zipformer_large(), shapes("upstream_keys_base"), "icefall")
    assert found.head == HeadConfig() and found.frontend == replace(HubertConfig.zipformer_large().frontend, norm="group")
    source_config = replace(small_config(), frontend=WaveformConfig(channels=16, norm="layer", bias=True))
    state = fairseq_state(source_config)
    found = fit_config(HubertConfig.zipformer_base(), state, "fairseq")
    assert found.head == HeadConfig(num_classes=(20,), similarity="cosine", code_dim=8)
    assert isinstance(found.frontend, WaveformConfig) and (found.frontend.norm, found.frontend.bias) == ("layer", True)
    sets = replace(HubertConfig.hubert_base(), head=HeadConfig(num_classes=(8, 12), similarity="cosine"))
    assert fit_config(sets, state, "fairseq").head.num_classes == (8, 12)
    headless = shapes("huggingface_keys_base")
    assert fit_config(sets, headless, "huggingface") == sets
