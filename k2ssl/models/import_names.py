"""Names of parameters in other projects' checkpoints, translated into ours.

Each source is a list of rules, a regular expression and our name for what it matches. A name that no rule matches is unknown. Two kinds
of name need more than another spelling: where queries, keys and values are apart, each becomes a third of our fused matrix (`Place.part`);
and where all label sets share one head, it is to be divided among our heads (`heads.*`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Literal, NamedTuple, get_args

from torch import Tensor

Source = Literal["icefall", "fairseq", "torchaudio", "huggingface"]
SOURCES: tuple[Source, ...] = get_args(Source)

PARTS = ("q", "k", "v")  # in the order in which `FusedSelfAttention.qkv` holds them


class Place(NamedTuple):
    """Where a source's tensor belongs.

    Attributes:
        key: our name in a `HubertModel`; `heads.*.` stands for all its heads together.
        part: "q", "k" or "v" if the tensor is that third of ours, else "".
    """

    key: str
    part: str = ""


_Rules = tuple[tuple[str, str], ...]

_PAIR = r"(weight|bias)"

# fairseq's names, which icefall's SSL recipe took over for everything but the Zipformer
_HUBERT_FRAME: _Rules = (
    (r"mask_emb", r"mask_embedding"),
    (rf"feature_extractor\.conv_layers\.(\d+)\.0\.{_PAIR}", r"frontend.layers.\1.conv.\2"),
    (rf"feature_extractor\.conv_layers\.(\d+)\.2\.(?:1\.)?{_PAIR}", r"frontend.layers.\1.norm.\2"),  # 2.1: layer_norm mode
    (rf"layer_norm\.{_PAIR}", r"feature_norm.\1"),
    (rf"post_extract_proj\.{_PAIR}", r"projection.\1"),
    (rf"final_proj\.{_PAIR}", r"heads.*.projection.\1"),
    (r"label_embs_concat", r"heads.*.codes"),
)

_STACK = r"(?:encoder\.)?encoders\.(\d+)\."  # without the first "encoder." in the state dictionary of an encoder alone
_ZIPFORMER_LAYER = rf"{_STACK}(?:encoder\.)?layers\.(\d+)\."  # the second one belongs to upstream's wrapper around reduced frame rates
_ZIPFORMER_MODULES: _Rules = (
    (r"self_attn_weights\.(.+)", r"attention_weights.\3"),
    (r"self_attn([12])\.(.+)", r"self_attention\3.\4"),
    (r"nonlin_attention\.(.+)", r"nonlinear_attention.\3"),
    (r"feed_forward([123])\.(.+)", r"feedforward\3.\4"),
    (r"conv_module([12])\.depthwise_conv\.(.+)", r"convolution\3.depthwise.\4"),
    (rf"conv_module([12])\.(in_proj|out_proj)\.{_PAIR}", r"convolution\3.\4.\5"),
    (r"(bypass|bypass_mid)\.bypass_scale", r"\3.scale"),
    (r"norm\.(log_scale|bias)", r"norm.\3"),
)
_ZIPFORMER: _Rules = (
    *((_ZIPFORMER_LAYER + theirs, r"encoder.stacks.\1.layers.\2." + ours) for theirs, ours in _ZIPFORMER_MODULES),
    (rf"{_STACK}downsample\.bias", r"encoder.stacks.\1.downsample.bias"),
    (rf"{_STACK}out_combiner\.bypass_scale", r"encoder.stacks.\1.out_bypass.scale"),
)


def _transformer(encoder: str, position: str, attention: str, attention_norm: str, up: str, down: str) -> _Rules:
    """HuBERT's Transformer; `encoder` is a regular expression, the others are names as they stand."""
    layer = rf"{encoder}layers\.(\d+)\."
    gain = r"(?:weight_g|parametrizations\.weight\.original0)"  # torch's two spellings of a normalised weight
    direction = r"(?:weight_v|parametrizations\.weight\.original1)"
    return (
        (rf"{encoder}{re.escape(position)}\.{gain}", r"encoder.position.conv.parametrizations.weight.original0"),
        (rf"{encoder}{re.escape(position)}\.{direction}", r"encoder.position.conv.parametrizations.weight.original1"),
        (rf"{encoder}{re.escape(position)}\.bias", r"encoder.position.conv.bias"),
        (rf"{encoder}layer_norm\.{_PAIR}", r"encoder.norm.\1"),
        (rf"{layer}{attention}\.(?P<part>[qkv])_proj\.{_PAIR}", r"encoder.layers.\1.attention.qkv.\3"),
        (rf"{layer}{attention}\.out_proj\.{_PAIR}", r"encoder.layers.\1.attention.out.\2"),
        (rf"{layer}{attention_norm}\.{_PAIR}", r"encoder.layers.\1.attention_norm.\2"),
        (rf"{layer}{re.escape(up)}\.{_PAIR}", r"encoder.layers.\1.feedforward.up.\2"),
        (rf"{layer}{re.escape(down)}\.{_PAIR}", r"encoder.layers.\1.feedforward.down.\2"),
        (rf"{layer}final_layer_norm\.{_PAIR}", r"encoder.layers.\1.final_norm.\2"),
    )


def _frontend(projection: str) -> _Rules:
    """Frontend and projection as torchaudio and Hugging Face call them; `projection` is a regular expression."""
    return (
        (rf"feature_extractor\.conv_layers\.(\d+)\.conv\.{_PAIR}", r"frontend.layers.\1.conv.\2"),
        (rf"feature_extractor\.conv_layers\.(\d+)\.layer_norm\.{_PAIR}", r"frontend.layers.\1.norm.\2"),
        (rf"{projection}layer_norm\.{_PAIR}", r"feature_norm.\1"),
        (rf"{projection}projection\.{_PAIR}", r"projection.\1"),
    )


_DENSE = ("feed_forward.intermediate_dense", "feed_forward.output_dense")
_FAIRSEQ = _transformer(r"encoder\.", "pos_conv.0", "self_attn", "self_attn_layer_norm", "fc1", "fc2")
_TORCHAUDIO = _transformer(r"encoder\.transformer\.", "pos_conv_embed.conv", "attention", "layer_norm", *_DENSE)
_HUGGINGFACE = _transformer(r"encoder\.", "pos_conv_embed.conv", "attention", "layer_norm", *_DENSE)

_RULES: dict[Source, _Rules] = {
    "icefall": _HUBERT_FRAME + _ZIPFORMER,
    "fairseq": _HUBERT_FRAME + _FAIRSEQ,
    "torchaudio": (
        *_frontend(r"encoder\.feature_projection\."),
        *_TORCHAUDIO,
        (r"mask_generator\.mask_embedding", r"mask_embedding"),
        (rf"logit_generator\.final_proj\.{_PAIR}", r"heads.*.projection.\1"),
        (r"logit_generator\.label_embeddings", r"heads.*.codes"),
    ),
    "huggingface": (*_frontend(r"feature_projection\."), *_HUGGINGFACE, (r"masked_spec_embed", r"mask_embedding")),
}

# Parameters that their own model never uses: learnt nothing, needed nowhere.
_DEAD: dict[Source, tuple[str, ...]] = {
    "icefall": (_ZIPFORMER_LAYER + r"bypass_scale", r"(?:encoder\.)?downsample_output\.bias"),
    "fairseq": (),
    "torchaudio": (),
    "huggingface": (),
}

# What models built around the pre-trained one, and trainers around those, put before every name.
_TRAINER_PREFIX = r"(?:(?:module|model)\.)?"
_MODEL_PREFIX: dict[Source, str] = {
    "icefall": "",
    "fairseq": r"(?:(?:w2v_encoder\.)?w2v_model\.)?",
    "torchaudio": r"(?:wav2vec2\.)?",
    "huggingface": r"(?:hubert\.)?",
}


@cache
def _compiled(source: Source) -> tuple[tuple[re.Pattern[str], str], ...]:
    prefix = _TRAINER_PREFIX + _MODEL_PREFIX[source]
    return tuple((re.compile(prefix + theirs), ours) for theirs, ours in _RULES[source])


@cache
def _compiled_dead(source: Source) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(_TRAINER_PREFIX + _MODEL_PREFIX[source] + theirs) for theirs in _DEAD[source])


def translate(key: str, source: Source) -> Place | None:
    """Where `key` of a state dictionary of `source` belongs, or None if no rule knows it."""
    for pattern, ours in _compiled(source):
        if match := pattern.fullmatch(key):
            return Place(match.expand(ours), match.groupdict().get("part", ""))
    return None


def is_dead(key: str, source: Source) -> bool:
    """Whether `key` names a parameter that `source` itself never uses."""
    return any(pattern.fullmatch(key) for pattern in _compiled_dead(source))


def count_known(keys: Iterable[str], source: Source) -> int:
    """How many of `keys` are names of `source`."""
    return sum(translate(key, source) is not None or is_dead(key, source) for key in keys)


def guess_source(state: Mapping[str, Tensor]) -> Source:
    """The source that knows most of the names; the first of `SOURCES` where several know equally many.

    Raises:
        ValueError: no source knows any of them.
    """
    known = {source: count_known(state, source) for source in SOURCES}
    best = max(SOURCES, key=lambda source: known[source])
    if known[best] == 0:
        raise ValueError(f"none of the {len(state)} names in the state dictionary is known from {', '.join(SOURCES)}: {looks_like(state)}")
    return best


def looks_like(keys: Iterable[str]) -> str:
    """A few of the names, for messages."""
    names = list(keys)
    return f"they look like {', '.join(names[:4])}" + (", ..." if len(names) > 4 else "") if names else "there are none"
